import json
from pathlib import Path
from typing import Any

import pytest

from jouletrace.workloads.mounts import container_name, container_name_of

POD = "6513270e-269e-4d37-b2a7-4de452e6b438"
OTHER_POD = "736506ec-ae7c-4f09-bddf-cbc9f3308ce5"
RECORDED = Path("tests/data/proc/recorded")
"""Processes of real runtimes, and what these answered when asked about them; tests/data/proc/README.md."""
ANSWERS: list[dict[str, Any]] = json.loads((RECORDED / "answers.json").read_text(encoding="utf-8"))
MOUNT = "1430 1423 259:2 {root} /dev/termination-log rw,relatime - ext4 /dev/nvme0n1p2 rw\n"


@pytest.mark.parametrize(
    ("roots", "name"),
    [
        ([f"/var/lib/kubelet/pods/{POD}/containers/vllm/1a2b3c4d"], "vllm"),
        # /var/lib/kubelet is a file system of its own, or lies elsewhere (microk8s, k3s).
        ([f"/pods/{POD}/containers/vllm/1a2b3c4d"], "vllm"),
        ([f"/var/snap/microk8s/common/var/lib/kubelet/pods/{POD}/containers/a-1/1a2b3c4d"], "a-1"),
        ([], ""),
        ([f"/var/lib/kubelet/pods/{POD}/etc-hosts"], ""),
        ([f"/var/lib/kubelet/pods/{POD}/volumes/kubernetes.io~empty-dir/containers/x/1a2b3c4d"], ""),
        # A process may mount what it likes inside its container: never another pod, never a choice.
        ([f"/var/lib/kubelet/pods/{OTHER_POD}/containers/vllm/1a2b3c4d"], ""),
        ([f"/pods/{POD}/containers/vllm/1a2b3c4d", f"/tmp/pods/{POD}/containers/other/1a2b3c4d"], ""),
        ([f"/pods/{POD}/containers/vllm/1a2b3c4d/more"], ""),
        ([f"/pods/{POD}/containers/UPPER/1a2b3c4d"], ""),
        ([f"/pods/{POD}/containers/{'a' * 64}/1a2b3c4d"], ""),
    ],
)
def test_container_name(roots: list[str], name: str) -> None:
    assert container_name("".join(MOUNT.format(root=root) for root in roots), POD) == name


@pytest.mark.parametrize(
    "said",
    [said for said in ANSWERS if (RECORDED / said["tree"] / str(said["pid"]) / "mountinfo").exists()],
    ids=lambda said: said["tree"],
)
def test_a_recorded_container_has_the_name_of_its_termination_log(said: dict[str, Any]) -> None:
    answer = said["answer"]
    # A container outside of pods has none in any pod.
    named = container_name_of(said["pid"], answer.get("pod_uid", POD), RECORDED / said["tree"])
    assert named == answer.get("container_name", "")


def test_what_is_no_mountinfo_says_nothing(tmp_path: Path) -> None:
    assert container_name("garbage\n\n1 2\n", POD) == ""
    assert container_name_of(1, POD, tmp_path) == ""
