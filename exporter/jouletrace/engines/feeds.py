"""What the configuration names beside an engine's page: forward-pass metrics and request files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from jouletrace.config import ConfigError, EngineTarget
from jouletrace.engines.forward_pass import ForwardPassError, ForwardPassSubscriber
from jouletrace.engines.request_log import RequestLog
from jouletrace.engines.scraping import target_of
from jouletrace.engines.sink import InboxSink
from jouletrace.requests.inbox import Inbox, Origin
from jouletrace.requests.records import EngineRecord

DEFAULT_KIND = "sglang"
"""The engine that has both of these feeds."""


class Feed(Protocol):
    """Something that brings records until it is cancelled."""

    async def run(self) -> None:
        """Follow until cancelled."""


def feeds_of(targets: Sequence[EngineTarget], inbox: Inbox) -> list[Feed]:
    """Return the feeds of the engines that have some; raises ConfigError with one line."""
    found: list[Feed] = []
    for target in targets:
        engine = EngineRecord(
            engine_id=target_of(target).engine_id,
            kind=target.kind or DEFAULT_KIND,
            models=target.models,
            gpu_uuids=target.gpu_uuids,
        )
        if target.forward_pass:
            sink = InboxSink(inbox, Origin.FORWARD_PASS)
            try:
                found.append(ForwardPassSubscriber(sink, target.forward_pass, engine=engine))
            except ForwardPassError as failure:
                raise ConfigError(f"engines.targets: {target.url}: {failure}") from None
        if target.request_log is not None:
            ranks = max(1, len(target.forward_pass))
            sink = InboxSink(inbox, Origin.REQUEST_LOG)
            found.append(RequestLog(sink, Path(target.request_log), engine=engine, ranks=ranks))
    return found
