"""Where a feed puts the records that it makes."""

from collections.abc import Sequence
from typing import Protocol

from jouletrace.requests.inbox import Inbox
from jouletrace.requests.records import Record


class Sink(Protocol):
    """The inbox as one feed sees it; belongs to the event loop."""

    def offer(self, records: Sequence[Record]) -> bool:
        """Take all of the records, or take none and return False: there is no room."""

    def lost(self, reason: str, count: int = 1) -> None:
        """Count records that came or should have come, and cannot be taken."""


class InboxSink:
    """The inbox as a feed sees it whose records come in under one origin."""

    def __init__(self, inbox: Inbox, origin: str) -> None:
        self._inbox = inbox
        self._origin = origin

    def offer(self, records: Sequence[Record]) -> bool:
        """Take all of the records, or none and return False."""
        return self._inbox.offer(self._origin, records)

    def lost(self, reason: str, count: int = 1) -> None:
        """Count records that cannot be taken."""
        self._inbox.lost(self._origin, reason, count)
