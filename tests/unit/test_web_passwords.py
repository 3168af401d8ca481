import asyncio
import base64
import time
from collections.abc import Iterator

import bcrypt
import pytest
from structlog.testing import capture_logs

from jouletrace.web import passwords
from jouletrace.web.passwords import FAILURE_SECONDS, FAILURES, HELD, Buckets, Passwords

USERS = {"alice": bcrypt.hashpw(b"opensesame", bcrypt.gensalt(4)).decode()}
HOME = "192.0.2.1"


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


RIGHT = basic("alice", "opensesame")


@pytest.fixture(name="clock")
def fixture_clock() -> Clock:
    return Clock()


@pytest.fixture(name="door")
def fixture_door(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Passwords]:
    monkeypatch.setattr(passwords, "HOLD_SECONDS", 0.01)
    door = Passwords(now=clock)
    yield door
    door.close()


async def status(door: Passwords, authorization: str, origin: str = HOME, users: dict[str, str] = USERS) -> int:
    problem = await door.refusal(users, authorization, origin)
    return 200 if problem is None else problem.status


async def test_who_is_let_in(door: Passwords) -> None:
    assert await status(door, RIGHT) == 200
    assert await status(door, RIGHT.replace("Basic", "basic")) == 200
    for wrong in ("", "Basic", "Basic !!", "Bearer abc", basic("alice", "opensesam"), basic("bob", "opensesame")):
        assert await status(door, wrong) == 401, wrong


async def test_hashes_of_htpasswd_and_long_passwords_count(door: Passwords) -> None:
    users = {"a": bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode().replace("$2b$", "$2y$")}
    assert await status(door, basic("a", "x" * 72), users=users) == 200
    assert await status(door, basic("a", "x" * 100), users=users) == 200
    assert await status(door, basic("a", "x" * 71), users=users) == 401
    assert await status(door, basic("a", "x\0"), users=users) == 401


async def test_guesses_are_limited_by_address_and_the_known_come_in_all_the_same(door: Passwords, clock: Clock) -> None:
    assert await status(door, RIGHT) == 200
    answers = [await status(door, basic("alice", f"guess {n}")) for n in range(FAILURES + 3)]
    assert answers == [401] * FAILURES + [429] * 3
    assert await status(door, RIGHT) == 200
    assert await status(door, basic("alice", "guess"), "192.0.2.2") == 401
    clock.seconds += FAILURE_SECONDS
    assert [await status(door, basic("alice", "guess")) for _ in range(2)] == [401, 429]


async def test_a_changed_password_is_asked_for_anew(door: Passwords) -> None:
    assert await status(door, RIGHT) == 200
    changed = {"alice": bcrypt.hashpw(b"other", bcrypt.gensalt(4)).decode()}
    assert await status(door, RIGHT, users=changed) == 401
    assert await status(door, RIGHT, users={"bob": USERS["alice"]}) == 401


async def test_a_remembered_login_and_an_unknown_user_cost_what_they_should(door: Passwords) -> None:
    users = {"alice": bcrypt.hashpw(b"opensesame", bcrypt.gensalt(10)).decode()}

    async def seconds(authorization: str) -> float:
        started = time.perf_counter()
        await status(door, authorization, users=users)
        return time.perf_counter() - started

    await seconds(RIGHT)
    remembered = min([await seconds(RIGHT) for _ in range(5)])
    wrong = min([await seconds(basic("alice", f"{n}")) for n in range(4)])
    unknown = min([await seconds(basic("bob", f"{n}")) for n in range(4)])
    assert remembered < wrong / 20
    assert 0.5 < unknown / wrong < 2


async def test_few_wait_for_the_thread(door: Passwords) -> None:
    users = {"alice": bcrypt.hashpw(b"opensesame", bcrypt.gensalt(8)).decode()}
    logins = [status(door, basic("alice", "guess"), f"192.0.2.{n}", users) for n in range(50)]
    answers = await asyncio.gather(*logins)
    assert answers.count(401) == passwords.WAITING
    assert answers.count(503) == 50 - passwords.WAITING


async def test_failures_are_logged_now_and_then_without_secrets(door: Passwords, clock: Clock) -> None:
    with capture_logs() as logs:
        for n in range(5):
            await status(door, basic("alice", f"guess {n}"))
        clock.seconds += passwords.COMPLAINT_SECONDS
        await status(door, basic("alice", "guess"))
    assert [line["failures"] for line in logs] == [1, 5]
    assert "guess" not in str(logs)
    assert "alice" not in str(logs)


async def test_refusals_that_were_asked_for_together_come_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else those who guess come again together, and a scrape waits for all of them."""
    hold_seconds, guesses = 0.2, 100
    monkeypatch.setattr(passwords, "HOLD_SECONDS", hold_seconds)
    door = Passwords()
    loop = asyncio.get_running_loop()
    ended: list[float] = []

    async def guess() -> None:
        if await status(door, basic("alice", "guess")) in (429, 503):
            ended.append(loop.time())

    began = loop.time()
    await asyncio.gather(*(guess() for _ in range(guesses)))
    door.close()
    assert len(ended) >= guesses - FAILURES
    assert ended[0] - began >= hold_seconds
    assert ended[-1] - ended[0] >= (len(ended) - 1) * hold_seconds / HELD * 0.9


def test_a_bucket_refills_and_forgets_the_oldest(clock: Clock) -> None:
    buckets = Buckets(2.0, 3, now=clock, most_origins=2)
    assert [buckets.take("a") for _ in range(4)] == [True, True, True, False]
    clock.seconds += 2.0
    assert [buckets.take("a") for _ in range(2)] == [True, False]
    assert buckets.take("b")
    assert buckets.take("c")
    assert buckets.take("a")  # forgotten: b and c came after it


def test_no_interval_is_no_limit(clock: Clock) -> None:
    buckets = Buckets(0.0, 1, now=clock)
    assert all(buckets.take("a") for _ in range(100))
