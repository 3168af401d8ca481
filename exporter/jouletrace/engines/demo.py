"""The recorded engine of a replay: sends its requests and steps to the daemon's own API, as any engine would."""

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec

from jouletrace.clock import Clock
from jouletrace.engines.client import Client
from jouletrace.gpu.replay import Course, ReplaySource
from jouletrace.requests.records import EngineRecord, RequestRecord, StepRecord
from jouletrace.trace import events
from jouletrace.trace.recording import Recording

TICK_SECONDS: Final = 0.05
"""How late a record may be sent."""


class RecordedEngine:
    """Plays the requests of a recording beside its power, lap after lap, under ids of their own in each lap."""

    def __init__(self, recording: Recording, source: ReplaySource, url: str, *, token_file: str | None = None) -> None:
        """Raise RecordingError when the recording's events make no sense.

        `url` and `token_file` are the daemon's own.
        """
        self._engine = events.engine_of(recording)
        self._records = list(events.records(recording, events.Fidelity.STEPS)) if self._engine else []
        self._source = source
        self._url = url
        self._token_file = token_file

    async def run(self) -> None:
        """Send until cancelled, or to the end of a recording that is played once."""
        if self._engine is None:
            return
        while (course := self._source.course) is None:  # noqa: ASYNC110 - set by the sampler's thread
            await asyncio.sleep(TICK_SECONDS)
        sent = within(self._records, course)
        client = Client(self._url, token_file=self._token_file)
        lap = 0
        try:
            while lap == 0 or course.loop:
                client.send("engine", msgspec.to_builtins(self._engine))
                await self._send_lap(client, course, sent, lap)
                lap += 1
                # Laps without requests end here, too.
                await self._wait_until(course.to_replay(course.begin_ns, lap))
        finally:
            # Not here: what is waited for is the answer of this very process.
            await asyncio.to_thread(client.close)

    async def _send_lap(
        self, client: Client, course: Course, sent: Sequence[tuple[int, StepRecord | RequestRecord]], lap: int
    ) -> None:
        assert self._engine is not None
        names = Names(self._engine, course, self._source.clock, lap)
        for t_ns, record in sent:
            await self._wait_until(course.to_replay(t_ns, lap))
            if isinstance(record, StepRecord):
                client.send("step", msgspec.to_builtins(names.step(record)))
            else:
                client.send("request", msgspec.to_builtins(names.request(record)))

    async def _wait_until(self, replay_ns: int) -> None:
        while self._source.clock.now_ns() < replay_ns:  # noqa: ASYNC110 - the replay's clock, not the loop's
            await asyncio.sleep(TICK_SECONDS)


class Names:
    """What records of the recording are called and when they happen in one lap of a replay."""

    def __init__(self, engine: EngineRecord, course: Course, clock: Clock, lap: int) -> None:
        self._model = engine.models[0]
        self._course = course
        self._clock = clock
        self._lap = lap
        # The replay's start as well: a daemon that is started again must not take them for what it knows already.
        self._prefix = f"{course.origin_ns // 10**9:x}-{lap}-"

    def request(self, record: RequestRecord) -> RequestRecord:
        """Return the record as its engine would send it now."""
        return msgspec.structs.replace(
            record,
            request_id=self._prefix + record.request_id,
            model=self._model,
            arrival_ns=self._time(record.arrival_ns),
            first_token_ns=self._time(record.first_token_ns),
            end_ns=self._time(record.end_ns),
        )

    def step(self, record: StepRecord) -> StepRecord:
        """Return the record as its engine would send it now."""
        return msgspec.structs.replace(
            record,
            start_ns=self._time(record.start_ns),
            end_ns=self._time(record.end_ns),
            prefill=tuple(
                msgspec.structs.replace(part, request_id=self._prefix + part.request_id)
                for part in record.prefill or ()
            ),
            decode=tuple(self._prefix + request_id for request_id in record.decode or ()),
        )

    def _time(self, recording_ns: int | None) -> int | None:
        """Return the wall-clock time of a recording time: engines stamp with that."""
        if recording_ns is None:
            return None
        return self._clock.to_wall(self._course.to_replay(recording_ns, self._lap))


def within(
    records: Sequence[tuple[int, StepRecord | RequestRecord]], course: Course
) -> list[tuple[int, StepRecord | RequestRecord]]:
    """Return the records of requests that lie within a lap as a whole, and the steps that do.

    What a lap cuts in two would begin and never end, or end and never have begun.
    """
    inside = [(t_ns, record) for t_ns, record in records if course.begin_ns <= t_ns <= course.end_ns]
    begun = {r.request_id for _, r in inside if isinstance(r, RequestRecord) and r.arrival_ns is not None}
    ended = {r.request_id for _, r in inside if isinstance(r, RequestRecord) and r.end_ns is not None}
    whole = begun & ended
    return [
        (t_ns, record)
        for t_ns, record in inside
        if (record.start_ns >= course.begin_ns if isinstance(record, StepRecord) else record.request_id in whole)
    ]
