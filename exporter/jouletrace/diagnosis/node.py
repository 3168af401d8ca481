"""The diagnosis of a node: every device's drivers and verdict, every engine's cause, and what was wasted.

Pure and single-threaded: it is shown what the devices read and what the account says, once a second or so, and keeps
totals. Each device's time is cut into spans without gaps, so that joules by driver and by verdict add up to the joules
of the device.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from jouletrace.diagnosis.causes import DeviceCondition, EngineDiagnosis, EngineWindow, diagnose_engine
from jouletrace.diagnosis.drivers import Driver, Refinement, clock_ratio, decompose, model_of
from jouletrace.diagnosis.reference import Measurement, Reference, shipped
from jouletrace.diagnosis.signals import DeviceSignals, align, next_span
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
CAUSE_NS = 5 * S
"""How often an engine's cause is looked for: a sixth of the window that it rests on."""
CONDITIONS_NS = 120 * S
"""How long a device's conditions are kept for engines whose account lags."""
STATE_FRESH_NS = 60 * S
"""What an engine said of its queue counts this long; idle engines report no steps."""
REFINE_NS = 60 * S
"""How often a device's own coefficients are fitted: they have a half-life of an hour."""
HINDRANCES = (
    ThrottleReason.THERMAL,
    ThrottleReason.SW_THERMAL,
    ThrottleReason.HW_THERMAL,
    ThrottleReason.HW_POWER_BRAKE,
)
"""What holds clocks down and can be mended. The power limit is not among them: a busy H200 runs at it."""
HINDRANCE_BITS = SW_THERMAL_BIT | HW_THERMAL_BIT | POWER_BRAKE_BIT


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
            use = known.observe(device)
            if use is not None:
                uses.append(use)
        for gone in self._devices.keys() - {device.uuid for device in devices}:
            self._waste.forget(gone)
        for gone in self._engines.keys() - account.engine_totals.keys():
            del self._engines[gone]
        for engine_id, totals in account.engine_totals.items():
            self._observe_engine(engine_id, totals, account)
        self._waste.add(uses, [self._demand(engine_id, account) for engine_id in self._engines])

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
        before = engine.look(totals, state)
        if before is None or (engine.finding and totals.settled_ns - engine.finding.end_ns < CAUSE_NS):
            return
        start_ns, end_ns = before[0].settled_ns, totals.settled_ns
        described = next((self._descriptions[model] for model in models if model in self._descriptions), None)
        known = [self._devices[uuid].condition(start_ns, end_ns) for uuid in uuids if uuid in self._devices]
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
        self.looks: deque[tuple[EngineTotals, EngineState]] = deque()
        self.finding: EngineFinding | None = None

    def look(self, totals: EngineTotals, state: EngineState) -> tuple[EngineTotals, EngineState] | None:
        """Remember a look; return the one at the beginning of the window that ends with it."""
        looks = self.looks
        if looks and totals.settled_ns < looks[-1][0].settled_ns:
            looks.clear()
        looks.append((totals, state))
        while len(looks) > 2 and looks[1][0].settled_ns <= totals.settled_ns - ENGINE_WINDOW_NS:
            looks.popleft()
        return looks[0] if len(looks) > 1 else None


Weighted = tuple[float, float]
"""A sum of values times seconds, and of the seconds for which the value was known."""


class _Sums(NamedTuple):
    """A device's conditions, summed up from the first span to the one that ends at `end_ns`."""

    end_ns: int
    underutilized: Weighted = (0.0, 0.0)
    power: Weighted = (0.0, 0.0)
    throttled: Weighted = (0.0, 0.0)

    def plus(self, span: DeviceSignals, condition: DeviceCondition) -> "_Sums":
        """Return the sums with another span."""

        def add(old: Weighted, value: float | None) -> Weighted:
            return old if value is None else (old[0] + value * span.seconds, old[1] + span.seconds)

        return _Sums(
            span.end_ns,
            add(self.underutilized, condition.underutilized),
            add(self.power, condition.power_ratio),
            add(self.throttled, condition.throttled_ratio),
        )


class _Device:
    """What is remembered of a device."""

    def __init__(self, device: WatchedDevice) -> None:
        self.finding: DeviceFinding | None = None
        self._end_ns = device.timeline.start_ns
        self._hysteresis = Hysteresis()
        self._refinement = Refinement(model_of(device.info.name, device.info.power_limit_watts))
        self._refined_ns = 0
        self._since_ns = self._end_ns
        self._driver_joules = dict.fromkeys(Driver, 0.0)
        self._verdict_seconds = dict.fromkeys(Verdict, 0.0)
        self._verdict_joules = dict.fromkeys(Verdict, 0.0)
        self._flag_seconds = dict.fromkeys(Flag, 0.0)
        self._uuid = device.uuid
        self._sums = [_Sums(self._end_ns)]

    def observe(self, device: WatchedDevice) -> DeviceUse | None:
        """Diagnose the time since the last span; return how the device was used, None when nothing new is known."""
        timeline = device.timeline
        # What the timeline has forgotten nobody can diagnose.
        span = next_span(max(self._end_ns, timeline.start_ns), timeline.end_ns, device.readings)
        if span is None:
            return None
        self._end_ns = span[1]
        signals = align(
            *span,
            info=device.info,
            timeline=timeline,
            readings=device.readings,
            states=device.states,
            healths=() if device.health is None else (device.health,),
            held=device.held,
            idle_watts=device.idle_watts,
        )
        judgement = self._hysteresis.update(signals)
        self._book(device, signals, judgement)
        return self._use(device.uuid, signals, judgement)

    def _book(self, device: WatchedDevice, signals: DeviceSignals, judgement: Judgement) -> None:
        """Add the span to the totals and make the finding."""
        refinement = self._refinement
        found = decompose(signals, refinement.coefficients, refinement.confidence)
        refinement.observe(signals)
        if signals.end_ns - self._refined_ns > REFINE_NS:
            self._refined_ns = signals.end_ns
            refinement.solve()
        for driver, joules in found.joules.items():
            self._driver_joules[driver] += joules
        verdict = judgement.verdict
        self._verdict_seconds[verdict] += signals.seconds
        self._verdict_joules[verdict] += signals.energy_joules or 0.0
        for flag in judgement.flags:
            self._flag_seconds[flag] += signals.seconds
        if self.finding is not None and self.finding.judgement.verdict is not verdict:
            self._since_ns = signals.start_ns
        self.finding = DeviceFinding(
            uuid=device.uuid,
            gpu=device.info.gpu,
            start_ns=signals.start_ns,
            end_ns=signals.end_ns,
            since_ns=self._since_ns,
            judgement=judgement,
            watts=signals.watts,
            driver_watts={driver: joules / signals.seconds for driver, joules in found.joules.items()},
            driver_confidence=found.confidence,
            driver_joules=dict(self._driver_joules),
            verdict_seconds=dict(self._verdict_seconds),
            verdict_joules=dict(self._verdict_joules),
            flag_seconds=dict(self._flag_seconds),
        )

    def _use(self, uuid: str, signals: DeviceSignals, judgement: Judgement) -> DeviceUse:
        limit, watts = signals.power_limit_watts, signals.watts
        throttled = _hindered(signals)
        condition = DeviceCondition(
            uuid=uuid,
            underutilized=judgement.verdict is Verdict.UNDERUTILIZED,
            power_ratio=watts / limit if watts is not None and limit else None,
            throttled_ratio=throttled,
        )
        self._sums.append(self._sums[-1].plus(signals, condition))
        if self._sums[0].end_ns < signals.end_ns - 2 * CONDITIONS_NS:
            del self._sums[: len(self._sums) // 2]
        return DeviceUse(
            uuid=uuid,
            start_ns=signals.start_ns,
            end_ns=signals.end_ns,
            energy_joules=signals.energy_joules,
            parked=judgement.verdict is Verdict.PARKED,
            underutilized=condition.underutilized,
            active_ratio=signals.active_ratio,
            parked_watts=signals.idle_watts.get(IdleKind.PARKED),
            throttled_ratio=throttled,
            clock_ratio=None if signals.sm_clock_hertz is None else clock_ratio(signals),
        )

    def condition(self, start_ns: int, end_ns: int) -> DeviceCondition:
        """Return what was found of the spans that end in (start_ns, end_ns], weighted by time; unknown without any."""
        sums = self._sums
        first, last = (bisect_right(sums, at_ns, key=lambda one: one.end_ns) - 1 for at_ns in (start_ns, end_ns))
        if last <= max(first, 0):
            return DeviceCondition(self._uuid)
        before, after = sums[max(first, 0)], sums[last]

        def mean(name: str) -> float | None:
            (weighted, seconds), (less, earlier) = getattr(after, name), getattr(before, name)
            return (weighted - less) / (seconds - earlier) if seconds > earlier else None

        underutilized = mean("underutilized")
        return DeviceCondition(
            uuid=self._uuid,
            underutilized=None if underutilized is None else underutilized > 0.5,
            power_ratio=mean("power"),
            throttled_ratio=mean("throttled"),
        )


def _hindered(signals: DeviceSignals) -> float | None:
    """Return the part of the span for which heat or a brake held the clocks down; None when nobody can tell."""
    counted = [ratio for reason, ratio in signals.throttled_ratio.items() if reason in HINDRANCES]
    if counted:
        return max(counted)
    if signals.event_reasons is None:
        return None
    return 1.0 if signals.event_reasons & HINDRANCE_BITS else 0.0
