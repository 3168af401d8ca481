"""Asks the daemon what a request used, within a time that the waiting client can bear."""

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec
import structlog

from jouletrace.engines.client import Token
from jouletrace.logs import Transitions

SETTLE_SECONDS: Final = 1.0
"""The daemon settles once a second, and a request a while after its end (docs/api.md): with a smaller budget there is
no point in waiting for the final figure, and the estimate is taken at once."""
RESERVE_SECONDS: Final = 0.05
"""Of a budget, for the way there and back."""
PAUSE_SECONDS: Final = 5.0
"""A daemon that did not answer is not asked for so long: one that hangs must not delay every answer."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Energy:
    """What a request used: measured if `final`, else the daemon's estimate."""

    request_id: str
    joules: float
    method: str
    final: bool

    def document(self, output_tokens: int | None) -> dict[str, Any]:
        """Return it as the `energy` object of an answer."""
        per_token = self.joules / output_tokens if output_tokens else None
        return {
            "energy_joules": _rounded(self.joules),
            "joules_per_output_token": None if per_token is None else _rounded(per_token),
            "method": self.method,
            "final": self.final,
            "request_id": self.request_id,
        }

    def headers(self) -> dict[str, str]:
        """Return it as headers."""
        return {"X-Energy-Joules": f"{self.joules:.6g}", "X-Energy-Final": "true" if self.final else "false"}


class EnergyDesk:
    """Where energy is asked for. `budget_seconds` is the longest that one answer is held up by it; 0 never asks."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, token: Token, budget_seconds: float) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._token = token
        self._budget_seconds = budget_seconds
        self._ask_again_at = 0.0
        self._states = Transitions(_log, time.monotonic_ns)

    async def ask(self, record: Mapping[str, Any]) -> Energy | None:
        """Return what the request of a record used, None when that is not known (in time); never raises."""
        if not self._budget_seconds or time.monotonic() < self._ask_again_at:
            return None
        query = {"engine_id": record["engine_id"]} if "engine_id" in record else {}
        if self._budget_seconds >= SETTLE_SECONDS:
            query["wait"] = f"{round((self._budget_seconds - RESERVE_SECONDS) * 1000)}ms"
        url = f"{self._url}/v1/requests/{quote(record['request_id'], safe='')}"
        try:
            async with asyncio.timeout(self._budget_seconds):
                while True:
                    headers = self._token.headers
                    async with self._session.get(url, params=query, headers=headers) as response:
                        status, content = response.status, await response.read()
                    if status != 401 or not self._token.renew(headers):
                        break
        except (TimeoutError, OSError, aiohttp.ClientError, ValueError) as failure:
            self._fail(f"{type(failure).__name__} {failure}".strip())
            return None
        if status not in (200, 404):
            self._fail(f"HTTP status {status}")
            return None
        self._states.recovered("daemon", "jouletrace answers again", url=self._url)
        return _energy(content) if status == 200 else None

    def _fail(self, problem: str) -> None:
        self._ask_again_at = time.monotonic() + PAUSE_SECONDS
        self._states.failed(
            "daemon",
            "jouletrace does not tell energies: requests pass all the same, answers go without; see whether it runs, "
            "and --jouletrace, --jouletrace-api and --token-file",
            url=self._url,
            problem=problem,
        )


def _energy(content: bytes) -> Energy | None:
    try:
        answer = msgspec.json.decode(content, type=dict[str, Any])
        energy = Energy(
            str(answer["request_id"]), float(answer["energy_joules"]), str(answer["method"]), answer["final"] is True
        )
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError):
        return None
    # An estimate of 0 says that nothing is known yet, of the first request of an engine for example.
    is_known = energy.joules > 0 or (energy.final and energy.joules == 0)
    return energy if is_known and math.isfinite(energy.joules) else None


def _rounded(value: float) -> float:
    """Return a figure with the six digits that it may be trusted for."""
    return float(f"{value:.6g}")
