"""What the ledger costs: `python -m tests.benchmarks.ledger_core` prints CPU microseconds per record and MiB.

One process: requests by three live records and by one complete record, named and counted steps of 32 members, memory
with 16,384 requests in flight and 100,000 settled, and a pass and a dump to the journal with so many.
"""

import gc
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jouletrace.energy.timeline import Timeline
from jouletrace.requests.devices import BusyTrack, DeviceView
from jouletrace.requests.journal import Journal
from jouletrace.requests.law import LawBook
from jouletrace.requests.ledger import Ledger, Limits
from jouletrace.requests.records import EngineRecord, PrefillPart, RequestRecord, Status, StepRecord, Usage
from jouletrace.requests.state import LedgerState

S = 1_000_000_000
START_NS = 1_700_000_000 * S
RATE = 5_000
"""Requests a second."""
STEPS = 2_000
"""Steps a second, over the engines."""
ENGINES = 8
SECONDS = 10


def devices(seconds: int) -> dict[str, DeviceView]:
    """Eight devices with a 50 Hz ring and GPM at 5 Hz."""
    views = {}
    for number in range(ENGINES):
        line = Timeline(START_NS)
        ends = START_NS + np.arange(1, seconds * 50 + 1) * (S // 50)
        line.extend(ends, np.full(len(ends), 12.0))
        busy = START_NS + np.arange(1, seconds * 5 + 1) * (S // 5)
        views[f"g{number}"] = DeviceView(line, True, BusyTrack(busy, np.ones(len(busy), np.bool_)))
    return views


def new_ledger() -> Ledger:
    ledger = Ledger(Limits(), LawBook())
    for number in range(ENGINES):
        record = EngineRecord(engine_id=f"e{number}", kind="vllm", models=("m",), gpu_uuids=(f"g{number}",))
        ledger.add_engine(record, START_NS)
    return ledger


def request(number: int, *, first_ns: int, end_ns: int | None = None, arrival_ns: int | None = None) -> RequestRecord:
    return RequestRecord(
        request_id=f"chatcmpl-{number:032x}",
        engine_id=f"e{number % ENGINES}",
        model="m",
        tenant=f"tenant-{number % 50}",
        arrival_ns=first_ns - S // 20 if arrival_ns is None else arrival_ns,
        first_token_ns=first_ns,
        end_ns=end_ns,
        status=Status.RUNNING if end_ns is None else Status.FINISHED,
        usage=Usage(input=500, output=50),
    )


def measure(name: str, records: list[list], count: int, add: Callable[[Ledger], Callable], ledger: Ledger) -> float:
    """Tell each second's records and settle; print and return CPU microseconds per record."""
    views = devices(len(records) + 30)
    take = add(ledger)
    gc.collect()
    added = settled = 0.0
    for second, batch in enumerate(records):
        now_ns = START_NS + (second + 1) * S
        begin = time.process_time()
        for record in batch:
            take(record, now_ns)
        middle = time.process_time()
        ledger.settle(views, now_ns)
        ledger.expire(now_ns)
        ledger.snapshot()
        added += middle - begin
        settled += time.process_time() - middle
    each = (added + settled) / count * 1e6
    print(
        f"{name:44s} {each:6.1f} us a record ({added / count * 1e6:.1f} to add, {settled / count * 1e6:.1f} to settle)"
    )
    return each


def complete_requests() -> float:
    batches = []
    for second in range(SECONDS):
        at = [START_NS + second * S + i * S // RATE for i in range(RATE)]
        batches.append([request(second * RATE + i, first_ns=t, end_ns=t + S // 2) for i, t in enumerate(at)])
    return measure(
        "request, one complete record, boundaries", batches, RATE * SECONDS, lambda book: book.add_request, new_ledger()
    )


def live_requests() -> float:
    """Each request in three records."""
    told: list[list[RequestRecord]] = [[] for _ in range(SECONDS + 2)]
    rate = RATE // 3
    for number in range(rate * SECONDS):
        arrival = START_NS + number * S // rate
        whole = request(number, first_ns=arrival + S // 20, end_ns=arrival + S, arrival_ns=arrival)
        key = {"request_id": whole.request_id, "engine_id": whole.engine_id}
        start = RequestRecord(
            **key, model="m", tenant=whole.tenant, arrival_ns=arrival, status=Status.RUNNING, usage=Usage(input=500)
        )
        first = RequestRecord(**key, first_token_ns=whole.first_token_ns)
        end = RequestRecord(**key, end_ns=whole.end_ns, status=Status.FINISHED, usage=whole.usage)
        for t_ns, record in ((arrival, start), (whole.first_token_ns, first), (whole.end_ns, end)):
            told[(t_ns - START_NS) // S].append(record)
    return measure(
        "request record, live form (three a request)",
        told,
        sum(map(len, told)),
        lambda book: book.add_request,
        new_ledger(),
    )


def steps(*, named: bool) -> float:
    """Steps of 32 members, requests of which stay in flight."""
    ledger = new_ledger()
    for number in range(32 * ENGINES):
        ledger.add_request(request(number, first_ns=START_NS), START_NS)
    names = [
        tuple(f"chatcmpl-{n:032x}" for n in range(32 * ENGINES) if n % ENGINES == engine) for engine in range(ENGINES)
    ]
    each = STEPS // ENGINES
    batches = []
    for second in range(SECONDS):
        batch = []
        for i in range(each):
            t = START_NS + second * S + i * S // each
            for engine in range(ENGINES):
                times = {"engine_id": f"e{engine}", "start_ns": t, "end_ns": t + S // each}
                members = names[engine]
                batch.append(
                    StepRecord(**times, decode=members[1:], prefill=(PrefillPart(request_id=members[0], tokens=256),))
                    if named
                    else StepRecord(**times, decode_requests=31, prefill_tokens=256, prefill_requests=1)
                )
        batches.append(batch)
    name = "step, 32 members by name" if named else "step, members counted"
    return measure(name, batches, STEPS * SECONDS, lambda book: book.add_step, ledger)


def memory() -> float:
    """Resident MiB that 16,384 requests in flight and 100,000 settled ones add."""
    before = _resident_mib()
    ledger = new_ledger()
    views = devices(200)
    each = 4_000
    for second in range(25):
        for i in range(each):
            t = START_NS + second * S + i * S // each
            ledger.add_request(request(second * each + i, first_ns=t, end_ns=t + S // 2), t + S // 2)
        ledger.settle(views, START_NS + (second + 2) * S)
    ledger.settle(views, START_NS + 60 * S)
    for number in range(16_384):
        ledger.add_request(request(1_000_000 + number, first_ns=START_NS + 50 * S), START_NS + 50 * S)
    ledger.settle(views, START_NS + 61 * S)
    seen = ledger.snapshot()
    added = _resident_mib() - before
    print(f"{sum(seen.in_flight.values())} in flight, {sum(seen.requests.values())} settled: {added:.0f} MiB")
    return added


def passes() -> float:
    """Milliseconds of a pass with 16,384 requests in flight and nothing new."""
    ledger = new_ledger()
    views = devices(120)
    for number in range(16_384):
        ledger.add_request(request(number, first_ns=START_NS), START_NS)
    ledger.settle(views, START_NS + 10 * S)
    begin = time.process_time()
    for second in range(11, 61):
        ledger.settle(views, START_NS + second * S)
        ledger.snapshot()
    each = (time.process_time() - begin) / 50 * 1e3
    print(f"pass with 16,384 in flight: {each:.1f} ms")
    return each


def dumps() -> float:
    """Milliseconds to dump 16,384 requests in flight that decode, and to write what has changed to the journal."""
    ledger = new_ledger()
    views = devices(120)
    for number in range(16_384):
        ledger.add_request(request(number, first_ns=START_NS), START_NS)
    dumped = written = 0.0
    with tempfile.TemporaryDirectory() as directory:
        journal = Journal(Path(directory), LedgerState)
        journal.open()
        for second in range(10, 31):
            ledger.settle(views, START_NS + second * S)
            begin = time.process_time()
            state = ledger.dump()
            middle = time.process_time()
            journal.write(state)
            if second > 10:
                dumped += middle - begin
                written += time.process_time() - middle
        journal.close()
    print(f"dump with 16,384 in flight: {dumped / 20 * 1e3:.1f} ms, its journal entry {written / 20 * 1e3:.1f} ms")
    return dumped


def _resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    memory()
    passes()
    dumps()
    request_us = complete_requests()
    live_requests()
    step_us = steps(named=True)
    steps(named=False)
    core = (RATE * request_us + STEPS * step_us) / 1e6
    print(f"{RATE} requests and {STEPS} named steps a second: {100 * core:.0f} % of one core")


if __name__ == "__main__":
    main()
