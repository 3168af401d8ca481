"""The sampler on the simulated driver in this process and on virtual time: hours pass in seconds, nothing sleeps."""

import contextlib
import threading
from pathlib import Path
from typing import Any

from jouletrace.gpu.nvml import NvmlDevice, NvmlSource
from jouletrace.gpu.readings import GpuError
from jouletrace.gpu.sampler import Intervals, Sampler
from jouletrace.snapshot import DeviceSnapshot
from tests.nvml_shim import Scenario, Shim

START_NS = 1_700_000_000_000_000_000
NS = 1_000_000_000


class ShimClock:
    """A steady clock that is the shim's; waiting moves it. `step` sets the wall clock."""

    def __init__(self, shim: Shim) -> None:
        self._shim = shim
        self._step_ns = self._jitter_ns = 0

    def now_ns(self) -> int:
        return self._shim.time_ns()

    def wall_step_ns(self) -> int:
        # As on a real machine, two readings of the difference of two clocks never agree to the nanosecond.
        self._jitter_ns = (self._jitter_ns + 137) % 1_000
        return self._step_ns + self._jitter_ns if self._step_ns else 0

    def from_wall(self, wall_ns: int) -> int:
        return wall_ns - self._step_ns

    def to_wall(self, steady_ns: int) -> int:
        return steady_ns + self._step_ns

    def wait(self, until_ns: int, wake: threading.Event) -> None:
        if until_ns > self._shim.time_ns():
            self._shim.set_time_ns(until_ns)

    def step(self, seconds: float) -> None:
        """Set the wall clock, as `date -s` does; the driver's later stamps follow it."""
        self._shim.step_clock_ns(round(seconds * NS))
        self._step_ns += round(seconds * NS)


class SimulatedNode:
    """A node of simulated GPUs with its own time; `sampler` after `begin`."""

    def __init__(self, shim: Shim) -> None:
        self.shim = shim
        shim.set_time_ns(START_NS)
        self.clock = ShimClock(shim)
        self.source = NvmlSource(self.clock)
        self.sampler: Sampler

    def use_real_time(self) -> None:
        """Run on the machine's clock; before anything is opened."""
        self.shim.use_real_time()
        self.source = NvmlSource()

    def open(self) -> list[NvmlDevice]:
        """Open the driver without a sampler."""
        devices = self.source.open()
        return [device for device in devices if isinstance(device, NvmlDevice)]

    def begin(self, intervals: Intervals | None = None, **options: Any) -> "SimulatedNode":
        """Start a sampler: open, probe, plan."""
        self.sampler = Sampler(self.source, intervals or Intervals(), **options)
        self.sampler.begin()
        return self

    def run(self, seconds: float) -> None:
        """Let the sampler do what is due until so much time has passed."""
        never = threading.Event()
        end_ns = self.clock.now_ns() + round(seconds * NS)
        while True:
            with contextlib.suppress(GpuError):
                self.sampler.collect_events(0)
            next_ns = self.sampler.run_due()
            if next_ns > end_ns:
                self.clock.wait(end_ns, never)
                return
            self.clock.wait(next_ns, never)

    def gpu(self, index: int = 0) -> DeviceSnapshot:
        """Return what the views see of a GPU."""
        [device] = [d for d in self.sampler.snapshot.devices if d.info.gpu == index]
        return device

    def close(self) -> None:
        """Let go of the driver and of the scenario."""
        self.source.close()
        self.shim.close()

    def truth(self, start_ns: int, end_ns: int, gpu: int = 0) -> float:
        """Return the energy that a perfect meter would have seen, joules."""
        return self.shim.true_energy_joules(gpu, start_ns, end_ns)


def scenario_node(library: Path, scenario: Scenario, folder: Path) -> SimulatedNode:
    """Load a scenario into this process."""
    return SimulatedNode(Shim(library, scenario, folder))
