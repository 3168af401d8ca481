"""The diagnosis of a node: every device's drivers and verdict, every engine's cause, and what was wasted.

Pure and single-threaded: it is shown what the devices read and what the account says, once a second or so, and keeps
totals. Each device's time is cut into spans without gaps, so that joules by driver and by verdict add up to the joules
of the device.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from operator import attrgetter
from typing import NamedTuple, Protocol

from jouletrace.diagnosis.causes import (
    DeviceCondition,
    EngineDiagnosis,
    EngineWindow,
    diagnose_engine,
    difference,
    steps_tell_all,
)
from jouletrace.diagnosis.drivers import Decomposition, Driver, Refinement, clock_ratio, decompose, model_of
from jouletrace.diagnosis.reference import Measurement, Reference, shipped
from jouletrace.diagnosis.signals import LEAST_SPAN_NS, SILENT_NS, DeviceSignals, align, next_span
from jouletrace.diagnosis.step_energy import StepEnergy, StepLaw
from jouletrace.diagnosis.verdicts import (
    HW_THERMAL_BIT,
    POWER_BRAKE_BIT,
    SW_THERMAL_BIT,
    Flag,
    Hysteresis,
    Judgement,
    Verdict,
)
from jouletrace.diagnosis.waste import DeviceUse, EngineDemand, Waste, WasteCause
from jouletrace.energy.baseline import IdleKind
from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.readings import ActivityReading, DeviceInfo, HealthReading, StateReading, ThrottleReason
from jouletrace.requests.account import EngineState, EngineTotals, LedgerSnapshot
from jouletrace.requests.law import LawBook
from jouletrace.requests.roofline import ModelDescription

S = 1_000_000_000
ENGINE_WINDOW_NS = 30 * S
"""What an engine's cause looks back on: ML.ENERGY's own steady windows are 20 s and longer."""
LONGEST_WINDOW_NS = 600 * S
"""And at most, where only requests tell what was made: agents' and reasoning requests take minutes."""
REQUEST_TIMES = 5
"""So many mean request times of activity make such a window: what began before it and what did not end in it, one
request time each, then weigh little."""
PAST_NS = 10 * S
"""How far apart looks are kept that are older than the window: a sixtieth of the longest one."""
FINDING_NS = 300 * S
"""A finding whose window ended so long before the newest span is of another time: the engine's account stands still
(a feed that lags holds it open for minutes, not hours)."""
SPAN_NS = 1 * S
"""How long the spans are that are judged one by one, however seldom the diagnosis is evaluated."""
MOST_SPANS = 30
"""What lies further back in one evaluation is judged as one: activity is only kept for half a minute."""
CAUSE_NS = 5 * S
"""How often an engine's cause is looked for: a sixth of the window that it rests on."""
RECENT_SPANS = 90
"""Spans of a device of which it is kept what the power went to: over a minute, for a live monitor that is opened."""
GONE_NS = 3600 * S
"""A device that has been gone for so long will not come back: its totals go."""
CONDITIONS_NS = LONGEST_WINDOW_NS + 120 * S
"""How long a device's conditions are kept: for the longest window of an engine whose account lags."""
STATE_FRESH_NS = 60 * S
"""What an engine said of its queue counts this long; idle engines report no steps."""
REFINE_NS = 60 * S
"""How often a device's own coefficients are fitted: they have a half-life of an hour."""
HINDRANCES: Mapping[ThrottleReason, int] = {
    ThrottleReason.THERMAL: SW_THERMAL_BIT | HW_THERMAL_BIT,
    ThrottleReason.SW_THERMAL: SW_THERMAL_BIT,
    ThrottleReason.HW_THERMAL: HW_THERMAL_BIT,
    ThrottleReason.HW_POWER_BRAKE: POWER_BRAKE_BIT,
}
"""What holds clocks down and can be mended, with its event reasons. The power limit is not among them: a busy H200 runs
at it."""


class WatchedDevice(Protocol):
    """What the diagnosis is shown of a device."""

    @property
    def uuid(self) -> str:
        """Its UUID."""

    @property
    def info(self) -> DeviceInfo:
        """What does not change."""

    @property
    def timeline(self) -> Timeline:
        """Its energy."""

    @property
    def held(self) -> bool | None:
        """Whether a process holds a context."""

    @property
    def readings(self) -> Sequence[ActivityReading]:
        """GPM intervals of the last half minute, oldest first."""

    @property
    def states(self) -> Sequence[StateReading]:
        """Clocks and throttle state of the last half minute, oldest first."""

    @property
    def health(self) -> HealthReading | None:
        """Processes, limit, and the throttle reasons that take long to read."""

    @property
    def idle_watts(self) -> Mapping[str, float]:
        """Learnt idle levels by kind."""


@dataclass(frozen=True, slots=True)
class DriverSpan:
    """What the power of a device went to, watts by driver, over a span."""

    start_ns: int
    end_ns: int
    watts: Mapping[Driver, float]


@dataclass(frozen=True, slots=True)
class DeviceFinding:
    """What is said of a device: of its newest span, and totals since the process began."""

    uuid: str
    gpu: int
    start_ns: int
    end_ns: int
    since_ns: int
    """When the verdict began."""
    judgement: Judgement
    watts: float | None
    driver_watts: Mapping[Driver, float]
    """Of the newest span."""
    driver_confidence: float
    driver_joules: Mapping[Driver, float]
    """Totals; they add up to the energy of the device."""
    recent: tuple[DriverSpan, ...]
    """The newest spans whose energy is known, oldest first."""
    booked_ns: int
    """Up to here time and energy are booked by verdict: a few spans behind while a change may be under way."""
    verdict_seconds: Mapping[Verdict, float]
    verdict_joules: Mapping[Verdict, float]
    flag_seconds: Mapping[Flag, float]


@dataclass(frozen=True, slots=True)
class EngineFinding:
    """What is said of an engine."""

    diagnosis: EngineDiagnosis
    law: StepLaw
    models: tuple[str, ...]
    devices: tuple[str, ...]
    start_ns: int
    end_ns: int
    """The window that it rests on."""
    reference: Measurement | None
    """The same model, measured by others on another GPU."""


@dataclass(frozen=True, slots=True)
class DiagnosisSnapshot:
    """The diagnosis at one moment."""

    devices: tuple[DeviceFinding, ...] = ()
    engines: Mapping[str, EngineFinding] = field(default_factory=dict)
    """By engine id."""
    wasted_joules: Mapping[tuple[str, WasteCause], float] = field(default_factory=dict)
    """By uuid and cause; totals since the process began."""


class NodeDiagnosis:
    """See the module. `descriptions` are the models whose shape the operator gave, by name."""

    def __init__(
        self,
        laws: LawBook,
        descriptions: Mapping[str, ModelDescription],
        *,
        parked_after_seconds: float,
        reference: Reference | None = None,
    ) -> None:
        self._laws = laws
        self._descriptions = descriptions
        self._reference = shipped() if reference is None else reference
        self._devices: dict[str, _Device] = {}
        self._engines: dict[str, _Engine] = {}
        self._waste = Waste(parked_after_seconds)

    def use_laws(self, laws: LawBook, descriptions: Mapping[str, ModelDescription]) -> None:
        """Take other laws and descriptions from the next observation on; may be called from any thread."""
        self._laws, self._descriptions = laws, descriptions

    def observe(self, devices: Sequence[WatchedDevice], account: LedgerSnapshot) -> None:
        """Take in what the devices have read and what the account says by now."""
        uses = []
        for device in devices:
            known = self._devices.get(device.uuid)
            if known is None:
                known = self._devices[device.uuid] = _Device(device)
            uses.append(known.observe(device))
        for gone in self._engines.keys() - account.engine_totals.keys():
            del self._engines[gone]
        for engine_id, totals in account.engine_totals.items():
            self._observe_engine(engine_id, totals, account)
        self._forget({device.uuid for device in devices})
        demands = [self._demand(engine_id, account) for engine_id in self._engines]
        for together in zip_longest(*uses):
            self._waste.add([use for use in together if use is not None], demands)

    def _forget(self, present: set[str]) -> None:
        """Leave out what is known of devices that are gone, and findings of engines whose account stands still.

        A lost device's totals stay for as long as it may come back.
        """
        newest_ns = max((one.end_ns for one in self._devices.values()), default=0)
        for gone in self._devices.keys() - present:
            if self._devices[gone].leave():
                self._waste.forget(gone)
            if self._devices[gone].end_ns < newest_ns - GONE_NS:
                del self._devices[gone]
        for engine in self._engines.values():
            if engine.finding is not None and engine.finding.end_ns < newest_ns - FINDING_NS:
                engine.finding = None

    def snapshot(self) -> DiagnosisSnapshot:
        """Return the diagnosis as it stands, frozen."""
        return DiagnosisSnapshot(
            devices=tuple(one.finding for one in self._devices.values() if one.finding is not None),
            engines={
                engine_id: engine.finding for engine_id, engine in self._engines.items() if engine.finding is not None
            },
            wasted_joules=self._waste.joules,
        )

    def _observe_engine(self, engine_id: str, totals: EngineTotals, account: LedgerSnapshot) -> None:
        engine = self._engines.get(engine_id)
        if engine is None:
            engine = self._engines[engine_id] = _Engine()
        if engine.looks and totals.settled_ns == engine.looks[-1][0].settled_ns:
            return
        models = account.engine_models.get(engine_id, ())
        uuids = account.engine_devices.get(engine_id, ())
        law = self._laws.law(engine_id, models)
        step_law = engine.energy.observe(totals, None if law is self._laws.default else law)
        state = account.engine_states.get(engine_id, EngineState())
        if state.t_ns < totals.settled_ns - STATE_FRESH_NS:
            state = EngineState(max_num_seqs=state.max_num_seqs)
        engine.look(totals, state)
        if len(engine.looks) < 2 or (engine.finding and totals.settled_ns - engine.finding.end_ns < CAUSE_NS):
            return
        before = engine.window_start()
        start_ns, end_ns = before[0].settled_ns, totals.settled_ns
        described = next((self._descriptions[model] for model in models if model in self._descriptions), None)
        known = [
            replace(
                self._devices[uuid].condition(start_ns, end_ns),
                engines=sum(uuid in held for held in account.engine_devices.values()),
            )
            for uuid in uuids
            if uuid in self._devices
        ]
        window = EngineWindow.between(engine_id, before, (totals, state), devices=known, model=described)
        found = diagnose_engine(window, step_law)
        engine.finding = EngineFinding(
            diagnosis=found,
            law=step_law,
            models=models,
            devices=uuids,
            start_ns=start_ns,
            end_ns=end_ns,
            reference=self._measured_elsewhere(found, models, len(uuids)),
        )

    def _measured_elsewhere(self, found: EngineDiagnosis, models: Sequence[str], devices: int) -> Measurement | None:
        batch = found.batch
        if found.unit != "token" or batch is None:
            return None
        answers = (self._reference.measurement(model, batch, devices=max(devices, 1)) for model in models)
        return next((one for one in answers if one is not None), None)

    def _demand(self, engine_id: str, account: LedgerSnapshot) -> EngineDemand:
        engine = self._engines[engine_id]
        totals, state = engine.looks[-1]
        # A request may begin and end between two evaluations.
        worked = len(engine.looks) > 1 and totals.active_seconds > engine.looks[-2][0].active_seconds
        return EngineDemand(
            devices=account.engine_devices.get(engine_id, ()),
            active=worked or account.in_flight.get(engine_id, 0) > 0,
            waiting=state.waiting,
            diagnosis=None if engine.finding is None else engine.finding.diagnosis,
        )


class _Engine:
    """What is remembered of an engine."""

    def __init__(self) -> None:
        self.energy = StepEnergy()
        self.looks: deque[_Look] = deque()
        """Those of the usual window, the newest last,"""
        self._past: deque[_Look] = deque()
        """and, further apart, those of the longest one before it."""
        self.finding: EngineFinding | None = None

    def look(self, totals: EngineTotals, state: EngineState) -> None:
        """Remember a look."""
        looks, past, now_ns = self.looks, self._past, totals.settled_ns
        if looks and now_ns < looks[-1][0].settled_ns:
            looks.clear()
            past.clear()
        looks.append((totals, state))
        while len(looks) > 2 and looks[1][0].settled_ns <= now_ns - ENGINE_WINDOW_NS:
            left = looks.popleft()
            if not past or left[0].settled_ns - past[-1][0].settled_ns >= PAST_NS:
                past.append(left)
        while past and past[0][0].settled_ns < now_ns - LONGEST_WINDOW_NS:
            past.popleft()

    def window_start(self) -> "_Look":
        """Return the look at which the window begins that ends with the newest one.

        Steps, and engines that count for themselves, tell at once what was made; requests only when they end, so that
        a window must hold several of them.
        """
        usual, (totals, _) = self.looks[0], self.looks[-1]
        work = difference(usual[0], totals)
        if not self._past or work is None or work.active_seconds == 0 or steps_tell_all(work):
            return usual
        oldest = self._past[0][0]
        ended = totals.ended_requests - oldest.ended_requests
        if ended <= 0:
            return usual if totals.output_tokens > oldest.output_tokens else self._past[0]
        needed = REQUEST_TIMES * (totals.sequence_seconds - oldest.sequence_seconds) / ended
        if work.active_seconds >= needed:
            return usual
        at = bisect_right(self._past, totals.active_seconds - needed, key=lambda look: look[0].active_seconds)
        return self._past[max(at - 1, 0)]


_Look = tuple[EngineTotals, EngineState]
_END = attrgetter("end_ns")


class _Conditions(NamedTuple):
    """A device's conditions, summed up over time from the first span to the one that ends at `end_ns`.

    Each value is a sum of value times seconds, beside it the seconds for which it was known.
    """

    end_ns: int
    underutilized: float = 0.0
    underutilized_seconds: float = 0.0
    power: float = 0.0
    power_seconds: float = 0.0
    throttled: float = 0.0
    throttled_seconds: float = 0.0


class _Device:
    """What is remembered of a device."""

    def __init__(self, device: WatchedDevice) -> None:
        self.finding: DeviceFinding | None = None
        self.end_ns = device.timeline.start_ns
        """Up to here it is diagnosed."""
        self._is_present = True
        self._hysteresis = Hysteresis()
        model = model_of(device.info.name, device.info.board_limit_watts)
        self._refinement = Refinement(model)
        self._usual_bare_watts = None if model.generic else model.coefficients.idle_watts[IdleKind.BARE]
        """What other devices of the model draw when nobody holds them: one that an engine has held ever since this
        process first saw it shows no bare level of its own."""
        self._refined_ns = 0
        self._since_ns = self._booked_ns = self.end_ns
        self._verdict: Verdict | None = None
        self._unbooked: list[DeviceSignals] = []
        """Spans whose verdict is not confirmed yet."""
        self._driver_joules = dict.fromkeys(Driver, 0.0)
        self._recent: deque[DriverSpan] = deque(maxlen=RECENT_SPANS)
        self._verdict_seconds = dict.fromkeys(Verdict, 0.0)
        self._verdict_joules = dict.fromkeys(Verdict, 0.0)
        self._flag_seconds = dict.fromkeys(Flag, 0.0)
        self._uuid = device.uuid
        self._idle_watts: Mapping[str, float] = {}
        self._sums = [_Conditions(self.end_ns)]

    def leave(self) -> bool:
        """Note that the device is not there; return whether that is news."""
        was_present, self._is_present = self._is_present, False
        return was_present

    def observe(self, device: WatchedDevice) -> Sequence[DeviceUse]:
        """Diagnose the time since the last span; return how the device was used in the time whose verdict stands."""
        self._is_present = True
        self._idle_watts = device.idle_watts
        timeline = device.timeline
        # What the timeline has forgotten nobody can diagnose.
        after_ns = max(self.end_ns, timeline.start_ns)
        # Older ones end no span: not looking at half a minute of them each second is a tenth of what this costs.
        oldest_ns = min(after_ns, timeline.end_ns - SILENT_NS)
        fresh = device.readings[bisect_right(device.readings, oldest_ns, key=_END) :]
        whole = next_span(after_ns, timeline.end_ns, fresh)
        if whole is None:
            return ()
        uses: list[DeviceUse] = []
        signals = None
        for start_ns, end_ns in _spans(*whole, fresh):
            signals = align(
                start_ns,
                end_ns,
                info=device.info,
                timeline=timeline,
                readings=_known(device.readings, end_ns) if end_ns < whole[1] else device.readings,
                states=device.states,
                healths=() if device.health is None else (device.health,),
                held=device.held,
                idle_watts=device.idle_watts,
            )
            judgement = self._hysteresis.update(signals)
            found = self._decompose(signals)
            for flag in judgement.flags:
                self._flag_seconds[flag] += signals.seconds
            self._unbooked.append(signals)
            if judgement.confirmed:
                uses += [self._book(one, judgement.verdict) for one in self._unbooked]
                self._unbooked.clear()
            if judgement.verdict is not self._verdict:
                self._verdict, self._since_ns = judgement.verdict, start_ns
        if signals is None:
            return ()
        self.end_ns = signals.end_ns
        self.finding = DeviceFinding(
            uuid=device.uuid,
            gpu=device.info.gpu,
            start_ns=signals.start_ns,
            end_ns=signals.end_ns,
            since_ns=self._since_ns,
            judgement=judgement,
            watts=signals.watts,
            driver_watts=_watts(found, signals),
            driver_confidence=found.confidence,
            driver_joules=dict(self._driver_joules),
            recent=tuple(self._recent),
            booked_ns=self._booked_ns,
            verdict_seconds=dict(self._verdict_seconds),
            verdict_joules=dict(self._verdict_joules),
            flag_seconds=dict(self._flag_seconds),
        )
        return uses

    def _decompose(self, signals: DeviceSignals) -> Decomposition:
        """Add the span to the drivers' joules, and learn from it."""
        refinement = self._refinement
        found = decompose(signals, refinement.coefficients, refinement.confidence)
        refinement.observe(signals)
        if signals.end_ns - self._refined_ns > REFINE_NS:
            self._refined_ns = signals.end_ns
            refinement.solve()
        for driver, joules in found.joules.items():
            self._driver_joules[driver] += joules
        if found.joules:
            self._recent.append(DriverSpan(signals.start_ns, signals.end_ns, _watts(found, signals)))
        return found

    def _book(self, signals: DeviceSignals, verdict: Verdict) -> DeviceUse:
        """Add a span to the totals of the verdict that holds for it; return how the device was used in it."""
        seconds = signals.seconds
        self._booked_ns = signals.end_ns
        self._verdict_seconds[verdict] += seconds
        self._verdict_joules[verdict] += signals.energy_joules or 0.0
        limit, watts = signals.power_limit_watts, signals.watts
        throttled = _hindered(signals)
        underutilized = verdict is Verdict.UNDERUTILIZED
        power = watts / limit if watts is not None and limit else None
        sums = self._sums[-1]
        self._sums.append(
            _Conditions(
                signals.end_ns,
                sums.underutilized + underutilized * seconds,
                sums.underutilized_seconds + seconds,
                sums.power if power is None else sums.power + power * seconds,
                sums.power_seconds if power is None else sums.power_seconds + seconds,
                sums.throttled if throttled is None else sums.throttled + throttled * seconds,
                sums.throttled_seconds if throttled is None else sums.throttled_seconds + seconds,
            )
        )
        if self._sums[0].end_ns < signals.end_ns - 2 * CONDITIONS_NS:
            del self._sums[: len(self._sums) // 2]
        return DeviceUse(
            uuid=self._uuid,
            start_ns=signals.start_ns,
            end_ns=signals.end_ns,
            energy_joules=signals.energy_joules,
            parked=verdict is Verdict.PARKED,
            underutilized=underutilized,
            active_ratio=signals.active_ratio,
            parked_watts=signals.idle_watts.get(IdleKind.PARKED),
            bare_watts=signals.idle_watts.get(IdleKind.BARE, self._usual_bare_watts),
            throttled_ratio=throttled,
            clock_ratio=None if signals.sm_clock_hertz is None else clock_ratio(signals),
        )

    def condition(self, start_ns: int, end_ns: int) -> DeviceCondition:
        """Return what was found of the spans that end in (start_ns, end_ns], weighted by time; unknown without any."""
        sums = self._sums
        first, last = (bisect_right(sums, at_ns, key=_END) - 1 for at_ns in (start_ns, end_ns))
        bare, parked = self._idle_watts.get(IdleKind.BARE), self._idle_watts.get(IdleKind.PARKED)
        if last <= max(first, 0):
            return DeviceCondition(self._uuid, bare_watts=bare, parked_watts=parked)
        before, after = sums[max(first, 0)], sums[last]

        def mean(value: float, seconds: float) -> float | None:
            return value / seconds if seconds > 0 else None

        underutilized = mean(
            after.underutilized - before.underutilized, after.underutilized_seconds - before.underutilized_seconds
        )
        return DeviceCondition(
            uuid=self._uuid,
            underutilized=None if underutilized is None else underutilized > 0.5,
            power_ratio=mean(after.power - before.power, after.power_seconds - before.power_seconds),
            throttled_ratio=mean(
                after.throttled - before.throttled, after.throttled_seconds - before.throttled_seconds
            ),
            bare_watts=bare,
            parked_watts=parked,
        )


def _watts(found: Decomposition, signals: DeviceSignals) -> Mapping[Driver, float]:
    seconds = signals.seconds
    return {driver: joules / seconds for driver, joules in found.joules.items()}


def _known(readings: Sequence[ActivityReading], end_ns: int) -> Sequence[ActivityReading]:
    """Return the readings that were there at a time: a span that is judged late is judged by no more than in time."""
    return readings[: bisect_right(readings, end_ns, key=_END)]


def _spans(start_ns: int, end_ns: int, readings: Sequence[ActivityReading]) -> Iterator[tuple[int, int]]:
    """Yield (start_ns, end_ns] in spans of about `SPAN_NS`, cut where intervals of activity end.

    So verdicts do not depend on how much time an evaluation has to catch up with. What is left over behind a span is
    left for the next evaluation.
    """
    if end_ns - start_ns > MOST_SPANS * SPAN_NS:
        oldest_ns = end_ns - MOST_SPANS * SPAN_NS
        yield start_ns, oldest_ns
        start_ns = oldest_ns
    ends_ns = sorted({one.end_ns for one in readings if start_ns < one.end_ns <= end_ns})
    while (due_ns := start_ns + SPAN_NS) <= end_ns + LEAST_SPAN_NS // 2:
        # The interval's end that is nearest to a second later, if there is one near.
        at = bisect_left(ends_ns, due_ns - LEAST_SPAN_NS // 2)
        cut_ns = ends_ns[at] if at < len(ends_ns) and ends_ns[at] <= due_ns + LEAST_SPAN_NS else due_ns
        if cut_ns > end_ns:
            break
        yield start_ns, cut_ns
        start_ns = cut_ns


def _hindered(signals: DeviceSignals) -> float | None:
    """Return the part of the span for which heat or a brake held the clocks down; None when nobody can tell."""
    counted = {reason: ratio for reason, ratio in signals.throttled_ratio.items() if reason in HINDRANCES}
    if signals.event_reasons is None:
        return max(counted.values(), default=None)
    # Of those that take long to read, only the event reasons are as young as the span.
    uncounted = signals.event_reasons
    for reason in counted:
        uncounted &= ~HINDRANCES[reason]
    if any(uncounted & bits for bits in HINDRANCES.values()):
        return 1.0
    return max(counted.values(), default=0.0)
