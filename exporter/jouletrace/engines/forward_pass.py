"""Steps of SGLang and Dynamo, from the forward-pass metrics that they publish over ZeroMQ.

A message has three frames: a topic (empty), a number that grows by one (eight bytes, big endian) and a MessagePack map
(SGLang 0.5.23, `sglang/srt/observability/forward_pass_metrics.py`; Dynamo 1.6 sends the same). A publisher that is
slow to be read drops messages; the numbers tell how many.

A message tells how long its pass took, not when it was. Passes of an engine run one after another, and a message
leaves after its pass: so a pass ended when its message came, or earlier where the next pass, which is known to have
taken its time before its own message came, leaves no room. Messages that wait together are laid out from the last to
the first. What remains is how late the publisher is: SGLang looks for finished passes once a step, so up to a step,
the same for neighbours; Dynamo on vLLM sends when a pass's output is handled, a few milliseconds.
"""

import asyncio
import importlib.util
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import structlog
from msgspec import Meta

from jouletrace.engines.sink import Sink
from jouletrace.requests.inbox import Loss
from jouletrace.requests.records import Count, EngineRecord, Record, StepRecord

VERSION: Final = 1
"""`FPM_VERSION` of the messages that are understood."""
MISSED: Final = "missed"
"""The reason of `events_dropped_total` for messages that were published and never came."""
LARGEST_GAP: Final = 100_000
"""Numbers that jump further do not count losses; it is another publisher."""
LONGEST_PASS_SECONDS: Final = 600.0
BATCH: Final = 256
"""Messages that are taken together; SGLang publishes 20 to 200 a second."""
REPEAT_SECONDS: Final = 60.0
"""How often an engine is announced again while it works."""
COMPLAINT_SECONDS: Final = 60.0

# Linux takes 107 bytes of path (unix(7)).
_ENDPOINT: Final = re.compile(r"ipc://[^\0]{1,107}|tcp://[A-Za-z0-9_.-]+:[0-9]{1,5}")

_log = structlog.get_logger(__name__)


class ForwardPassError(Exception):
    """Forward-pass metrics cannot be read; the message says why and what to do."""


class _Scheduled(msgspec.Struct, frozen=True, gc=False):
    num_prefill_requests: Count = 0
    sum_prefill_tokens: Count = 0
    num_decode_requests: Count = 0
    sum_decode_kv_tokens: Count = 0


class _Queued(msgspec.Struct, frozen=True, gc=False):
    num_prefill_requests: Count = 0
    num_decode_requests: Count = 0


class _Message(msgspec.Struct, frozen=True, gc=False):
    """The fields of a message that are read; others are passed over."""

    version: int
    wall_time: Annotated[float, Meta(ge=0, le=LONGEST_PASS_SECONDS)]
    counter_id: Count = 0
    scheduled_requests: _Scheduled = _Scheduled()
    queued_requests: _Queued = _Queued()


@dataclass(frozen=True, slots=True)
class _Pass:
    received_ns: int
    message: _Message

    @property
    def length_ns(self) -> int:
        return round(self.message.wall_time * 1e9)

    @property
    def is_step(self) -> bool:
        """Whether requests took part: not so in heartbeats and in passes that only keep other ranks company."""
        scheduled = self.message.scheduled_requests
        work = scheduled.num_prefill_requests or scheduled.sum_prefill_tokens or scheduled.num_decode_requests
        return bool(work) and self.length_ns > 0


class ForwardPasses:
    """Turns the messages of one publisher into steps."""

    def __init__(self, engine_id: str, lost: Callable[[str, int], None]) -> None:
        self._engine_id = engine_id
        self._lost = lost
        self._decode = msgspec.msgpack.Decoder(_Message).decode
        self._expected: int | None = None
        self._end_ns = 0
        self._quiet_until = 0.0

    def steps(self, messages: Sequence[tuple[int, Sequence[bytes]]]) -> list[StepRecord]:
        """Return the steps of messages that were there together: when each came (epoch ns), and its frames."""
        passes = [each for came_ns, frames in messages if (each := self._read(came_ns, frames)) is not None]
        found: list[StepRecord] = []
        latest_ns = passes[-1].received_ns if passes else 0
        for each in reversed(passes):
            end_ns = min(each.received_ns, latest_ns)
            latest_ns = end_ns - each.length_ns
            if each.is_step:
                found.append(self._step(each.message, max(latest_ns, self._end_ns), max(end_ns, self._end_ns)))
        found.reverse()
        if found:
            self._end_ns = found[-1].end_ns
        return found

    def _read(self, came_ns: int, frames: Sequence[bytes]) -> _Pass | None:
        try:
            message = self._decode(frames[-1])
            if message.version != VERSION or not math.isfinite(message.wall_time):
                raise msgspec.ValidationError(f"it has version {message.version}, and {VERSION} is understood")
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, IndexError) as error:
            self._lost(Loss.INVALID, 1)
            self._complain(str(error))
            # It had a number all the same: one that cannot be read is not one that never came.
            self._expected = None
            return None
        number = int.from_bytes(frames[-2], "big") if len(frames) > 1 and len(frames[-2]) == 8 else message.counter_id
        missed = 0 if self._expected is None else number - self._expected
        if 0 < missed <= LARGEST_GAP:
            self._lost(MISSED, missed)
        self._expected = number + 1
        return _Pass(came_ns, message)

    def _step(self, message: _Message, start_ns: int, end_ns: int) -> StepRecord:
        scheduled, queued = message.scheduled_requests, message.queued_requests
        return StepRecord(
            engine_id=self._engine_id,
            start_ns=start_ns,
            end_ns=end_ns,
            prefill_tokens=scheduled.sum_prefill_tokens,
            prefill_requests=scheduled.num_prefill_requests,
            decode_requests=scheduled.num_decode_requests,
            kv_tokens=scheduled.sum_decode_kv_tokens,
            running=scheduled.num_prefill_requests + scheduled.num_decode_requests,
            waiting=queued.num_prefill_requests + queued.num_decode_requests,
        )

    def _complain(self, problem: str) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + COMPLAINT_SECONDS
            _log.warning("a forward-pass message cannot be read", engine=self._engine_id, problem=problem)


class ForwardPassSubscriber:
    """Follows the publishers of one engine, one endpoint for each data-parallel rank.

    `engine` says what the engine is; with several endpoints each rank is an engine of its own, `ENGINE-dp0` and so
    on in the order of the endpoints. An endpoint is `ipc:///path` or `tcp://host:port`; one that is not there yet is
    waited for. What finds no room in the sink is dropped and counted.

    Raises ForwardPassError when pyzmq is missing or an endpoint is none.
    """

    def __init__(
        self,
        sink: Sink,
        endpoints: Sequence[str],
        *,
        engine: EngineRecord,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        if importlib.util.find_spec("zmq") is None:
            raise ForwardPassError(
                "Forward-pass metrics come over ZeroMQ and pyzmq is not installed; pip install 'jouletrace[zmq]'"
            )
        for endpoint in endpoints:
            if _ENDPOINT.fullmatch(endpoint) is None:
                raise ForwardPassError(
                    f"{endpoint} is no endpoint of forward-pass metrics; write ipc:///path.0 or tcp://127.0.0.1:20380"
                )
        self._sink = sink
        self._wall_ns = wall_ns
        self._ranks = [(endpoint, ranked(engine, rank, len(endpoints))) for rank, endpoint in enumerate(endpoints)]

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as group:
            for endpoint, engine in self._ranks:
                group.create_task(self._follow(endpoint, engine))

    async def _follow(self, endpoint: str, engine: EngineRecord) -> None:
        import zmq  # noqa: PLC0415  (an optional extra)
        import zmq.asyncio  # noqa: PLC0415

        passes = ForwardPasses(engine.engine_id, self._sink.lost)
        announced = -REPEAT_SECONDS
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as subscriber:
            subscriber.setsockopt(zmq.LINGER, 0)
            subscriber.setsockopt(zmq.SUBSCRIBE, b"")
            subscriber.connect(endpoint)
            while True:
                messages = [(await subscriber.recv_multipart(), self._wall_ns())]
                while len(messages) < BATCH and await subscriber.poll(0):
                    messages.append((await subscriber.recv_multipart(), self._wall_ns()))
                records: list[Record] = [*passes.steps([(came_ns, frames) for frames, came_ns in messages])]
                if not records:
                    continue
                if time.monotonic() - announced >= REPEAT_SECONDS:
                    announced = time.monotonic()
                    records.insert(0, engine)
                if not self._sink.offer(records):
                    self._sink.lost(Loss.QUEUE_FULL, len(records))
                    announced = -REPEAT_SECONDS


def ranked(engine: EngineRecord, rank: int, ranks: int) -> EngineRecord:
    """Return the engine of one data-parallel rank: its id says which, where there are several."""
    if ranks == 1:
        return engine
    return msgspec.structs.replace(engine, engine_id=f"{engine.engine_id}-dp{rank}")
