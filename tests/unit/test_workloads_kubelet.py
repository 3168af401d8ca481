"""The pod-resources API against a server that speaks real gRPC on a real socket."""

from pathlib import Path

import pytest
from tests.kubelet_server import KubeletServer, Pod

from jouletrace.workloads.kubelet import list_claims
from jouletrace.workloads.pods import Claim, KubeletError

GPU = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


def test_all_claims_on_gpus_and_nothing_else(tmp_path: Path) -> None:
    pods = (
        Pod("team-a", "llm-0", {"engine": [GPU, f"{GPU}::3"], "proxy": []}),
        Pod("team-b", "mig", {"main": ["MIG-f3b4e9d0-0b0c-5b1b-9a51-5d0f1c9a2a11"]}, "nvidia.com/mig-1g.18gb"),
        Pod("team-c", "amd", {"main": ["card0"]}, "amd.com/gpu"),
        Pod("kube-system", "proxy"),
    )
    with KubeletServer(tmp_path / "kubelet.sock", *pods) as kubelet:
        assert list_claims(kubelet.socket) == [
            Claim("team-a", "llm-0", "engine", "nvidia.com/gpu", GPU),
            Claim("team-a", "llm-0", "engine", "nvidia.com/gpu", f"{GPU}::3"),
            Claim("team-b", "mig", "main", "nvidia.com/mig-1g.18gb", "MIG-f3b4e9d0-0b0c-5b1b-9a51-5d0f1c9a2a11"),
        ]


def code(socket: Path, timeout_seconds: float = 5.0) -> str:
    with pytest.raises(KubeletError) as failure:
        list_claims(socket, timeout_seconds)
    assert str(failure.value).startswith(failure.value.code + ": ")
    return failure.value.code


def test_a_socket_that_is_not_there_or_that_nobody_serves(tmp_path: Path) -> None:
    assert code(tmp_path / "none.sock") == "UNAVAILABLE"
    (tmp_path / "file.sock").touch()
    assert code(tmp_path / "file.sock") == "UNAVAILABLE"


def test_a_kubelet_that_restarts_is_heard_at_once(tmp_path: Path) -> None:
    kubelet = KubeletServer(tmp_path / "kubelet.sock", Pod("ns", "pod", {"main": [GPU]}))
    for _ in range(3):
        with kubelet:
            assert len(list_claims(kubelet.socket)) == 1
        assert code(kubelet.socket) == "UNAVAILABLE"


def test_a_slow_answer_is_not_waited_for(tmp_path: Path) -> None:
    with KubeletServer(tmp_path / "kubelet.sock") as kubelet:
        kubelet.release.clear()
        assert code(kubelet.socket, timeout_seconds=0.2) == "DEADLINE_EXCEEDED"


def test_an_answer_that_is_too_long_or_makes_no_sense(tmp_path: Path) -> None:
    with KubeletServer(tmp_path / "kubelet.sock") as kubelet:
        kubelet.raw = bytes(17 << 20)
        assert code(kubelet.socket) == "RESOURCE_EXHAUSTED"
        # Text that is not UTF-8, a length beyond the end, a group that never closes.
        for raw in (b"\x0a\x03\x0a\x01\xff", b"\x0a\x7f", b"\x0b"):
            kubelet.raw = raw
            assert code(kubelet.socket) == "INTERNAL"


def test_a_socket_that_speaks_something_else(tmp_path: Path) -> None:
    import socket
    import threading

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "http.sock"))
        server.listen()

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert code(tmp_path / "http.sock", timeout_seconds=1.0) in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        thread.join(5)
