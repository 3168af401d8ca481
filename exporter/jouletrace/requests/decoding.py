"""Bytes to records: strict about types, forgiving about what is unknown, and exact about what is wrong where.

A body holds one record, a JSON array of records, or NDJSON (a record a line). Bodies are decoded in slices, so that
whoever decodes eight megabytes on an event loop can let others have their turn.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from jouletrace.requests.inbox import Loss
from jouletrace.requests.records import (
    EngineRecord,
    LoadRecord,
    Record,
    RecordError,
    RecordKind,
    RequestRecord,
    StepRecord,
    check_load,
    check_request,
    check_step,
)

SLICE_LINES: Final = 512
"""Records that are decoded in one go: about 1 ms (2.2 us a record of 300 bytes, of which a decoder for many lines
at once would save 0.5 us but not say which line is wrong)."""
SLICE_BYTES: Final = 512 << 10
"""As many bytes at most, unless one record is longer: those of 16 kB take 20 us each."""
SHOWN_BYTES: Final = 120
"""An error repeats at most this much of what somebody else wrote."""

_RECORD_BYTES: Final = 320
"""A request record's struct, usage and numbers; its words have about the length that they have in JSON."""
_MEMBER_BYTES: Final = 96
"""What an id in a list takes beside its letters: 49 bytes of string and a reference, in `prefill` a struct and a number
as well (sys.getsizeof in CPython 3.11)."""

_STRUCTS = {
    RecordKind.ENGINE: EngineRecord,
    RecordKind.STEP: StepRecord,
    RecordKind.REQUEST: RequestRecord,
    RecordKind.LOAD: LoadRecord,
}
_PLACE = re.compile(r"^(?P<problem>.*?)(?: - at (?:the key in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
_KINDS = ", ".join(RecordKind)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a record that makes sense is not taken: the reason of `events_dropped_total`, and what is wrong where."""

    reason: str
    field: str
    message: str


Check = Callable[[Record], Refusal | None]
"""Looks at a record that makes sense; None takes it."""


@dataclass(frozen=True, slots=True)
class LineError:
    """A record that was refused."""

    line: int
    """Counted from 1: the line of NDJSON, the element of an array, 1 for a single record."""
    field: str
    """Dotted, as in `usage.output`; empty when the line as a whole is wrong."""
    message: str
    reason: str = Loss.INVALID
    """Of `events_dropped_total`."""

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"line {self.line}: {where}{self.message}"


@dataclass(frozen=True, slots=True)
class Slice:
    """Some records of a body, in its order, and what was wrong with those that are missing."""

    first_line: int
    records: Sequence[Record]
    errors: Sequence[LineError]
    held_bytes: int = 0
    """About what the records take in memory."""


class TooManyRecordsError(ValueError):
    """A body holds more records than are allowed; nothing of it was decoded."""

    def __init__(self, count: int, limit: int) -> None:
        super().__init__(f"the body holds {count} records and {limit} are allowed; send it in parts")


class RecordDecoder:
    """Decodes records of one kind, or of any kind when each names its own in the field `record`."""

    def __init__(self, kind: RecordKind | None = None, *, max_records: int = 65_536) -> None:
        self._decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record if kind is None else _STRUCTS[kind])
        self._max_records = max_records

    def body(self, body: bytes) -> "Body":
        """Return a body ready for decoding; raises TooManyRecordsError."""
        try:
            elements = _elements(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return Body(self, (), (_explained(1, error),))
        if len(elements) > self._max_records:
            raise TooManyRecordsError(len(elements), self._max_records)
        return Body(self, elements)

    def lines(self, lines: Sequence[bytes | msgspec.Raw], first_line: int = 1, check: Check | None = None) -> Slice:
        """Decode a record a line; blank lines are passed over, and what `check` refuses is an error."""
        decode = self._decoder.decode
        records: list[Record] = []
        errors: list[LineError] = []
        held = 0
        for number, line in enumerate(lines, first_line):
            try:
                record = decode(line)
                if type(record) is RequestRecord:
                    check_request(record)
                elif type(record) is StepRecord:
                    check_step(record)
                elif type(record) is LoadRecord:
                    check_load(record)
            except RecordError as error:
                field, _, message = str(error).partition(": ")
                errors.append(LineError(number, field, message))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                if isinstance(line, msgspec.Raw) or line.strip():
                    errors.append(_explained(number, error))
            else:
                refusal = None if check is None else check(record)
                if refusal is None:
                    records.append(record)
                    held += held_bytes(record, _length(line))
                else:
                    errors.append(LineError(number, refusal.field, refusal.message, refusal.reason))
        return Slice(first_line, records, errors, held)


def held_bytes(record: Record, encoded_bytes: int) -> int:
    """Return about what a record takes in memory (within a factor of 2), from the length of its JSON."""
    members = 0
    if type(record) is StepRecord:
        members = len(record.decode or ()) + len(record.prefill or ())
    elif type(record) is EngineRecord:
        members = len(record.models) + len(record.gpu_uuids)
    return _RECORD_BYTES + encoded_bytes + _MEMBER_BYTES * members


def slices(lines: Sequence[bytes | msgspec.Raw]) -> Iterator[range]:
    """Return which lines to decode in one go: at most SLICE_LINES, and SLICE_BYTES unless a line alone has more."""
    start = size = 0
    for number, line in enumerate(lines):
        size += _length(line)
        if number - start == SLICE_LINES or (size > SLICE_BYTES and number > start):
            yield range(start, number)
            start, size = number, _length(line)
    if start < len(lines):
        yield range(start, len(lines))


def _length(line: bytes | msgspec.Raw) -> int:
    return memoryview(line).nbytes if isinstance(line, msgspec.Raw) else len(line)


class Body:
    """The records of one body, decoded slice by slice."""

    def __init__(
        self, decoder: RecordDecoder, elements: Sequence[bytes | msgspec.Raw], errors: Sequence[LineError] = ()
    ) -> None:
        self._decoder = decoder
        self._elements = elements
        self._errors = errors

    def slices(self, check: Callable[[], Check] | None = None) -> Iterator[Slice]:
        """Decode the body; a slice takes about a millisecond. `check` is asked for the check of each slice."""
        if self._errors:
            yield Slice(1, (), self._errors)
        for part in slices(self._elements):
            elements = self._elements[part.start : part.stop]
            yield self._decoder.lines(elements, part.start + 1, None if check is None else check())

    def count(self, first_line: int = 1) -> int:
        """Return how many records there are from a line on, decoded or not."""
        rest = self._elements[first_line - 1 :]
        return sum(1 for element in rest if isinstance(element, msgspec.Raw) or element.strip())


def _elements(body: bytes) -> Sequence[bytes | msgspec.Raw]:
    """Return the body's records, still encoded; raises the decoder's errors for an array that does not end."""
    start = body.lstrip()[:1]
    if start == b"[":
        return msgspec.json.decode(body, type=list[msgspec.Raw])
    lines = body.split(b"\n")
    if lines and not lines[-1].strip():
        del lines[-1]
    if start == b"{" and len(lines) > 1:
        # One record written over several lines is JSON as a whole; two records never are.
        try:
            msgspec.json.decode(body, type=msgspec.Raw)
        except (msgspec.MsgspecError, RecursionError):
            pass
        else:
            return [body]
    return lines


def _explained(line: int, error: Exception) -> LineError:
    """Return a decoder's complaint as field and message."""
    if isinstance(error, UnicodeDecodeError):
        return LineError(line, "", "holds text that is not UTF-8")
    if isinstance(error, RecursionError):
        return LineError(line, "", "is nested too deeply")
    match = _PLACE.match(str(error))
    assert match is not None
    problem, field = match["problem"], (match["path"] or "").lstrip(".")
    if not isinstance(error, msgspec.ValidationError):
        return LineError(line, "", f"is not valid JSON ({problem.removeprefix('JSON is malformed: ')})")
    missing = re.fullmatch("Object missing required field `(.*)`", problem)
    if missing is not None:
        return LineError(line, f"{field}.{missing[1]}".lstrip("."), "is missing")
    if field == "record":
        return LineError(line, field, f"does not fit here; on a socket it is one of {_KINDS}")
    text = problem.replace("`", "").replace(" | ", " or ")
    clipped = text if len(text) <= SHOWN_BYTES else text[:SHOWN_BYTES] + "..."
    return LineError(line, field, clipped[:1].lower() + clipped[1:])
