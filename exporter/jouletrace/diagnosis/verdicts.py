"""What limits a device: one verdict at a time, flags beside it, the evidence, and how far to trust it.

The verdict follows a roofline's question: while kernels run, which resource is the most loaded? GPM's ratios are
divided by the active part of the span for that ("intensity while active"); whether the device was active at all is
asked first. Thresholds lie in the middle of wide gaps between known loads, see `Thresholds`.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import msgspec

from jouletrace.diagnosis.signals import ActiveSource, DeviceSignals, merge, sound
from jouletrace.energy.baseline import QUIET_ACTIVITY, IdleKind
from jouletrace.gpu.readings import Link, Pipe, ThrottleReason


class Verdict(StrEnum):
    """What limits a device."""

    IDLE = "idle"
    """No process holds a context."""
    PARKED = "parked"
    """A process holds a context and does nothing."""
    UNDERUTILIZED = "underutilized"
    """Active under half of the time, or on a small part of its SMs."""
    MEMORY_BOUND = "memory_bound"
    COMPUTE_BOUND = "compute_bound"
    TRANSFER_BOUND = "transfer_bound"
    """Links are busy, SMs are not."""
    BALANCED = "balanced"
    """Nothing stands out, or nobody can tell."""


class Flag(StrEnum):
    """What is worth knowing beside the verdict."""

    POWER_CAPPED = "power_capped"
    THERMALLY_THROTTLED = "thermally_throttled"
    LOW_CLOCKS = "low_clocks"
    UTILIZATION_MISLEADING = "utilization_misleading"
    """NVML's utilization says busy and the SMs are not."""
    FP32_PIPE = "fp32_pipe"
    """Heavy FP32 work with idle tensor cores."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where one verdict ends and the next begins. "H200" is the demo recording's phases."""

    quiet_ratio: float = QUIET_ACTIVITY
    """SM, GRAPHICS and DRAM activity up to this is none (idle H200: at most 0.001; 20 % duty: 0.12)."""
    active_ratio: float = 0.5
    """Under this part of the time the device is underutilized: by definition, not fitted."""
    sm_ratio: float = 0.1
    """Under this part of its SMs, and with nothing loaded, too: kernels too small for the device (decode at batch 1
    keeps 0.63 of an H200's SMs busy; one block alone 0.0076)."""
    loaded_ratio: float = 0.25
    """A resource can only be the limit when it is loaded at least so much while active. Half of the least loaded
    limit seen on the H200 (DRAM 0.60 in decode), so that smaller models, whose kernels have more gaps, pass."""
    dominance: float = 1.5
    """And so many times as loaded as the other one. H200: DRAM over tensor is 1.9 in decode at batch 256, which
    may be called balanced, and 4.2 at batch 64; tensor over DRAM is 2.2 in the shortest prefill."""
    link_ratio: float = 0.03
    """Links count as busy from this part of `pcie_bytes_per_second` or `nvlink_bytes_per_second` on: the geometric
    middle of host copies (1.0) and a busy engine's own traffic (0.001, H200)."""
    quiet_link_ratio: float = 0.002
    """And as quiet below this (idle H200: 0.0001; a loop of tiny kernels 0.002)."""
    pcie_bytes_per_second: float = 59e9
    """What one direction of PCIe 5 x16 carries (host copies on the H200)."""
    nvlink_bytes_per_second: float = 450e9
    """What one direction of Hopper's NVLink carries (data sheet: 900 GB/s both ways)."""
    misleading_utilization_ratio: float = 0.5
    """NVML utilization from this on, with half of it or more not backed by kernels, misleads."""
    low_clock_ratio: float = 0.9
    """SM clock below this part of the highest while active is low: the 10 % that a clock may give up before
    throttling is worth a word (the paper's authors have no threshold; ours)."""
    throttled_ratio: float = 0.05
    """Throttled for more than this part of the span, by the driver's own count, where no event reason was seen."""
    fp32_ratio: float = 0.4
    """FP32 pipe from this on is heavy: the middle of 0.18 (elementwise) and 0.77 (FP32 matrix product), H200."""
    idle_tensor_ratio: float = 0.01
    """Tensor pipes below this are idle (FP32 matrix product 0.000, decode at batch 1 0.024, H200)."""
    conflict_power_ratio: float = 0.15
    """GPM that shows nothing while power is further than this part of the way from parked to the limit is not
    believed (host copies without any kernel: 0.015)."""
    inferred_memory_ratio: float = 0.55
    """NVML's memory utilization over its GPU utilization, without GPM: the geometric middle of prefill (0.41)
    and decode (0.76), H200."""
    inferred_compute_power_ratio: float = 0.5
    """Without GPM and with little memory utilization, compute needs this part of the way from parked to the limit
    (FP32 matrix product 0.81; loops of tiny kernels 0.002 and 0.11, H200)."""
    inferred_transfer_power_ratio: float = 0.05
    """Without GPM, a device that says it is busy for half of the time at less power than this does no work on its SMs
    (host copies 0.015, H200). Far below the least of real work (FP32 matrix product 0.81), as small kernels draw
    little: loops of them 0.11 and, on another card, 0.002 at 31 % utilization."""
    parked_part_of_limit: float = 0.17
    """Parked level where none is learnt, as a part of the board's own limit (H200: 121 of 700 W)."""
    bare_clock_ratio: float = 0.5
    """Where nothing else tells bare from parked: a device that nobody holds drops its clock (345 of 1,980 MHz)."""


THRESHOLDS = Thresholds()

SW_POWER_CAP_BIT, SW_THERMAL_BIT, HW_THERMAL_BIT, POWER_BRAKE_BIT = 0x4, 0x20, 0x40, 0x80
"""nvmlClocksEventReason bits of nvml.h."""
_THERMAL_REASONS = (ThrottleReason.THERMAL, ThrottleReason.SW_THERMAL, ThrottleReason.HW_THERMAL)
_POWER_REASONS = (ThrottleReason.SW_POWER_CAP, ThrottleReason.HW_POWER_BRAKE, ThrottleReason.BOARD_LIMIT)

COMPUTE_PIPES = (Pipe.TENSOR, Pipe.FP32, Pipe.FP16, Pipe.FP64, Pipe.INTEGER)

MARGIN_SCALE = 0.3
"""Confidence is 0.5 on a threshold and 0.82 a factor of e ** 0.3 (a third) away from it."""
SOURCE_CONFIDENCE: Mapping[ActiveSource | None, float] = {
    ActiveSource.GRAPHICS: 1.0,
    ActiveSource.SCALED_SM: 0.9,
    ActiveSource.UTILIZATION: 0.8,
    ActiveSource.SM: 0.7,
    None: 0.6,
}
"""By how the active part is known. Where SM activity alone settles the matter it is 1."""
INFERRED_CONFIDENCE = 0.6
CONFLICT_CONFIDENCE = 0.5
MISSING_CONFIDENCE = 0.6
GARBAGE_CONFIDENCE = 0.8
"""For each signal with values that made no sense ..."""
MOST_GARBAGE = 3
"""... up to so many: a device whose GPM is garbage throughout is judged by its utilization and power."""
SHARED_CONFIDENCE = 0.8
"""Several processes: their loads are mixed in one number."""
MIG_CONFIDENCE = 0.6
"""MIG: instances are mixed in one number, and NVML's utilization is not there."""
LEAST_CONFIDENCE = 0.2
"""A verdict below this is not worth naming: it is balanced."""
MOST_MARGIN = 3.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and what it rests on."""

    verdict: Verdict
    flags: tuple[Flag, ...]
    confidence: float
    """0 to 1."""
    evidence: Mapping[str, float | str]
    """The numbers it rests on; ratios are 0 to 1, `margin` is the natural logarithm of the factor by which the
    deciding number is off the nearest threshold."""
    sentence: str
    confirmed: bool = True
    """Whether the span may be booked under the verdict. Of `Hysteresis` False means that the newest span by itself says
    something else, so that a change may be under way. Then hold the span's seconds and joules back, with those of the
    unconfirmed ones before it, until a judgement is confirmed, and book them all under that one's verdict: it comes at
    most `PATIENCE_NS` and a span later."""


@dataclass(frozen=True, slots=True)
class _Finding:
    """A verdict before all doubts are counted."""

    verdict: Verdict
    margin: float
    confidence: float
    reason: str


def judge(signals: DeviceSignals, thresholds: Thresholds = THRESHOLDS) -> Judgement:
    """Return what limited a device over a span. Never raises: what is missing or senseless lowers the confidence."""
    signals, garbage = sound(signals)
    load = _Load.of(signals, thresholds)
    return replace(_judge(signals, load, garbage, thresholds), flags=_flags(signals, load, thresholds))


def _judge(signals: DeviceSignals, load: "_Load", garbage: float, thresholds: Thresholds) -> Judgement:
    """Return the judgement of sound signals, without flags."""
    conflict = signals.has_activity and _conflict(signals, load, thresholds)
    measured = signals.has_activity and not conflict
    found = (_measured if measured else _inferred)(signals, load, thresholds)
    confidence = found.confidence * (1.0 - 0.5 * math.exp(-max(0.0, found.margin) / MARGIN_SCALE))
    confidence *= GARBAGE_CONFIDENCE ** min(garbage, MOST_GARBAGE) * (1.0 - (signals.sm_clock_swing or 0.0) / 2)
    if conflict:
        confidence *= CONFLICT_CONFIDENCE
    if signals.mig_enabled:
        confidence *= MIG_CONFIDENCE
    if (signals.processes or 0) > 1:
        confidence *= SHARED_CONFIDENCE
    if confidence < LEAST_CONFIDENCE and found.verdict is not Verdict.BALANCED:
        reason = f"too little is known to say more ({found.verdict} at best)"
        found = replace(found, verdict=Verdict.BALANCED, reason=reason)
    evidence = load.evidence(signals)
    evidence["source"] = "gpm" if measured else "nvml"
    evidence["margin"] = min(found.margin, MOST_MARGIN)
    reason = found.reason
    if conflict:
        reason += "; GPM shows no activity at all, which the power contradicts"
    return Judgement(found.verdict, (), confidence, evidence, f"{found.verdict}: {reason}.")


def _flags(signals: DeviceSignals, load: "_Load", thresholds: Thresholds) -> tuple[Flag, ...]:
    """Return the flags of sound signals."""
    flags = []
    reasons, throttled = signals.event_reasons or 0, signals.throttled_ratio
    if reasons & (SW_POWER_CAP_BIT | POWER_BRAKE_BIT) or any(
        throttled.get(reason, 0.0) > thresholds.throttled_ratio for reason in _POWER_REASONS
    ):
        flags.append(Flag.POWER_CAPPED)
    if reasons & (SW_THERMAL_BIT | HW_THERMAL_BIT) or any(
        throttled.get(reason, 0.0) > thresholds.throttled_ratio for reason in _THERMAL_REASONS
    ):
        flags.append(Flag.THERMALLY_THROTTLED)
    busy = load.active if load.active is not None else load.utilization
    if load.clock is not None and load.clock < thresholds.low_clock_ratio and (busy or 0.0) > thresholds.quiet_ratio:
        flags.append(Flag.LOW_CLOCKS)
    if _misleading(signals, load, thresholds):
        flags.append(Flag.UTILIZATION_MISLEADING)
    if (
        load.intensity(Pipe.FP32) >= thresholds.fp32_ratio
        and Pipe.TENSOR in signals.busy_ratio
        and load.intensity(Pipe.TENSOR) < thresholds.idle_tensor_ratio
    ):
        flags.append(Flag.FP32_PIPE)
    return tuple(flags)


ROLL_NS = 3_000_000_000
"""A live verdict is of the last 3 s: an engine whose bursts come each 2 s is underutilized, not parked and busy in
turn."""
HOLD_NS = 1_500_000_000
"""And holds until another one has been found for so long in a row: by two of the daemon's spans of about a second, or
by one longer span (a replay at five times the speed has spans of 5 s)."""
PATIENCE_NS = 4_500_000_000
"""After so long without the held one the newest is taken, though they do not agree with each other."""


class Hysteresis:
    """One device's verdict, which does not flap, and from when on it may be booked (`Judgement.confirmed`)."""

    def __init__(self, thresholds: Thresholds = THRESHOLDS) -> None:
        self._thresholds = thresholds
        self._spans: deque[tuple[DeviceSignals, Verdict]] = deque()
        """Sound signals of the last `ROLL_NS`, and what each says by itself."""
        self._held: Verdict | None = None
        self._others: list[tuple[Verdict, int]] = []
        """Verdicts since the held one was last found, and the lengths of their spans, ns."""
        self._unconfirmed_ns = 0
        """How long the spans since the last confirmed one are."""

    def update(self, signals: DeviceSignals) -> Judgement:
        """Return the judgement after another span, which follows the one before; flags are those of the span alone.

        The verdict is of the last `ROLL_NS`. While the newest span by itself says something else, evidence and
        sentence are of that span, so that they do not contradict its watts, and `confirmed` is False. While the last
        `ROLL_NS` say something else too, the held verdict stands with half of the confidence.
        """
        spans, thresholds = self._spans, self._thresholds
        signals, garbage = sound(signals)
        load = _Load.of(signals, thresholds)
        alone = _judge(signals, load, garbage, thresholds)
        if spans and not 0 <= signals.start_ns - spans[-1][0].end_ns <= ROLL_NS:
            spans.clear()
        spans.append((signals, alone.verdict))
        length_ns = signals.end_ns - signals.start_ns
        first_ns = signals.end_ns - ROLL_NS - length_ns // 2
        while len(spans) > 1 and spans[0][0].start_ns < first_ns:
            spans.popleft()
        if all(verdict is alone.verdict for _, verdict in spans):
            # What each span says by itself they say together: no need to merge them.
            found = alone
        else:
            found = judge(merge([span for span, _ in spans]), thresholds)
        agreed = self._follow(found.verdict, length_ns)
        assert self._held is not None
        is_confirmed = alone.verdict is self._held or self._unconfirmed_ns + length_ns >= PATIENCE_NS
        self._unconfirmed_ns = 0 if is_confirmed else self._unconfirmed_ns + length_ns
        says_held = alone.verdict is self._held
        said = found if says_held and agreed else alone
        sentence = said.sentence
        if not says_held:
            sentence = f"{self._held} by the seconds before; the newest alone is {sentence}"
        return Judgement(
            verdict=self._held,
            flags=_flags(signals, load, thresholds),
            confidence=found.confidence if agreed else found.confidence / 2,
            evidence=said.evidence,
            sentence=sentence,
            confirmed=is_confirmed,
        )

    def _follow(self, found: Verdict, length_ns: int) -> bool:
        """Hold a verdict or change over to the one found; return whether the held one is the one found."""
        if self._held is None or found is self._held:
            self._held, self._others = found, []
            return True
        self._others.append((found, length_ns))
        lasted_ns = 0
        for verdict, other_ns in reversed(self._others):
            if verdict is not found:
                break
            lasted_ns += other_ns
        if lasted_ns < HOLD_NS and sum(other_ns for _, other_ns in self._others) < PATIENCE_NS:
            return False
        self._held, self._others = found, []
        return True


# -------------------------------------------------------------------- what the numbers say


class _Load(msgspec.Struct, frozen=True):
    """How loaded each resource was while kernels ran; None where nobody can tell."""

    active: float | None
    sm: float | None
    memory: float | None
    compute: float | None
    pipe: Pipe | None
    """The most loaded of the compute pipes."""
    link: float
    """The most loaded link's part of what it can carry, over the whole span."""
    link_bytes_per_second: float
    power: float | None
    """How far power is on the way from the parked level (0) to the limit (1)."""
    clock: float | None
    utilization: float | None
    pipes: Mapping[Pipe, float]

    @classmethod
    def of(cls, signals: DeviceSignals, thresholds: Thresholds) -> "_Load":
        busy = signals.busy_ratio
        sm = busy.get(Pipe.SM)
        utilization = signals.utilization_ratio.get("gpu")
        active = signals.active_ratio
        if active is None:
            active = busy.get(Pipe.GRAPHICS, sm)
        if active is None and signals.has_activity:
            active = utilization
        divisor = active if active is not None and active > thresholds.quiet_ratio else None
        pipes = {pipe: _part(busy[pipe], divisor) for pipe in COMPUTE_PIPES if pipe in busy}
        pipe = max(pipes, key=lambda one: pipes[one], default=None)
        pcie, nvlink = (
            max((signals.bytes_per_second.get(link, 0.0) for link in links), default=0.0)
            for links in ((Link.PCIE_TRANSMIT, Link.PCIE_RECEIVE), (Link.NVLINK_TRANSMIT, Link.NVLINK_RECEIVE))
        )
        return cls(
            active=active,
            sm=sm,
            memory=None if signals.dram_ratio is None else _part(signals.dram_ratio, divisor),
            compute=None if pipe is None else pipes[pipe],
            pipe=pipe,
            link=max(pcie / thresholds.pcie_bytes_per_second, nvlink / thresholds.nvlink_bytes_per_second),
            link_bytes_per_second=max(pcie, nvlink),
            power=_power(signals, thresholds),
            clock=_clock(signals),
            utilization=utilization,
            pipes=pipes,
        )

    def intensity(self, pipe: Pipe) -> float:
        """Return a pipe's busy ratio while active, 0 where it is absent."""
        return self.pipes.get(pipe, 0.0)

    def evidence(self, signals: DeviceSignals) -> dict[str, float | str]:
        """Return what is known, for a reader."""
        watts, limit = signals.watts, signals.power_limit_watts
        found: dict[str, float | str | None] = {
            "watts": watts,
            "power_limit_ratio": None if watts is None or limit is None else watts / limit,
            "active_ratio": self.active,
            "active_source": None if signals.active_source is None else signals.active_source.value,
            "sm_ratio": self.sm,
            "dram_intensity_ratio": self.memory,
            "compute_intensity_ratio": self.compute,
            "compute_pipe": None if self.pipe is None else self.pipe.value,
            "link_bytes_per_second": self.link_bytes_per_second if signals.bytes_per_second else None,
            "sm_clock_ratio": self.clock,
            "utilization_gpu_ratio": self.utilization,
            "utilization_memory_ratio": signals.utilization_ratio.get("memory"),
        }
        return {name: value for name, value in found.items() if value is not None}


def _part(ratio: float, active: float | None) -> float:
    return ratio if active is None else min(1.0, ratio / active)


def _clock(signals: DeviceSignals) -> float | None:
    clock, top = signals.sm_clock_hertz, signals.max_sm_clock_hertz
    return None if clock is None or top is None else clock / top


def _parked_watts(signals: DeviceSignals, thresholds: Thresholds) -> float | None:
    parked = signals.idle_watts.get(IdleKind.PARKED)
    board = signals.power_limit_watts if signals.board_limit_watts is None else signals.board_limit_watts
    if parked is not None or board is None:
        return parked
    return thresholds.parked_part_of_limit * board


def _power(signals: DeviceSignals, thresholds: Thresholds) -> float | None:
    watts, limit, parked = signals.watts, signals.power_limit_watts, _parked_watts(signals, thresholds)
    if watts is None or limit is None or parked is None or limit <= parked:
        return None
    return max(0.0, (watts - parked) / (limit - parked))


def _off(value: float, threshold: float) -> float:
    """Return the logarithm of the factor between a value and a threshold below it; the most for a threshold of 0."""
    if threshold <= 0:
        return MOST_MARGIN
    return MOST_MARGIN if value <= 0 else min(MOST_MARGIN, math.log(value / threshold))


def _under(value: float, threshold: float) -> float:
    """Return the same for a threshold above the value."""
    if threshold <= 0:
        return 0.0
    return MOST_MARGIN if value <= 0 else min(MOST_MARGIN, math.log(threshold / value))


def _conflict(signals: DeviceSignals, load: _Load, thresholds: Thresholds) -> bool:
    """Return whether GPM shows nothing at all while the device draws the power of work."""
    quiet = max(load.active or 0.0, load.sm or 0.0, signals.dram_ratio or 0.0) <= thresholds.quiet_ratio
    return quiet and load.link < thresholds.link_ratio and (load.power or 0.0) > thresholds.conflict_power_ratio


def _misleading(signals: DeviceSignals, load: _Load, thresholds: Thresholds) -> bool:
    utilization = load.utilization
    if utilization is None or utilization < thresholds.misleading_utilization_ratio:
        return False
    if not signals.has_activity:
        # Busy by its own account, at the power of a device that does nothing.
        return load.power is not None and load.power < thresholds.inferred_transfer_power_ratio
    if load.sm is not None and load.sm < thresholds.sm_ratio:
        return True
    backed = load.active if signals.active_source is not ActiveSource.UTILIZATION else None
    return backed is not None and backed <= utilization / 2


def _measured(signals: DeviceSignals, load: _Load, thresholds: Thresholds) -> _Finding:
    """Return the verdict that GPM gives."""
    active, dram = load.active, signals.dram_ratio
    if active is None:
        return _limit(load, thresholds, MISSING_CONFIDENCE)
    trust = SOURCE_CONFIDENCE[signals.active_source if signals.active_ratio is not None else None]
    if active <= thresholds.quiet_ratio:
        if load.link >= thresholds.link_ratio:
            return _transfer(load, _off(load.link, thresholds.link_ratio), 1.0)
        if (dram or 0.0) >= thresholds.loaded_ratio:
            reason = f"memory is at {_percent(dram)} of its peak without any kernel: copies inside the device"
            return _Finding(Verdict.MEMORY_BOUND, _off(dram or 0.0, thresholds.loaded_ratio), 1.0, reason)
        if load.link <= thresholds.quiet_link_ratio and (dram or 0.0) <= thresholds.quiet_ratio:
            margin = _under(max(active, dram or 0.0), thresholds.quiet_ratio)
            return _resting(signals, thresholds, margin, 1.0 if dram is not None else MISSING_CONFIDENCE)
        reason = "no kernel runs, and links and memory carry little"
        margin = min(
            _off(max(load.link / thresholds.quiet_link_ratio, (dram or 0.0) / thresholds.quiet_ratio), 1.0),
            _under(load.link, thresholds.link_ratio),
        )
        return _Finding(Verdict.UNDERUTILIZED, margin, 1.0, reason)
    if active < thresholds.active_ratio:
        if load.link >= thresholds.link_ratio and load.link >= active:
            return _transfer(load, min(_off(load.link, thresholds.link_ratio), _off(load.link, active)), trust)
        reason = f"kernels ran for {_percent(active)} of the time: the device waits for its host or for work"
        margin = min(_under(active, thresholds.active_ratio), _off(active, thresholds.quiet_ratio))
        return _Finding(Verdict.UNDERUTILIZED, margin, trust, reason)
    if load.sm is not None and load.sm >= thresholds.active_ratio:
        trust = 1.0
    loads = [one for one in (load.memory, load.compute) if one is not None]
    most = max(loads, default=0.0)
    if load.sm is not None and load.sm < thresholds.sm_ratio and loads and most < thresholds.loaded_ratio:
        if load.link >= thresholds.link_ratio and load.link >= thresholds.dominance * most:
            return _transfer(load, _off(load.link, thresholds.link_ratio), trust)
        reason = (
            f"kernels ran for {_percent(active)} of the time, but on {_percent(load.sm)} of the SMs: "
            "too small for the device"
        )
        margin = min(_under(load.sm, thresholds.sm_ratio), _under(most, thresholds.loaded_ratio))
        return _Finding(Verdict.UNDERUTILIZED, margin, trust, reason)
    if load.link >= thresholds.loaded_ratio and load.link >= thresholds.dominance * most:
        margin = min(_off(load.link, thresholds.loaded_ratio), _off(load.link, thresholds.dominance * most))
        return _transfer(load, margin, trust)
    found = _limit(load, thresholds, trust)
    return replace(found, margin=min(found.margin, _off(max(active, load.sm or 0.0), thresholds.active_ratio)))


def _limit(load: _Load, thresholds: Thresholds, trust: float) -> _Finding:
    """Return which of memory and compute was the limit while kernels ran."""
    memory, compute = load.memory, load.compute
    if memory is None or compute is None:
        trust *= MISSING_CONFIDENCE
    if memory is None and compute is None:
        return _Finding(Verdict.BALANCED, 0.0, trust * MISSING_CONFIDENCE, "neither memory nor pipes can be read")
    memory, compute = memory or 0.0, compute or 0.0
    said = (
        f"while active, memory is at {_percent(load.memory)} of its peak "
        f"and the {load.pipe or 'compute'} pipe at {_percent(load.compute)}"
    )
    dominance, loaded = thresholds.dominance, thresholds.loaded_ratio
    # A load that is not known may be anything: only one that leaves no room for more can be the limit then.
    other = 0.0 if load.memory is not None and load.compute is not None else 1.0 / (2 * dominance)
    for verdict, one, against in (
        (Verdict.MEMORY_BOUND, memory, max(compute, other)),
        (Verdict.COMPUTE_BOUND, compute, max(memory, other)),
    ):
        if one >= loaded and one >= dominance * against:
            return _Finding(verdict, min(_off(one, loaded), _off(one, dominance * against)), trust, said)
    if max(memory, compute) < loaded:
        said += ": kernels run and load neither, they are short or wait on each other"
        return _Finding(Verdict.BALANCED, _under(max(memory, compute), loaded), trust, said)
    lesser = max(min(memory, compute), other)
    return _Finding(Verdict.BALANCED, _under(max(memory, compute), dominance * lesser), trust, said)


def _inferred(signals: DeviceSignals, load: _Load, thresholds: Thresholds) -> _Finding:
    """Return the verdict without GPM: from NVML's duty cycles and power."""
    trust, power, busy = INFERRED_CONFIDENCE, load.power, load.utilization
    note = "memory bandwidth is inferred from NVML's utilization and power, without GPM"
    if busy is None:
        if power is not None and power < thresholds.inferred_transfer_power_ratio:
            return _resting(signals, thresholds, _under(power, thresholds.inferred_transfer_power_ratio), trust / 2)
        return _Finding(Verdict.BALANCED, 0.0, trust / 2, f"neither GPM nor utilization can be read ({note})")
    if busy <= thresholds.quiet_ratio:
        if (power or 0.0) <= thresholds.conflict_power_ratio:
            margin = min(_under(busy, thresholds.quiet_ratio), _under(power or 0.0, thresholds.conflict_power_ratio))
            return _resting(signals, thresholds, margin, trust if power is not None else trust * MISSING_CONFIDENCE)
        reason = f"power is that of work, and utilization reads {_percent(busy)} ({note})"
        return _Finding(Verdict.BALANCED, 0.0, trust / 2, reason)
    memory = signals.utilization_ratio.get("memory")
    if (
        busy >= thresholds.misleading_utilization_ratio
        and power is not None
        and power < thresholds.inferred_transfer_power_ratio
        and (memory or 0.0) < thresholds.inferred_memory_ratio * busy
    ):
        reason = f"utilization reads {_percent(busy)} at the power of a device that does nothing: copies, most likely"
        margin = _under(power, thresholds.inferred_transfer_power_ratio)
        return _Finding(Verdict.TRANSFER_BOUND, margin, trust, f"{reason} ({note})")
    if busy < thresholds.active_ratio:
        reason = f"kernels or copies ran for {_percent(busy)} of the time ({note})"
        margin = min(_under(busy, thresholds.active_ratio), _off(busy, thresholds.quiet_ratio))
        return _Finding(Verdict.UNDERUTILIZED, margin, trust, reason)
    if memory is None:
        return _Finding(Verdict.BALANCED, 0.0, trust / 2, f"memory utilization cannot be read ({note})")
    part, threshold = memory / busy, thresholds.inferred_memory_ratio
    said = f"memory was accessed for {_percent(part)} of the busy time"
    if part >= threshold:
        return _Finding(Verdict.MEMORY_BOUND, _off(part, threshold), trust, f"{said} ({note})")
    if power is not None:
        said += f" at {_percent(power)} of the way from parked power to the limit"
    least = thresholds.inferred_compute_power_ratio
    if power is not None and power >= least:
        margin = min(_under(part, threshold), _off(power, least))
        return _Finding(Verdict.COMPUTE_BOUND, margin, trust, f"{said} ({note})")
    return _Finding(Verdict.BALANCED, _under(power or least, least), trust, f"{said} ({note})")


def _transfer(load: _Load, margin: float, trust: float) -> _Finding:
    reason = (
        f"links carry {load.link_bytes_per_second / 1e9:.1f} GB/s while kernels run for "
        f"{_percent(load.active)} of the time"
    )
    return _Finding(Verdict.TRANSFER_BOUND, margin, trust, reason)


def _resting(signals: DeviceSignals, thresholds: Thresholds, margin: float, trust: float) -> _Finding:
    """Return idle or parked: by who holds the device, else by its learnt levels, else by its clock."""
    watts, held = signals.watts, signals.held
    bare, parked = (signals.idle_watts.get(kind) for kind in (IdleKind.BARE, IdleKind.PARKED))
    clock = _clock(signals)
    drawn = "" if watts is None else f", {watts:.0f} W drawn"
    if held is None:
        trust *= MISSING_CONFIDENCE
        unknown = f"nothing runs{drawn}; whether a process holds the device is not known"
        if watts is not None and bare is not None and parked is not None:
            held = abs(watts - parked) < abs(watts - bare)
            unknown += f", the power is nearer to the {IdleKind.PARKED if held else IdleKind.BARE} level"
        elif clock is not None:
            held = clock > thresholds.bare_clock_ratio
            unknown += f", the clock at {_percent(clock)} of its highest is that of a device that "
            unknown += "is held" if held else "nobody holds"
        else:
            trust *= MISSING_CONFIDENCE
        return _Finding(Verdict.PARKED if held else Verdict.IDLE, margin, trust, unknown)
    if held:
        return _Finding(Verdict.PARKED, margin, trust, f"a process holds the device, nothing runs{drawn}")
    return _Finding(Verdict.IDLE, margin, trust, f"no process holds the device{drawn}")


def _percent(ratio: float | None) -> str:
    return "an unknown part" if ratio is None else f"{100 * ratio:.0f} %"
