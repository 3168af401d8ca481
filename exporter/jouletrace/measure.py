"""`jouletrace measure -- CMD`: the energy that the GPUs used while a command ran."""

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jouletrace.energy.timeline import WindowEnergy
from jouletrace.gpu.readings import DeviceInfo
from jouletrace.gpu.sampler import Sampler

SETTLE_SECONDS = 30.0
"""Longest wait for the timelines to reach the command's end."""
START_SECONDS = 20.0
EXIT_NOT_FOUND = 127
EXIT_NOT_EXECUTABLE = 126


class MeasureError(Exception):
    """The measurement could not be made; the message says why, `exit_code` is the one to end with."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Measurement:
    """One device's part in the command's energy."""

    info: DeviceInfo
    energy: WindowEnergy
    energy_source: str
    idle_watts: float | None
    """The learnt level of doing nothing before the command started, when there was time to learn it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the command did and used."""

    exit_code: int
    seconds: float
    devices: Sequence[Measurement]


def measure(sampler: Sampler, command: Sequence[str], failure: Callable[[], BaseException | None]) -> Outcome:
    """Run a command while a started sampler reads the GPUs; return its exit code and the energy of its span.

    Raises MeasureError when the sampler does not come up or falls behind, and what made it fail.
    """
    clock = sampler.source.clock

    def wait(condition: Callable[[], bool], seconds: float, problem: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            died = failure()
            if died is not None:
                raise died
            if time.monotonic() > deadline:
                call = sampler.overdue_call
                raise MeasureError(problem + (f" ({call} does not return)" if call else ""))
            time.sleep(0.02)

    def ends() -> list[int | None]:
        return [sampler_device.timeline_end_ns for sampler_device in sampler.snapshot.devices]

    wait(lambda: bool(ends()) and all(ends()), START_SECONDS, "no energy sample from the GPUs within 20 s")
    start_ns = clock.now_ns()
    exit_code = _run(command)
    end_ns = clock.now_ns()
    wait(
        lambda: all(end is not None and end >= end_ns for end in ends()),
        SETTLE_SECONDS,
        "the GPUs' energy did not reach the end of the command within 30 s",
    )
    devices = []
    for account in sampler.snapshot.devices:
        energy = sampler.window(account.info.uuid, start_ns, end_ns)
        if energy is None:
            raise MeasureError(f"GPU {account.info.gpu} has no energy for the time of the command")
        idle = account.idle_watts.get("parked", account.idle_watts.get("bare"))
        devices.append(Measurement(account.info, energy, account.energy_source or "", idle))
    return Outcome(exit_code, (end_ns - start_ns) / 1e9, devices)


def _run(command: Sequence[str]) -> int:
    """Run the command with our terminal; signals that a terminal sends reach it, and we go on measuring."""
    try:
        process = subprocess.Popen(command)
    except FileNotFoundError:
        raise MeasureError(f"{command[0]}: command not found", EXIT_NOT_FOUND) from None
    except OSError as problem:
        raise MeasureError(f"{command[0]}: {problem.strerror}", EXIT_NOT_EXECUTABLE) from None
    with _signals_to(process):
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _signals_to(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Let the command decide on signals: the terminal sends Ctrl-C to it as well, a SIGTERM we pass on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number)),
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as plain data."""
    return {
        "exit_code": outcome.exit_code,
        "seconds": outcome.seconds,
        "energy_joules": sum(d.energy.joules for d in outcome.devices),
        "devices": [
            {
                "gpu": d.info.gpu,
                "uuid": d.info.uuid,
                "name": d.info.name,
                "energy_joules": d.energy.joules,
                "low": d.energy.low,
                "high": d.energy.high,
                "average_watts": d.energy.joules / outcome.seconds if outcome.seconds else None,
                "energy_source": d.energy_source,
                "idle_watts": d.idle_watts,
            }
            for d in outcome.devices
        ],
    }


def render(outcome: Outcome) -> str:
    """Return the outcome for a terminal, one line a device and a total."""
    lines = [f"{outcome.seconds:.3f} s, exit code {outcome.exit_code}"]
    for d in outcome.devices:
        error = max(d.energy.high - d.energy.joules, d.energy.joules - d.energy.low)
        watts = d.energy.joules / outcome.seconds if outcome.seconds else 0.0
        lines.append(
            f"GPU {d.info.gpu}  {d.energy.joules:12.2f} J  ± {error:.2f} J  {watts:8.1f} W on average"
            f"  {d.info.name} ({d.energy_source})"
        )
    total = sum(d.energy.joules for d in outcome.devices)
    lines.append(f"total  {total:12.2f} J  = {total / 3600:.4f} Wh")
    return "\n".join(lines) + "\n"
