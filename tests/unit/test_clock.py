import threading
import time
from collections.abc import Iterator

import pytest

from jouletrace.clock import WALL_NOISE_NS, SystemClock

S = 1_000_000_000
MS = 1_000_000


class Machine:
    """The two clocks of a machine, as an administrator and the scheduler move them."""

    def __init__(self) -> None:
        self.monotonic_ns = 5_000 * S
        self.wall_ns = 1_795_373_000 * S
        self.preempted: Iterator[int] = iter(())

    def passes(self, ns: int) -> None:
        self.monotonic_ns += ns
        self.wall_ns += ns

    def read_monotonic(self) -> int:
        self.passes(100)
        return self.monotonic_ns

    def read_wall(self) -> int:
        self.passes(100 + next(self.preempted, 0))
        return self.wall_ns


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(time, "monotonic_ns", machine.read_monotonic)
    monkeypatch.setattr(time, "time_ns", machine.read_wall)
    return machine


def test_agrees_with_the_wall_clock_and_never_goes_back() -> None:
    clock = SystemClock()
    assert clock.now_ns() == pytest.approx(time.time_ns(), abs=50 * MS)
    times = [clock.now_ns() for _ in range(1_000)]
    assert times == sorted(times)
    assert clock.wall_step_ns() == 0


@pytest.mark.parametrize("step_ns", [-3_600 * S, -500 * MS, -3 * MS, 3 * MS, 500 * MS, 3_600 * S])
def test_a_step_of_the_wall_clock_moves_no_steady_time(machine: Machine, step_ns: int) -> None:
    clock = SystemClock()
    before_ns = clock.now_ns()
    assert clock.wall_step_ns() == 0
    machine.wall_ns += step_ns
    machine.passes(10 * S)
    assert clock.now_ns() - before_ns == pytest.approx(10 * S, abs=MS)
    assert clock.wall_step_ns() == pytest.approx(step_ns, abs=1_000)
    # A stamp made now, by whoever reads the wall clock, is now in steady time; and back.
    assert clock.from_wall(machine.wall_ns) == pytest.approx(clock.now_ns(), abs=MS)
    assert clock.to_wall(clock.now_ns()) == pytest.approx(machine.wall_ns, abs=MS)
    stamp_ns = machine.wall_ns - 123_456_789
    assert clock.to_wall(clock.from_wall(stamp_ns)) == pytest.approx(stamp_ns, abs=1_000)


def test_steps_add_up(machine: Machine) -> None:
    clock = SystemClock()
    for step_ns in (-7 * S, 2 * S, 5 * S):
        machine.wall_ns += step_ns
        machine.passes(S)
    assert clock.wall_step_ns() == 0


def test_a_difference_within_read_jitter_is_no_step(machine: Machine) -> None:
    clock = SystemClock()
    machine.wall_ns += WALL_NOISE_NS - 1_000
    assert clock.wall_step_ns() == 0
    stamp_ns = machine.wall_ns
    assert clock.from_wall(stamp_ns) == stamp_ns


def test_a_thread_that_is_preempted_between_two_reads_sees_no_step(machine: Machine) -> None:
    machine.preempted = iter([30 * MS])
    clock = SystemClock()
    machine.preempted = iter([30 * MS, 5 * MS, 0])
    assert clock.wall_step_ns() == 0
    # Even if it is every time, half of the shortest pause is the most that the difference can be off.
    machine.preempted = iter([30 * MS, 3 * MS, 20 * MS, 40 * MS, 25 * MS])
    assert clock.wall_step_ns() == 0


def test_waits_until_a_time_or_until_woken() -> None:
    clock, wake = SystemClock(), threading.Event()
    until_ns = clock.now_ns() + 30 * MS
    clock.wait(until_ns, wake)
    assert clock.now_ns() >= until_ns - MS
    started = time.monotonic()
    clock.wait(clock.now_ns() - S, wake)
    wake.set()
    clock.wait(clock.now_ns() + 60 * S, wake)
    assert time.monotonic() - started < 5
