"""A stand-in for the ledger that notes what it is told, for tests of what surrounds the ledger."""

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from jouletrace.requests.account import LedgerSnapshot, Method, RequestEnergy, Taken
from jouletrace.requests.records import EngineRecord, Record, RequestRecord, Status, StepRecord


class Totals(msgspec.Struct, frozen=True):
    """What the stand-in keeps over a restart."""

    settlings: int = 0
    joules: dict[tuple[str, str], float] = {}
    ids: list[str] = []


def accept(_: Record) -> Taken:
    """Take everything."""
    return Taken.ACCEPTED


@dataclass
class RecordingAccount:
    """Takes records as `judge` says; a request costs as many joules as it has output tokens, final once settled."""

    judge: Callable[[Record], Taken] = accept
    records: list[Record] = field(default_factory=list)
    booked_ns: list[int] = field(default_factory=list)
    settled: list[tuple[float, int]] = field(default_factory=list)
    """The devices and times of the settlings."""
    final: set[str] = field(default_factory=set)
    totals: Totals = field(default_factory=Totals)

    def _add(self, record: Record, now_ns: int) -> Taken:
        taken = self.judge(record)
        if taken is Taken.ACCEPTED:
            self.records.append(record)
            self.booked_ns.append(now_ns)
        return taken

    def add_engine(self, record: EngineRecord, now_ns: int) -> Taken:
        return self._add(record, now_ns)

    def add_step(self, record: StepRecord, now_ns: int) -> Taken:
        return self._add(record, now_ns)

    def add_request(self, record: RequestRecord, now_ns: int) -> Taken:
        return self._add(record, now_ns)

    def settle(self, devices: float, now_ns: int) -> None:
        self.settled.append((devices, now_ns))
        ended = [r.request_id for r in self.records if isinstance(r, RequestRecord) and r.end_ns is not None]
        self.final.update(ended)
        joules = self.totals.joules | {("m", "t"): float(len(ended))}
        self.totals = Totals(self.totals.settlings + 1, joules, ended)

    def expire(self, now_ns: int) -> None:
        pass

    def price(self, request_id: str, engine_id: str | None = None) -> RequestEnergy | None:
        found = [r for r in self.records if isinstance(r, RequestRecord) and r.request_id == request_id]
        if not found:
            return None
        output = max((r.usage.output for r in found if r.usage is not None), default=0)
        return RequestEnergy(
            request_id=request_id,
            engine_id=found[-1].engine_id or "e",
            model=found[-1].model or "m",
            tenant=found[-1].tenant or "other",
            status=found[-1].status or Status.RUNNING,
            energy_joules=float(output),
            low=output - 0.5,
            high=output + 0.5,
            prefill_joules=0.0,
            decode_joules=float(output),
            fixed_joules=0.0,
            marginal_joules=float(output),
            joules_per_output_token=1.0 if output else None,
            method=Method.STEPS,
            final=request_id in self.final,
            arrival_ns=found[0].arrival_ns or 0,
            end_ns=found[-1].end_ns,
        )

    def snapshot(self) -> LedgerSnapshot:
        settled_ns = self.settled[-1][1] if self.settled else 0
        return LedgerSnapshot(settled_ns=settled_ns, device_joules={"GPU-0": float(len(self.records))})

    def dump(self) -> Totals:
        return self.totals
