import asyncio
import contextlib
from collections.abc import Sequence

import pytest
import structlog

from jouletrace.diagnosis import service
from jouletrace.diagnosis.node import NodeDiagnosis, WatchedDevice
from jouletrace.diagnosis.service import DiagnosisService
from jouletrace.requests.account import EngineTotals, LedgerSnapshot
from jouletrace.requests.law import LawBook

S = 1_000_000_000


async def test_a_fault_is_told_once_and_the_diagnosis_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "INTERVAL_SECONDS", 0.001)
    looks = 0
    seen = asyncio.Event()
    loop = asyncio.get_running_loop()

    def devices() -> Sequence[WatchedDevice]:
        nonlocal looks
        looks += 1
        if looks in (3, 4):
            raise RuntimeError("a fault")
        if looks > 8:
            loop.call_soon_threadsafe(seen.set)
        return ()

    def account() -> LedgerSnapshot:
        totals = EngineTotals(settled_ns=looks * S, active_seconds=float(looks))
        return LedgerSnapshot(engine_totals={"e": totals})

    diagnosis = DiagnosisService(NodeDiagnosis(LawBook(), {}, parked_after_seconds=60.0), devices, account)
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(diagnosis.run())
        await asyncio.wait_for(seen.wait(), 20)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert len(logs) == 2
    assert "e" in diagnosis.snapshot.engines
