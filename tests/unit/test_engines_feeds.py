import asyncio
import contextlib
import json
from pathlib import Path

import msgspec
import pytest

from jouletrace.config import ConfigError, EngineTarget
from jouletrace.engines.feeds import feeds_of
from jouletrace.requests.inbox import Inbox
from jouletrace.requests.records import EngineRecord, RequestRecord

URL = "http://127.0.0.1:30000"


def test_an_engine_with_a_page_alone_has_no_feed() -> None:
    assert feeds_of([EngineTarget(url=URL)], Inbox(100)) == []


def test_a_wrong_endpoint_is_one_line_that_names_the_key_and_the_engine() -> None:
    with pytest.raises(ConfigError, match=rf"^engines\.targets: {URL}: udp://x is no endpoint"):
        feeds_of([EngineTarget(url=URL, forward_pass=("udp://x",))], Inbox(100))


async def test_request_files_come_in_under_the_engine_s_name(tmp_path: Path) -> None:
    inbox = Inbox(1000)
    [feed] = feeds_of([EngineTarget(url=URL, engine_id="s", models=("m",), request_log=str(tmp_path))], inbox)
    running = asyncio.create_task(feed.run())
    await asyncio.sleep(0.2)  # What was there before the start is passed over.
    row = {"id": "a", "prompt_tokens": 128, "completion_tokens": 64, "e2e_latency": 2.0}
    row |= {"request_received_ts": 1_795_373_146.0, "request_finished_ts": 1_795_373_148.0}
    (tmp_path / "sglang-request-metrics-20261122_12.log").write_text(json.dumps(row) + "\n")
    records: list[msgspec.Struct] = []
    async with asyncio.timeout(20):
        while not any(isinstance(record, RequestRecord) for record in records):
            await inbox.filled()
            batch = inbox.take()
            assert batch is not None
            assert batch.origin == "request_log"
            records += batch.records
            inbox.done(batch)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert any(isinstance(record, EngineRecord) and record.engine_id == "s" for record in records)
    assert {one.engine_id for one in records if isinstance(one, RequestRecord)} == {"s"}
    assert {one.model for one in records if isinstance(one, RequestRecord)} == {"m"}
