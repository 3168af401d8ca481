"""What the ledger would turn down for its time or its engine, found while the sender can still be told."""

from collections.abc import Callable, Set

from jouletrace.clock import Clock
from jouletrace.energy.timeline import DEPTH_NS
from jouletrace.requests.account import Taken
from jouletrace.requests.decoding import Refusal
from jouletrace.requests.inbox import ENGINE_IDS, Inbox
from jouletrace.requests.intake import FUTURE_NS
from jouletrace.requests.records import EngineRecord, Record, RequestRecord

_KEPT = f"{DEPTH_NS // 60_000_000_000} minutes"


class Admission:
    """Looks at records before they are queued.

    `settled_engines` returns the ids of the engines in the account, also those that it took over from before a
    restart. It lags by a settling, so those whose record the inbox has taken are known as well. An engine that the
    account has dropped for its silence stays known: the ledger takes it back as soon as it tells something. As long as
    there is no engine at all the ledger decides.
    """

    def __init__(self, inbox: Inbox, settled_engines: Callable[[], Set[str]], clock: Clock) -> None:
        self._inbox = inbox
        self._settled_engines = settled_engines
        self._clock = clock
        self._seen: dict[str, None] = {}
        """Engines that were in the account, the newest last."""

    def check(self) -> Callable[[Record], Refusal | None]:
        """Return a check of records that come now: None, or why one is refused."""
        now_ns = self._clock.to_wall(self._clock.now_ns())
        latest_ns, earliest_ns = now_ns + FUTURE_NS, now_ns - DEPTH_NS
        announced, seen = self._inbox.engine_ids, self._seen
        for engine_id in self._settled_engines() - seen.keys():
            seen[engine_id] = None
        while len(seen) > ENGINE_IDS:
            del seen[next(iter(seen))]

        def refusal(record: Record) -> Refusal | None:
            if isinstance(record, EngineRecord):
                return None
            engine_id = record.engine_id
            if engine_id is not None and engine_id not in announced and engine_id not in seen and (announced or seen):
                return Refusal(
                    Taken.UNKNOWN_ENGINE,
                    "engine_id",
                    "no engine of this name is known; send it to /v1/engines first",
                )
            end_ns = record.end_ns
            if end_ns is not None:
                if earliest_ns < end_ns <= latest_ns:
                    return None
                if end_ns <= earliest_ns:
                    return Refusal(Taken.LATE, "end_ns", f"is older than the {_KEPT} that the timeline keeps")
                return _future("end_ns", end_ns - now_ns)
            assert isinstance(record, RequestRecord)  # A step always has its end.
            for field, at_ns in (
                ("first_token_ns", record.first_token_ns),
                ("scheduled_ns", record.scheduled_ns),
                ("arrival_ns", record.arrival_ns),
            ):
                if at_ns is not None:
                    # They are in order, so the last one that is known decides.
                    return _future(field, at_ns - now_ns) if at_ns > latest_ns else None
            return None

        return refusal


def _future(field: str, ahead_ns: int) -> Refusal:
    return Refusal(Taken.FUTURE, field, f"lies {ahead_ns / 1e9:.0f} s in the future")
