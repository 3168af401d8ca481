"""The diagnosis at work: once a second, in a thread, from what the sampler and the ledger publish."""

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from jouletrace.diagnosis.node import DiagnosisSnapshot, NodeDiagnosis, WatchedDevice
from jouletrace.logs import Transitions
from jouletrace.requests.account import LedgerSnapshot

INTERVAL_SECONDS = 1.0
"""As often as the power ring is harvested: nothing new is known before."""

_log = structlog.get_logger(__name__)


class DiagnosisService:
    """Owns the node's diagnosis; everybody else sees its snapshot."""

    def __init__(
        self,
        diagnosis: NodeDiagnosis,
        devices: Callable[[], Sequence[WatchedDevice]],
        account: Callable[[], LedgerSnapshot],
    ) -> None:
        self._diagnosis = diagnosis
        self._devices = devices
        self._account = account
        self._snapshot = DiagnosisSnapshot()
        self._failures = Transitions(_log, time.monotonic_ns)

    @property
    def snapshot(self) -> DiagnosisSnapshot:
        """The diagnosis as of the last evaluation; may be read from any thread."""
        return self._snapshot

    async def run(self) -> None:
        """Evaluate until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            # Not on the event loop: a few milliseconds would be seen by those who send records.
            await asyncio.to_thread(self._evaluate)

    def _evaluate(self) -> None:
        try:
            self._diagnosis.observe(self._devices(), self._account())
            self._snapshot = self._diagnosis.snapshot()
        except Exception:
            self._failures.failed(
                "diagnosis", "the diagnosis failed and stands still; please report this", exc_info=True
            )
            return
        self._failures.recovered("diagnosis", "the diagnosis goes on")
