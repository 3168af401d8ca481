"""Verdicts on a real GPU: known work that no threshold was chosen on, and what the daemon said of it.

`python -m tests.gpu.diagnosis_on_gpu OUTDIR` on a machine with one NVIDIA GPU and torch. A 3-billion-parameter
Llama-shaped model (the shipped recordings hold an 8-billion one) with contexts of 512 and 4096 tokens, duty cycles,
host-bound and transfer phases run while the daemon samples and a recorder records. Leaves in OUTDIR the recording,
each second's answer of `/v1/diagnosis`, `/metrics` and the confusion table (`confusion.md`).
"""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.gpu.requests_on_gpu import fetch, jouletrace

URL = "http://127.0.0.1:9841"
PHASE_SECONDS, SETTLE_SECONDS = 10.0, 4.0
"""A verdict may lag by its hysteresis: only answers about the phase behind its first seconds count."""
IDLE, PARKED, UNDERUTILIZED, MEMORY, COMPUTE, TRANSFER, BALANCED = (
    ("idle",),
    ("parked",),
    ("underutilized",),
    ("memory_bound",),
    ("compute_bound",),
    ("transfer_bound",),
    ("balanced", "compute_bound", "memory_bound"),
)


class Watch:
    """Runs phases and keeps what the daemon says meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.events: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    def phase(self, name: str, expected: tuple[str, ...], work: Callable[[float], None]) -> None:
        """Run `work(until)` for a phase, `until` in seconds of time.time(), with a look at the daemon each second."""
        labels = {"phase": name, "expected": list(expected)}
        start = time.time()
        self.events.append({"t_ns": time.time_ns(), "kind": "phase_start", **labels})
        said: list[dict[str, Any]] = []
        while time.time() < start + PHASE_SECONDS:
            work(min(time.time() + 1.0, start + PHASE_SECONDS))
            answer = json.loads(fetch(f"{URL}/v1/diagnosis"))
            device = answer["devices"][0]
            if device["start_ns"] / 1e9 > start + SETTLE_SECONDS:
                said.append(device)
        self.events.append({"t_ns": time.time_ns(), "kind": "phase_end", **labels})
        verdicts = Counter(one["verdict"] for one in said)
        flags = Counter(flag for one in said for flag in one["flags"])
        self.rows.append(
            {
                "phase": name,
                "expected": list(expected),
                "verdicts": dict(verdicts),
                "flags": dict(flags),
                "last": said[-1:],
            }
        )
        print(f"{name:28} {'/'.join(expected):40} {dict(verdicts)} {dict(flags)}", flush=True)

    def table(self) -> str:
        """Return the confusion table."""
        lines = ["| phase | expected | said, windows | flags |", "|---|---|---|---|"]
        right = wrong = 0
        for row in self.rows:
            said = row["verdicts"]
            right += sum(count for verdict, count in said.items() if verdict in row["expected"])
            wrong += sum(count for verdict, count in said.items() if verdict not in row["expected"])
            lines.append(
                f"| {row['phase']} | {' or '.join(row['expected'])} | "
                + ", ".join(f"{verdict} {count}" for verdict, count in said.items())
                + f" | {', '.join(row['flags'])} |"
            )
        return "\n".join([*lines, "", f"{right} of {right + wrong} windows as expected"]) + "\n"


def run_torch_phases(watch: Watch) -> None:
    """Run everything that needs a context on the GPU."""
    import torch

    from tests.gpu.engine import Model, Shape

    shape = Shape(28, 3072, 24, 8, 128, 8192)
    torch.zeros(1, device="cuda")
    watch.phase("parked", PARKED, lambda until: time.sleep(max(0.0, until - time.time())))

    def repeat(step: Callable[[], Any]) -> Callable[[float], None]:
        def work(until: float) -> None:
            while time.time() < until:
                for _ in range(4):
                    step()
                torch.cuda.synchronize()

        return work

    def duty(step: Callable[[], Any], ratio: float, period: float) -> Callable[[float], None]:
        def work(until: float) -> None:
            while (begin := time.time()) < until:
                while time.time() < begin + ratio * period:
                    step()
                    torch.cuda.synchronize()
                time.sleep(max(0.0, begin + period - time.time()))

        return work

    for context, batches in ((512, (1, 16, 96)), (4096, (8, 48))):
        model = Model(0, 1, shape, context)
        for batch in batches:
            expected = BALANCED if batch >= 96 else MEMORY
            watch.phase(f"decode {batch} x {context}", expected, repeat(model.step(0, batch).replay))
        if context == 512:
            prefill = model.step(4096, 0)
            watch.phase("prefill 4096", COMPUTE, repeat(prefill.replay))
            watch.phase("mixed 1024 + 32", BALANCED, repeat(model.step(1024, 32).replay))
            decode = model.step(0, 16)
            watch.phase("decode 16, duty 30 % of 100 ms", UNDERUTILIZED, duty(decode.replay, 0.3, 0.1))
            watch.phase("prefill, duty 15 % of 2 s", UNDERUTILIZED, duty(prefill.replay, 0.15, 2.0))
            watch.phase("decode 16, duty 80 % of 200 ms", MEMORY, duty(decode.replay, 0.8, 0.2))
        del model
        torch.cuda.empty_cache()
    small = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)

    def tiny() -> None:
        x = small
        for _ in range(50):
            x = torch.relu(x * 1.01)

    watch.phase("eager, tiny kernels", UNDERUTILIZED, repeat(tiny))
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    watch.phase("host to device", TRANSFER, repeat(lambda: device.copy_(host, non_blocking=True)))
    watch.phase("device to host", TRANSFER, repeat(lambda: host.copy_(device, non_blocking=True)))
    large = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(large)
    watch.phase("copy on the device", MEMORY, repeat(partial(other.copy_, large)))
    floats = torch.randn(1 << 28, device="cuda", dtype=torch.float16)
    watch.phase("elementwise fp16", MEMORY, repeat(partial(floats.mul_, 1.0)))
    a = torch.randn(6144, 6144, device="cuda", dtype=torch.float16)
    watch.phase("matrix product fp16", COMPUTE, repeat(lambda: a @ a))
    b = torch.randn(4096, 4096, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    watch.phase("matrix product fp32", COMPUTE, repeat(lambda: b @ b))
    watch.phase("parked again", PARKED, lambda until: time.sleep(max(0.0, until - time.time())))


def main() -> None:
    """Run all phases and write the results."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    daemon = subprocess.Popen(
        jouletrace("run", "--web.listen-address=127.0.0.1:9841", f"--state-dir={folder / 'state'}"),
        stderr=(folder / "daemon.log").open("w"),
    )
    recorder = subprocess.Popen(jouletrace("record", "-o", str(folder / "diagnosis.json.gz")))
    process = psutil.Process(daemon.pid)
    for _ in range(200):
        try:
            if "ready" in fetch(f"{URL}/-/ready"):
                break
        except OSError:
            time.sleep(0.1)
    time.sleep(3.0)
    watch = Watch(folder)
    begin, cpu = time.monotonic(), sum(process.cpu_times()[:2])
    try:
        watch.phase("idle", IDLE, lambda until: time.sleep(max(0.0, until - time.time())))
        run_torch_phases(watch)
    finally:
        used = (sum(process.cpu_times()[:2]) - cpu) / (time.monotonic() - begin)
        (folder / "metrics.txt").write_text(fetch(f"{URL}/metrics"))
        (folder / "events.json").write_text(json.dumps(watch.events))
        (folder / "phases.json").write_text(json.dumps(watch.rows))
        (folder / "confusion.md").write_text(watch.table() + f"\ndaemon: {100 * used:.2f} % of a core\n")
        time.sleep(2.0)
        recorder.send_signal(signal.SIGINT)
        recorder.wait(60)
        daemon.terminate()
        daemon.wait(30)
    from jouletrace.trace import recording

    path = folder / "diagnosis.json.gz"
    old = recording.read(path)
    recording.write(path, recording.Recording(old.meta, old.streams, (*old.events, *watch.events), old.name))
    print((folder / "confusion.md").read_text())
    (folder / "done").touch()


if __name__ == "__main__":
    main()
