import timeit

from jouletrace.clock import SystemClock
from jouletrace.requests.admission import Admission
from jouletrace.requests.inbox import ENGINE_IDS, Inbox, Origin
from jouletrace.requests.records import EngineRecord, RequestRecord, StepRecord


def test_an_engine_is_known_from_the_account_or_the_inbox() -> None:
    inbox, clock = Inbox(), SystemClock()
    settled: set[str] = set()
    admission = Admission(inbox, lambda: settled, clock)

    def is_taken(engine_id: str) -> bool:
        return admission.check()(RequestRecord(request_id="r", engine_id=engine_id)) is None

    assert is_taken("b")
    settled.add("a")
    assert (is_taken("a"), is_taken("b")) == (True, False)
    inbox.offer(Origin.DATAGRAM, [EngineRecord(engine_id="b")])
    assert is_taken("b")
    assert admission.check()(EngineRecord(engine_id="c")) is None


def test_an_engine_that_the_account_dropped_for_its_silence_stays_known() -> None:
    settled = {"restored", "other"}
    admission = Admission(Inbox(), lambda: settled, SystemClock())
    admission.check()
    settled.remove("restored")
    check = admission.check()
    assert check(RequestRecord(request_id="r", engine_id="restored")) is None
    refusal = check(RequestRecord(request_id="r", engine_id="typo"))
    assert refusal is not None
    assert refusal.reason == "unknown_engine"


def test_engines_of_long_ago_are_forgotten() -> None:
    settled: set[str] = set()
    admission = Admission(Inbox(), lambda: settled, SystemClock())
    for number in range(ENGINE_IDS + 10):
        settled.clear()
        settled.add(str(number))
        admission.check()
    check = admission.check()
    assert check(RequestRecord(request_id="r", engine_id="9")) is not None
    assert check(RequestRecord(request_id="r", engine_id="10")) is None


async def test_the_inbox_remembers_a_bounded_number_of_engines() -> None:
    inbox = Inbox(10 * ENGINE_IDS)
    inbox.offer(Origin.HTTP, [EngineRecord(engine_id=f"{i}") for i in range(ENGINE_IDS + 1)])
    assert len(inbox.engine_ids) == ENGINE_IDS
    assert "0" not in inbox.engine_ids


def test_a_look_takes_under_a_microsecond() -> None:
    clock = SystemClock()
    now_ns = clock.now_ns()
    check = Admission(Inbox(), lambda: {"e"}, clock).check()
    step = StepRecord(engine_id="e", start_ns=now_ns - 1, end_ns=now_ns, decode=("r",))
    assert check(step) is None
    assert min(timeit.repeat(lambda: check(step), number=10_000, repeat=5)) / 10_000 < 1e-6
