"""Basic authentication with bcrypt that neither a scrape nor an attacker pays for often.

A hash takes 62 ms at cost 10. So a right password is remembered by a keyed digest; wrong ones are limited by address
before any hash is computed; hashes are computed in one thread, and few may wait for it. Whoever has logged in before
never waits for whoever has not.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import bcrypt
import structlog
from aiohttp import hdrs

from jouletrace.web.entrance import Problem

REMEMBERED: Final = 128
"""Right logins that are remembered; there are as many as users, of which a node has a few."""
FAILURES: Final = 10
"""Wrong logins that an address may make at once,"""
FAILURE_SECONDS: Final = 5.0
"""and one more each so many seconds: 62 ms of a core in 5 s is 1.2 %."""
WAITING: Final = 8
"""Logins that may wait for the thread: half a second at cost 10."""
HOLD_SECONDS: Final = 1.0
"""How long a login beyond these limits waits for its refusal: a guesser with 256 connections gets 256 a second.
Answered at once, 2,500 a second kept scrapes waiting for 68 ms (p99). Refusals that wait are let go one after another,
not all that came together: else they come together again, and a scrape waits for 250 of them."""
HELD: Final = 384
"""Logins that are kept waiting so, of the 512 connections; others find room in the rest."""
ORIGINS: Final = 4096
"""Addresses whose attempts are remembered, the newest; some 150 bytes each."""
COMPLAINT_SECONDS: Final = 60.0
"""Failed logins are logged at most this often."""
NICENESS: Final = 10
"""Of the thread that computes hashes: a tenth of the weight of others where they want the same core (sched(7))."""
PASSWORD_BYTES: Final = 72
"""Bcrypt looks at no more (OpenBSD, bcrypt.c), and htpasswd cuts what is longer."""
_SPARE = b"jouletrace"
"""What the hash for unknown users is made of; knowing it helps nobody, as its answer is not used."""

_log = structlog.get_logger(__name__)


class Buckets:
    """A token bucket for each origin: `burst` at once, then one in `interval_seconds`; 0 is no limit."""

    def __init__(
        self,
        interval_seconds: float,
        burst: int,
        *,
        now: Callable[[], float] = time.monotonic,
        most_origins: int = ORIGINS,
    ) -> None:
        """`now` returns seconds that never go back."""
        self._interval_seconds = interval_seconds
        self._burst = burst
        self._now = now
        self._most_origins = most_origins
        self._full_at: OrderedDict[str, float] = OrderedDict()
        """When each bucket is full again."""

    def take(self, origin: str) -> bool:
        """Take a token; return whether there was one."""
        now = self._now()
        full_at = max(self._full_at.get(origin, now), now)
        if full_at - now > (self._burst - 1) * self._interval_seconds:
            return False
        self._full_at[origin] = full_at + self._interval_seconds
        self._full_at.move_to_end(origin)
        if len(self._full_at) > self._most_origins:
            self._full_at.popitem(last=False)
        return True

    def give_back(self, origin: str) -> None:
        """Put back a token that was taken."""
        if origin in self._full_at:
            self._full_at[origin] -= self._interval_seconds


class Passwords:
    """Checks passwords. For the event loop."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        """`now` returns seconds that never go back."""
        self._secret = secrets.token_bytes(32)
        self._right: OrderedDict[bytes, None] = OrderedDict()
        self._failures = Buckets(FAILURE_SECONDS, FAILURES, now=now)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bcrypt", initializer=_stand_back)
        self._waiting = 0
        self._held = 0
        self._let_go_at = 0.0
        """When the last of those that are held is answered."""
        self._spare: dict[int, str] = {}
        self._now = now
        self._untold = 0
        self._quiet_until = 0.0

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def refusal(self, users: Mapping[str, str], authorization: str, origin: str) -> Problem | None:
        """Return why a client with this Authorization is not let in, None for a user with the right password.

        `users` holds bcrypt hashes; an unknown user costs as much time as a known one with a wrong password.
        """
        if not authorization:
            return _UNKNOWN
        user, password = _decoded(authorization)
        known = users.get(user)
        hashed = self._hash_for_unknown(users) if known is None else known
        digest = self._digest(user, password, hashed)
        # Looking for a digest with a secret key tells nothing about what it is of, however long it takes.
        if digest in self._right:
            self._right.move_to_end(digest)
            return None
        if not self._failures.take(origin):
            self._complain(origin)
            return await self._after_a_while(_TOO_MANY)
        if self._waiting >= WAITING:
            self._failures.give_back(origin)
            return await self._after_a_while(_BUSY)
        right = await self._is_right(password, hashed)
        if known is None or not right:
            self._complain(origin)
            return _UNKNOWN
        self._failures.give_back(origin)
        self._right[digest] = None
        if len(self._right) > REMEMBERED:
            self._right.popitem(last=False)
        return None

    async def _after_a_while(self, problem: Problem) -> Problem:
        if self._held < HELD:
            self._held += 1
            now = self._now()
            self._let_go_at = max(now + HOLD_SECONDS, self._let_go_at + HOLD_SECONDS / HELD)
            try:
                await asyncio.sleep(self._let_go_at - now)
            finally:
                self._held -= 1
        return problem

    async def _is_right(self, password: bytes, hashed: str) -> bool:
        self._waiting += 1
        checking = asyncio.get_running_loop().run_in_executor(self._thread, _matches, password, hashed)
        # Counted down when the thread is done, not when the client has gone.
        checking.add_done_callback(self._done)
        return await asyncio.shield(checking)

    def _done(self, _: "asyncio.Future[bool]") -> None:
        self._waiting -= 1

    def _digest(self, user: str, password: bytes, hashed: str) -> bytes:
        # With the hash: a password that was changed is forgotten by itself.
        parts = (user.encode(errors="surrogateescape"), hashed.encode(), password)
        text = b"".join(len(part).to_bytes(4) + part for part in parts)
        return hmac.digest(self._secret, text, hashlib.sha256)

    def _hash_for_unknown(self, users: Mapping[str, str]) -> str:
        """Return a hash that is as dear as the dearest of the users'."""
        cost = max(int(hashed[4:6]) for hashed in users.values())
        if cost not in self._spare:
            # Made from a valid salt and checksum of any password: computing one would cost what is to be hidden.
            self._spare[cost] = f"$2b${cost:02}${_CHEAPEST[7:]}"
        return self._spare[cost]

    def _complain(self, origin: str) -> None:
        # Neither user nor password: people type one in the other's place.
        self._untold += 1
        now = self._now()
        if now >= self._quiet_until:
            _log.warning("logins are refused: wrong user or password", remote=origin, failures=self._untold)
            self._untold = 0
            self._quiet_until = now + COMPLAINT_SECONDS


_CHEAPEST: Final = bcrypt.hashpw(_SPARE, bcrypt.gensalt(4)).decode()


def _stand_back() -> None:
    """Let all other threads of the machine go before this one (setpriority(2): in Linux it is for a thread)."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _matches(password: bytes, hashed: str) -> bool:
    try:
        return bcrypt.checkpw(password[:PASSWORD_BYTES], hashed.encode())
    except ValueError:  # a NUL in the password
        return False


def _decoded(authorization: str) -> tuple[str, bytes]:
    """Return user and password of an Authorization; ones that nobody has when it is not Basic (RFC 7617)."""
    scheme, _, text = authorization.partition(" ")
    if scheme.lower() != "basic":
        return "", b""
    try:
        user, _, password = base64.b64decode(text.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return "", b""
    return user.decode(errors="surrogateescape"), password


_UNKNOWN = Problem(
    401,
    "User or password is missing or wrong; basic_auth_users of the web configuration has those who are let in.",
    {hdrs.WWW_AUTHENTICATE: 'Basic realm="jouletrace", charset="UTF-8"'},
)
_TOO_MANY = Problem(
    429,
    "There were too many wrong logins from this address; mend the user and password and wait.",
    {hdrs.RETRY_AFTER: f"{FAILURE_SECONDS:.0f}"},
)
_BUSY = Problem(503, "Too many logins are being checked; try again.", {hdrs.RETRY_AFTER: "1"})
