"""Finished requests of SGLang, from the files of `--export-metrics-to-file`.

SGLang appends an object a request to `sglang-request-metrics-YYYYMMDD_HH.log`, a file an hour (SGLang 0.5.23,
`sglang/srt/observability/request_metrics_exporter.py`). Beside the figures that are read here an object holds the
request's parameters, with the prompt in them: those are passed over undecoded, and no line is ever logged or kept.
"""

import asyncio
import fnmatch
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Final

import msgspec
import structlog
from msgspec import Meta

from jouletrace.engines.forward_pass import ranked
from jouletrace.engines.sink import Sink
from jouletrace.logs import Transitions
from jouletrace.requests.inbox import Loss
from jouletrace.requests.records import (
    Count,
    EngineRecord,
    Identifier,
    Record,
    RecordError,
    RequestRecord,
    Status,
    Usage,
    check_request,
)

PATTERN: Final = "sglang-request-metrics-*.log"
POLL_SECONDS: Final = 0.5
READ_BYTES: Final = 1 << 20
"""What is read and decoded in one go: a millisecond."""
MAX_LINE_BYTES: Final = 64 << 20
"""A line holds the prompt, and the log-probabilities if they were asked for."""
KEPT_FILES: Final = 4
"""The newest files are followed: late requests of the hour before, and another server's files."""
REPEAT_SECONDS: Final = 60.0
COMPLAINT_SECONDS: Final = 60.0

_Seconds = Annotated[float, Meta(ge=0, le=2**33)]

_log = structlog.get_logger(__name__)


class _FinishReason(msgspec.Struct, frozen=True, gc=False):
    type: str = ""
    status_code: int | None = None


class _Line(msgspec.Struct, frozen=True, gc=False):
    """The keys that are read, and no other."""

    id: Identifier
    finish_reason: _FinishReason | None = None
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    cached_tokens: Count | None = None
    dp_rank: Annotated[int, Meta(ge=0, le=65_535)] | None = None
    e2e_latency: _Seconds | None = None
    request_received_ts: _Seconds | None = None
    forward_entry_time: _Seconds | None = None
    first_token_latency: _Seconds | None = None
    request_finished_ts: _Seconds | None = None
    response_sent_to_client_ts: _Seconds | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What a piece of a file held."""

    records: Sequence[RequestRecord]
    invalid: int = 0
    too_long: int = 0
    problem: str = ""
    """What is wrong with the first invalid line, without its content."""


class RequestLines:
    """Decodes lines; `ranks` above 1 tells that each data-parallel rank is an engine of its own."""

    def __init__(self, engine: EngineRecord, ranks: int = 1) -> None:
        self._engine = engine
        self._ranks = ranks
        self._decode = msgspec.json.Decoder(_Line).decode

    def decode(self, lines: Sequence[bytes]) -> Part:
        """Return the requests of complete lines; blank ones are passed over."""
        records: list[RequestRecord] = []
        invalid, problem = 0, ""
        for line in lines:
            try:
                record = self._record(self._decode(line))
                check_request(record)
            except (msgspec.MsgspecError, RecordError, UnicodeDecodeError, RecursionError) as error:
                if line.strip():
                    invalid += 1
                    problem = problem or str(error)
            else:
                records.append(record)
        return Part(records, invalid, 0, problem)

    def _record(self, line: _Line) -> RequestRecord:
        end_ns = _first_ns(line.request_finished_ts, line.response_sent_to_client_ts)
        arrival_ns = _first_ns(line.request_received_ts)
        latency_ns = _first_ns(line.e2e_latency)
        if end_ns is None:
            if arrival_ns is None or latency_ns is None:
                raise RecordError("request_finished_ts: is missing; start SGLang with --enable-metrics")
            end_ns = arrival_ns + latency_ns
        if arrival_ns is None and latency_ns is not None:
            arrival_ns = max(end_ns - latency_ns, 0)
        first_ns = None
        if arrival_ns is not None:
            # SGLang's processes tell wall time by an offset of their own each, a millisecond apart.
            arrival_ns = min(arrival_ns, end_ns)
            if line.first_token_latency:
                first_ns = min(arrival_ns + round(line.first_token_latency * 1e9), end_ns)
        scheduled_ns = _first_ns(line.forward_entry_time)
        if scheduled_ns is not None:
            scheduled_ns = max(min(scheduled_ns, end_ns if first_ns is None else first_ns), arrival_ns or 0)
        return RequestRecord(
            request_id=line.id,
            engine_id=ranked(self._engine, line.dp_rank or 0, self._ranks).engine_id,
            model=self._engine.models[0] if self._engine.models else None,
            arrival_ns=arrival_ns,
            scheduled_ns=scheduled_ns,
            first_token_ns=first_ns,
            end_ns=end_ns,
            status=_status(line.finish_reason),
            usage=Usage(
                input=line.prompt_tokens,
                cached_input=min(line.cached_tokens or 0, line.prompt_tokens),
                output=line.completion_tokens,
            ),
        )


def _first_ns(*seconds: float | None) -> int | None:
    """Return the first that is known and not 0, in nanoseconds."""
    return next((round(value * 1e9) for value in seconds if value), None)


def _status(reason: _FinishReason | None) -> Status:
    if reason is None or reason.type != "abort":
        return Status.FINISHED
    return Status.CANCELLED if reason.status_code is None else Status.FAILED


class Tail:
    """What is appended to a file, line by line; a file that is replaced or cut short is begun anew.

    A file of which only the end is wanted is begun behind its last newline.
    """

    def __init__(self, path: Path, *, from_end: bool) -> None:
        self.path = path
        self._file: IO[bytes] = path.open("rb")
        self._rest = bytearray()
        self._skipping = False
        if from_end and (size := self._file.seek(0, os.SEEK_END)):
            self._file.seek(size - 1)
            self._skipping = self._file.read(1) != b"\n"

    def read(self) -> tuple[list[bytes], int] | None:
        """Return whole lines that have come, at most a piece of the file, and how many were too long; None at its end.

        Raises OSError.
        """
        data = self._file.read(READ_BYTES)
        if not data:
            if os.fstat(self._file.fileno()).st_size < self._file.tell():
                self._begin(self._file)
            elif self._is_replaced():
                old, self._file = self._file, self.path.open("rb")
                old.close()
                self._begin(self._file)
            else:
                return None
            data = self._file.read(READ_BYTES)
        too_long = 0
        head, newline, tail = data.rpartition(b"\n")
        lines: list[bytes] = []
        if newline:
            lines = (bytes(self._rest) + head).split(b"\n")
            self._rest.clear()
            if self._skipping:
                del lines[0]
                self._skipping = False
        if not self._skipping:
            self._rest += tail
        if len(self._rest) > MAX_LINE_BYTES:
            self._rest.clear()
            self._skipping = True
            too_long = 1
        return lines, too_long

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _begin(self, file: IO[bytes]) -> None:
        file.seek(0)
        self._rest.clear()
        self._skipping = False

    def _is_replaced(self) -> bool:
        try:
            there, open_ = self.path.stat(), os.fstat(self._file.fileno())
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) != (open_.st_dev, open_.st_ino)


class RequestLog:
    """Follows the request files of one SGLang server.

    With `ranks` above 1 each data-parallel rank is an engine of its own, `ENGINE-dp0` and so on. What was written
    before the start is passed over: the process before may have counted it. While the sink has no room the files are
    left alone, so that nothing is lost; nothing is remembered on disk.
    """

    def __init__(self, sink: Sink, directory: Path, *, engine: EngineRecord, ranks: int = 1) -> None:
        self._sink = sink
        self._directory = directory
        self._engines = [ranked(engine, rank, ranks) for rank in range(ranks)]
        self._lines = RequestLines(engine, ranks)
        self._tails: dict[Path, Tail] = {}
        self._has_looked = False
        self._failures = Transitions(_log, time.monotonic_ns)
        self._announced = -REPEAT_SECONDS
        self._quiet_until = 0.0

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            while True:
                part = await asyncio.to_thread(self._next)
                if part is None:
                    await asyncio.sleep(POLL_SECONDS)
                else:
                    await self._hand_on(part)
        finally:
            for tail in self._tails.values():
                tail.close()

    def _next(self) -> Part | None:
        """Return what the next piece of any file holds, None when nothing has come."""
        there = self._look()
        for path, tail in tuple(self._tails.items()):
            try:
                piece = tail.read()
            except OSError as error:
                self._failed(path, error)
                piece, there = None, there - {path}
            if piece is not None:
                part = self._lines.decode(piece[0])
                return Part(part.records, part.invalid, piece[1], part.problem)
            if path not in there:
                tail.close()
                del self._tails[path]
        return None

    def _look(self) -> set[Path]:
        """Open files that are new; return those that are to be followed."""
        try:
            names = [path.name for path in self._directory.iterdir()]
        except OSError as error:
            self._failed(self._directory, error)
            names = []
        else:
            self._failures.recovered(str(self._directory), "the directory of request files can be read")
        there = [self._directory / name for name in sorted(fnmatch.filter(names, PATTERN))[-KEPT_FILES:]]
        for path in there:
            if path not in self._tails:
                try:
                    self._tails[path] = Tail(path, from_end=not self._has_looked)
                except OSError as error:
                    self._failed(path, error)
                else:
                    self._failures.recovered(str(path), "the request file can be read", file=str(path))
        self._has_looked = True
        return set(there)

    def _failed(self, path: Path, error: OSError) -> None:
        self._failures.failed(
            str(path),
            "requests of SGLang cannot be read; check that the path is mounted and readable",
            path=str(path),
            problem=error.strerror,
        )

    async def _hand_on(self, part: Part) -> None:
        self._count(part)
        if not part.records:
            return
        records: list[Record] = [*part.records]
        if time.monotonic() - self._announced >= REPEAT_SECONDS:
            self._announced = time.monotonic()
            records = [*self._engines, *records]
        while not self._sink.offer(records):  # noqa: ASYNC110  (a sink has no event; the file waits as long as it must)
            await asyncio.sleep(POLL_SECONDS)

    def _count(self, part: Part) -> None:
        for reason, count in ((Loss.INVALID, part.invalid), (Loss.TOO_LONG, part.too_long)):
            if count:
                self._sink.lost(reason, count)
        now = time.monotonic()
        if (part.invalid or part.too_long) and now >= self._quiet_until:
            self._quiet_until = now + COMPLAINT_SECONDS
            problem = part.problem or f"a line is over {MAX_LINE_BYTES >> 20} MiB"
            _log.warning("a line of SGLang's request files cannot be used", problem=problem)
