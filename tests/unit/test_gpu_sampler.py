"""The sampler on the simulated driver and on virtual time: tiers, faults, and the account that survives them."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import structlog
from tests.conftest import NodeFactory
from tests.nvml_shim import (
    Constant,
    Device,
    Fault,
    Latency,
    Power,
    Process,
    Ramp,
    Square,
    Steps,
    Xid,
    write_control,
)
from tests.simulated_node import NS, START_NS, SimulatedNode

from jouletrace.energy.baseline import IdleKind
from jouletrace.gpu.readings import Pipe
from jouletrace.gpu.sampler import DriverLostError, Intervals, Sampler
from jouletrace.snapshot import DeviceStatus
from jouletrace.web.health import Readiness, readiness

pytestmark = pytest.mark.timeout(60)

MS = NS // 1000
RING = "nvmlDeviceGetSamples"
COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
FIELDS = "nvmlDeviceGetFieldValues"
HIGH_WATTS = {"h200": 650, "a100": 390, "ada": 340, "t4": 68, "pascal": 290, "average_only": 290}


def check_energy(node: SimulatedNode, gpu: int, start_ns: int, end_ns: int) -> float:
    """Assert that the truth lies within the bounds; return the relative error."""
    energy = node.sampler.window(node.gpu(gpu).info.uuid, start_ns, end_ns)
    assert energy is not None
    truth = node.truth(start_ns, end_ns, gpu)
    assert energy.low - 0.01 <= truth <= energy.high + 0.01, (energy, truth)
    return energy.joules / truth - 1


def ready(node: SimulatedNode) -> Readiness:
    return readiness(node.sampler.snapshot, node.clock.now_ns(), 5.0, 0.0)


# ---- the ladder against the truth ----

PERIODS_S = (0.02, 0.03, 0.05, 0.07, 0.1, 0.101, 0.2, 0.35, 0.5, 1.0, 2.0)


def test_square_waves_through_the_ring(simulate: NodeFactory) -> None:
    """Any period from 20 ms to 2 s, four phases each, within 1 % over 10 s."""
    worst = 0.0
    for period_s in PERIODS_S:
        phases = [Device("h200", Square(100, 650, period_s, phase_s=part * period_s)) for part in (0, 0.13, 0.37, 0.61)]
        node = simulate(*phases).begin()
        node.run(30)
        for gpu in range(4):
            uuid, end_ns = node.gpu(gpu).info.uuid, node.gpu(gpu).timeline_end_ns
            assert end_ns is not None
            for back_s in (0, 3.21, 7.77, 13.31):
                until_ns = end_ns - round(back_s * NS)
                energy = node.sampler.window(uuid, until_ns - 10 * NS, until_ns)
                assert energy is not None
                error = energy.joules / node.truth(until_ns - 10 * NS, until_ns, gpu) - 1
                assert abs(error) < 0.01, f"period {period_s} s, GPU {gpu}"
                worst = max(worst, abs(error))
    assert worst > 0


def loads(high: float) -> list[Power]:
    """Return loads up to `high` watts: steady, square waves of all paces, ramps."""
    low = high / 5
    return [
        Constant(high * 0.7),
        *(Square(low, high, period_s, phase_s=period_s / 3) for period_s in PERIODS_S),
        Square(low, high, 0.35, duty=0.1),
        Ramp(low, high, 3),
        Ramp(low, high, 0.3),
    ]


@pytest.mark.parametrize("profile", ["a100", "ada", "t4", "pascal", "average_only"])
def test_the_truth_lies_within_the_bounds_on_every_other_rung(simulate: NodeFactory, profile: str) -> None:
    powers = loads(HIGH_WATTS[profile])
    for some in (powers[:8], powers[8:]):
        node = simulate(*[Device(profile, power) for power in some]).begin()
        node.run(50)
        for gpu in range(len(some)):
            end_ns = node.gpu(gpu).timeline_end_ns
            assert end_ns is not None
            for seconds, back_s in itertools.product((1, 5, 30), (0, 1.37, 4.2, 9.99, 15.05)):
                until_ns = end_ns - round(back_s * NS)
                check_energy(node, gpu, until_ns - seconds * NS, until_ns)


@pytest.mark.parametrize("profile", ["h200", "a100", "ada", "t4", "pascal", "average_only"])
def test_a_steady_load_is_exact_on_every_rung(simulate: NodeFactory, profile: str) -> None:
    node = simulate(Device(profile, Constant(55))).begin()
    node.run(60)
    end_ns = node.gpu().timeline_end_ns
    assert end_ns is not None
    for seconds in (1, 5, 30):
        assert check_energy(node, 0, end_ns - seconds * NS, end_ns) == pytest.approx(0, abs=1e-3)


def test_activity_integrals(simulate: NodeFactory) -> None:
    levels = {
        "graphics_util": (90.0, 0.0),
        "sm_util": (70.0, 0.0),
        "any_tensor_util": (55.0, 0.0),
        "dram_bw_util": (40.0, 0.5),
        "pcie_rx_per_sec": (900.0, 0.0),
        "nvlink_total_tx_per_sec": (3000.0, 100.0),
    }
    node = simulate(Device(power=Square(100, 600, 1.7), gpm=levels)).begin()
    node.run(1)
    before, from_ns = node.gpu(), node.clock.now_ns()
    node.run(120)
    after, to_ns = node.gpu(), node.clock.now_ns()

    def truth(metric: int) -> float:
        return node.shim.true_gpm_integral(0, metric, from_ns, to_ns)

    def grown(name: str) -> float:
        return float(getattr(after, name) - getattr(before, name))

    busy = {pipe: after.busy_seconds[pipe] - before.busy_seconds.get(pipe, 0.0) for pipe in after.busy_seconds}
    # Readings end up to half a second before the snapshot, at both ends.
    assert busy[Pipe.SM] == pytest.approx(truth(2) / 100, abs=0.5)
    assert busy[Pipe.TENSOR] == pytest.approx(truth(5) / 100, abs=0.4)
    peak = after.info.peak_dram_bytes_per_second
    assert peak is not None
    assert grown("dram_bytes") == pytest.approx(truth(10) / 100 * peak, rel=0.01)
    received = after.pcie_bytes["receive"] - before.pcie_bytes["receive"]
    assert received == pytest.approx(truth(21) * 2**20, rel=0.01)
    sent = after.nvlink_bytes["transmit"] - before.nvlink_bytes["transmit"]
    assert sent == pytest.approx(truth(61) * 2**20, rel=0.01)


# ---- tiers ----


def test_tiers_run_at_their_rates(simulate: NodeFactory) -> None:
    intervals = Intervals(ring=1.0, activity=0.25, state=2.0, health=5.0, counter=10.0)
    node = simulate(*[Device() for _ in range(8)]).begin(intervals)
    calls = {
        RING: 60,
        "nvmlDeviceGetUtilizationRates": 30,
        "nvmlDeviceGetComputeRunningProcesses_v3": 12,
        COUNTER: 6,
    }
    before = {call: [node.shim.call_count(call, gpu) for gpu in range(8)] for call in calls}
    node.run(60)
    for call, times in calls.items():
        for gpu in range(8):
            # A process list is sized first.
            grown = node.shim.call_count(call, gpu) - before[call][gpu]
            assert times <= grown <= times + 2 or (call.endswith("_v3") and grown <= 2 * (times + 2)), (call, gpu)


def test_processes_are_listed_by_themselves_where_that_is_wanted(simulate: NodeFactory) -> None:
    """Who is there is known within a second, with the SM shares of the last health reading."""
    processes = [Process(77, 2000, sm_percent=50, from_s=20), Process(88, 2000, sm_percent=30, from_s=20, to_s=33)]
    node = simulate(Device(processes=processes)).begin(Intervals(health=10.0, processes=1.0))
    seen: dict[int, tuple[list[int], list[float | None]]] = {}
    for second in range(1, 40):
        node.run(1)
        [device] = node.sampler.live_devices()
        assert device.processes is not None
        assert device.processes_ns is not None
        assert node.clock.now_ns() - device.processes_ns < 1.1 * NS
        seen[second] = ([one.pid for one in device.processes], [one.sm_ratio for one in device.processes])
    assert seen[19] == ([], [])
    assert seen[22][0] == seen[32][0] == [77, 88]
    assert seen[32][1] == [0.5, 0.3]
    assert seen[35][0] == [77]


def test_a_list_that_fails_is_not_the_list_before(simulate: NodeFactory, tmp_path: Path) -> None:
    control = tmp_path / "control"
    node = simulate(Device(processes=[Process(77, 2000)]), control=control).begin(Intervals(processes=1.0))
    node.run(3)
    write_control(control, [Fault.error("nvmlDeviceGetComputeRunningProcesses_v3", 999)])
    node.shim.poll_control()
    node.run(20)
    [device] = node.sampler.live_devices()
    assert (device.processes, device.processes_ns) == (None, None)
    assert "processes reads fail" in node.gpu().problem
    write_control(control)
    node.shim.poll_control()
    node.run(3)
    [device] = node.sampler.live_devices()
    assert [one.pid for one in device.processes or ()] == [77]


def test_devices_take_turns(simulate: NodeFactory) -> None:
    """Not all rings are read in one go: a scrape in between always sees some that are half an interval younger."""
    node = simulate(*[Device() for _ in range(8)]).begin()
    never = threading.Event()
    read_ns: list[list[int]] = [[] for _ in range(8)]
    counts = [node.shim.call_count(RING, gpu) for gpu in range(8)]
    end_ns = node.clock.now_ns() + 10 * NS
    while (now_ns := node.clock.now_ns()) < end_ns:
        next_ns = node.sampler.run_due()
        for gpu in range(8):
            count = node.shim.call_count(RING, gpu)
            if count != counts[gpu]:
                read_ns[gpu].append(now_ns)
            counts[gpu] = count
        node.clock.wait(next_ns, never)
    moments = {times[-1] for times in read_ns}
    assert len(moments) >= 2
    assert all(np.diff(times).max() < 1.01 * NS for times in read_ns)


def test_the_thread_wakes_as_often_as_activity_is_read_however_many_devices_there_are(simulate: NodeFactory) -> None:
    node = simulate(*(Device() for _ in range(8))).begin()
    node.run(2)
    end_ns, wakes, never = node.clock.now_ns() + 20 * NS, 0, threading.Event()
    while (next_ns := node.sampler.run_due()) < end_ns:
        node.clock.wait(next_ns, never)
        wakes += 1
    assert wakes == pytest.approx(2 * 20, abs=1)


def test_a_late_tier_skips_what_it_missed(simulate: NodeFactory) -> None:
    node = simulate().begin(Intervals(state=1.0))
    node.run(3)
    before = node.shim.call_count("nvmlDeviceGetUtilizationRates", 0)
    node.shim.advance(30)
    node.run(0)
    assert node.shim.call_count("nvmlDeviceGetUtilizationRates", 0) == before + 1
    node.run(5)
    assert node.shim.call_count("nvmlDeviceGetUtilizationRates", 0) == before + 6


def test_the_counter_is_read_as_often_as_it_costs_where_energy_comes_from_it(simulate: NodeFactory) -> None:
    node = simulate(Device("a100")).begin()
    # So many that the reads of this test, which take what a crowded machine makes of them, do not count beside them.
    for _ in range(100_000):
        node.source.calls.add(COUNTER, 0.004)
    before = node.shim.call_count(COUNTER, 0)
    node.run(60)
    # 4 ms of a core each, half a percent of a core in all: one in 0.8 s.
    assert node.shim.call_count(COUNTER, 0) - before == pytest.approx(75, abs=3)


def test_the_governor_reads_less_often_and_relaxes_again(simulate: NodeFactory, tmp_path: Path) -> None:
    control = tmp_path / "control"
    node = simulate(control=control).begin(cpu_budget_ratio=0.02)
    node.run(20)
    assert node.sampler.snapshot.sampler.stretch == 1.0
    write_control(control, [Fault.slow("nvmlGpmSampleGet", 20_000, burn=True)])
    node.shim.poll_control()
    with structlog.testing.capture_logs() as logs:
        node.run(60)
        # 2 readings a second at 20 ms are twice the budget.
        stretch = node.sampler.snapshot.sampler.stretch
        assert 1.5 < stretch <= 8
        before = node.shim.call_count("nvmlGpmSampleGet", 0)
        node.run(20)
        assert node.shim.call_count("nvmlGpmSampleGet", 0) - before < 35
        assert ready(node).ready
        write_control(control)
        node.shim.poll_control()
        node.run(60)
    assert node.sampler.snapshot.sampler.stretch == 1.0
    assert [line["event"] for line in logs] == [
        "reading less often to stay within the CPU budget",
        "reading at the configured intervals again",
    ]


def test_the_ring_is_never_read_too_late_for_its_depth(simulate: NodeFactory) -> None:
    node = simulate(Device(power=Square(100, 600, 0.13)), latencies=[Latency.call("nvmlGpmSampleGet", 5000)])
    node.begin(cpu_budget_ratio=0.001)
    node.run(90)
    assert node.sampler.snapshot.sampler.stretch == 8
    assert node.gpu().gap_seconds == 0


# ---- faults of one GPU ----


@pytest.mark.parametrize("same_handle", [False, True])
def test_a_lost_gpu_is_dropped_and_picked_up_again(simulate: NodeFactory, *, same_handle: bool) -> None:
    node = simulate(
        Device(power=Square(100, 600, 1.3)),
        Device(power=Square(150, 400, 0.9)),
        faults=[Fault.lost(0, from_s=20, to_s=40, same_handle=same_handle)],
        xids=[Xid(1, 13, at_s=30), Xid(0, 79, at_s=65)],
    ).begin()
    joules: list[float] = []
    with structlog.testing.capture_logs() as logs:
        for second in range(75):
            node.run(1)
            joules.append(node.gpu(0).energy_joules)
            other = node.gpu(1)
            assert other.status is DeviceStatus.OK
            assert other.gap_seconds == 0
            if second == 30:
                lost = node.gpu(0)
                assert lost.status is DeviceStatus.LOST
                assert (lost.power_watts, lost.clock_hertz, lost.ecc_errors) == (None, {}, {})
                assert other.ecc_errors
                assert "GPU_IS_LOST" in ready(node).reasons[0]
                assert len(ready(node).reasons) == 1
    assert np.all(np.diff(joules) >= 0), "a counter never goes down"
    back = node.gpu(0)
    assert (back.status, back.problem, back.energy_source) == (DeviceStatus.OK, "", "power_ring")
    assert ready(node).ready
    # The hardware counter knows what was used while nobody could look.
    assert back.timeline_end_ns is not None
    assert check_energy(node, 0, START_NS, back.timeline_end_ns) == pytest.approx(0, abs=0.01)
    error = "GPU reported a critical error"
    assert [line["event"] for line in logs] == ["GPU lost", error, "GPU is back", error]
    assert node.gpu(1).xid_errors == {13: 1}, "a lost GPU does not keep those of the others back"
    assert node.gpu(0).xid_errors == {79: 1}, "critical errors are watched on the new handle as well"


def test_a_gpu_lost_while_it_is_tried_at_start_comes_later(simulate: NodeFactory) -> None:
    node = simulate(Device(), Device(), faults=[Fault.lost(0, from_s=0.3, to_s=10)]).begin()
    assert node.gpu(0).status is DeviceStatus.LOST
    assert not ready(node).ready
    node.run(60)
    assert node.gpu(0).status is DeviceStatus.OK
    assert node.gpu(0).energy_source == "power_ring"
    assert ready(node).ready


def test_a_gpu_that_comes_back_without_power_is_tried_again(simulate: NodeFactory) -> None:
    sick = [Fault.error(call, 999, gpu=0, from_s=10, to_s=30) for call in (RING, COUNTER, FIELDS)]
    node = simulate(Device(), Device(), faults=[Fault.lost(0, from_s=10, to_s=12), *sick]).begin()
    node.run(25)
    assert node.gpu(0).status is DeviceStatus.LOST
    node.run(75)
    assert node.gpu(0).status is DeviceStatus.OK
    assert node.gpu(0).energy_source == "power_ring"


def test_one_reading_that_fails_for_good_costs_only_itself(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.error("nvmlDeviceGetComputeRunningProcesses_v3", 999, from_s=20)])
    node.begin(Intervals(health=5.0))
    with structlog.testing.capture_logs() as logs:
        node.run(15)
        assert node.sampler.live_devices()[0].processes == ()
        node.run(100)
    assert [line["event"] for line in logs] == ["GPU read fails"]
    device = node.gpu()
    assert device.status is DeviceStatus.OK
    assert node.sampler.live_devices()[0].processes is None
    assert "health reads fail: nvmlDeviceGetComputeRunningProcesses_v3: UNKNOWN" in device.problem
    assert device.clock_hertz
    assert ready(node).ready
    errors = node.sampler.snapshot.sampler.call_errors
    assert errors["nvmlDeviceGetComputeRunningProcesses_v3", "UNKNOWN"] >= 18


def test_a_reading_that_is_refused_for_good_is_dropped(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.error("nvmlGpmSampleGet", 3, from_s=20)]).begin()
    node.run(15)
    assert node.gpu().dram_bandwidth_ratio is not None
    # The slow graphics tier ends with its next turn.
    node.run(60)
    calls = node.shim.call_count("nvmlGpmSampleGet", 0)
    node.run(60)
    assert node.shim.call_count("nvmlGpmSampleGet", 0) == calls
    assert node.gpu().dram_bandwidth_ratio is None
    assert ready(node).ready


@pytest.mark.parametrize(("sm_percent", "least", "most"), [(0.0, 3, 6), (80.0, 3, 6), (12.0, 6, 9)])
def test_graphics_is_read_more_often_only_while_sm_leaves_it_open(
    simulate: NodeFactory, sm_percent: float, least: int, most: int
) -> None:
    gpm = {"sm_util": sm_percent, "graphics_util": max(sm_percent, 25.0) if sm_percent else 0.0}
    node = simulate(Device(power=Constant(200), gpm=gpm)).begin()
    node.run(120)
    [live] = node.sampler.live_devices()
    assert least <= node.source.calls.count["nvmlGpmMetricsGet"] - 2 * 119 <= most
    graphics = [one for one in live.readings if Pipe.GRAPHICS in one.busy_ratio]
    assert graphics[-1].busy_ratio[Pipe.GRAPHICS] == pytest.approx(gpm["graphics_util"] / 100, abs=0.01)
    # However often it is read, no time is left out.
    seconds = (graphics[-1].end_ns - START_NS) / NS
    assert node.gpu().busy_seconds[Pipe.GRAPHICS] == pytest.approx(seconds * gpm["graphics_util"] / 100, abs=1.0)
    assert live.states[-1].t_ns - live.states[0].t_ns > 25 * NS


def test_graphics_is_read_anew_when_the_work_changes(simulate: NodeFactory) -> None:
    """From kernels that run 30 % of the time on all SMs to some that always run on 45 % of them."""
    gpm = {"sm_util": (45.0, 25.0), "graphics_util": (100.0, 30.0), "dram_bw_util": (30.0, 15.0)}
    node = simulate(Device(power=Steps([(0, 100), (80, 400)], active_above_watts=200), gpm=gpm)).begin()
    node.run(79)
    [live] = node.sampler.live_devices()
    long = [one for one in live.readings if Pipe.GRAPHICS in one.busy_ratio][-1]
    assert long.end_ns - long.start_ns > 13 * NS
    node.run(15)
    [live] = node.sampler.live_devices()
    newest = [one for one in live.readings if Pipe.GRAPHICS in one.busy_ratio][-1]
    assert newest.start_ns > START_NS + 80 * NS, "nothing of the work before"
    assert newest.busy_ratio[Pipe.GRAPHICS] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("code", [3, 999])
def test_a_ring_that_fails_for_good_leaves_the_next_rung(simulate: NodeFactory, code: int) -> None:
    faults = [Fault.error(RING, code, gpu=0, from_s=20)]
    node = simulate(Device(power=Constant(300)), Device(power=Constant(200)), faults=faults).begin()
    joules = []
    for _ in range(80):
        node.run(1)
        joules.append(node.gpu(0).energy_joules)
    assert np.all(np.diff(joules) >= 0)
    device = node.gpu(0)
    assert (device.status, device.energy_source) == (DeviceStatus.OK, "energy_counter")
    assert device.timeline_end_ns is not None
    # The counter knows what was used while another sensor was looked for.
    assert check_energy(node, 0, START_NS, device.timeline_end_ns) == pytest.approx(0, abs=0.01)
    assert check_energy(node, 0, device.timeline_end_ns - 30 * NS, device.timeline_end_ns) == pytest.approx(0, abs=0.01)
    assert node.gpu(1).energy_source == "power_ring"
    assert node.gpu(1).gap_seconds == 0
    assert ready(node).ready


def test_a_refused_ring_is_replaced_before_readiness_is_lost(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.error(RING, 3, from_s=20)]).begin()
    for _ in range(400):
        node.run(0.1)
        assert not any("old" in reason for reason in ready(node).reasons)
    assert node.gpu().energy_source == "energy_counter"
    # The power seen goes on for the two or three seconds in between.
    end_ns = node.gpu().timeline_end_ns
    assert end_ns is not None
    assert check_energy(node, 0, START_NS, end_ns) == pytest.approx(0, abs=0.01)


def test_a_counter_that_fails_does_not_cost_the_ring(simulate: NodeFactory) -> None:
    # The gap that the loss leaves is to be filled from the counter, which is refused by then.
    faults = [Fault.lost(0, from_s=20, to_s=21), Fault.error(COUNTER, 999, from_s=26)]
    node = simulate(Device(power=Constant(200)), faults=faults).begin(Intervals(counter=5.0))
    node.run(25)
    node.shim.advance(4)
    node.run(40)
    device = node.gpu()
    assert device.energy_source == "power_ring"
    assert device.status is DeviceStatus.OK
    assert ready(node).ready
    assert device.timeline_end_ns is not None
    check_energy(node, 0, START_NS, device.timeline_end_ns)


@pytest.mark.parametrize("profile", ["h200", "a100"])
def test_a_counter_that_starts_again(simulate: NodeFactory, profile: str) -> None:
    node = simulate(Device(profile, Square(100, 300, 1.3)), faults=[Fault.counter_reset(0, at_s=33)]).begin()
    joules = []
    for _ in range(90):
        node.run(1)
        joules.append(node.gpu().energy_joules)
    assert np.all(np.diff(joules) >= 0)
    assert node.gpu().counter_resets == 1
    end_ns = node.gpu().timeline_end_ns
    assert end_ns is not None
    assert check_energy(node, 0, START_NS + NS, end_ns) == pytest.approx(0, abs=0.01)
    assert ready(node).ready


@pytest.mark.parametrize("call", [RING, COUNTER, FIELDS])
@pytest.mark.parametrize("profile", ["h200", "a100"])
def test_garbage_now_and_then_is_dropped(simulate: NodeFactory, profile: str, call: str) -> None:
    node = simulate(Device(profile, Square(100, 300, 0.7)), faults=[Fault.garbage(call, every=7, from_s=5)]).begin()
    node.run(120)
    end_ns = node.gpu().timeline_end_ns
    assert end_ns is not None
    assert node.gpu().status is DeviceStatus.OK
    assert check_energy(node, 0, end_ns - 100 * NS, end_ns) == pytest.approx(0, abs=0.02)
    for watts in (node.gpu().power_watts, node.gpu().power_max_watts, node.gpu().memory_power_watts):
        assert watts is None or watts < 1400


# ---- back to the best sensor ----


def ring_reads(node: SimulatedNode, seconds: int, step_s: int) -> list[int]:
    """Run on; return after how many seconds GPU 0's ring was asked, to the step."""
    seen, asked = node.shim.call_count(RING, 0), []
    for passed_s in range(step_s, seconds + 1, step_s):
        node.run(step_s)
        if node.shim.call_count(RING, 0) != seen:
            seen = node.shim.call_count(RING, 0)
            asked.append(passed_s)
    return asked


def test_a_ring_that_works_again_is_used_again_after_a_minute(simulate: NodeFactory) -> None:
    faults = [Fault.error(RING, 999, gpu=0, from_s=20, to_s=40)]
    node = simulate(Device(power=Square(100, 600, 1.3)), Device(power=Constant(200)), faults=faults).begin()
    joules: list[float] = []
    sources: list[str | None] = []
    with structlog.testing.capture_logs() as logs:
        for second in range(150):
            node.run(1)
            joules.append(node.gpu(0).energy_joules)
            sources.append(node.gpu(0).energy_source)
            assert second < 30 or ready(node).ready
            assert second < 30 or node.gpu(0).clock_hertz
    assert np.all(np.diff(joules) >= 0)
    fell_s, back_s = sources.index("energy_counter"), len(sources) - sources[::-1].index("energy_counter")
    assert 24 <= fell_s <= 28
    assert back_s - fell_s == pytest.approx(60, abs=1)
    assert set(sources[back_s:]) == {"power_ring"}
    [back] = [line for line in logs if line["event"] == "energy sensor is back"]
    assert (back["energy_source_before"], back["energy_source"]) == ("energy_counter", "power_ring")
    assert len(logs) == 3, "a line each for the fall, the sensor found at once and the way back"
    end_ns = node.gpu(0).timeline_end_ns
    assert end_ns is not None
    assert check_energy(node, 0, START_NS, end_ns) == pytest.approx(0, abs=0.01)
    # From before the climb to after it, and by the ring alone.
    assert check_energy(node, 0, end_ns - 100 * NS, end_ns - 40 * NS) == pytest.approx(0, abs=0.01)
    assert check_energy(node, 0, end_ns - 40 * NS, end_ns) == pytest.approx(0, abs=0.01)
    assert node.gpu(0).agreement_ratio == pytest.approx(1, abs=0.01)
    assert node.gpu(1).gap_seconds == 0


def test_the_climb_itself_leaves_no_gap(simulate: NodeFactory) -> None:
    faults = [Fault.error(call, 999, from_s=20, to_s=40) for call in (RING, COUNTER)]
    node = simulate(Device(power=Square(100, 600, 1.3)), faults=faults).begin()
    node.run(60)
    fallen = node.gpu()
    assert fallen.energy_source == "power_polling"
    node.run(40)
    device = node.gpu()
    assert device.energy_source == "power_ring"
    assert device.gap_seconds == fallen.gap_seconds
    node.run(20)
    assert node.gpu().agreement_ratio == pytest.approx(1, abs=0.01), "the counter is back as well"


def test_gpus_that_fell_together_climb_one_after_the_other(simulate: NodeFactory) -> None:
    faults = [Fault.error(call, 999, gpu=gpu, from_s=20, to_s=40) for call in (RING, COUNTER) for gpu in range(7)]
    node = simulate(*[Device(power=Constant(300)) for _ in range(8)], faults=faults).begin()
    node.run(60)
    fallen = [node.gpu(gpu) for gpu in range(8)]
    assert [device.energy_source for device in fallen] == ["power_polling"] * 7 + ["power_ring"]
    back: list[int] = []
    for _ in range(50):
        node.run(1)
        back.append(sum(device.energy_source == "power_ring" for device in node.sampler.snapshot.devices) - 1)
    assert back[-1] == 7
    assert np.diff(back).max() == 1
    assert [node.gpu(gpu).gap_seconds for gpu in range(8)] == [device.gap_seconds for device in fallen]


def test_a_sensor_that_stays_away_is_tried_ever_less_often(simulate: NodeFactory) -> None:
    faults = [Fault.error(call, 999, from_s=20) for call in (RING, COUNTER)]
    node = simulate(faults=faults).begin(Intervals(activity=60, state=60, health=60, polling=1.0))
    node.run(30)
    assert node.gpu().energy_source == "power_polling"
    with structlog.testing.capture_logs() as logs:
        asked = ring_reads(node, 4 * 3600, 10)
    assert logs == []
    # A minute after the fall, then twice as long each time, up to an hour.
    assert np.diff(asked).tolist() == pytest.approx([120, 240, 480, 960, 1920, 3600, 3600], abs=10)
    assert node.gpu().status is DeviceStatus.OK
    errors = node.sampler.snapshot.sampler.call_errors
    assert errors[RING, "UNKNOWN"] >= len(asked)


def test_a_sensor_that_comes_and_goes_is_used_no_more_often_than_it_is_tried(simulate: NodeFactory) -> None:
    """Falls at 25, 225 and 5,000 s: the second time it is trusted later, after more than an hour as at first."""
    faults = [Fault.error(RING, 999, from_s=from_s, to_s=from_s + 20) for from_s in (20, 220, 5000)]
    node = simulate(Device(power=Constant(300)), faults=faults).begin(Intervals(activity=30, state=5, health=60))
    falls: list[int] = []
    climbs: list[int] = []
    source = "power_ring"
    for second in range(5200):
        node.run(1)
        now = node.gpu().energy_source
        assert now is not None
        if now != source:
            (climbs if now == "power_ring" else falls).append(second)
        source = now
    assert len(falls) == 3
    assert np.subtract(climbs, falls).tolist() == pytest.approx([60, 120, 60], abs=1)
    end_ns = node.gpu().timeline_end_ns
    assert end_ns is not None
    assert check_energy(node, 0, end_ns - 800 * NS, end_ns) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    ("device", "faults"),
    [
        (Device("a100"), []),
        (Device("pascal", power=Constant(55)), []),
        (Device(features={"ring": "off"}), []),
        (Device(features={"ring": "depth:119,period_ms:1000"}), []),
        (Device(), [Fault.error(RING, 3)]),
        # Fails at first, and is then refused for good when it is tried again.
        (Device(), [Fault.error(RING, 999, to_s=30), Fault.error(RING, 3, from_s=30)]),
    ],
)
def test_a_gpu_that_never_had_a_ring_is_not_bothered(
    simulate: NodeFactory, device: Device, faults: Sequence[Fault]
) -> None:
    node = simulate(device, faults=faults).begin(Intervals(activity=10, state=10, polling=0.5))
    node.run(90)
    before = [node.shim.call_count(call, 0) for call in (RING, "nvmlDeviceGetHandleByUUID")]
    node.run(600)
    assert [node.shim.call_count(call, 0) for call in (RING, "nvmlDeviceGetHandleByUUID")] == before


@pytest.mark.parametrize(
    ("profile", "calls", "at_start", "later"),
    [
        ("h200", [RING], "energy_counter", "power_ring"),
        ("h200", [RING, COUNTER], "power_polling", "power_ring"),
        ("h200", [RING, COUNTER, FIELDS, "nvmlDeviceGetPowerUsage"], None, "power_ring"),
        ("a100", [COUNTER], "power_polling", "energy_counter"),
        ("t4", [COUNTER, FIELDS, "nvmlDeviceGetPowerUsage"], None, "energy_counter"),
    ],
)
def test_a_sensor_that_fails_while_tried_at_start_is_used_when_it_works(
    simulate: NodeFactory, profile: str, calls: Sequence[str], at_start: str | None, later: str
) -> None:
    faults = [Fault.error(call, 999, to_s=30) for call in calls]
    node = simulate(Device(profile, power=Constant(60)), faults=faults).begin()
    node.run(50)
    assert node.gpu().energy_source == at_start
    node.run(50)
    device = node.gpu()
    assert (device.status, device.problem, device.energy_source) == (DeviceStatus.OK, "", later)
    assert ready(node).ready
    assert device.timeline_end_ns is not None
    assert check_energy(node, 0, device.timeline_end_ns - 9 * NS, device.timeline_end_ns) == pytest.approx(0, abs=0.01)


def test_a_counter_that_fails_at_start_checks_the_ring_when_it_works(simulate: NodeFactory) -> None:
    node = simulate(Device(power=Square(100, 600, 1.3)), faults=[Fault.error(COUNTER, 999, to_s=30)]).begin()
    node.run(50)
    assert (node.gpu().energy_source, node.gpu().agreement_ratio) == ("power_ring", None)
    node.run(50)
    device = node.gpu()
    assert device.agreement_ratio == pytest.approx(1, abs=0.01)
    assert device.gap_seconds == 0
    # The counter is asked for what a gap holds.
    node.shim.advance(8)
    node.run(10)
    end_ns = node.gpu().timeline_end_ns
    assert end_ns is not None
    assert node.gpu().gap_seconds > 0
    assert check_energy(node, 0, end_ns - 18 * NS, end_ns) == pytest.approx(0, abs=0.03)


def test_a_counter_that_stood_still_is_believed_again_when_it_moves(simulate: NodeFactory) -> None:
    still = Fault.garbage(COUNTER, value=1_000_123_456, from_s=20, to_s=50)
    node = simulate(Device("a100", power=Constant(200)), faults=[still]).begin()
    node.run(40)
    assert node.gpu().energy_source == "power_polling"
    node.run(60)
    assert node.gpu().energy_source == "energy_counter"
    end_ns = node.gpu().timeline_end_ns
    assert end_ns is not None
    assert check_energy(node, 0, START_NS + NS, end_ns) == pytest.approx(0, abs=0.02)


def test_a_try_that_hangs_names_the_call_and_goes_on_when_it_returns(simulate: NodeFactory, tmp_path: Path) -> None:
    control = tmp_path / "control"
    faults = [Fault.error(RING, 999, gpu=0, from_s=20, to_s=40)]
    node = simulate(Device(power=Constant(300)), Device(), faults=faults, control=control).begin()
    node.run(60)
    before = node.gpu(0)
    assert before.energy_source == "energy_counter"
    write_control(control, [Fault.hang(RING, gpu=0)])
    node.shim.poll_control()
    running = threading.Thread(target=node.run, args=(60,))
    running.start()
    deadline = time.monotonic() + 10
    while node.sampler.overdue_call != f"{RING} on GPU 0":
        assert time.monotonic() < deadline, "the ring was never tried"
        time.sleep(0.01)
    # What was known can be seen; nobody waits for the driver.
    stuck = node.gpu(0)
    assert (stuck.status, stuck.energy_source) == (DeviceStatus.OK, "energy_counter")
    assert stuck.energy_joules > before.energy_joules
    assert node.sampler.window(stuck.info.uuid, START_NS, node.clock.now_ns()) is not None
    write_control(control)
    running.join(10)
    assert not running.is_alive()
    assert node.gpu(0).energy_source == "power_ring"


# ---- time ----


@pytest.mark.parametrize("seconds", [10, -10, 3600, -3600])
@pytest.mark.parametrize("profile", ["h200", "a100", "pascal"])
def test_the_account_goes_on_when_the_clock_is_set(simulate: NodeFactory, profile: str, seconds: float) -> None:
    node = simulate(Device(profile, Square(60, 250, 1.3))).begin()
    node.run(25.3)
    joules = [node.gpu().energy_joules]
    for step in (seconds, -seconds):
        node.clock.step(step)
        for _ in range(40):
            node.run(0.5)
            joules.append(node.gpu().energy_joules)
            assert ready(node).ready
    assert np.all(np.diff(joules) >= 0)
    assert node.gpu().timeline_end_ns == pytest.approx(node.clock.now_ns(), abs=1.1 * NS)
    end_ns = node.gpu().timeline_end_ns
    assert end_ns is not None
    for window_s in (1, 5, 45):
        check_energy(node, 0, end_ns - window_s * NS, end_ns)
    # With the ring, nothing is missing at all.
    assert profile != "h200" or node.gpu().gap_seconds == 0


def test_a_pause_of_the_process_is_filled_from_the_counter(simulate: NodeFactory) -> None:
    node = simulate(Device(power=Steps([(0, 100), (31, 600), (33, 150)]))).begin(Intervals(counter=5.0))
    node.run(30)
    node.shim.advance(8)
    node.run(10)
    device = node.gpu()
    # The ring holds the last 2.4 of the 8 s.
    assert device.gap_seconds == pytest.approx(5.6, abs=1.1)
    assert device.timeline_end_ns is not None
    assert check_energy(node, 0, START_NS, device.timeline_end_ns) == pytest.approx(0, abs=0.03)
    assert ready(node).ready


# ---- the driver as a whole ----


def test_an_updated_driver_ends_the_process_with_a_sentence(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.driver_mismatch(from_s=10)]).begin()
    with pytest.raises(DriverLostError, match=r"driver was updated under this process .* restart jouletrace"):
        node.run(20)


def test_a_driver_that_restarts_is_opened_anew(simulate: NodeFactory) -> None:
    node = simulate(
        Device(power=Square(100, 600, 1.3)),
        Device(power=Constant(200)),
        faults=[Fault.error("*", 999, from_s=10, to_s=40)],
    ).begin()
    with structlog.testing.capture_logs() as logs:
        node.run(30)
        assert [device.status for device in node.sampler.snapshot.devices] == [DeviceStatus.LOST] * 2
        assert node.shim.call_count("nvmlShutdown") > 0
        node.run(60)
    assert [device.status for device in node.sampler.snapshot.devices] == [DeviceStatus.OK] * 2
    assert ready(node).ready
    for gpu in range(2):
        end_ns = node.gpu(gpu).timeline_end_ns
        assert end_ns is not None
        check_energy(node, gpu, START_NS, end_ns)
    # One line when it starts and one when it ends, for each GPU.
    events = [line["event"] for line in logs if line["log_level"] != "debug"]
    assert events == ["GPU read fails"] * 2 + ["GPU is back"] * 2


def test_a_driver_that_stays_away_is_given_up(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.error("*", 999, from_s=10), Fault.error("nvmlShutdown", 999, from_s=10)])
    node.begin(give_up_after_seconds=60)
    with pytest.raises(DriverLostError, match=r"no GPU has answered for 60 s .*UNKNOWN \(code 999\)\).*nvidia-smi"):
        node.run(200)
    assert 70 <= (node.clock.now_ns() - START_NS) / NS < 85


def test_errors_are_counted_while_everything_is_lost(simulate: NodeFactory) -> None:
    node = simulate(faults=[Fault.lost(0, from_s=10)]).begin()
    node.run(20)
    before = sum(node.sampler.snapshot.sampler.call_errors.values())
    node.run(40)
    assert sum(node.sampler.snapshot.sampler.call_errors.values()) > before


def test_critical_errors_are_counted(simulate: NodeFactory) -> None:
    node = simulate(Device(), Device(), xids=[Xid(0, 79, at_s=5), Xid(0, 79, at_s=6), Xid(1, 13, at_s=6)]).begin()
    for _ in range(10):
        node.run(1)
    assert node.gpu(0).xid_errors == {79: 2}
    assert node.gpu(1).xid_errors == {13: 1}


# ---- idle ----


@pytest.mark.parametrize(("profile", "levels"), [("h200", (79.0, 121.0)), ("a100", (55.0, 88.0))])
def test_idle_levels_are_learnt(simulate: NodeFactory, profile: str, levels: Sequence[float]) -> None:
    bare, parked = levels
    node = simulate(
        Device(
            profile,
            Steps([(0, bare), (60, 350), (90, parked)], active_above_watts=200),
            gpm={"graphics_util": (95.0, 0.0), "sm_util": (80.0, 0.0)} if profile == "h200" else {},
            state={"util_pct": (97, 0), "memory_util_pct": (50, 0)},
            processes=[Process(77, 2000, from_s=60)],
        )
    ).begin()
    node.run(59)
    assert node.gpu().idle_watts == pytest.approx({"bare": bare}, rel=0.01)
    node.run(91)
    assert node.gpu().idle_watts == pytest.approx({"bare": bare, "parked": parked}, rel=0.01)
    learnt = node.sampler.learnt_levels()[node.gpu().info.uuid]
    assert learnt[IdleKind.PARKED].watts == pytest.approx(parked, rel=0.01)


UTILIZATION = "nvmlDeviceGetUtilizationRates"


@pytest.mark.parametrize(
    ("profile", "faults"),
    [
        ("h200", []),
        # Ampere has no GPM, and MIG mode no duty cycles either: power alone is left.
        ("a100", []),
        ("a100", [Fault.error(UTILIZATION, 3)]),
        ("h200", [Fault.error("nvmlGpmSampleGet", 3), Fault.error(UTILIZATION, 3)]),
    ],
)
def test_work_is_told_from_rest_with_whatever_there_is(
    simulate: NodeFactory, profile: str, faults: Sequence[Fault]
) -> None:
    busy_from, busy_until = 20, 50
    node = simulate(
        Device(
            profile,
            Steps([(0, 90), (busy_from, 350), (busy_until, 90)], active_above_watts=200),
            gpm={"graphics_util": (95.0, 0.0), "sm_util": (80.0, 0.0)} if profile == "h200" else {},
            state={"util_pct": (97, 0), "memory_util_pct": (50, 0)},
            processes=[Process(77, 2000)],
        ),
        faults=faults,
    ).begin()
    node.run(80)
    [live] = node.sampler.live_devices()
    ends_ns = live.busy_ends_ns.tolist()
    assert ends_ns == sorted(set(ends_ns))
    # All of the time is known, but for what the newest reading leaves.
    assert max(np.diff([START_NS, *ends_ns, START_NS + 80 * NS])) < 3 * NS
    for end_ns, ratio in zip(ends_ns, live.busy_ratios.tolist(), strict=True):
        second = (end_ns - START_NS) / NS
        if busy_from + 2.5 < second < busy_until:
            assert ratio > 0.5, second
        elif second < busy_from or second > busy_until + 2.5:
            assert ratio <= 0.01, second


def test_activity_of_the_last_quarter_hour_is_kept_whole(simulate: NodeFactory) -> None:
    node = simulate(Device(gpm={"sm_util": (80.0, 0.0)})).begin(Intervals(activity=0.5))
    earlier = np.empty(0, np.int64)
    for _ in range(3):
        node.run(800)
        [live] = node.sampler.live_devices()
        recent = live.busy_ends_ns[live.busy_ends_ns > node.clock.now_ns() - 900 * NS]
        assert np.diff(recent).max() < 0.6 * NS
        assert recent[-1] > node.clock.now_ns() - NS
        # What somebody still holds does not change.
        assert (np.diff(earlier) > 0).all()
        earlier = live.busy_ends_ns
    assert len(live.busy_ratios) == len(live.busy_ends_ns) < 2400


def test_levels_of_before_are_known_from_the_start(simulate: NodeFactory) -> None:
    node = simulate(Device(power=Constant(79))).begin()
    node.run(60)
    levels = node.sampler.learnt_levels()
    assert levels
    again = simulate(Device(power=Constant(600), gpm={"graphics_util": 95.0})).begin(levels=levels)
    again.run(5)
    assert again.gpu().idle_watts == pytest.approx({"bare": 79}, rel=0.01)


# ---- the thread ----


def test_a_hang_stops_the_heartbeat_and_names_the_call(simulate: NodeFactory, tmp_path: Path) -> None:
    control = tmp_path / "control"
    node = simulate(Device(), Device(), control=control)
    node.use_real_time()
    sampler = Sampler(node.source, Intervals(ring=0.1))
    sampler.start()

    def until(what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.01)

    until("first samples", lambda: len(sampler.snapshot.devices) == 2)
    write_control(control, [Fault.hang(RING, gpu=1)])
    until("the hang", lambda: sampler.heartbeat_age_seconds > 0.8)
    assert sampler.overdue_call == f"{RING} on GPU 1"
    assert not sampler.stop(patience_seconds=0.1)
    write_control(control)
    assert sampler.stop(patience_seconds=5)
