import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from tests.snapshots import NOW_NS, SECOND_NS, diagnosis_snapshot, full_device, ledger_snapshot, node_snapshot

from jouletrace.clock import SystemClock
from jouletrace.energy.timeline import Timeline
from jouletrace.requests.account import Method, RequestEnergy
from jouletrace.requests.records import Status
from jouletrace.web.application import errors
from jouletrace.web.entrance import Entrance
from jouletrace.web.health import Readiness
from jouletrace.web.live.document import Moment
from jouletrace.web.live.stream import LiveStream
from jouletrace.web.serve import WebServer

WORD = "s3cret"
MS = 1_000_000
REQUEST = RequestEnergy(
    "r1", "e", "m", "acme", Status.FINISHED, 4.0, 3.5, 4.5, 1.0, 3.0, 2.0, 2.0, 0.25, Method.STEPS, True, NOW_NS, NOW_NS
)


class GrowingDevice:
    """A device whose timeline gets a second of 50 samples with each look."""

    def __init__(self, samples: int = 50) -> None:
        self.uuid = full_device(0).info.uuid
        self.timeline = Timeline(NOW_NS - 2 * SECOND_NS)
        self.looks = 0
        self._samples = samples

    def look(self) -> list["GrowingDevice"]:
        self.looks += 1
        ends = self.timeline.end_ns + 20 * MS * np.arange(1, self._samples + 1)
        self.timeline.extend(ends, np.full(self._samples, 0.02 * self.looks))
        return [self]


class Rig:
    """The stream as the daemon serves it, on frozen snapshots and a timeline that grows."""

    def __init__(
        self, *, tokens: Sequence[str] = (), interval_seconds: float = 0.05, max_viewers: int = 4, samples: int = 50
    ) -> None:
        self.device = GrowingDevice(samples)
        self.entrance = Entrance(tokens=tokens, max_body_bytes=1 << 20)
        self.failures = 0
        self.asked = 0
        self.stream = LiveStream(
            moment=self._moment,
            devices=self.device.look,
            requests=self,
            entrance=self.entrance,
            clock=SystemClock(),
            interval_seconds=interval_seconds,
            max_viewers=max_viewers,
        )
        app = web.Application(middlewares=[errors])
        self.stream.add_to(app)
        self.server = WebServer(app, shutdown_seconds=3)
        self.session: aiohttp.ClientSession

    def _moment(self) -> Moment:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("out of order")
        return Moment(
            NOW_NS, node_snapshot(full_device(0)), Readiness(ready=True), ledger_snapshot(), diagnosis_snapshot(), 5.0
        )

    async def running(self, limit: int) -> list[RequestEnergy]:
        self.asked += 1
        return [REQUEST][:limit]

    async def recent(self, limit: int) -> list[RequestEnergy]:
        return [REQUEST] * limit

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Rig"]:
        await self.server.start(["127.0.0.1:0"])
        async with aiohttp.ClientSession() as self.session:
            try:
                yield self
            finally:
                await self.server.stop()

    async def takes_another(self) -> bool:
        async with self.session.get(f"{self.server.urls[0]}/v1/live") as answer:
            return answer.status == 200

    @contextlib.asynccontextmanager
    async def viewer(self, **headers: str) -> AsyncIterator[AsyncIterator[tuple[str, Any]]]:
        async with self.session.get(f"{self.server.urls[0]}/v1/live", headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            yield events(answer)


async def events(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    rest = b""
    async for part in answer.content.iter_any():
        *whole, rest = (rest + part).split(b"\n\n")
        for event in whole:
            name, data = event.decode().split("\n")
            yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def take(stream: AsyncIterator[tuple[str, Any]], count: int) -> list[tuple[str, Any]]:
    async with asyncio.timeout(5):
        return [await anext(stream) for _ in range(count)]


async def test_the_first_round_is_whole_and_the_others_go_on_from_it() -> None:
    async with Rig().serving() as rig, rig.viewer() as stream:
        told = await take(stream, 13)
    assert [name for name, _ in told] == ["hello", *("trace", "drivers", "node", "requests") * 3]
    assert told[0][1]["requests_refused"] is None
    pieces = [data[rig.device.uuid] for name, data in told if name == "trace"]
    # Two more viewers' worth of looks do not matter: each piece begins where the last one ended.
    ends = [piece["start_ms"] + sum(piece["steps_ms"]) for piece in pieces]
    assert [piece["start_ms"] for piece in pieces[1:]] == ends[:-1]
    assert [piece["watts"] for piece in pieces[1:]] == [[2] * 50, [3] * 50]
    # What power went to, too: a minute of it at once, and the same span never twice.
    drivers = [data for name, data in told if name == "drivers"]
    assert drivers[0][rig.device.uuid]["watts"]["tensor"][-1] == pytest.approx(71.9, abs=0.2)
    assert len(drivers[0][rig.device.uuid]["ends_ms"]) == 59
    assert drivers[1:] == [{}, {}]


async def test_a_second_viewer_gets_the_history_and_takes_nothing_from_the_first() -> None:
    async with Rig().serving() as rig, rig.viewer() as first:
        seen = [data[rig.device.uuid] for name, data in await take(first, 13) if name == "trace"]
        async with rig.viewer() as second:
            whole = (await take(second, 2))[1][1][rig.device.uuid]
            seen += [data[rig.device.uuid] for name, data in await take(first, 12) if name == "trace"]
    ends = [piece["start_ms"] + sum(piece["steps_ms"]) for piece in seen]
    assert [piece["start_ms"] for piece in seen[1:]] == ends[:-1]
    assert whole["start_ms"] == seen[0]["start_ms"]
    assert len(whole["watts"]) > len(seen[0]["watts"])


async def test_requests_are_for_the_entitled() -> None:
    async with Rig(tokens=[WORD]).serving() as rig:
        async with rig.viewer() as stream:
            told = await take(stream, 10)
            assert [name for name, _ in told] == ["hello", *("trace", "drivers", "node") * 3]
            assert "token is missing" in told[0][1]["requests_refused"]
            assert "acme" not in json.dumps(told)
            assert rig.asked == 0
        async with rig.viewer(Authorization=f"Bearer {WORD}") as stream:
            told = await take(stream, 5)
            assert told[4][1]["settled"][0]["tenant"] == "acme"
            assert len(told[4][1]["settled"]) == 20
        async with rig.viewer(Authorization="Bearer wrong") as stream:
            assert "requests" not in [name for name, _ in await take(stream, 7)]


async def test_a_stream_ends_when_it_changes_who_may_look() -> None:
    async with Rig(tokens=[WORD]).serving() as rig, rig.viewer(Authorization=f"Bearer {WORD}") as own:
        async with rig.viewer() as other:
            await take(own, 5)
            await take(other, 4)
            asked = rig.asked
            rig.entrance.use_tokens(["new"])
            async with asyncio.timeout(5):
                left = [[name async for name, _ in stream] for stream in (own, other)]
        # What had been sent before may still come, one round of each; nothing is collected for them any more.
        assert all(len(names) <= 4 for names in left)
        assert rig.asked <= asked + 1
        async with rig.viewer(Authorization=f"Bearer {WORD}") as stream:
            assert (await take(stream, 1))[0][1]["requests_refused"]
        async with rig.viewer(Authorization="Bearer new") as stream:
            assert (await take(stream, 1))[0][1]["requests_refused"] is None


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}])
async def test_a_strange_page_in_a_browser_here_is_not_entitled(headers: dict[str, str]) -> None:
    async with Rig().serving() as rig, rig.viewer(**headers) as stream:
        told = await take(stream, 5)
        assert told[0][1]["requests_refused"]
        assert "requests" not in [name for name, _ in told]


async def test_entitled_and_other_viewers_side_by_side() -> None:
    async with (
        Rig(tokens=[WORD]).serving() as rig,
        rig.viewer(Authorization=f"Bearer {WORD}") as own,
        rig.viewer() as other,
    ):
        await take(own, 10)
        assert "requests" not in [name for name, _ in await take(other, 9)]


async def test_viewers_are_bounded_and_a_place_becomes_free() -> None:
    async with Rig(max_viewers=2).serving() as rig:
        async with rig.viewer() as first, rig.viewer() as second:
            await take(first, 4)
            await take(second, 4)
            async with rig.session.get(f"{rig.server.urls[0]}/v1/live") as refused:
                assert refused.status == 503
                assert refused.headers["Retry-After"] == "10"
                assert "2 viewers are looking already" in (await refused.json())["error"]["message"]
        async with asyncio.timeout(5):
            while not await rig.takes_another():  # noqa: ASYNC110 - the other side's state
                await asyncio.sleep(0.05)


async def test_nothing_is_collected_while_nobody_looks() -> None:
    async with Rig().serving() as rig:
        await asyncio.sleep(0.2)
        assert rig.device.looks == 0
        async with rig.viewer() as stream:
            await take(stream, 7)
        await asyncio.sleep(0.3)
        looks = rig.device.looks
        await asyncio.sleep(0.3)
        assert rig.device.looks == looks
        # And it begins anew.
        async with rig.viewer() as stream:
            await take(stream, 7)


async def test_a_viewer_that_does_not_read_is_cut_off_and_the_others_do_not_wait() -> None:
    # 40 kB a round fill what the kernel holds within a second or two.
    async with Rig(interval_seconds=0.01, max_viewers=2, samples=5000).serving() as rig:
        host, port = rig.server.urls[0].removeprefix("http://").split(":")
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect((host, int(port)))
        stuck.sendall(b"GET /v1/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with stuck:
            async with rig.viewer() as stream, asyncio.timeout(20):
                rounds = 0
                async for name, _ in stream:
                    rounds += name == "node"
                    if name == "node" and rounds % 20 == 0 and await rig.takes_another():
                        break


async def test_a_fault_costs_a_round_and_not_the_stream() -> None:
    async with Rig().serving() as rig, rig.viewer() as stream:
        await take(stream, 4)
        rig.failures = 3
        await take(stream, 3)
        assert rig.failures == 0


async def test_the_end_of_the_daemon_ends_the_streams_at_once() -> None:
    rig = Rig()
    async with rig.serving(), rig.viewer() as stream:
        await take(stream, 4)
        at = asyncio.get_running_loop().time()
        await rig.server.stop()
        assert asyncio.get_running_loop().time() - at < 1
        async with asyncio.timeout(5):
            # What was on its way, then the end.
            [name async for name, _ in stream]
