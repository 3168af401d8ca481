"""Looks at devices with processes in trees of /proc, and what a scrape then sees."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tests.stepped_clock import START_NS, SteppedClock

from jouletrace.config import Workloads
from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.readings import HealthReading, ProcessReading
from jouletrace.workloads.energy import OUTSIDE
from jouletrace.workloads.service import WorkloadService

NS = 1_000_000_000
TREES = Path("tests/data/proc")
POD = "6513270e-269e-4d37-b2a7-4de452e6b438"
VLLM, DOCKER, SLURM = 31770, 51233, 77120


@dataclass
class Gpu:
    """A device of 100 W whose processes a test sets."""

    uuid: str = "GPU-0"
    timeline: Timeline = field(default_factory=lambda: Timeline(START_NS))
    processes: Sequence[ProcessReading] | None = None
    processes_ns: int | None = None
    health: HealthReading | None = None

    def use(self, clock: SteppedClock, *pids: int, sm_ratios: dict[int, float] | None = None) -> None:
        """Let a second pass at the end of which these processes are there."""
        clock.t_ns += NS
        self.timeline.extend([clock.t_ns], [100.0])
        self.processes, self.processes_ns = [ProcessReading(pid) for pid in pids], clock.t_ns
        if sm_ratios is not None:
            self.health = HealthReading(clock.t_ns, self.processes, sm_ratios)


@pytest.fixture(name="proc")
def fixture_proc(tmp_path: Path) -> Path:
    for tree, pid in (("containerd-systemd-v2", VLLM), ("docker-systemd-v2", DOCKER), ("slurm-v1", SLURM)):
        shutil.copytree(TREES / tree / str(pid), tmp_path / "proc" / str(pid))
    return tmp_path / "proc"


def service(proc: Path, clock: SteppedClock, *gpus: Gpu, processes: bool = True, pods: bool = True) -> WorkloadService:
    config = Workloads(processes=processes, pods=pods, pod_resources_socket="", pod_logs_dir=str(proc.parent / "logs"))
    (proc.parent / "logs" / f"team-a_llm-0_{POD}").mkdir(parents=True, exist_ok=True)
    return WorkloadService(config, clock, lambda: gpus, proc)


def test_processes_by_what_they_are(proc: Path) -> None:
    clock, gpu, idle, mute = SteppedClock(), Gpu(), Gpu("GPU-1"), Gpu("GPU-2")
    looking = service(proc, clock, gpu, idle, mute)
    gpu.use(clock, VLLM, DOCKER, SLURM)
    idle.use(clock)
    looking.look()
    found = looking.scraped()
    assert found.devices.keys() == {"GPU-0", "GPU-1"}, "what the driver does not tell is absent"
    assert found.devices["GPU-1"].process_count == 0
    assert found.devices["GPU-0"].process_count == 3
    assert [
        (one.process_name, one.namespace, one.pod, one.container, one.home.container_id[:4], one.home.slurm_job)
        for one in found.devices["GPU-0"].workloads
    ] == [
        ("VLLM::EngineCor", "team-a", "llm-0", "vllm", "123b", ""),
        ("ollama", "", "", "", "8263", ""),
        ("python", "", "", "", "", "48213"),
    ]


def test_processes_that_agree_in_everything_are_one_workload(proc: Path) -> None:
    shutil.copytree(proc / str(SLURM), proc / "9")
    clock, gpu = SteppedClock(), Gpu()
    looking = service(proc, clock, gpu)
    gpu.use(clock, SLURM, 9)
    looking.look()
    on = looking.scraped().devices["GPU-0"]
    assert (on.process_count, len(on.workloads)) == (2, 1)


def test_what_is_switched_off_is_not_told(proc: Path) -> None:
    clock, gpu = SteppedClock(), Gpu()
    only_processes = service(proc, clock, gpu, pods=False)
    only_pods = service(proc, clock, gpu, processes=False)
    for _ in range(3):
        gpu.use(clock, VLLM)
        only_processes.look()
        only_pods.look()
    [workload] = only_processes.scraped().devices["GPU-0"].workloads
    assert (workload.pod, workload.container, workload.home.pod_uid) == ("", "vllm", POD)
    assert only_processes.scraped().pod_joules == {}
    assert only_pods.scraped().devices == {}
    assert only_pods.scraped().pod_joules["GPU-0"] == pytest.approx({("team-a", "llm-0", "vllm"): 250.0})


def test_a_pod_comes_shares_and_goes(proc: Path) -> None:
    clock, gpu = SteppedClock(), Gpu()
    looking = service(proc, clock, gpu)

    def second(*pids: int, sm_ratios: dict[int, float] | None = None) -> None:
        gpu.use(clock, *pids, sm_ratios=sm_ratios)
        looking.look()
        looking.scraped()

    llm = ("team-a", "llm-0", "vllm")
    for _ in range(4):
        second()
    for _ in range(10):
        second(VLLM)
    second(VLLM, SLURM, sm_ratios={VLLM: 1.0})
    for _ in range(9):
        second(VLLM, SLURM)
    second(SLURM, sm_ratios={VLLM: 0.6, SLURM: 0.2})
    second(SLURM)
    # From the middle of 4 and 5 s to that of 14 and 15 s alone, then half a second before and 10 s after the SM times
    # came of 15 s, up to the middle of 24 and 25 s.
    expected = 1000 + 50 + 950 * 0.75
    assert looking.scraped().pod_joules["GPU-0"][llm] == pytest.approx(expected)
    for _ in range(30):
        second(SLURM)
    assert looking.scraped().pod_joules["GPU-0"][llm] == pytest.approx(expected), "settled once"
    assert [one.pod for one in looking.scraped().devices["GPU-0"].workloads] == [""]
    for _ in range(35):
        second(SLURM)
    assert looking.scraped().pod_joules["GPU-0"].keys() == {OUTSIDE}


def test_a_failed_list_is_nobody_and_not_the_list_before(proc: Path) -> None:
    clock, gpu = SteppedClock(), Gpu()
    looking = service(proc, clock, gpu)
    gpu.use(clock, VLLM)
    looking.look()
    for _ in range(4):
        clock.t_ns += NS
        gpu.timeline.extend([clock.t_ns], [100.0])
        gpu.processes = gpu.processes_ns = None
        looking.look()
    assert looking.scraped().devices == {}
    joules = looking.scraped().pod_joules["GPU-0"]
    assert joules == pytest.approx({("team-a", "llm-0", "vllm"): 150.0, OUTSIDE: 300.0})


def test_processes_that_cannot_be_seen_are_said_once(tmp_path: Path) -> None:
    clock, gpu = SteppedClock(), Gpu()
    (tmp_path / "proc").mkdir()
    looking = service(tmp_path / "proc", clock, gpu)
    with capture_logs() as logs:
        for _ in range(10):
            gpu.use(clock, 4711)
            looking.look()
        shutil.copytree(TREES / "slurm-v1" / str(SLURM), tmp_path / "proc" / "4711")
        gpu.use(clock, 4711)
        looking.look()
    assert [entry["log_level"] for entry in logs] == ["warning", "info"]
    assert "hostPID: true" in logs[0]["event"]
