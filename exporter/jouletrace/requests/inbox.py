"""The bounded queue between those who receive records and the ledger, and the count of what came and what was lost."""

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum

from jouletrace.requests.records import EngineRecord, Record

ENGINE_IDS = 4096
"""Engines that are remembered as announced; a node has some tens."""
RECORD_BYTES = 1024
"""What a record of ours is taken to hold where nobody has counted it."""


class Origin(StrEnum):
    """The way by which records came in; the label `source` of `events_total`."""

    HTTP = "http"
    STREAM = "stream"
    DATAGRAM = "datagram"
    OTLP = "otlp"
    SCRAPE = "scrape"
    FORWARD_PASS = "forward_pass"  # noqa: S105 - no password
    REQUEST_LOG = "request_log"


class Loss(StrEnum):
    """Why a record never reached the ledger; the ledger's own reasons are in `account.Taken`."""

    INVALID = "invalid"
    """It could not be decoded or contradicts itself."""
    QUEUE_FULL = "queue_full"
    TOO_LONG = "too_long"
    """A line or datagram over the limit."""
    INCOMPLETE = "incomplete"
    """The connection ended in the middle of a line."""


@dataclass(frozen=True, slots=True)
class Events:
    """Counts since the start of the process: what came in = what the ledger took + what was dropped."""

    received: Mapping[str, int] = field(default_factory=dict)
    """By origin."""
    dropped: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """By origin and reason."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Records that arrived together."""

    origin: str
    records: Sequence[Record]
    held_bytes: int
    """About what the records take in memory."""


class Inbox:
    """A queue of records that belongs to the event loop.

    It never holds more than `capacity` of them, nor more than about `capacity_bytes` in memory: one step may name
    65,536 requests and takes ten thousand times the room of another. Only an empty queue takes a batch that is larger
    than the whole, else it could never be taken.
    """

    def __init__(self, capacity: int = 65_536, capacity_bytes: int = 64 << 20) -> None:
        self.capacity = capacity
        self.capacity_bytes = capacity_bytes
        self._batches: deque[Batch] = deque()
        self._waiting = 0
        self._held_bytes = 0
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._room = asyncio.Event()
        self._room.set()
        self._received: Counter[str] = Counter()
        self._dropped: Counter[tuple[str, str]] = Counter()
        self._engine_ids: dict[str, None] = {}

    @property
    def engine_ids(self) -> Set[str]:
        """The engines that were announced last; a live view."""
        return self._engine_ids.keys()

    def __len__(self) -> int:
        return self._waiting

    @property
    def held_bytes(self) -> int:
        """About what the records in the queue take in memory."""
        return self._held_bytes

    @property
    def is_full(self) -> bool:
        """Whether an offer was turned down and there is no room for another yet; see `room`."""
        return not self._room.is_set()

    def offer(self, origin: str, records: Sequence[Record], held_bytes: int | None = None) -> bool:
        """Take all of the records and count them as received, or take none and return False.

        `held_bytes` is about what they take in memory (`decoding.held_bytes`).
        """
        if not records:
            return True
        if held_bytes is None:
            held_bytes = RECORD_BYTES * len(records)
        waiting, held = self._waiting + len(records), self._held_bytes + held_bytes
        if waiting > self.capacity or (held > self.capacity_bytes and self._waiting):
            self._room.clear()
            return False
        self._received[origin] += len(records)
        self._batches.append(Batch(origin, records, held_bytes))
        self._waiting, self._held_bytes = waiting, held
        self._drained.clear()
        self._filled.set()
        for record in records:
            if type(record) is EngineRecord:
                self._note_engine(record.engine_id)
        return True

    def _note_engine(self, engine_id: str) -> None:
        self._engine_ids.pop(engine_id, None)
        self._engine_ids[engine_id] = None
        if len(self._engine_ids) > ENGINE_IDS:
            del self._engine_ids[next(iter(self._engine_ids))]

    def lost(self, origin: str, reason: str, count: int = 1) -> None:
        """Count records that came in and cannot be taken."""
        if count:
            self._received[origin] += count
            self._dropped[origin, reason] += count

    def refused(self, origin: str, reason: str) -> None:
        """Count a record as dropped that was received before."""
        self._dropped[origin, reason] += 1

    def take(self) -> Batch | None:
        """Return the oldest batch, None when there is none; `done` must follow once its records are dealt with."""
        return self._batches.popleft() if self._batches else None

    def done(self, batch: Batch) -> None:
        """Give the batch's room back."""
        self._waiting -= len(batch.records)
        self._held_bytes -= batch.held_bytes
        # Half of the room, not the first place: else a full queue wakes every sender for each record.
        if self._waiting <= self.capacity // 2 and self._held_bytes <= self.capacity_bytes // 2:
            self._room.set()
        if not self._waiting:
            self._filled.clear()
            self._drained.set()

    async def filled(self) -> None:
        """Wait until there is a record."""
        await self._filled.wait()

    async def drained(self) -> None:
        """Wait until there is none."""
        await self._drained.wait()

    async def room(self) -> None:
        """Wait until an offer that was turned down is worth repeating."""
        await self._room.wait()

    def events(self) -> Events:
        """Return the counts; may be called from any thread."""
        return Events(dict(self._received), dict(self._dropped))
