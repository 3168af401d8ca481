"""Engines found by their processes: real processes with the names, ports and descent that engines have."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jouletrace.engines.discovery import Discovery, engine_kind
from jouletrace.engines.scraping import Target

ENGINE = """
import os, socket, subprocess, sys, time
if "--worker" in sys.argv:
    time.sleep(60)
sock = socket.create_server(("127.0.0.1", int(os.environ.get("LISTEN_ON", "0"))))
other = socket.create_server(("127.0.0.1", 0))
worker = subprocess.Popen([sys.executable, sys.argv[0], "--worker"])
print(sock.getsockname()[1], worker.pid, flush=True)
time.sleep(60)
"""


class Engine:
    """A program of an engine's name that listens on two ports and has a worker, which holds the GPU."""

    def __init__(self, folder: Path, name: str, arguments: list[str], **variables: str) -> None:
        script = folder / name
        script.write_text(ENGINE)
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        assert self.process.stdout is not None
        self.port, self.worker = map(int, self.process.stdout.readline().split())

    def end(self) -> None:
        os.kill(self.worker, 9)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Engine]]:
    engines: list[Engine] = []
    yield engines
    for one in engines:
        one.end()


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_the_listener_is_the_worker_s_parent_and_the_port_is_on_its_command_line(
    tmp_path: Path, started: list[Engine]
) -> None:
    port = free_port()
    arguments = ["serve", "model", "--max-num-seqs=48", "--port", str(port)]
    started.append(Engine(tmp_path, "vllm", arguments, LISTEN_ON=str(port)))
    [engine] = started
    holders = {"GPU-1": [engine.worker, os.getpid()], "GPU-0": [engine.worker], "GPU-2": []}
    [target] = Discovery(lambda: holders).targets()
    assert target == Target(
        url=f"http://127.0.0.1:{port}",
        engine_id=f"vllm-{port}",
        kind="vllm",
        pid=engine.process.pid,
        pids=frozenset({engine.process.pid, engine.worker}),
        container_id=target.container_id,
        pod_uid=target.pod_uid,
        gpu_uuids=("GPU-0", "GPU-1"),
        max_num_seqs=48,
    )


def test_the_port_may_be_a_variable(tmp_path: Path, started: list[Engine]) -> None:
    port = str(free_port())
    started.append(Engine(tmp_path, "text-generation-launcher", [], LISTEN_ON=port, PORT=port))
    [target] = Discovery(lambda: {"g": [started[0].worker]}).targets()
    assert (target.kind, target.url) == ("tgi", f"http://127.0.0.1:{port}")


def test_ports_that_nobody_named_are_not_tried(
    tmp_path: Path, started: list[Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    started.append(Engine(tmp_path, "vllm", ["serve", "model"]))
    discovery = Discovery(lambda: {"g": [started[0].worker]})
    assert discovery.targets() == []
    assert discovery.targets() == []
    said = capsys.readouterr()
    assert (said.out + said.err).count("engines.targets") == 1


def test_a_llama_server_that_falls_asleep(tmp_path: Path, started: list[Engine]) -> None:
    port = str(free_port())
    started.append(
        Engine(tmp_path, "llama-server", ["--port", port, "--sleep-idle-seconds", "300", "-np", "4"], LISTEN_ON=port)
    )
    [target] = Discovery(lambda: {"g": [started[0].worker]}).targets()
    assert (target.kind, target.falls_asleep, target.max_num_seqs) == ("llamacpp", True, 4)


def test_no_engine() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert Discovery(lambda: {"g": [os.getpid(), gone.pid, 1]}).targets() == []
    assert Discovery(dict).targets() == []


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("/usr/bin/python3 /usr/local/bin/vllm serve meta/llama", "vllm"),
        ("python3 -m vllm.entrypoints.openai.api_server --model m", "vllm"),
        ("VLLM::EngineCore", "vllm"),
        ("VLLM::Worker_TP0", "vllm"),
        ("python3 -u -m sglang.launch_server --model-path m", "sglang"),
        ("sglang::scheduler_TP0", "sglang"),
        ("text-generation-launcher --model-id m", "tgi"),
        ("/opt/conda/bin/python3 /opt/conda/bin/text-generation-server serve m", "tgi"),
        ("/usr/bin/python3 /usr/local/bin/trtllm-serve serve m", "trtllm"),
        ("tritonserver --model-repository=/models", "triton"),
        ("/opt/tritonserver/bin/tritonserver", "triton"),
        ("./build/bin/llama-server -m m.gguf", "llamacpp"),
        ("python3 -m dynamo.vllm --model m", "dynamo"),
        ("python3 -m dynamo.sglang", "dynamo"),
        ("python3 -m vllm_nvext.entrypoints.openai.api_server", "nim"),
        ("python3 train.py --engine vllm", None),
        ("python3 vllm_benchmark.py", None),
        ("python3 vllm.py", None),
        ("python3 -c import(vllm)", None),
        ("bash -c vllm", None),
        ("python3", None),
        ("", None),
    ],
)
def test_kinds_by_command_line(line: str, kind: str | None) -> None:
    assert engine_kind(line.split() if line else []) == kind
