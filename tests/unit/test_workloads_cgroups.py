"""Paths as container runtimes, the kubelet, systemd and SLURM write them (cgroup v1 and v2)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from jouletrace.workloads.cgroups import Membership, membership, membership_of

ID = "3f4e8a0d9c1b2a7e6d5c4b3a29180f7e6d5c4b3a29180f7e6d5c4b3a29180f7e"
OTHER = "a" * 64
POD = "2c48913c-b29f-11e7-9350-020968147796"
SLICE = POD.replace("-", "_")
RECORDED = Path("tests/data/proc/recorded")
"""Processes of real runtimes, and what these answered when asked about them; tests/data/proc/README.md."""
ANSWERS: list[dict[str, Any]] = json.loads((RECORDED / "answers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # cgroup v2
        (f"0::/system.slice/docker-{ID}.scope", Membership(container_id=ID)),
        (f"0::/docker/{ID}", Membership(container_id=ID)),
        (
            "0::/kubepods.slice/kubepods-burstable.slice/"
            f"kubepods-burstable-pod{SLICE}.slice/cri-containerd-{ID}.scope",
            Membership(ID, POD),
        ),
        (f"0::/kubepods.slice/kubepods-pod{SLICE}.slice/crio-{ID}.scope", Membership(ID, POD)),
        # In a private cgroup namespace, and a container's own groups below.
        (f"0::/../../kubepods-besteffort-pod{SLICE}.slice/cri-containerd-{ID}.scope/init", Membership(ID, POD)),
        (f"0::/kubepods/burstable/pod{POD}/{ID}", Membership(ID, POD)),
        # A static pod's uid is a hash of its manifest.
        (f"0::/kubepods/pod{'0' * 31}b/{ID}", Membership(ID, "0" * 31 + "b")),
        (f"0::/machine.slice/libpod-{ID}.scope/container", Membership(ID)),
        # The monitor of a container is not in it.
        (f"0::/machine.slice/libpod-conmon-{ID}.scope", Membership()),
        (
            f"0::/kubepods.slice/kubepods-pod{SLICE}.slice/crio-conmon-{ID}.scope",
            Membership(pod_uid=POD),
        ),
        # kind: a node that is a container; the innermost counts.
        (f"0::/docker/{OTHER}/kubelet/kubepods/pod{POD}/{ID}", Membership(ID, POD)),
        # What runs in a pod may make groups with any name: the outermost pod counts, and its container.
        (
            f"0::/kubepods/burstable/pod{POD}/{ID}/docker/{OTHER}/kubelet/kubepods/pod{'0' * 32}/{OTHER}",
            Membership(ID, POD),
        ),
        (f"0::/kubepods/burstable/pod{POD}/pod{'0' * 32}/{ID}", Membership(ID, POD)),
        ("0::/system.slice/vllm.service", Membership(unit="vllm.service")),
        (r"0::/system.slice/system-vllm.slice/vllm\x2dserve@8b.service", Membership(unit="vllm-serve@8b.service")),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/llama.service",
            Membership(unit="llama.service"),
        ),
        ("0::/system.slice/slurmstepd.scope/job_4711/step_0/user/task_0", Membership(slurm_job="4711")),
        ("0::/system.slice/n7_slurmstepd.scope/job_4711/step_batch/user/task_0", Membership(slurm_job="4711")),
        ("0::/", Membership()),
        # cgroup v1: a line for each controller
        (
            f"12:pids:/docker/{ID}\n4:devices:/docker/{ID}\n1:name=systemd:/docker/{ID}\n0::/system.slice/docker.service",
            Membership(ID, unit="docker.service"),
        ),
        (
            f"11:memory:/kubepods/burstable/pod{POD}/{ID}\n1:name=systemd:/kubepods/burstable/pod{POD}/{ID}\n",
            Membership(ID, POD),
        ),
        (
            f"5:cpu:/system.slice/containerd.service/kubepods-burstable-pod{SLICE}.slice:cri-containerd:{ID}",
            Membership(ID, POD, unit="containerd.service"),
        ),
        ("9:memory:/slurm/uid_1000/job_4711/step_batch/task_0", Membership(slurm_job="4711")),
        ("9:memory:/slurm_node7/uid_0/job_12/step_extern", Membership(slurm_job="12")),
        # None of it
        ("", Membership()),
        ("garbage\n::\n0:" + "/" * 5000, Membership()),
        (f"0::/system.slice/docker-{ID[:63]}.scope", Membership()),
        (f"0::/system.slice/docker-{ID}f.scope", Membership()),
    ],
)
def test_membership(text: str, expected: Membership) -> None:
    assert membership(text) == expected


@pytest.mark.parametrize(
    "said",
    [said for said in ANSWERS if said["tree"] != "containerd-ctr-v1"],
    ids=lambda said: f"{said['tree']}-{said['pid']}",
)
def test_a_recorded_process_is_where_its_runtime_says(said: dict[str, Any]) -> None:
    found = membership_of(said["pid"], RECORDED / said["tree"])
    answer = said["answer"]
    assert (found.container_id, found.pod_uid, found.slurm_job) == tuple(
        answer.get(key, "") for key in ("container_id", "pod_uid", "slurm_job")
    )
    # Runtimes do not say below which unit they run, as Podman does in its user's or in the one that called it.
    if "unit" in answer:
        assert found.unit == answer["unit"]


def test_a_container_that_ctr_named_freely_has_no_id() -> None:
    """Names such as `my-engine` in `/default/my-engine` are not told from any other group's."""
    (said,) = [said for said in ANSWERS if said["tree"] == "containerd-ctr-v1"]
    assert said["answer"]["container_id"] in (RECORDED / said["tree"] / str(said["pid"]) / "cgroup").read_text()
    assert membership_of(said["pid"], RECORDED / said["tree"]) == Membership()


def test_membership_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text(f"0::/docker/{ID}\n")
    assert membership_of(7, tmp_path).container_id == ID
    assert membership_of(8, tmp_path) == Membership()
    assert membership_of(os.getpid()) == membership(Path("/proc/self/cgroup").read_text())


def test_a_units_name_is_escaped_by_bytes() -> None:
    """What `systemd-escape --template=run@.service "café nº 1"` prints."""
    unit = "run@caf\\xc3\\xa9\\x20n\\xc2\\xba\\x201.service"
    assert membership(f"0::/system.slice/{unit}\n").unit == "run@café nº 1.service"
    assert membership("0::/system.slice/half\\xc3.service\n").unit == "half\ufffd.service"
