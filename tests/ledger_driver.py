"""Runs a ledger over a simulated time, as the daemon's event loop would."""

from collections.abc import Iterable, Mapping

from jouletrace.energy.timeline import Timeline
from jouletrace.requests.account import Taken
from jouletrace.requests.devices import BusyTrack, DeviceView
from jouletrace.requests.ledger import Ledger
from jouletrace.requests.records import EngineRecord, RequestRecord, StepRecord
from tests.step_simulator import START_NS, S

Timed = tuple[int, EngineRecord | StepRecord | RequestRecord]


def views(
    timelines: Mapping[str, Timeline], busy: BusyTrack | None = None, engine_shares: Mapping[str, float] | None = None
) -> dict[str, DeviceView]:
    return {
        uuid: DeviceView(line, held=True, busy=busy, engine_shares=engine_shares) for uuid, line in timelines.items()
    }


def tell(ledger: Ledger, record: EngineRecord | StepRecord | RequestRecord, now_ns: int) -> Taken:
    if isinstance(record, EngineRecord):
        return ledger.add_engine(record, now_ns)
    if isinstance(record, StepRecord):
        return ledger.add_step(record, now_ns)
    return ledger.add_request(record, now_ns)


def drive(
    ledger: Ledger,
    devices: Mapping[str, DeviceView],
    timed: Iterable[Timed],
    until_ns: int,
    *,
    pass_ns: int = S,
) -> None:
    """Tell the records at their times and settle each second; the timelines are complete from the beginning."""
    waiting = sorted(timed, key=lambda one: one[0])
    at = 0
    now_ns = START_NS
    while now_ns < until_ns:
        now_ns += pass_ns
        while at < len(waiting) and waiting[at][0] <= now_ns:
            tell(ledger, waiting[at][1], waiting[at][0])
            at += 1
        ledger.settle(devices, now_ns)


def residual(ledger: Ledger) -> float:
    """Device energy that is in no part of the account, relative to all."""
    seen = ledger.snapshot()
    whole = sum(seen.device_joules.values())
    booked = (
        sum(seen.attributed_joules.values())
        + sum(seen.pending_joules.values())
        + sum(seen.idle_joules.values())
        + sum(seen.unattributed_joules.values())
    )
    return abs(whole - booked) / max(whole, 1.0)
