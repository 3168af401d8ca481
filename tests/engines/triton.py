"""Real Triton on the CPU, scraped by a real daemon: joules per inference. Run by `make triton`.

Installs tritonserver from the wheel of PyTriton into an environment of its own (60 MB), serves two models in Python
that only wait, one four times as long as the other, and starts the daemon on a recording of a GPU. Half a minute.

    TRITON_PIP_OPTIONS   options for pip
"""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.busy_recording import busy_recording
from tests.daemon_process import DaemonProcess
from tests.engines.vllm_cpu import check

REPOSITORY = Path(__file__).parents[2]
BUILD = REPOSITORY / "build" / "triton"
PYTRITON = "0.7.0"
START_SECONDS = 60.0
WAITS = {"short": 0.005, "long": 0.020}
"""Seconds by model."""
INFERENCES = 400

MODEL = """
import time
import numpy as np
import triton_python_backend_utils as utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep({wait})
        return [utils.InferenceResponse([utils.Tensor("OUT", one.inputs()[0].as_numpy())]) for one in requests]
"""
CONFIGURATION = """
name: "{name}"
backend: "python"
max_batch_size: 8
input [{{ name: "IN" data_type: TYPE_FP32 dims: [ 1 ] }}]
output [{{ name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] }}]
instance_group [{{ kind: KIND_CPU count: 1 }}]
dynamic_batching {{ }}
"""


def install() -> Path:
    """Return the folder of tritonserver; install what is missing."""
    python = BUILD / "bin" / "python"
    stamp = BUILD / f".installed-{PYTRITON}"
    if not stamp.exists():
        print(f"installing tritonserver (PyTriton {PYTRITON}) into {BUILD}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(BUILD)], check=True)
        options = shlex.split(os.environ.get("TRITON_PIP_OPTIONS", ""))
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *options]
        subprocess.run([*pip, f"nvidia-pytriton=={PYTRITON}", "numpy"], check=True)
        stamp.touch()
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    server = Path(packages, "pytriton", "tritonserver")
    # The wheel has a stub for each version of Python; the backend looks for it beside itself.
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy2(stub, server / "backends" / "python" / stub.name)
    return server


@contextlib.contextmanager
def serving(server: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the URLs of inference and of metrics of a Triton that is ready."""
    models = folder / "models"
    for name, wait in WAITS.items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "config.pbtxt").write_text(CONFIGURATION.format(name=name))
        (models / name / "1" / "model.py").write_text(MODEL.format(wait=wait))
    with contextlib.ExitStack() as free:
        sockets = [free.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        http, grpc, metrics = (one.getsockname()[1] for one in sockets)
    environment = {**os.environ, "PATH": f"{BUILD / 'bin'}:{os.environ['PATH']}"}
    libraries = [str(server / "external_libs"), str(server / "lib"), environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    log = folder / "triton.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                str(server / "bin" / "tritonserver"),
                f"--model-repository={models}",
                f"--backend-directory={server / 'backends'}",
                f"--http-port={http}",
                f"--grpc-port={grpc}",
                f"--metrics-port={metrics}",
                "--allow-gpu-metrics=false",
            ],
            stdout=output,
            stderr=output,
            env=environment,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        url = f"http://127.0.0.1:{http}"
        while True:
            try:
                with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=1):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"Triton does not start:\n{log.read_text()[-3000:]}") from None
                time.sleep(0.1)
        yield url, f"http://127.0.0.1:{metrics}"
    finally:
        process.terminate()
        process.wait(30)


def infer(url: str, model: str) -> None:
    """Ask for one inference."""
    body = {"inputs": [{"name": "IN", "shape": [1, 1], "datatype": "FP32", "data": [1.0]}]}
    request = urllib.request.Request(
        f"{url}/v2/models/{model}/infer", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        answer.read()


def main() -> None:
    """Run the comparison; the exit code says whether all of it holds."""
    server = install()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            serving(server, folder) as (url, metrics),
            DaemonProcess(
                folder, "--source", f"replay:{busy_recording(folder)}", "--engines.targets", metrics
            ) as daemon,
        ):
            daemon.until("the engine", lambda: "scraping an engine" in daemon.text(), 20)
            time.sleep(1.5)  # Its first page says where the counters stand.
            with ThreadPoolExecutor(16) as pool:
                for model in WAITS:
                    list(pool.map(infer, [url] * INFERENCES, [model] * INFERENCES))
            page = urllib.request.urlopen(f"{metrics}/metrics", timeout=5).read().decode()
            print(
                "\n".join(line for line in page.splitlines() if line.startswith("nv_inference_") and "_us" not in line)
            )
            units = {}

            def counted() -> bool:
                rows = json.loads(daemon.get("/v1/ledger")[1])["units"]
                units.update({row["model"]: row["count"] for row in rows if row["unit"] == "inference"})
                return all(units.get(model) == INFERENCES for model in WAITS)

            daemon.until("the inferences", counted, 45)
            check("the daemon counts Triton's inferences", holds=True, saw=units)
            rows = json.loads(daemon.get("/v1/ledger")[1])["attributed"]
            joules = {model: sum(row["joules"] for row in rows if row["model"] == model) for model in WAITS}
            each = {model: joules[model] / INFERENCES for model in WAITS}
            check("each model has joules per inference", holds=min(each.values()) > 0, saw=each)
            daemon.assert_calm()


if __name__ == "__main__":
    main()
