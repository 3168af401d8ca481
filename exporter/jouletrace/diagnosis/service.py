"""The diagnosis at work: each second or two, in a thread, from what the sampler and the ledger publish."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import structlog

from jouletrace.diagnosis.node import DiagnosisSnapshot, NodeDiagnosis, WatchedDevice
from jouletrace.logs import Transitions
from jouletrace.requests.account import LedgerSnapshot

INTERVAL_SECONDS = 1.0
"""As often as the power ring is harvested: nothing new is known before."""
QUIET_INTERVAL_SECONDS = 2.0
"""While no engine is known. The same spans are judged, two at a time: with cold caches the first takes as long as the
next four."""

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
        stop = threading.Event()
        try:
            # Not on the event loop: a few milliseconds would be seen by those who send records. And the loop is not
            # woken up for each evaluation, which takes as long as evaluating one device.
            await asyncio.to_thread(self._evaluate_until, stop)
        finally:
            stop.set()

    def _evaluate_until(self, stop: threading.Event) -> None:
        while not stop.wait(INTERVAL_SECONDS if self._account().engine_totals else QUIET_INTERVAL_SECONDS):
            self._evaluate()

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
