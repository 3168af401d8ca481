"""When the kubelet and the log folders are asked, and what becomes of their failures."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tests.kubelet_server import KubeletServer, Pod
from tests.stepped_clock import SteppedClock

from jouletrace.config import ConfigError
from jouletrace.workloads.naming import NS, PodNaming, logged_pods
from jouletrace.workloads.pods import LivePod, PodName

GPU = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
UID = "6513270e-269e-4d37-b2a7-4de452e6b438"
LLM = PodName("team-a", "llm-0")


@pytest.fixture(name="kubelet")
def fixture_kubelet(tmp_path: Path) -> Iterator[KubeletServer]:
    with KubeletServer(tmp_path / "kubelet.sock", Pod(*LLM, {"engine": [GPU]})) as kubelet:
        yield kubelet


@pytest.fixture(name="clock")
def fixture_clock() -> SteppedClock:
    return SteppedClock()


def live(clock: SteppedClock, uid: str = UID) -> LivePod:
    return LivePod(uid, clock.now_ns(), {"engine": frozenset({GPU})})


def test_the_kubelet_is_asked_for_a_pod_that_is_not_known_and_now_and_then(
    kubelet: KubeletServer, clock: SteppedClock
) -> None:
    naming = PodNaming(str(kubelet.socket), "", clock)
    naming.update([], [GPU])
    assert kubelet.asked == 1, "who was there before any pod came"
    for _ in range(20):
        clock.t_ns += NS
        naming.update([], [GPU])
    assert kubelet.asked == 1
    pod = live(clock)
    naming.update([pod], [GPU])
    assert (kubelet.asked, naming.names[UID], naming.answered_ns) == (2, LLM, clock.now_ns())
    stranger = live(clock, "another")
    for _ in range(59):
        naming.update([pod, stranger], [GPU])
        clock.t_ns += NS // 2
    assert kubelet.asked == 2, "an answer as young as the pod would not say more"
    clock.t_ns += NS
    naming.update([pod, stranger], [GPU])
    assert kubelet.asked == 3


def test_a_kubelet_that_is_away_is_asked_again_and_names_its_pods_when_it_is_back(
    kubelet: KubeletServer, clock: SteppedClock
) -> None:
    naming = PodNaming(str(kubelet.socket), "", clock)
    kubelet.stop()
    pod = live(clock)
    with capture_logs() as logs:
        for _ in range(8):
            naming.update([pod], [GPU])
            clock.t_ns += NS
        assert naming.errors == {"UNAVAILABLE": 4}
        assert (naming.names[UID], naming.answered_ns) == (None, None)
        kubelet.start()
        naming.update([pod], [GPU])
    assert naming.names[UID] == LLM
    assert [(entry["log_level"], entry["event"].partition(",")[0]) for entry in logs] == [
        ("warning", "the kubelet does not say which pods hold the GPUs"),
        ("info", "the kubelet answers again"),
    ]


def test_a_name_stays_while_the_kubelet_is_away(kubelet: KubeletServer, clock: SteppedClock) -> None:
    naming = PodNaming(str(kubelet.socket), "", clock)
    pod = live(clock)
    naming.update([pod], [GPU])
    kubelet.stop()
    clock.t_ns += 100 * NS
    naming.update([pod], [GPU])
    assert (naming.names[UID], naming.errors) == (LLM, {"UNAVAILABLE": 1})


def test_without_grpcio_one_line_says_what_to_do(clock: SteppedClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    monkeypatch.delitem(sys.modules, "jouletrace.workloads.kubelet", raising=False)
    with pytest.raises(ConfigError, match=r"^workloads\.pod_resources_socket: .* `pip install 'jouletrace\[grpc\]'"):
        PodNaming("/kubelet.sock", "", clock)
    PodNaming("", "/var/log/pods", clock)


def test_log_folders_name_pods_without_any_kubelet(tmp_path: Path, clock: SteppedClock) -> None:
    for name in (f"team-a_llm-0_{UID}", f"kube-system_etcd-n1_{'0' * 31}b", "notes.txt", "a_b", "_x_y", "a_b_c_d"):
        (tmp_path / name).mkdir()
    assert logged_pods(tmp_path) == {UID: LLM, "0" * 31 + "b": PodName("kube-system", "etcd-n1")}
    naming = PodNaming("", str(tmp_path), clock)
    naming.update([live(clock), live(clock, "unknown")], [GPU])
    assert (naming.names[UID], naming.names["unknown"], naming.answered_ns) == (LLM, None, None)


def test_log_folders_that_cannot_be_read_are_said_once(
    tmp_path: Path, kubelet: KubeletServer, clock: SteppedClock
) -> None:
    naming = PodNaming(str(kubelet.socket), str(tmp_path / "logs"), clock)
    with capture_logs() as logs:
        naming.update([live(clock)], [GPU])
        naming.update([live(clock, "another")], [GPU])
        assert naming.names[UID] is None, "it is not there any more"
        (tmp_path / "logs").mkdir()
        naming.update([live(clock, "third")], [GPU])
    assert [entry["log_level"] for entry in logs] == ["warning", "info"]
    assert "mount them or set workloads.pod_logs_dir to nothing" in logs[0]["event"]
