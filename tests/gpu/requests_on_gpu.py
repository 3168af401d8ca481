"""Joules per request on real GPUs: a torch engine drives the daemon through its HTTP API.

`python -m tests.gpu.requests_on_gpu OUTDIR SECONDS` on one GPU, or under
`torchrun --standalone --nproc-per-node=2 -m tests.gpu.requests_on_gpu OUTDIR SECONDS` tensor parallel. Steady steps
first (for the law), then serving at changing rates with pauses. Leaves in OUTDIR the recordings, what the engine did
(`truth.json`) and what the daemon answered (`answers.json`); `tests.gpu.evaluate_requests` compares them.
"""

import http.client
import json
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pynvml

from tests.gpu.engine import CHUNK, CONTEXT, Engine, started

GRID = ((0, 1), (0, 16), (0, 64), (256, 0), (256, 16), (256, 64), (128, 4), (512, 16))
GRID_SECONDS = 3.0
RATES = (2.0, 8.0, 4.0, 10.0, 1.0, 6.0)
SERVE_SECONDS, PAUSE_SECONDS = 25.0, 3.0
MODEL, ENGINE_ID = "random-8b", "torch-engine"


def jouletrace(*arguments: str) -> list[str]:
    """Return the command line of a jouletrace command."""
    return [sys.executable, "-m", "jouletrace", *arguments]


class Sender(threading.Thread):
    """Sends records to the daemon in small NDJSON batches, as an engine's plugin would."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        host, port = url.removeprefix("http://").split(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=10)
        self._waiting: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self.refused: list[str] = []
        self.sent = 0

    def put(self, path: str, record: dict[str, Any]) -> None:
        """Queue one record for a path."""
        self._waiting.put((path, record))

    def finish(self) -> None:
        """Send what is left and end."""
        self._waiting.put(None)
        self.join()

    def run(self) -> None:
        """Send a batch each 20 ms."""
        ended = False
        while not ended:
            time.sleep(0.02)
            batches: dict[str, list[dict[str, Any]]] = {}
            while not self._waiting.empty():
                item = self._waiting.get()
                if item is None:
                    ended = True
                    break
                batches.setdefault(item[0], []).append(item[1])
            # A request must be known before the steps that name it.
            for path in sorted(batches):
                self._post(path, batches[path])

    def _post(self, path: str, records: list[dict[str, Any]]) -> None:
        body = "\n".join(json.dumps(record) for record in records)
        self._connection.request("POST", path, body, {"Content-Type": "application/x-ndjson"})
        answer = self._connection.getresponse()
        text = answer.read().decode()
        self.sent += len(records)
        if answer.status != 200 or json.loads(text).get("dropped") or json.loads(text).get("errors"):
            self.refused.append(f"{path} {answer.status} {text[:500]}")


class Truth:
    """Writes down what the engine did, and tells the daemon."""

    def __init__(self, sender: Sender | None) -> None:
        self.steps: list[dict[str, Any]] = []
        self.requests: dict[str, dict[str, Any]] = {}
        self._sender = sender

    def report(self, kind: str, event: dict[str, Any]) -> None:
        """Take one event of the engine."""
        if kind == "step":
            self.steps.append(event)
            record = {"engine_id": ENGINE_ID, **event}
            record["prefill"] = [{"request_id": event["prefill"]["id"], "tokens": CHUNK}] if event["prefill"] else []
            self._send("/v1/steps", record)
            return
        request = self.requests.setdefault(event["id"], {"id": event["id"]})
        identity = {"request_id": event["id"], "engine_id": ENGINE_ID}
        match kind:
            case "start":
                request |= {"arrival_ns": event["t_ns"], "tenant": event["tenant"], "prompt": event["prompt"]}
                fields = {
                    "model": MODEL,
                    "tenant": event["tenant"],
                    "arrival_ns": event["t_ns"],
                    "status": "running",
                    "usage": {"input": event["prompt"]},
                }
            case "first_token":
                request["first_token_ns"] = event["t_ns"]
                fields = {"first_token_ns": event["t_ns"]}
            case _:
                request |= {"end_ns": event["t_ns"], "output": event["output"]}
                fields = {
                    "end_ns": event["t_ns"],
                    "status": "finished",
                    "model": MODEL,
                    "usage": {"input": request["prompt"], "output": event["output"]},
                }
        self._send("/v1/requests", identity | fields)

    def _send(self, path: str, record: dict[str, Any]) -> None:
        if self._sender is not None:
            self._sender.put(path, record)


def fetch(url: str) -> str:
    """Return a page of the daemon."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def chosen(engine: Engine) -> str:
    """Return the flag that picks the engine's GPUs."""
    return "--devices=" + ",".join(map(str, range(engine.world)))


def recorded(engine: Engine, path: Path) -> subprocess.Popen[bytes]:
    """Start recording the engine's GPUs."""
    process = subprocess.Popen(jouletrace("record", chosen(engine), "-o", str(path)))
    time.sleep(4.0)
    return process


def grid(engine: Engine, folder: Path) -> None:
    """Run steady steps while recording, and add what ran to the recording's events."""
    from jouletrace.trace import recording

    recorder = recorded(engine, folder / "grid.json.gz")
    events: list[dict[str, Any]] = []
    for prefill, decode in GRID:
        start_ns, end_ns, steps = engine.steady(prefill, decode, GRID_SECONDS)
        labels = {"phase": "mixed_steps", "prefill_tokens": prefill, "decode": decode, "context": CONTEXT}
        events += [
            {"t_ns": start_ns, "kind": "phase_start", **labels},
            {"t_ns": end_ns, "kind": "work", **labels, "steps": steps, "seconds": (end_ns - start_ns) / 1e9},
            {"t_ns": end_ns, "kind": "phase_end", **labels},
        ]
        time.sleep(0.4)
    time.sleep(2.0)
    recorder.send_signal(signal.SIGINT)
    recorder.wait(60)
    (folder / "grid-events.json").write_text(json.dumps(events))
    for path in sorted(folder.glob("grid*.json.gz")):
        old = recording.read(path)
        recording.write(path, recording.Recording(old.meta, old.streams, (*old.events, *events), old.name))


def serve(engine: Engine, folder: Path, seconds: float) -> None:
    """Serve while the daemon accounts; keep everything for the comparison."""
    steady = str(min(folder.glob("grid*.json.gz")))
    law = subprocess.run(jouletrace("calibrate", steady), capture_output=True, text=True, check=False)
    (folder / "law.txt").write_text(law.stdout + law.stderr)
    arguments = ["--web.listen-address=127.0.0.1:9841", f"--state-dir={folder / 'state'}", chosen(engine)]
    if law.returncode == 0:
        (folder / "laws.json").write_text(json.dumps({"engines": {ENGINE_ID: json.loads(law.stdout)["law"]}}))
        arguments.append(f"--ledger.laws-file={folder / 'laws.json'}")
    daemon = subprocess.Popen(jouletrace("run", *arguments), stderr=(folder / "daemon.log").open("w"))
    url = "http://127.0.0.1:9841"
    for _ in range(200):
        try:
            if "ready" in fetch(f"{url}/-/ready"):
                break
        except OSError:
            time.sleep(0.1)
    recorder = recorded(engine, folder / "serve.json.gz")
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(engine.world)]
    uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    sender = Sender(url)
    sender.start()
    sender.put("/v1/engines", {"engine_id": ENGINE_ID, "kind": "vllm", "models": [MODEL], "gpu_uuids": uuids})
    truth = Truth(sender)
    process = psutil.Process(daemon.pid)
    cpu, begin, number = sum(process.cpu_times()[:2]), time.monotonic(), 0
    counters = [{"t_ns": time.time_ns(), "mj": [pynvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in handles]}]
    while time.monotonic() - begin < seconds:
        rate = RATES[number % len(RATES)]
        left = seconds - (time.monotonic() - begin)
        engine.serve(rate, min(SERVE_SECONDS, left), 100 + number, f"s{number}", truth.report)
        number += 1
        time.sleep(PAUSE_SECONDS)
    counters.append({"t_ns": time.time_ns(), "mj": [pynvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in handles]})
    used = (sum(process.cpu_times()[:2]) - cpu) / (time.monotonic() - begin)
    sender.finish()
    time.sleep(15.0)
    answers = {}
    for request_id in truth.requests:
        try:
            answers[request_id] = json.loads(fetch(f"{url}/v1/requests/{request_id}?engine_id={ENGINE_ID}"))
        except OSError as failure:
            answers[request_id] = {"error": str(failure)}
    result = {
        "answers": answers,
        "ledger": json.loads(fetch(f"{url}/v1/ledger")),
        "metrics": fetch(f"{url}/metrics"),
        "cpu": used,
        "resident_mib": process.memory_info().rss / 2**20,
        "refused": sender.refused[:50],
        "sent": sender.sent,
        "uuids": uuids,
        "counters": counters,
    }
    (folder / "answers.json").write_text(json.dumps(result))
    (folder / "truth.json").write_text(json.dumps({"steps": truth.steps, "requests": list(truth.requests.values())}))
    recorder.send_signal(signal.SIGINT)
    recorder.wait(120)
    daemon.terminate()
    result = {"exit_code": daemon.wait(30), "cpu": used, "steps": len(truth.steps), "requests": len(truth.requests)}
    print(json.dumps(result), flush=True)


def main() -> None:
    """Rank 0 does all of it, the others follow its steps."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    engine = started()
    for prefill, decode in GRID:
        engine.model.step(prefill, decode)
    engine.warm_up()
    if engine.rank:
        engine.follow()
        return
    folder.mkdir(parents=True, exist_ok=True)
    grid(engine, folder)
    serve(engine, folder, seconds)
    engine.stop()
    (folder / "done").touch()


if __name__ == "__main__":
    main()
