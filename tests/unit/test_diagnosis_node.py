import threading
from collections import Counter
from pathlib import Path

import pytest

from jouletrace.diagnosis.node import DiagnosisSnapshot, NodeDiagnosis
from jouletrace.diagnosis.verdicts import Flag, Verdict
from jouletrace.diagnosis.waste import WasteCause
from jouletrace.gpu.replay import Course, ReplaySource
from jouletrace.gpu.sampler import Intervals, Sampler
from jouletrace.requests.account import EngineState, EngineTotals, LedgerSnapshot
from jouletrace.requests.law import LawBook
from jouletrace.trace.analyze import phases_of
from jouletrace.trace.recording import read

DEMO = Path(__file__).parents[2] / "exporter/jouletrace/demo/recording.json.gz"
S = 1_000_000_000
START_NS = 2_000_000_000 * S


class SteppedClock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.t_ns = START_NS

    def now_ns(self) -> int:
        return self.t_ns

    def from_wall(self, wall_ns: int) -> int:
        return wall_ns

    def to_wall(self, steady_ns: int) -> int:
        return steady_ns

    def wall_step_ns(self) -> int:
        return 0

    def wait(self, until_ns: int, wake: threading.Event) -> None:
        self.t_ns = max(self.t_ns, until_ns)


class Replayed:
    """The daemon's sampler on the demo recording in stepped time, diagnosed each second."""

    def __init__(self, **options: float) -> None:
        self.clock = SteppedClock()
        self.source = ReplaySource(DEMO, loop=False, clock=self.clock)
        self.sampler = Sampler(self.source, Intervals())
        self.diagnosis = NodeDiagnosis(LawBook(), {}, parked_after_seconds=options.get("parked_after_seconds", 300.0))
        self.sampler.begin()
        assert self.source.course is not None
        self.course: Course = self.source.course

    def run(self, until_ns: int, account: LedgerSnapshot | None = None) -> list[DiagnosisSnapshot]:
        seen = []
        while self.clock.t_ns < until_ns:
            second_ns = min(self.clock.t_ns + S, until_ns)
            while self.clock.t_ns < second_ns:
                self.clock.t_ns = min(self.sampler.run_due(), second_ns)
            self.sampler.run_due()
            self.diagnosis.observe(self.sampler.live_devices(), account or LedgerSnapshot())
            seen.append(self.diagnosis.snapshot())
        return seen

    @property
    def length_ns(self) -> int:
        return self.course.to_replay(self.course.end_ns) - self.clock.t_ns


@pytest.fixture(scope="module")
def whole() -> tuple[Replayed, list[DiagnosisSnapshot]]:
    node = Replayed()
    return node, node.run(node.course.to_replay(node.course.end_ns) - S)


def test_joules_by_driver_and_by_verdict_are_the_device_joules(
    whole: tuple[Replayed, list[DiagnosisSnapshot]],
) -> None:
    node, seen = whole
    [found] = seen[-1].devices
    [live] = node.sampler.live_devices()
    diagnosed = live.timeline.joules - live.timeline.window(found.end_ns, live.timeline.end_ns).joules
    assert sum(found.driver_joules.values()) == pytest.approx(diagnosed, rel=1e-9)
    assert sum(found.verdict_joules.values()) == pytest.approx(diagnosed, rel=1e-9)
    assert sum(found.verdict_seconds.values()) == pytest.approx((found.end_ns - live.timeline.start_ns) / S, rel=1e-9)
    assert diagnosed == pytest.approx(120_000, rel=0.1)
    for joules in zip(*(one.devices[0].driver_joules.values() for one in seen if one.devices), strict=True):
        assert list(joules) == sorted(joules)


EXPECTED = {
    "idle_no_context": {Verdict.IDLE},
    "idle_with_weights": {Verdict.PARKED},
    "decode": {Verdict.MEMORY_BOUND, Verdict.BALANCED},
    "prefill": {Verdict.COMPUTE_BOUND},
    "decode_duty 0.2": {Verdict.UNDERUTILIZED},
    "eager_host_bound": {Verdict.UNDERUTILIZED},
    "gemm_bf16": {Verdict.COMPUTE_BOUND},
    "gemm_fp32": {Verdict.COMPUTE_BOUND},
    "device_copy": {Verdict.MEMORY_BOUND},
    "host_offload": {Verdict.TRANSFER_BOUND},
    "elementwise_fp32": {Verdict.MEMORY_BOUND},
}


def test_the_live_verdict_follows_the_phases(whole: tuple[Replayed, list[DiagnosisSnapshot]]) -> None:
    node, seen = whole
    phases, _ = phases_of(read(DEMO))
    for phase in phases:
        duty = phase.labels.get("duty")
        name = phase.name if duty is None else f"{phase.name} {duty}"
        if name not in EXPECTED:
            continue
        start_ns, end_ns = node.course.to_replay(phase.start_ns), node.course.to_replay(phase.end_ns)
        # GRAPHICS of before the phase may count for its first 5 s, and a new verdict waits for the next one to agree.
        said = Counter(
            one.devices[0].judgement.verdict
            for one in seen
            if one.devices and one.devices[0].start_ns > start_ns + 4 * S and one.devices[0].end_ns < end_ns
        )
        assert said, name
        assert set(said) <= EXPECTED[name], (name, phase.labels, said)
        if phase.name == "host_offload":
            flags = {
                flag
                for one in seen
                if one.devices and start_ns < one.devices[0].start_ns < end_ns - S
                for flag in one.devices[0].judgement.flags
            }
            assert Flag.UTILIZATION_MISLEADING in flags


def test_parked_energy_is_waste_only_beyond_the_allowed_time() -> None:
    node = Replayed(parked_after_seconds=4.0)
    phases, _ = phases_of(read(DEMO))
    parked = next(phase for phase in phases if phase.name == "idle_with_weights")
    seen = node.run(node.course.to_replay(parked.end_ns) - S)
    [found] = seen[-1].devices
    wasted = seen[-1].wasted_joules[found.uuid, WasteCause.PARKED]
    assert wasted == pytest.approx(found.verdict_joules[Verdict.PARKED] - 4.0 * 121.4, rel=0.02)
    assert set(seen[-1].wasted_joules) == {(found.uuid, WasteCause.PARKED)}


def test_an_engine_is_diagnosed_over_half_a_minute_with_its_reference() -> None:
    node = Replayed()
    [device] = node.sampler.live_devices()
    # An engine as ML.ENERGY measured Llama-3.1-8B: 3.16 J + 66.5 mJ per sequence, here at batch 8, steps of 10 ms.
    for second in range(1, 60):
        steps = 100.0 * second
        totals = EngineTotals(
            settled_ns=START_NS + second * S,
            busy_joules=(3.16 + 8 * 0.0665) * steps,
            decode_joules=(3.16 + 8 * 0.0665) * steps,
            step_joules=(3.16 + 8 * 0.0665) * steps,
            step_seconds=float(second),
            active_seconds=float(second),
            sequence_seconds=8.0 * second,
            steps=steps,
            step_decode_sequences=8.0 * steps,
        )
        account = LedgerSnapshot(
            engine_totals={"e": totals},
            engine_states={"e": EngineState(t_ns=totals.settled_ns, running=8.0, waiting=0.0)},
            engine_devices={"e": (device.uuid,)},
            engine_models={"e": ("meta-llama/Llama-3.1-8B-Instruct",)},
        )
        node.diagnosis.observe([device], account)
    found = node.diagnosis.snapshot().engines["e"]
    assert found.end_ns - found.start_ns == pytest.approx(30 * S, abs=S)
    assert found.diagnosis.joules_per_unit == pytest.approx(3.16 / 8 + 0.0665, rel=1e-6)
    assert found.reference is not None
    assert found.reference.gpu_model == "H100"
    node.diagnosis.observe([device], LedgerSnapshot())
    assert node.diagnosis.snapshot().engines == {}
