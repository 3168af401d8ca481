"""Every joule is in exactly one part of the account, whatever comes in and in whichever order."""

import random
from collections.abc import Mapping

import msgspec
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ledger_driver import Timed, residual, tell
from tests.step_simulator import START_NS, Cost, S, Simulator

from jouletrace.energy.timeline import Timeline
from jouletrace.requests.account import LedgerSnapshot
from jouletrace.requests.devices import BusyTrack, DeviceView
from jouletrace.requests.law import Law, LawBook, PrefillSchedule
from jouletrace.requests.ledger import Ledger, Limits
from jouletrace.requests.records import EngineRecord, PrefillPart, RequestRecord, Status, StepRecord, Usage
from jouletrace.requests.state import LedgerState

MS = 1_000_000
FEEDS = ("steps", "counts", "boundaries", "complete", "mixed")


def shuffled(feed: str, engine_id: str, rng: random.Random) -> list[Timed]:
    """Records of a short run: delayed, lost, doubled, out of order, and some nonsense."""
    run = Simulator(
        Cost(3.0, 0.02, 0.06),
        rate=rng.choice((2, 10)),
        seconds=8,
        chunk=256,
        prompts=(16, 300, 2000),
        outputs=(1, 20, 200),
        seed=rng.randrange(1000),
        engine_id=engine_id,
        cached_part=0.3,
        cancelled_part=0.2,
    ).run()
    told: list[Timed] = []
    if feed in ("steps", "mixed"):
        told += [(step.end_ns, step) for step in run.steps]
    if feed in ("counts", "mixed"):
        told += [(step.end_ns + 1, step) for step in run.counted()]
    for job in run.jobs:
        told += [(job.end_ns or 0, job.record(engine_id))] if feed == "complete" else job.live(engine_id)
    told += _nonsense(engine_id, rng)
    kept = [one for one in told if rng.random() > rng.choice((0.0, 0.1))]
    kept += rng.sample(kept, len(kept) // 10)
    delay = rng.choice((0.0, 0.3, 5.0, 30.0))
    return [(t_ns + round(rng.random() * delay * S), record) for t_ns, record in kept]


def _nonsense(engine_id: str, rng: random.Random) -> list[Timed]:
    told: list[Timed] = []
    for number in range(10):
        begin = START_NS + rng.randrange(-2 * S, 12 * S)
        end = begin + rng.choice((0, 1, MS, S, 30 * S))
        name = rng.choice((f"ghost{number}", f"r{number}"))
        told.append(
            (
                end,
                StepRecord(
                    engine_id=engine_id,
                    start_ns=begin,
                    end_ns=end,
                    prefill=(PrefillPart(request_id=name, tokens=0),) if number % 2 else None,
                    decode=(name, name, "x") if number % 3 else (),
                    decode_requests=None,
                ),
            )
        )
        told.append(
            (
                end,
                RequestRecord(
                    request_id=name,
                    engine_id=engine_id,
                    attempt=number % 2,
                    model=rng.choice(("m", None)),
                    arrival_ns=begin,
                    first_token_ns=rng.choice((None, begin, end)),
                    end_ns=rng.choice((None, end)),
                    status=rng.choice((None, Status.FAILED, Status.RUNNING)),
                    usage=rng.choice((None, Usage(input=10, cached_input=10), Usage(output=3))),
                ),
            )
        )
    return told


def rough_timeline(rng: random.Random, seconds: int) -> Timeline:
    line = Timeline(START_NS)
    step_ns = rng.choice((20 * MS, 100 * MS, 500 * MS))
    ends = START_NS + np.arange(1, seconds * S // step_ns + 1) * step_ns
    watts = np.array([rng.choice((0.0, 79.0, 121.0, 690.0)) for _ in range(len(ends))])
    line.extend(ends, watts * step_ns / S, above=watts * step_ns / S * rng.choice((0.0, 0.1)))
    return line


def rough_busy(rng: random.Random, seconds: int) -> BusyTrack | None:
    if rng.random() < 0.3:
        return None
    ends = START_NS + np.arange(1, seconds * 5 + 1) * 200 * MS
    return BusyTrack(ends, np.array([rng.random() < 0.6 for _ in range(len(ends))]))


def counters(seen: LedgerSnapshot) -> dict[object, float]:
    """Everything that must never go down."""
    found: dict[object, float] = {}
    parts: tuple[tuple[str, Mapping], ...] = (
        ("device", seen.device_joules),
        ("attributed", seen.attributed_joules),
        ("allocated", seen.allocated_joules),
        ("idle", seen.idle_joules),
        ("unattributed", seen.unattributed_joules),
        ("requests", seen.requests),
        ("tokens", seen.tokens),
    )
    for name, totals in parts:
        found.update({(name, key): value for key, value in totals.items()})
    for model, buckets in seen.request_joules.items():
        found.update({("bucket", model, bound): n for bound, n in zip(buckets.bounds, buckets.counts, strict=False)})
        found["sum", model] = buckets.total_joules
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    feeds=st.lists(st.sampled_from(FEEDS), min_size=1, max_size=3),
    schedule=st.sampled_from(PrefillSchedule),
    law=st.sampled_from(
        (
            Law(fixed_joules=3.0, prefill_token_joules=0.02, decode_sequence_joules=0.06),
            Law(fixed_joules=0.0, prefill_token_joules=0.0, decode_sequence_joules=0.06),
            Law(fixed_joules=3.0, prefill_token_joules=0.0, decode_sequence_joules=0.0),
            Law(fixed_joules=0.0, prefill_token_joules=1.0, decode_sequence_joules=1e-6, kv_token_joules=1e-6),
        )
    ),
    shared=st.booleans(),
    in_flight=st.sampled_from((3, 16_384)),
    restarts=st.integers(0, 2),
)
def test_conservation(
    seed: int, feeds: list[str], schedule: PrefillSchedule, law: Law, shared: bool, in_flight: int, restarts: int
) -> None:
    rng = random.Random(seed)
    seconds = 150
    uuids = ["g0", "g1"]
    lines = {uuid: rough_timeline(rng, seconds) for uuid in uuids}
    busies = {uuid: rough_busy(rng, seconds) for uuid in uuids}
    shares = rng.choice((None, {f"e{n}": rng.random() for n in range(2)}))
    names = [f"e{n}" for n in range(len(feeds))]
    book = LawBook(default=law, schedules=dict.fromkeys(names, schedule))
    limits = Limits(
        in_flight=in_flight, settled=rng.choice((5, 1000)), tenants_per_model=2, steps=rng.choice((50, 65_536))
    )
    ledger = Ledger(limits, book, start_ns=START_NS + rng.randrange(S))
    engines: list[Timed] = []
    for number, name in enumerate(names):
        mine = tuple(uuids) if number == 0 and rng.random() < 0.4 else (uuids[0 if shared else number % 2],)
        engines.append((START_NS + rng.choice((0, 3 * S)), EngineRecord(engine_id=name, models=("m",), gpu_uuids=mine)))
    told = sorted(
        engines + [one for feed, name in zip(feeds, names, strict=True) for one in shuffled(feed, name, rng)],
        key=lambda one: one[0],
    )
    breaks = {rng.randrange(1, 40) for _ in range(restarts)}
    before: dict[object, float] = {}
    at, now_ns = 0, START_NS
    for turn in range(60):
        now_ns += rng.choice((S // 2, S, S, 3 * S))
        while at < len(told) and told[at][0] <= now_ns:
            tell(ledger, told[at][1], max(told[at][0], now_ns - S))
            at += 1
        views = {
            uuid: DeviceView(lines[uuid], rng.choice((True, False, None)), busies[uuid], shares)
            for uuid in uuids
            if rng.random() > 0.05
        }
        ledger.settle(views, now_ns)
        if rng.random() < 0.1:
            ledger.expire(now_ns + rng.choice((0, 400 * S, 2000 * S)))
        if turn in breaks:
            state = msgspec.msgpack.decode(msgspec.msgpack.encode(ledger.dump()), type=LedgerState)
            ledger = Ledger.restore(state, limits, book, start_ns=now_ns)
        assert residual(ledger) < 1e-9
        after = counters(ledger.snapshot())
        for key, value in before.items():
            assert after[key] >= value - 1e-9 * max(1.0, value), key
        before = after
    ledger.settle({uuid: DeviceView(lines[uuid], True, busies[uuid]) for uuid in uuids}, now_ns, close_ns=now_ns)
    assert residual(ledger) < 1e-9
