import asyncio
import base64
import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from structlog.testing import capture_logs

from jouletrace.engines.forward_pass import ForwardPassError, ForwardPasses, ForwardPassSubscriber
from jouletrace.requests.records import EngineRecord, Record, StepRecord, check_step

MS = 1_000_000
T0 = 1_795_373_146_000 * MS
FILE = Path(__file__).parents[1] / "data" / "engines" / "sglang-0.5.23.forward-pass.jsonl"
CAPTURED = [[base64.b64decode(frame) for frame in json.loads(line)] for line in FILE.read_text().splitlines()]
"""What SGLang's own publisher sent: two prefills, a mixed pass, five decodes, an idle pass, a heartbeat."""
ENGINE = EngineRecord(engine_id="sg", kind="sglang", models=("llama",))


class Losses:
    """Counts what is lost."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, reason: str, count: int = 1) -> None:
        self.counts[reason] += count


def passes() -> tuple[ForwardPasses, Counter[str]]:
    losses = Losses()
    return ForwardPasses("sg", losses), losses.counts


def message(number: int, wall_time: float = 0.01, **more: Any) -> list[bytes]:
    scheduled = {"num_decode_requests": 4, "sum_decode_kv_tokens": 4000}
    body = {"version": 1, "counter_id": number, "wall_time": wall_time, "scheduled_requests": scheduled, **more}
    return [b"", number.to_bytes(8, "big"), msgspec.msgpack.encode(body)]


def test_what_sglang_publishes_becomes_steps() -> None:
    reader, lost = passes()
    ends = [45, 66, 78, 90, 102, 114, 126, 137, 1137]
    found = [
        step for frames, end in zip(CAPTURED, ends, strict=True) for step in reader.steps([(T0 + end * MS, frames)])
    ]
    for step in found:
        check_step(step)
    assert not lost
    assert [(s.prefill_requests, s.prefill_tokens, s.decode_requests, s.kv_tokens) for s in found] == [
        (2, 1536, 0, 0),
        (1, 256, 2, 2050),
        *((0, 0, 3, 2309 + 3 * i) for i in range(5)),
    ]
    assert [(s.running, s.waiting) for s in found[:3]] == [(2, 3), (3, 2), (3, 0)]
    assert [(s.start_ns - T0, s.end_ns - T0) for s in found[:3]] == [
        (0, 45 * MS),
        (45 * MS, 66 * MS),
        (66 * MS, 78 * MS),
    ]


def test_messages_that_waited_together_are_laid_out_one_after_another() -> None:
    """Ten passes of 10 ms that are read at once, as after a busy moment of the event loop."""
    reader, _ = passes()
    reader.steps([(T0, message(0))])
    found = reader.steps([(T0 + 100 * MS, message(number)) for number in range(1, 11)])
    assert [s.end_ns - T0 for s in found] == [number * 10 * MS for number in range(1, 11)]
    assert {s.end_ns - s.start_ns for s in found} == {10 * MS}


def test_a_message_never_reaches_back_behind_the_step_before() -> None:
    reader, _ = passes()
    first = reader.steps([(T0, message(0))])[0]
    late = reader.steps([(T0 + 4 * MS, message(1))])[0]
    assert (first.end_ns, late.start_ns, late.end_ns) == (T0, T0, T0 + 4 * MS)


@pytest.mark.parametrize(
    ("numbers", "missed"),
    [
        ([5, 6, 7], 0),
        ([5, 8, 20], 2 + 11),
        ([5, 0, 1], 0),  # Restarted.
        ([5, 2**63], 0),  # Another publisher.
    ],
)
def test_gaps_in_the_numbers_are_losses(numbers: list[int], missed: int) -> None:
    reader, lost = passes()
    for number in numbers:
        reader.steps(
            [(T0, message(min(number, 2**40)) if number < 2**40 else [b"", number.to_bytes(8, "big"), message(1)[2]])]
        )
    assert lost["missed"] == missed


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([1, "w", 0, 7, 0.01]),
        msgspec.msgpack.encode({"wall_time": 0.01}),
        msgspec.msgpack.encode({"version": 2, "wall_time": 0.01}),
        msgspec.msgpack.encode({"version": 1, "wall_time": float("nan")}),
        msgspec.msgpack.encode({"version": 1, "wall_time": -1.0}),
        msgspec.msgpack.encode({"version": 1, "wall_time": 0.01, "scheduled_requests": {"num_decode_requests": -1}}),
        CAPTURED[0][2][:-3],
    ],
)
def test_what_cannot_be_read_is_counted_and_told_once(payload: bytes) -> None:
    reader, lost = passes()
    with capture_logs() as logs:
        assert reader.steps([(T0, [b"", bytes(8), payload]), (T0, [b"", bytes(8), payload]), (T0, [])]) == []
    assert lost == {"invalid": 3}
    assert len(logs) == 1


def test_fields_may_be_added_and_the_number_may_be_in_the_message_only() -> None:
    reader, lost = passes()
    body = message(3, planets=9)[2]
    assert len(reader.steps([(T0, [body]), (T0 + 20 * MS, [message(5)[2]])])) == 2
    assert lost == {"missed": 1}


# ---------------------------------------------------------------- over ZeroMQ


class Inbox:
    """A sink with or without room."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.is_full = False
        self.lost = Losses()

    def offer(self, records: Sequence[Record]) -> bool:
        if self.is_full:
            return False
        self.records += records
        return True

    async def until(self, count: int) -> list[Record]:
        async with asyncio.timeout(5):
            while len(self.records) < count:  # noqa: ASYNC110  (the code under test knows no events)
                await asyncio.sleep(0.005)
        return self.records


@contextlib.asynccontextmanager
async def following(inbox: Inbox, *endpoints: str) -> AsyncIterator[None]:
    task = asyncio.create_task(ForwardPassSubscriber(inbox, endpoints, engine=ENGINE).run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def publishing(endpoint: str) -> AsyncIterator["zmq.asyncio.Socket"]:
    """Yield a PUB socket to which somebody has subscribed."""
    with zmq.asyncio.Context() as context, context.socket(zmq.XPUB) as publisher:
        publisher.setsockopt(zmq.LINGER, 0)
        publisher.bind(endpoint)
        async with asyncio.timeout(5):
            assert await publisher.recv() == b"\x01"
        yield publisher


async def test_a_publisher_that_comes_later_is_followed(tmp_path: Path) -> None:
    inbox, endpoint = Inbox(), f"ipc://{tmp_path}/fpm.0"
    async with following(inbox, endpoint):
        await asyncio.sleep(0.05)
        async with publishing(endpoint) as publisher:
            for frames in CAPTURED:
                await publisher.send_multipart(frames)
            found = await inbox.until(8)
    assert found[0] == ENGINE
    assert [type(record) for record in found[1:]] == [StepRecord] * 7
    assert not inbox.lost.counts


async def test_each_rank_is_an_engine_and_a_restart_is_survived(tmp_path: Path) -> None:
    inbox, endpoints = Inbox(), [f"ipc://{tmp_path}/fpm.{rank}" for rank in range(2)]
    async with following(inbox, *endpoints):
        async with publishing(endpoints[0]) as zero, publishing(endpoints[1]) as one:
            await zero.send_multipart(message(7))
            await one.send_multipart(message(0))
            await inbox.until(4)
        async with publishing(endpoints[1]) as one:
            await one.send_multipart(message(0))
            found = await inbox.until(5)
    assert sorted(record.engine_id for record in found if isinstance(record, EngineRecord)) == ["sg-dp0", "sg-dp1"]
    assert Counter(record.engine_id for record in found if isinstance(record, StepRecord)) == {"sg-dp0": 1, "sg-dp1": 2}
    assert not inbox.lost.counts


async def test_a_full_inbox_costs_steps_which_are_counted(tmp_path: Path) -> None:
    inbox, endpoint = Inbox(), f"ipc://{tmp_path}/fpm.0"
    inbox.is_full = True
    async with following(inbox, endpoint), publishing(endpoint) as publisher:
        await publisher.send_multipart(message(0))
        async with asyncio.timeout(5):
            while not inbox.lost.counts:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        inbox.is_full = False
        await publisher.send_multipart(message(1))
        assert [type(record) for record in await inbox.until(2)] == [EngineRecord, StepRecord]
    assert inbox.lost.counts == {"queue_full": 2}


@pytest.mark.parametrize(
    "endpoint", ["localhost:20380", "tcp://localhost", "ipc://", "ipc:///" + "x" * 200, "http://a:1"]
)
def test_an_endpoint_that_is_none_is_named(endpoint: str) -> None:
    with pytest.raises(ForwardPassError, match=f"^{endpoint} is no endpoint"):
        ForwardPassSubscriber(Inbox(), [endpoint], engine=ENGINE)


def test_without_pyzmq_it_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['zmq'] = None\n"
        "from jouletrace.engines.forward_pass import ForwardPassSubscriber\n"
        "from jouletrace.requests.records import EngineRecord\n"
        "ForwardPassSubscriber(None, ['ipc:///x'], engine=EngineRecord(engine_id='e'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=20)
    assert "ForwardPassError" in done.stderr
    assert "jouletrace[zmq]" in done.stderr
