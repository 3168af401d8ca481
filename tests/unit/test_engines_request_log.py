import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from jouletrace.engines import request_log
from jouletrace.engines.request_log import RequestLines, RequestLog, Tail
from jouletrace.requests.records import EngineRecord, Record, RequestRecord, Status, Usage

ENGINE = EngineRecord(engine_id="sg", kind="sglang", models=("llama",))
PROMPT = "the patient is called"
T0 = 1_795_373_146
S = 1_000_000_000


def line(request_id: str = "a", *, without: Sequence[str] = (), **more: Any) -> bytes:
    """Return what SGLang 0.5.23 writes with --enable-metrics, put together from its source."""
    row: dict[str, Any] = {
        "request_parameters": json.dumps({"rid": request_id, "text": f'{PROMPT} "Bob"\n', "stream": True}),
        "id": request_id,
        "finish_reason": {"type": "length", "length": 64},
        "prompt_tokens": 128,
        "weight_version": "default",
        "num_retractions": 0,
        "forward_entry_time": T0 + 0.125,
        "prefill_finished_time": T0 + 0.25,
        "queue_time": 0.1,
        "reasoning_tokens": 0,
        "completion_tokens": 64,
        "cached_tokens": 32,
        "cached_tokens_details": {"device": 32},
        "dp_rank": None,
        "output_token_logprobs": [[-0.5, 17, PROMPT]],
        "e2e_latency": 2.0,
        "request_received_ts": float(T0),
        "first_token_latency": 0.5,
        "api_server_dispatch_finish_ts": T0 + 0.01,
        "request_finished_ts": T0 + 2.0,
        "decode_throughput": 42.0,
        "response_sent_to_client_ts": T0 + 2.01,
    }
    row = {name: value for name, value in {**row, **more}.items() if name not in without}
    return json.dumps(row).encode() + b"\n"


def decoded(*lines: bytes, ranks: int = 1) -> list[RequestRecord]:
    part = RequestLines(ENGINE, ranks).decode(lines)
    assert not part.invalid, part.problem
    return list(part.records)


def test_a_line_is_a_request() -> None:
    assert decoded(line()) == [
        RequestRecord(
            request_id="a",
            engine_id="sg",
            model="llama",
            arrival_ns=T0 * S,
            scheduled_ns=round((T0 + 0.125) * 1e9),  # A float of seconds is exact to a quarter of a microsecond.
            first_token_ns=T0 * S + S // 2,
            end_ns=(T0 + 2) * S,
            status=Status.FINISHED,
            usage=Usage(input=128, cached_input=32, output=64),
        )
    ]


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        # Without --enable-metrics the latency and the time of the answer are all that is told.
        (
            line(without=["request_received_ts", "request_finished_ts", "first_token_latency", "forward_entry_time"]),
            {"arrival_ns": T0 * S + S // 100, "end_ns": T0 * S + 2 * S + S // 100, "first_token_ns": None},
        ),
        (line(without=["request_finished_ts", "response_sent_to_client_ts"]), {"end_ns": (T0 + 2) * S}),
        # Processes whose clocks are some milliseconds apart.
        (line(forward_entry_time=T0 - 0.003), {"scheduled_ns": T0 * S}),
        (line(forward_entry_time=T0 + 0.75), {"scheduled_ns": T0 * S + S // 2}),
        (line(first_token_latency=2.004), {"first_token_ns": (T0 + 2) * S}),
        (line(cached_tokens=999), {"usage": Usage(input=128, cached_input=128, output=64)}),
        # An embedding.
        (line(without=["completion_tokens", "cached_tokens"]), {"usage": Usage(input=128)}),
        (line(finish_reason=None), {"status": Status.FINISHED}),
        (line(finish_reason={"type": "stop", "matched": 2}), {"status": Status.FINISHED}),
        (line(finish_reason={"type": "abort", "message": PROMPT}), {"status": Status.CANCELLED}),
        (line(finish_reason={"type": "abort", "status_code": 500}), {"status": Status.FAILED}),
    ],
)
def test_what_may_be_missing_or_odd(given: bytes, fields: dict[str, Any]) -> None:
    [record] = decoded(given)
    assert {name: getattr(record, name) for name in fields} == pytest.approx(fields)


def test_each_rank_is_an_engine() -> None:
    found = decoded(line("a", dp_rank=0), line("b", dp_rank=3), line("c"), ranks=4)
    assert [record.engine_id for record in found] == ["sg-dp0", "sg-dp3", "sg-dp0"]


def test_bad_lines_are_counted_and_none_of_their_content_is_told() -> None:
    bad = [
        b'{"id": "a", "request_parameters": "' + PROMPT.encode(),
        PROMPT.encode(),
        line(prompt_tokens=-1),
        line(prompt_tokens=PROMPT),
        line(id=None),
        line(without=["request_finished_ts", "response_sent_to_client_ts", "request_received_ts"]),
        line(id="x" * 300),
        b"\xff\xfe",
        b"[" * 10_000,
    ]
    for each in bad:
        part = RequestLines(ENGINE).decode([b"", each, line("good")])
        assert (part.invalid, len(part.records)) == (1, 1)
        assert part.problem
        assert PROMPT not in part.problem
    assert PROMPT not in repr(decoded(line()))


# ---------------------------------------------------------------- the file


def lines(tail: Tail) -> list[bytes]:
    found: list[bytes] = []
    while (piece := tail.read()) is not None:
        found += piece[0]
    return [each for each in found if each]


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_half_lines_wait_for_their_other_half(tmp_path: Path) -> None:
    path = tmp_path / "f"
    append(path, b"one\ntw")
    tail = Tail(path, from_end=False)
    assert lines(tail) == [b"one"]
    append(path, b"o\nthree")
    assert lines(tail) == [b"two"]
    append(path, b"\n")
    assert lines(tail) == [b"three"]
    tail.close()


@pytest.mark.parametrize(
    ("before", "after"), [(b"old\n", [b"f", b"new"]), (b"old\nhal", [b"new"]), (b"", [b"f", b"new"])]
)
def test_from_the_end_the_first_whole_line_counts(before: bytes, after: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "f"
    append(path, before)
    tail = Tail(path, from_end=True)
    append(path, b"f\nnew\n")
    assert lines(tail) == after
    tail.close()


def test_a_file_that_is_cut_short_or_replaced_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "f"
    append(path, b"one\ntwo\nhalf of a li")
    tail = Tail(path, from_end=False)
    assert lines(tail) == [b"one", b"two"]
    path.write_bytes(b"3\n")
    assert lines(tail) == [b"3"]
    append(path, b"4\n")
    path.rename(tmp_path / "f.1")
    append(tmp_path / "f.1", b"5\n")
    path.write_bytes(b"6\n")
    assert lines(tail) == [b"4", b"5", b"6"]
    path.unlink()
    assert tail.read() is None
    tail.close()


def test_a_line_that_never_ends_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(request_log, "READ_BYTES", 300)
    path = tmp_path / "f"
    append(path, b"x" * 5000 + b"\nnext\n")
    tail = Tail(path, from_end=False)
    found: list[bytes] = []
    too_long = 0
    while (piece := tail.read()) is not None:
        found += piece[0]
        too_long += piece[1]
    assert (found, too_long) == ([b"next"], 1)
    tail.close()


# ---------------------------------------------------------------- the directory


class Inbox:
    """A sink with or without room."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.is_full = False
        self.counts: Counter[str] = Counter()

    def offer(self, records: Sequence[Record]) -> bool:
        if self.is_full:
            return False
        self.records += records
        return True

    def lost(self, reason: str, count: int = 1) -> None:
        self.counts[reason] += count

    async def until(self, count: int) -> list[str]:
        """Return the request ids, once so many are there."""
        async with asyncio.timeout(5):
            while len(self.requests()) < count:  # noqa: ASYNC110  (the code under test knows no events)
                await asyncio.sleep(0.005)
        return self.requests()

    def requests(self) -> list[str]:
        return [record.request_id for record in self.records if isinstance(record, RequestRecord)]


@pytest.fixture(name="inbox")
def fixture_inbox(monkeypatch: pytest.MonkeyPatch) -> Inbox:
    monkeypatch.setattr(request_log, "POLL_SECONDS", 0.01)
    return Inbox()


@contextlib.asynccontextmanager
async def following(inbox: Inbox, directory: Path) -> AsyncIterator[None]:
    task = asyncio.create_task(RequestLog(inbox, directory, engine=ENGINE).run())
    await asyncio.sleep(0.05)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_hours_change_and_what_was_there_before_is_not_counted_again(inbox: Inbox, tmp_path: Path) -> None:
    ten, eleven = (tmp_path / f"sglang-request-metrics-20261122_{hour}.log" for hour in (10, 11))
    append(ten, line("counted before"))
    append(tmp_path / "other.log", line("of another program"))
    async with following(inbox, tmp_path):
        append(ten, line("a"))
        await inbox.until(1)
        append(eleven, line("b") + line("c"))
        append(ten, line("late"))
        assert sorted(await inbox.until(4)) == ["a", "b", "c", "late"]
        assert inbox.records[0] == ENGINE
        ten.unlink()
        append(eleven, line("d"))
        assert len(await inbox.until(5)) == 5
    assert not inbox.counts


async def test_a_full_inbox_loses_nothing(inbox: Inbox, tmp_path: Path) -> None:
    inbox.is_full = True
    async with following(inbox, tmp_path):
        append(tmp_path / "sglang-request-metrics-1.log", b"".join(line(str(number)) for number in range(100)))
        await asyncio.sleep(0.05)
        assert not inbox.records
        inbox.is_full = False
        assert await inbox.until(100) == [str(number) for number in range(100)]
    assert not inbox.counts


async def test_a_directory_that_is_not_there_yet_is_told_once(inbox: Inbox, tmp_path: Path) -> None:
    directory = tmp_path / "later"
    with capture_logs() as logs:
        async with following(inbox, directory):
            directory.mkdir()
            await asyncio.sleep(0.03)
            append(directory / "sglang-request-metrics-1.log", line("a") + b"nonsense\n" * 3)
            await inbox.until(1)
    assert inbox.counts == {"invalid": 3}
    assert [entry["log_level"] for entry in logs] == ["warning", "info", "warning"]
    assert str(directory) in logs[0]["path"]


def test_a_megabyte_of_requests_takes_little_time() -> None:
    many = [line(str(number)).strip() for number in range(1000)]
    begin = time.perf_counter()
    assert len(decoded(*many)) == 1000
    assert time.perf_counter() - begin < 0.2
