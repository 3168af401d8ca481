"""Runs a ledger over a simulated time, as the daemon's event loop would."""

from collections.abc import Iterable, Mapping

from jouletrace.requests.devices import BusyTrack, DeviceView
from jouletrace.requests.ledger import Ledger
from jouletrace.requests.records import EngineRecord, RequestRecord, StepRecord
from tests.step_simulator import S, START_NS

Timed = tuple[int, EngineRecord | StepRecord | RequestRecord]


def views(ledger_timelines: Mapping[str, object], busy: BusyTrack | None = None, **more: object) -> dict[str, DeviceView]:
    return {
        uuid: DeviceView(timeline, held=True, busy=busy, **more)  # type: ignore[arg-type]
        for uuid, timeline in ledger_timelines.items()
    }


def tell(ledger: Ledger, record: EngineRecord | StepRecord | RequestRecord, now_ns: int):
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
    after: object = None,
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
        if callable(after):
            after(ledger, now_ns)


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
