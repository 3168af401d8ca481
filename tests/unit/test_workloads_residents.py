"""Processes as each runtime leaves them in /proc: trees of files in the kernel's formats under tests/data/proc."""

import os
import shutil
from pathlib import Path

import pytest

from jouletrace.workloads.cgroups import Membership
from jouletrace.workloads.processes import Process
from jouletrace.workloads.residents import Resident, Residents

TREES = Path("tests/data/proc")
CRIO_POD = "d75d6769-aa4c-4c60-95a0-cce60e2ec40a"


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (
            "containerd-systemd-v2",
            Resident(
                1,
                Process(31770, 884123),
                "VLLM::EngineCor",
                Membership(
                    "123b1612dd272d1371c17149d439536b3216fdaeeb975729fae923d5a4fd12aa",
                    "6513270e-269e-4d37-b2a7-4de452e6b438",
                ),
                "vllm",
            ),
        ),
        (
            "containerd-systemd-v1",
            Resident(
                1,
                Process(90211, 551209),
                "tritonserver",
                Membership(
                    "2ea68ef786e4d3cea27d26934b484e73cf575dcad6ba2b0aee0ca92373288158",
                    "072235c2-8fcd-4f40-b3c1-cd2c81f98b52",
                    unit="containerd.service",
                ),
                "triton-0",
            ),
        ),
        (
            # /var/lib/kubelet is a file system of its own.
            "containerd-cgroupfs-v1",
            Resident(
                1,
                Process(4188, 7712349),
                "python3",
                Membership(
                    "3043b026c48bbf33feff9243a8f506b40928b5b7a767c76fb008f86bebb2737f",
                    "0d75985d-99c9-4309-970d-c1951c2442f9",
                ),
                "worker",
            ),
        ),
        (
            "containerd-hybrid",
            Resident(
                1,
                Process(1290, 120034),
                "python",
                Membership(
                    "c94dbca3a0aac36098b2cc2bd818319478da6bd0c621de49f145fda9988c79fc",
                    "736506ec-ae7c-4f09-bddf-cbc9f3308ce5",
                ),
                "main",
            ),
        ),
        (
            "static-pod",
            Resident(
                1,
                Process(2204, 2290),
                "nv-hostengine",
                Membership(
                    "7f1adbc60926f6967e7893f57fd14c1604d115cea325a65e19cbae530282bd36",
                    "d33296c87009e8a7f770d9106fd287db",
                ),
                "dcgm",
            ),
        ),
        (
            "docker-systemd-v2",
            Resident(
                1,
                Process(51233, 881020),
                "ollama",
                Membership("8263dfe574de739988b886e7577496a2c8773e130f7eb19731662b5e803b61ba"),
            ),
        ),
        (
            "docker-cgroupfs-v1",
            Resident(
                1,
                Process(8123, 99120),
                "python3",
                Membership("4168160adb59261ff2d3c425c8d99d19bdd0b6cc60d5d32cbe54014c2b54b955", unit="docker.service"),
            ),
        ),
        (
            "podman-rootful-v2",
            Resident(
                1,
                Process(7331, 66001),
                "llama-server",
                Membership("23cf6941fa1c257c6f561c5cb347611a3ce9d97dcbee500fe7ee5fc324bdb2e1"),
            ),
        ),
        (
            "podman-rootless-v2",
            Resident(
                1,
                Process(7402, 66120),
                "llama-server",
                Membership(
                    "142a21c402364f9572b85a8e48f687ab165c58ac5831be38cb8cb4ba2e751989", unit="user@1000.service"
                ),
            ),
        ),
        ("systemd-unit", Resident(1, Process(812, 4410), "VLLM::Worker_TP", Membership(unit="vllm.service"))),
        ("systemd-user-unit", Resident(1, Process(30211, 730112), "python", Membership(unit="comfyui.service"))),
        ("slurm-v1", Resident(1, Process(77120, 11203344), "python", Membership(slurm_job="48213"))),
    ],
    ids=str,
)
def test_a_process_of_each_runtime(tree: str, expected: Resident) -> None:
    residents = Residents(TREES / tree)
    assert expected.process is not None
    residents.update([expected.process.pid], now_ns=1)
    assert residents.by_pid == {expected.process.pid: expected}


def test_the_monitor_of_a_container_is_in_its_pod_but_not_in_it() -> None:
    residents = Residents(TREES / "crio-systemd-v2")
    residents.update([2071133, 2071098], now_ns=1)
    engine, monitor = residents.by_pid[2071133], residents.by_pid[2071098]
    assert (engine.name, engine.container, engine.home.pod_uid) == ("sglang::schedul", "sglang", CRIO_POD)
    assert (monitor.name, monitor.container, monitor.home) == ("conmon", "", Membership(pod_uid=CRIO_POD))


def test_slurm_with_several_nodes_on_a_machine_and_a_name_with_parentheses() -> None:
    residents = Residents(TREES / "slurm-v2")
    residents.update([40122, 40190], now_ns=1)
    assert [(one.name, one.home.slurm_job) for one in residents.by_pid.values()] == [
        ("torchrun", "48214"),
        ("python3 (rank 7)", "48215"),
    ]


def test_a_pid_that_another_process_took_is_a_new_resident(tmp_path: Path) -> None:
    shutil.copytree(TREES / "containerd-systemd-v2" / "31770", tmp_path / "7")
    residents = Residents(tmp_path)
    residents.update([7], now_ns=1)
    first = residents.by_pid[7]
    residents.update([7], now_ns=2)
    assert residents.by_pid[7] is first
    shutil.rmtree(tmp_path / "7")
    residents.update([7], now_ns=3)
    assert residents.by_pid[7] is first, "it has ended since the driver listed it"
    shutil.copytree(TREES / "slurm-v1" / "77120", tmp_path / "7")
    residents.update([7], now_ns=4)
    assert residents.by_pid[7] == Resident(4, Process(7, 11203344), "python", Membership(slurm_job="48213"))
    residents.update([], now_ns=5)
    assert residents.by_pid == {}


def test_a_process_that_proc_does_not_show() -> None:
    residents = Residents(TREES / "slurm-v1")
    residents.update([1, 77120], now_ns=1)
    assert residents.by_pid[1] == Resident(1)
    residents.update([1, 77120], now_ns=2)
    assert residents.by_pid[1].seen_ns == 1


def test_this_very_process() -> None:
    residents = Residents()
    residents.update([os.getpid()], now_ns=1)
    me = residents.by_pid[os.getpid()]
    assert me.name == Path("/proc/self/comm").read_text().strip()
    assert me.process is not None
    # proc_pid_stat(5): starttime is the 22nd field; a test runner's name has no spaces.
    assert me.process.start_ticks == int(Path("/proc/self/stat").read_text().split()[21])
