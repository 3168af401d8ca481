"""Why an engine's joules per token are above their best: one cause, the numbers that it rests on, and advice.

Rests on J/token = idle + a/B + KV + decode + prefill: each part is measured energy, divided by the step-energy law.
Pure: a window of totals, the engine's own words and what the devices' diagnosis said go in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter, sub
from typing import Final

from jouletrace.diagnosis.step_energy import Known, StepLaw
from jouletrace.requests.account import EngineState, EngineTotals
from jouletrace.requests.law import PRIOR_ERROR
from jouletrace.requests.records import Unit
from jouletrace.requests.roofline import ModelDescription

FULL_KV: Final = 0.85
"""KV cache use above which memory limits the batch (ML.ENERGY benchmark, scripts/validate_results.py)."""
SATURATED: Final = 0.8
"""Running requests over max_num_seqs from which the engine counts as saturated (same source)."""
THROTTLED: Final = 0.05
"""Part of the window that the clocks were held down, from which that is the cause (ours)."""
LOW_POWER: Final = 0.45
"""Power over its limit under which a GPU with active requests waits for its host: eager decode draws 27 %, decode at
batch 1 draws 69 % (measured on an H200), the lowest dense H100 row of ML.ENERGY 57 %."""
MOSTLY: Final = 0.5
"""A part that is more than half of its whole is what matters most; the same for time with active requests."""
COMPLETE: Final = 0.9
"""Part of the active time that step records must cover for their counts to be all the tokens (ours)."""
GAIN: Final = 0.02
"""A figure under this part of what is spent now is no gain: the energy of a phase is known to 0.5 %, a law to a few."""
ROUNDING: Final = 1e-6
"""Totals are sums of floats over months: a step back by so little is no restart."""
CONFIDENCE: Final[Mapping[Known, float]] = {
    Known.FITTED: 0.95,
    Known.CALIBRATED: 0.9,
    Known.CONFIGURED: 0.7,
    Known.PRIOR: 0.4,
    Known.UNKNOWN: 0.0,
}
"""What a claim that rests on the law starts from (ours, a ranking rather than a probability)."""


class Cause(StrEnum):
    """Why a token costs what it costs; `docs/diagnosis-engines.md` has each one's rule."""

    NO_DEMAND = "no_demand"
    """Nothing is active, or idle energy is the largest part and nobody waits."""
    HOST_BOUND = "host_bound"
    """Requests are active and the GPU waits for something else."""
    SMALL_BATCH = "small_batch"
    """B < B*: most of a decode step's energy is there however many take part."""
    KV_CAPACITY = "kv_capacity"
    """Memory for the KV cache limits the batch."""
    LONG_CONTEXT = "long_context"
    """Reading contexts costs more than what a step costs anyway."""
    PREFILL_HEAVY = "prefill_heavy"
    """Prompts take most of the energy."""
    THROTTLED = "throttled"
    """The clocks are held down by heat or a brake."""
    HEALTHY = "healthy"
    """None of these: the batch is beyond B* and nothing is in its way."""
    UNKNOWN = "unknown"
    """The inputs are missing or contradict each other."""


class BatchLimit(StrEnum):
    """What keeps a batch small."""

    DEMAND = "demand"
    MAX_NUM_SEQS = "max_num_seqs"
    OTHER = "other"
    """Requests wait although there is room: the scheduler's other limits."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class DeviceCondition:
    """What the diagnosis of a device says about an engine's window; None is unknown."""

    uuid: str
    underutilized: bool | None = None
    """Active under half of the time."""
    power_ratio: float | None = None
    """Mean power over the power limit."""
    throttled_ratio: float | None = None
    """Part of the window that clocks were held down by heat or a brake; not by the power limit, which is normal under
    load (a busy H200 runs at it)."""
    bare_watts: float | None = None
    """The learnt level that stays while nobody holds the device."""
    parked_watts: float | None = None
    """The learnt level of the device held by processes that do nothing."""
    engines: int = 1
    """How many engines hold it: one that goes frees nothing of a device that others keep."""


@dataclass(frozen=True, slots=True)
class EngineWindow:
    """What an engine did between two looks at it. Tens of seconds give steady answers."""

    engine_id: str
    work: EngineTotals | None
    """Differences; None when they make no sense (the account began anew, or a value is not a number)."""
    seconds: float = 0.0
    state: EngineState = field(default_factory=EngineState)
    """At the window's end."""
    preemptions: float | None = None
    """In the window."""
    devices: Sequence[DeviceCondition] = ()
    model: ModelDescription | None = None
    """For the bytes of its weights and of its contexts."""

    @classmethod
    def between(
        cls,
        engine_id: str,
        before: tuple[EngineTotals, EngineState],
        after: tuple[EngineTotals, EngineState],
        *,
        devices: Sequence[DeviceCondition] = (),
        model: ModelDescription | None = None,
    ) -> "EngineWindow":
        """Return the window between two looks."""
        old, new = before[1].preemptions, after[1].preemptions
        preemptions = None if old is None or new is None else _number(new - old)
        return cls(
            engine_id=engine_id,
            work=difference(before[0], after[0]),
            seconds=(after[0].settled_ns - before[0].settled_ns) / 1e9,
            state=after[1],
            preemptions=preemptions,
            devices=devices,
            model=model,
        )


@dataclass(frozen=True, slots=True)
class EngineDiagnosis:
    """Why an engine's product costs what it costs. Joules are per `unit` where the name says so."""

    engine_id: str
    cause: Cause
    confidence: float
    """0 to 1; a ranking by how much is known, not a probability."""
    advice: str
    """One sentence."""
    unit: str = "token"
    """What the engine produces: `token` (output tokens), `input_token` (an engine that only prefills), or a
    request's unit (`image`, `frame`, ...)."""
    joules_per_unit: float | None = None
    units_per_joule: float | None = None
    """Throughput per watt."""
    decomposition: Mapping[str, float] = field(default_factory=dict)
    """Joules per unit by part, summing to `joules_per_unit`: `idle`, and `fixed`, `kv`, `decode`, `prefill`,
    `between_steps` (requests were active, no step ran) or, without a law, `busy`. Work that no request or step tells
    of is in none of them (evidence `unreported_watts`)."""
    batch: float | None = None
    """Mean decoding sequences per step, or mean active requests where no steps are reported."""
    half_fixed_batch: float | None = None
    """B* at the window's context length."""
    batch_limit: BatchLimit | None = None
    """With `small_batch`: what keeps it small."""
    reachable_joules_per_unit: float | None = None
    """What the advice would reach; None where the numbers do not support a figure."""
    reachable_batch: float | None = None
    saved_watts: float = 0.0
    """Power that the advice would save at the present throughput; 0 where no figure is supported."""
    evidence: Mapping[str, float | str] = field(default_factory=dict)


def difference(before: EngineTotals, after: EngineTotals) -> EngineTotals | None:
    """Return what was added between the two, or None.

    None when nothing was settled before, time stood still, a total fell or is not a number.
    """
    seconds = after.settled_ns - before.settled_ns
    values = list(map(sub, _totals(after), _totals(before)))
    if before.settled_ns <= 0 or seconds <= 0 or not math.isfinite(sum(values)) or min(values) < -ROUNDING:
        return None
    units = {unit: count - before.units.get(unit, 0.0) for unit, count in after.units.items()}
    if not all(0 <= count < math.inf for count in units.values()):
        return None
    unclaimed = after.unclaimed_joules - before.unclaimed_joules
    if not math.isfinite(unclaimed):
        return None
    made = {unit: count for unit, count in units.items() if count}
    if min(values) < 0:
        values = [max(value, 0.0) for value in values]
    # What was claimed of the time before the window belongs to products that are told in it.
    return EngineTotals(
        after.settled_ns, unclaimed_joules=unclaimed, units=made, **dict(zip(_TOTALS, values, strict=True))
    )


_TOTALS: Final = tuple(
    name for name in EngineTotals.__dataclass_fields__ if name not in ("settled_ns", "unclaimed_joules", "units")
)
_totals: Final = attrgetter(*_TOTALS)


def steps_tell_all(work: EngineTotals) -> bool:
    """Return whether step records cover the active time of a window, so that they count all of its tokens."""
    active_seconds = max(work.active_seconds, work.step_seconds)
    return work.steps > 0 and work.step_joules > 0 and work.step_seconds >= COMPLETE * active_seconds


def diagnose_engine(window: EngineWindow, law: StepLaw) -> EngineDiagnosis:
    """Return the cause of the window's joules per token; never raises, `unknown` when the inputs do not tell."""
    if window.work is None or not 0 < window.seconds < math.inf:
        return _unknown(window, "The engine's account begins in this window or makes no sense: wait for the next.")
    return _Case(window, window.work, law).diagnosis()


def _unknown(window: EngineWindow, advice: str) -> EngineDiagnosis:
    return EngineDiagnosis(window.engine_id, Cause.UNKNOWN, 0.0, advice)


def _number(value: float | None) -> float | None:
    """Return a finite number that is not negative, else None."""
    return value if value is not None and 0 <= value < math.inf else None


class _Case:
    """One window with everything that is derived from it once."""

    def __init__(self, window: EngineWindow, work: EngineTotals, law: StepLaw) -> None:
        self.window, self.work, self.law = window, work, law
        state = window.state
        self.running, self.waiting = _number(state.running), _number(state.waiting)
        self.kv_usage, self.limit = _number(state.kv_usage), _number(state.max_num_seqs) or None
        self.active_seconds = max(work.active_seconds, work.step_seconds)
        self.active_ratio = min(self.active_seconds / window.seconds, 1.0)
        self.trust = 1.0
        """Lowered by everything that is missing or odd."""
        if self.running == 0 and work.sequence_seconds >= MOSTLY * window.seconds:
            # A queue that says nobody runs beside requests that do: believe the requests.
            self.running, self.trust = None, 0.5
        self.has_steps = work.steps > 0 and work.step_joules > 0
        self.covered = work.step_seconds / self.active_seconds if self.active_seconds > 0 else 0.0
        self.by_steps = steps_tell_all(work)
        self.unit, self.units = self._product()
        self.measured = max(work.busy_joules - work.unclaimed_joules, 0.0)
        """The engine's own busy energy in the window's time,"""
        self.own = self.measured if self.by_steps or self.units <= 0 else work.made_joules
        """and that of what it made: requests that ended may have begun long before the window."""
        self.joules = self.own + work.idle_joules
        self.unreported_watts = max(work.unclaimed_joules, 0.0) / window.seconds
        self.batch = self._batch()
        self.context = work.step_kv_tokens / work.step_decode_sequences if work.step_decode_sequences > 0 else 0.0
        self.half = law.half_fixed_batch(self.context) if law.known is not Known.UNKNOWN else None
        self.parts = self._parts()

    def _product(self) -> tuple[str, float]:
        work = self.work
        counted = work.step_decode_sequences if self.by_steps else 0.0
        tokens = counted or work.output_tokens
        if tokens > 0:
            return ("token", tokens) if not work.units else ("mixed", 0.0)
        if len(work.units) == 1:
            ((unit, count),) = work.units.items()
            return Unit(unit).value, count
        if work.units:
            return "mixed", 0.0
        if work.step_decode_sequences == 0 and (work.step_prefill_tokens > 0 or work.input_tokens > 0):
            return "input_token", work.step_prefill_tokens if self.by_steps else work.input_tokens
        return "token", 0.0

    def _batch(self) -> float | None:
        work = self.work
        if self.has_steps:
            return work.step_decode_sequences / work.steps
        if work.active_seconds > 0 and work.sequence_seconds > 0:
            return work.sequence_seconds / work.active_seconds
        return None

    def _parts(self) -> dict[str, float]:
        """Return joules by part, summing to the window's."""
        work, law, idle = self.work, self.law, {"idle": self.work.idle_joules}
        if self.unit not in ("token", "input_token") or law.known is Known.UNKNOWN:
            return idle | {"busy": self.own}
        if self.has_steps:
            shares = {
                "fixed": law.fixed_joules * work.steps,
                "kv": law.kv_token_joules * work.step_kv_tokens,
                "decode": law.sequence_joules * work.step_decode_sequences,
                "prefill": law.prefill_token_joules * work.step_prefill_tokens,
            }
            stepped = min(work.step_joules, self.own) if self.by_steps else self.own
        else:
            # Without steps: as the split of requests had it, which shares the fixed part by energy.
            split = work.prefill_joules + work.decode_joules
            marginal = max(split - work.fixed_joules, 0.0)
            shares = {
                "fixed": work.fixed_joules,
                "kv": 0.0,
                "decode": marginal * work.decode_joules / split if split > 0 else 0.0,
                "prefill": marginal * work.prefill_joules / split if split > 0 else 0.0,
            }
            stepped = self.own
        total = sum(shares.values())
        if total <= 0:
            return idle | {"busy": self.own}
        scale = stepped / total
        parts = {name: share * scale for name, share in shares.items()}
        return idle | parts | {"between_steps": self.own - stepped}

    def part(self, name: str) -> float:
        """Return the joules of a part, 0 when it is not told apart."""
        return self.parts.get(name, 0.0)

    def percent(self, name: str) -> str:
        """Return a part's share of the busy joules, for a sentence."""
        return f"{100 * self.part(name) / self.own:.0f} %"

    def _levels(self, name: str) -> float | None:
        """Return the sum of a learnt level of the engine's devices; None where it is not known of one of them."""
        levels = [_number(getattr(one, name)) for one in self.window.devices]
        known = [level for level in levels if level is not None]
        return sum(known) if known and len(known) == len(levels) else None

    def diagnosis(self) -> EngineDiagnosis:
        """Return the first cause whose rule holds, in the order of `docs/diagnosis-engines.md`."""
        return self._nothing_active() or self._contradiction() or self._device_cause() or self._batch_cause()

    def _nothing_active(self) -> EngineDiagnosis | None:
        work = self.work
        produced = self.units > 0 or self.has_steps
        if self.active_ratio == 0 and not produced:
            if self.running or self.waiting:
                return self._answer(
                    Cause.UNKNOWN,
                    0.0,
                    f"The engine says that {self.running or 0:.0f} requests run and {self.waiting or 0:.0f} wait, but "
                    "none was reported: check its request and step feed.",
                )
            if work.unclaimed_joules > work.idle_joules:
                return self._answer(
                    Cause.UNKNOWN,
                    0.0,
                    f"Its GPUs used {self.unreported_watts:.0f} W for work that no request or step tells of: check the "
                    "engine's feed, and whether another process runs there.",
                )
            return self._without_request()
        idle, measured = self.part("idle"), self.measured + self.part("idle")
        # What works for somebody unknown is not idle.
        if (
            work.unclaimed_joules < idle > MOSTLY * measured > 0
            and self.joules > idle
            and self.units > 0
            and self.waiting in (0, None)
        ):
            return self._mostly_idle(idle)
        return None

    def _without_request(self) -> EngineDiagnosis:
        seconds = self.window.seconds
        watts = self.work.idle_joules / seconds
        bare, parked = self._levels("bare_watts"), self._levels("parked_watts")
        held = f"No request for {seconds:.0f} s while it holds {watts:.0f} W"
        # It may have held its devices for a part of the window only.
        freed = watts * max(1 - bare / parked, 0.0) if bare is not None and parked else 0.0
        shared = self._shared()
        if not watts:
            advice = f"No request for {seconds:.0f} s: nothing to do."
        elif shared:
            advice = f"{held} as its part of GPUs that it shares: only when all that share them go, power is freed."
        elif bare is None:
            advice = (
                f"{held}: scale this replica to zero or let other work share its GPUs. What that frees is not known, "
                "for its GPUs have not been seen without a process yet."
            )
        elif freed < 1:
            advice = f"{held}, which its GPUs draw without it, too: let other work share them."
        else:
            advice = (
                f"{held}: let other work share its GPUs, or scale this replica to zero, which frees {freed:.0f} W "
                f"({watts - freed:.0f} W stay while {self._the_gpus()} powered)."
            )
        freed = 0.0 if shared else freed
        return self._answer(Cause.NO_DEMAND, 0.9 if self.running == 0 else 0.6, advice, saved_watts=freed)

    def _mostly_idle(self, idle: float) -> EngineDiagnosis:
        left = None if self._shared() else self._levels("bare_watts")
        reach = None if left is None else self._reach(idle - left * self.window.seconds)
        claim = ""
        if reach is not None:
            claim = (
                f"; without the idle part, but with the {left:.0f} W that stay while {self._the_gpus()} powered, "
                f"{self._a_unit()} costs {reach:.3g} J instead of {self.joules / self.units:.3g} J"
            )
        return self._answer(
            Cause.NO_DEMAND,
            0.9 if self.waiting == 0 else 0.6,
            f"It is idle for most of its energy: consolidate onto fewer replicas{claim}.",
            reach=reach,
        )

    def _shared(self) -> bool:
        return any(one.engines > 1 for one in self.window.devices)

    def _left_watts(self) -> float | None:
        """Return what the devices draw at most when the engine is gone; None for not known, or nobody knows whose."""
        bare = self._levels("bare_watts")
        if self._shared():
            return None
        return self._levels("parked_watts") if bare is None else bare

    def _the_gpus(self) -> str:
        return "the GPUs are" if len(self.window.devices) > 1 else "the GPU is"

    def _reach(self, saved: float) -> float | None:
        """Return the joules per unit after a saving, None where that is no gain to speak of."""
        return (self.joules - saved) / self.units if saved >= GAIN * self.joules > 0 else None

    def _contradiction(self) -> EngineDiagnosis | None:
        work, seconds = self.work, self.window.seconds
        if self.unit == "mixed":
            return self._answer(
                Cause.UNKNOWN,
                0.0,
                "It made several kinds of product in this window, whose joules cannot be told apart: "
                "serve them by engines of their own.",
            )
        if self.units <= 0:
            told = (
                f"{work.ended_requests:.0f} requests ended in the last {seconds:.0f} s without telling what they made"
            )
            return self._answer(
                Cause.UNKNOWN,
                0.0,
                f"{told}: send step records, or requests with their usage."
                if work.ended_requests
                else f"No request ended in the last {seconds:.0f} s: what its products cost shows when one does, or "
                "at once with step records.",
            )
        if self.own <= 0:
            return self._answer(
                Cause.UNKNOWN,
                0.0,
                "No energy was measured for this engine: check that its GPUs are known (`gpu_uuids` or `pid`).",
            )
        if self.has_steps and work.step_decode_sequences == 0 and work.output_tokens > 0:
            return self._answer(
                Cause.UNKNOWN,
                0.0,
                "Its steps report a batch of 0 while tokens flow: check what its step records count as decoding.",
            )
        return None

    def _device_cause(self) -> EngineDiagnosis | None:
        devices = self.window.devices
        throttled = max((ratio for one in devices if (ratio := _number(one.throttled_ratio)) is not None), default=0.0)
        if throttled > THROTTLED:
            return self._answer(
                Cause.THROTTLED,
                0.9,
                f"Heat or a power brake held the clocks down for {100 * min(throttled, 1):.0f} % of the time: check "
                "cooling, airflow and power supply of the node.",
                evidence={"throttled_ratio": throttled},
            )
        judged = [one.underutilized for one in devices if one.underutilized is not None]
        powers = [ratio for one in devices if (ratio := _number(one.power_ratio)) is not None]
        if not judged or not powers:
            self.trust *= 0.9
            return None
        power = sum(powers) / len(powers)
        if all(judged) and power < LOW_POWER and self.active_ratio >= MOSTLY:
            return self._answer(
                Cause.HOST_BOUND,
                0.8,
                f"Requests were active {100 * self.active_ratio:.0f} % of the time but the GPU drew only "
                f"{100 * power:.0f} % of its limit: look for what it waits for (CPU, tokenizer, eager launches, data "
                "loading).",
                evidence={"power_ratio": power},
            )
        return None

    def _batch_cause(self) -> EngineDiagnosis:
        saturated = self.running is not None and self.limit is not None and self.running >= SATURATED * self.limit
        preempted = (self.window.preemptions or 0.0) > 0
        full = self.kv_usage is not None and self.kv_usage > FULL_KV and self.waiting != 0
        roomy = self.running is not None and self.limit is not None and not saturated
        # Without max_num_seqs (vLLM does not publish it) a queue before a full cache says the same.
        limits = full and (roomy or (self.limit is None and self.waiting))
        if preempted or (limits and not self._is_large()):
            return self._kv_capacity(preempted)
        if self.unit not in ("token", "input_token"):
            return self._answer(
                Cause.UNKNOWN,
                0.0,
                f"{self._a_unit().capitalize()} costs {self.joules / self.units:.3g} J; there is no law of what "
                "a batch of them should cost.",
            )
        kv_bytes, weight_bytes = self._bytes()
        if self.part("kv") > self.part("fixed") > 0 or kv_bytes > weight_bytes > 0:
            return self._long_context(kv_bytes, weight_bytes)
        if self.unit == "input_token":
            return self._only_prefill()
        if self.part("prefill") > MOSTLY * self.own:
            return self._prefill_heavy(f"Prompts take {self.percent('prefill')} of its busy energy")
        return self._judged_by_law(saturated)

    def _prefill_heavy(self, what: str) -> EngineDiagnosis:
        return self._answer(
            Cause.PREFILL_HEAVY,
            self._confidence(),
            f"{what}: share prefixes through the prefix cache and shorten prompts.",
        )

    def _only_prefill(self) -> EngineDiagnosis:
        """Answer for an engine whose product are the prompt tokens themselves: fewer of them are no saving."""
        if self.part("prefill") <= 0:
            return self._answer(
                Cause.UNKNOWN,
                0.0,
                f"It only prefills, and what a prompt token should cost is not known "
                f"({self.law.refusal or 'no step-energy law'}): {self._remedy()}.",
            )
        if self.part("fixed") > self.part("prefill"):
            return self._answer(
                Cause.SMALL_BATCH,
                self._confidence(),
                f"It only prefills, and {self.percent('fixed')} of its busy energy is what each step costs however "
                "many tokens it computes: send more prompts at a time.",
                limit=BatchLimit.DEMAND if self.waiting == 0 else BatchLimit.UNKNOWN,
            )
        return self._answer(
            Cause.HEALTHY,
            self._confidence(),
            f"It only prefills, and {self.percent('prefill')} of its busy energy goes into computing the prompts: "
            "nothing to do.",
        )

    def _remedy(self) -> str:
        first = "wait for more varied load" if self.has_steps else "send step records"
        return f"{first}, or give a law from `jouletrace calibrate`"

    def _is_large(self) -> bool:
        """Whether the batch is surely beyond the half-fixed one; a prior may be off by half."""
        if self.batch is None or self.half is None:
            return False
        sure = 1 - PRIOR_ERROR if self.law.known is Known.PRIOR else 1.0
        return self.batch * sure >= self.half

    def _bytes(self) -> tuple[float, float]:
        """Return the bytes of contexts and of weights that a step reads, 0 when not known."""
        model, work = self.window.model, self.work
        if model is None or work.steps <= 0:
            return 0.0, 0.0
        return model.kv_bytes_per_token * work.step_kv_tokens / work.steps, model.parameters * model.weight_bytes

    def _kv_capacity(self, preempted: bool) -> EngineDiagnosis:
        # A KV cache of half the bytes per token holds twice the sequences, if so many wait.
        target = None
        if self.batch is not None and self.running and self.waiting:
            target = self.batch * min(2.0, (self.running + self.waiting) / self.running)
        what = (
            "the KV cache preempts requests"
            if preempted
            else f"the KV cache is {100 * (self.kv_usage or 0):.0f} % full"
        )
        return self._with_batch(
            Cause.KV_CAPACITY,
            0.9 if preempted or (self.waiting and self.limit) else 0.6,
            f"Memory limits the batch ({what}): quantise the KV cache or the weights, shorten contexts, or give the "
            "engine more GPU memory",
            target,
        )

    def _long_context(self, kv_bytes: float, weight_bytes: float) -> EngineDiagnosis:
        reach = None
        if self.part("kv") > 0 and self.law.known in (Known.FITTED, Known.CALIBRATED):
            reach = self._reach(self.part("kv") / 2)
        claim = f", which would bring a token from {self.joules / self.units:.3g} to {reach:.3g} J" if reach else ""
        return self._answer(
            Cause.LONG_CONTEXT,
            self._confidence() if kv_bytes <= weight_bytes else max(self._confidence(), 0.7),
            "Reading long contexts costs more than reading the weights: keep the KV cache in 8 bits (half the bytes)"
            f"{claim}, or shorten contexts.",
            reach=reach,
            evidence={"kv_bytes_per_step": kv_bytes, "weight_bytes": weight_bytes} if kv_bytes else None,
        )

    def _judged_by_law(self, saturated: bool) -> EngineDiagnosis:
        batch, half, law = self.batch, self.half, self.law
        if not batch or half is None or (half > 0 and not self.part("fixed")):
            missing = law.refusal or "no step-energy law"
            return self._answer(Cause.UNKNOWN, 0.0, f"Its batch cannot be judged ({missing}): {self._remedy()}.")
        doubtful = law.known is Known.PRIOR
        # A prior may be off by half: it tells only what lies beyond that.
        if doubtful and (1 - PRIOR_ERROR) * half <= batch <= half / (1 - PRIOR_ERROR):
            return self._answer(
                Cause.UNKNOWN,
                0.0,
                f"Batch {batch:.3g} is near the estimated half-fixed batch {half:.3g}, which is not known well enough: "
                f"{self._remedy()}.",
            )
        margin = abs(math.log(batch / half)) if 0 < half < math.inf else 1.0
        confidence = self._confidence() * (0.5 + 0.5 * min(1.0, margin / (3 * (law.residual or 0.0) + 0.05)))
        if batch >= half:
            return self._answer(
                Cause.HEALTHY,
                confidence,
                f"At batch {batch:.3g} the part that every step costs anyway is the smaller one: nothing to do.",
            )
        if self.part("prefill") - self.part("fixed") > GAIN * self.own:
            return self._prefill_heavy(
                f"Prompts take {self.percent('prefill')} of its busy energy, more than the {self.percent('fixed')} "
                "that steps cost however many take part"
            )
        return self._small_batch(saturated, confidence, batch)

    def _small_batch(self, saturated: bool, confidence: float, batch: float) -> EngineDiagnosis:
        if self.waiting == 0:
            most = 2 * batch if self.limit is None else min(2 * batch, float(self.limit))
            return self._with_batch(
                Cause.SMALL_BATCH,
                confidence,
                "Nobody waits, so no limit is in the way: consolidate the load onto fewer replicas",
                most,
                BatchLimit.DEMAND,
                left_watts=self._left_watts(),
            )
        if self.waiting is None:
            return self._with_batch(
                Cause.SMALL_BATCH,
                0.8 * confidence,
                f"{self.percent('fixed')} of its busy energy is what steps cost however many take part, here "
                f"{batch:.3g} sequences; whether others wait is not known: report `waiting` to learn what limits the "
                "batch",
                None,
                BatchLimit.UNKNOWN,
            )
        if saturated:
            target = batch * (1 + self.waiting / self.running) if self.running else None
            if target is not None and self.kv_usage:
                target = min(target, batch * FULL_KV / self.kv_usage)
            return self._with_batch(
                Cause.SMALL_BATCH,
                confidence,
                f"{self.waiting:.0f} requests wait while max_num_seqs ({self.limit:.0f}) is reached: raise it",
                target,
                BatchLimit.MAX_NUM_SEQS,
            )
        if self.limit is None or self.running is None:
            return self._with_batch(
                Cause.SMALL_BATCH,
                0.8 * confidence,
                f"{self.waiting:.0f} requests wait while the batch is {batch:.3g}: report `running` and "
                "`max_num_seqs` to learn what limits it",
                None,
                BatchLimit.UNKNOWN,
            )
        return self._with_batch(
            Cause.SMALL_BATCH,
            0.8 * confidence,
            f"{self.waiting:.0f} requests wait although max_num_seqs and the KV cache have room: look at the "
            "scheduler's other limits (vLLM: max_num_batched_tokens)",
            None,
            BatchLimit.OTHER,
        )

    def _with_batch(
        self,
        cause: Cause,
        confidence: float,
        advice: str,
        target: float | None,
        limit: BatchLimit | None = None,
        *,
        left_watts: float | None = 0.0,
    ) -> EngineDiagnosis:
        """Answer with what `target`, or the largest batch that the law knows, would reach; both may be no gain.

        `left_watts` is what a replica's devices still draw when its load has gone to others; None for not known.
        """
        reach, batch, law = None, self.batch, self.law
        if left_watts is not None and target is not None and batch and self.parts.get("fixed") and self.units > 0:
            target = min(target, law.batch_high if law.batch_high is not None else 0.0)
            known = law.joules_per_token(batch) is not None and law.joules_per_token(target) is not None
            if target > batch and known and self.unit == "token":
                saved = self.part("fixed") - left_watts * self.window.seconds
                reach = self._reach(saved * (1 - batch / target))
        if reach is None:
            return self._answer(cause, confidence, f"{advice}.", limit=limit)
        return self._answer(
            cause,
            confidence,
            f"{advice}; at batch {target:.3g} instead of {batch:.3g} a token costs {reach:.3g} J instead of "
            f"{self.joules / self.units:.3g} J"
            f"{', with what the freed GPUs still draw' if left_watts else ''}.",
            reach=reach,
            reach_batch=target,
            limit=limit,
        )

    def _confidence(self) -> float:
        """Return what a claim is worth that rests on the law and the parts."""
        if not self.has_steps:
            # The parts are those of the requests' split, whose law is at most a calibrated one.
            known = min(CONFIDENCE[self.law.known], CONFIDENCE[Known.CALIBRATED]) * 0.7
        else:
            known = CONFIDENCE[self.law.known] * min(1.0, self.covered / COMPLETE)
        return known * (1.0 - min(self.law.residual or 0.0, 1.0))

    def _a_unit(self) -> str:
        name = self.unit.replace("_", " ")
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"

    def _answer(
        self,
        cause: Cause,
        confidence: float,
        advice: str,
        *,
        reach: float | None = None,
        reach_batch: float | None = None,
        limit: BatchLimit | None = None,
        saved_watts: float = 0.0,
        evidence: Mapping[str, float | str] | None = None,
    ) -> EngineDiagnosis:
        per_unit = self.joules / self.units if self.units > 0 and self.joules > 0 else None
        if reach is not None and per_unit is not None:
            saved_watts = (per_unit - reach) * self.units / self.window.seconds
        return EngineDiagnosis(
            engine_id=self.window.engine_id,
            cause=cause,
            confidence=min(max(confidence * self.trust, 0.0), 1.0),
            advice=advice,
            unit=self.unit,
            joules_per_unit=per_unit,
            units_per_joule=None if per_unit is None else 1.0 / per_unit,
            decomposition={} if per_unit is None else {name: one / self.units for name, one in self.parts.items()},
            batch=self.batch,
            half_fixed_batch=self.half if self.half is not None and self.half < math.inf else None,
            batch_limit=limit,
            reachable_joules_per_unit=reach,
            reachable_batch=reach_batch,
            saved_watts=saved_watts,
            evidence={**self._evidence(), **(evidence or {})},
        )

    def _evidence(self) -> dict[str, float | str]:
        """Return what is known of the numbers that causes rest on."""
        law = self.law
        found: dict[str, float | str | None] = {
            "window_seconds": self.window.seconds,
            "active_ratio": self.active_ratio,
            "units_per_second": self.units / self.window.seconds,
            "watts": (self.measured + self.work.idle_joules) / self.window.seconds,
            "unreported_watts": self.unreported_watts or None,
            "batch": self.batch,
            "running": self.running,
            "waiting": self.waiting,
            "max_num_seqs": self.limit,
            "kv_usage": self.kv_usage,
            "preemptions": self.window.preemptions,
            "steps_covered_ratio": self.covered,
            "law": law.known.value,
            "law_residual": law.residual,
            "law_refusal": law.refusal or None,
        }
        if law.known is not Known.UNKNOWN:
            found["step_fixed_joules"] = law.fixed_joules
            found["step_sequence_joules"] = law.marginal_joules(self.context)
        return {name: value for name, value in found.items() if value is not None}
