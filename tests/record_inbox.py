"""Where a test finds the records that something under test has sent."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from jouletrace.requests.decoding import RecordDecoder
from jouletrace.requests.records import RequestRecord


class RecordInbox:
    """A Unix datagram socket that records arrive at; all that arrive must be valid."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "ingest.dgram")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)
        self._decoder = RecordDecoder()
        self.records: list[Any] = []

    def read(self) -> list[Any]:
        """Return all records so far."""
        while True:
            try:
                part = self._decoder.lines(self._socket.recv(1 << 20).split(b"\n"))
            except BlockingIOError:
                return self.records
            assert not part.errors
            self.records += part.records

    def requests(self) -> list[RequestRecord]:
        """Return the request records so far."""
        return [record for record in self.read() if isinstance(record, RequestRecord)]

    async def ended(self, count: int = 1) -> list[RequestRecord]:
        """Return the last records of requests, once so many have ended."""
        for _ in range(400):
            ended = [record for record in self.requests() if record.end_ns is not None]
            if len(ended) >= count:
                return ended
            await asyncio.sleep(0.01)
        return pytest.fail(f"{count} requests have not ended: {self.records}")

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()
