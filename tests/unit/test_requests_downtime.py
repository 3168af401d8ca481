"""Energy between two processes, by the counter; all figures are of a device whose power is known in closed form."""

import msgspec
import pytest
from tests.conftest import NodeFactory
from tests.ledger_driver import residual
from tests.nvml_shim import Constant
from tests.nvml_shim import Device as GpuDevice

from jouletrace.energy.timeline import Timeline
from jouletrace.requests.devices import DeviceView
from jouletrace.requests.law import LawBook
from jouletrace.requests.ledger import Ledger, Limits
from jouletrace.requests.state import LedgerState

S = 1_000_000_000
AT_BOOT = 5000.0
"""What the counter shows at time 0."""


def true_joules(t_s: float) -> float:
    """100 W, but 300 W from 30 to 80 s."""
    return 100.0 * t_s + 200.0 * min(max(t_s - 30.0, 0.0), 50.0)


def view(
    from_s: int, until_s: int, read_s: float | None, *, reset: float = 0.0, limit: float | None = 700.0
) -> DeviceView:
    line = Timeline(from_s * S)
    ends = range(from_s + 1, until_s + 1)
    line.extend([end * S for end in ends], [true_joules(end) - true_joules(end - 1) for end in ends])
    counter = None if read_s is None else (round(read_s * S), AT_BOOT + true_joules(read_s) - reset)
    return DeviceView(line, held=True, counter=counter, limit_watts=limit)


def restarted(ledger: Ledger, start_s: int) -> Ledger:
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(ledger.dump()), type=LedgerState)
    return Ledger.restore(state, Limits(), LawBook(), start_ns=start_s * S)


def first_process() -> Ledger:
    ledger = Ledger(Limits(), LawBook())
    ledger.settle({"g": view(0, 12, 7.5)}, 12 * S)
    # The counter is read each 10 s and may be ahead of the timeline.
    ledger.settle({"g": view(0, 20, 20.5)}, 20 * S)
    return ledger


def test_the_energy_of_the_downtime_is_unattributed() -> None:
    ledger = restarted(first_process(), 90)
    ledger.settle({"g": view(89, 95, None)}, 95 * S)
    assert ledger.snapshot().device_joules["g"] == pytest.approx(2000 + 600)
    for read_s, now_s in ((96.25, 100), (106.0, 110)):
        ledger.settle({"g": view(89, now_s, read_s)}, now_s * S)
        seen = ledger.snapshot()
        assert seen.device_joules["g"] == pytest.approx(true_joules(now_s))
        assert seen.unattributed_joules["g"] == pytest.approx(true_joules(89) - true_joules(20))
        assert residual(ledger) < 1e-9


def test_a_process_that_ended_before_it_read_the_counter_does_not_hide_the_downtime() -> None:
    short = restarted(first_process(), 40)
    short.settle({"g": view(40, 42, None)}, 42 * S)
    ledger = restarted(short, 90)
    ledger.settle({"g": view(90, 100, 95)}, 100 * S)
    assert ledger.snapshot().device_joules["g"] == pytest.approx(true_joules(100))
    assert ledger.snapshot().unattributed_joules["g"] == pytest.approx(
        true_joules(40) - true_joules(20) + true_joules(90) - true_joules(42)
    )


@pytest.mark.parametrize(
    "after",
    [
        view(90, 100, 95, reset=20_000),  # The driver was loaded anew: the counter began at 0.
        view(90, 100, 95, reset=-200_000),  # More than the device can use.
        view(90, 100, 95, limit=None),
        view(15, 100, 95),  # The ring reaches back to before the end: nothing was missed.
    ],
)
def test_what_cannot_be_told_is_not_booked(after: DeviceView) -> None:
    ledger = restarted(first_process(), 90)
    known = after.timeline.joules - float(after.timeline.energies_at([20 * S])[0])
    ledger.settle({"g": after}, 100 * S)
    assert ledger.snapshot().device_joules["g"] == pytest.approx(2000 + known)
    assert ledger.snapshot().unattributed_joules["g"] == 0
    # From then on the counter serves as before.
    again = restarted(ledger, 100)
    again.settle({"g": view(110, 120, 115, reset=AT_BOOT + true_joules(95) - after.counter[1])}, 120 * S)  # type: ignore[index]
    assert again.snapshot().unattributed_joules["g"] == pytest.approx(1000)


def test_the_simulated_drivers_counter_bridges_two_samplers(simulate: NodeFactory) -> None:
    node = simulate(GpuDevice(power=Constant(200))).begin()

    def settle(ledger: Ledger) -> None:
        [live] = node.sampler.live_devices()
        seen = DeviceView(live.timeline, live.held, counter=live.counter, limit_watts=live.info.power_limit_watts)
        ledger.settle({"g": seen}, node.clock.now_ns())

    ledger = Ledger(Limits(), LawBook())
    for _ in range(40):
        node.run(1)
        settle(ledger)
    settled_ns = ledger.snapshot().settled_ns
    began_ns = settled_ns - round(ledger.snapshot().device_joules["g"] / 200 * S)
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(ledger.dump()), type=LedgerState)
    node.shim.advance(120)
    node.begin()
    again = Ledger.restore(state, Limits(), LawBook(), start_ns=node.clock.now_ns())
    for _ in range(30):
        node.run(1)
        settle(again)
    seen = again.snapshot()
    # A tick of the counter is 100 ms.
    assert seen.device_joules["g"] == pytest.approx(node.truth(began_ns, seen.settled_ns), abs=2 * 0.1 * 200)
    assert seen.unattributed_joules["g"] == pytest.approx(120 * 200, rel=0.05)
