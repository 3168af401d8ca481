"""What of the ledger outlives a restart."""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from jouletrace.requests.downtime import CounterState
from jouletrace.requests.inflight import SUM_COLUMNS, Inference, InFlight, InFlightState
from jouletrace.requests.records import EngineRecord, Status, Unit
from jouletrace.requests.split import NEVER

Int64s = NDArray[np.int64]


class AccountState(msgspec.Struct, frozen=True):
    """An account's totals, joules."""

    model: str
    tenant: str
    engine_id: str
    prefill: float
    decode: float
    idle: float


class HistogramState(msgspec.Struct, frozen=True):
    """A model's histogram: counts by bucket, not cumulative."""

    counts: list[int]
    total_joules: float


class TenantState(msgspec.Struct, frozen=True):
    """What a model did for a tenant."""

    model: str
    tenant: str
    requests: dict[Status, int]
    tokens: dict[str, int]
    units: dict[Unit, int]


class LedgerState(msgspec.Struct, frozen=True):
    """Everything that must outlive a restart. Answers of settled requests and unsettled steps do not.

    What grows lies in dicts with stable keys, so that a journal can write what has changed.
    """

    engines: list[EngineRecord]
    engine_settled_ns: list[int]
    accounts: dict[int, AccountState]
    settled_ns: dict[str, int]
    device_joules: dict[str, float]
    idle_joules: dict[str, dict[str, float]]
    """By device and kind."""
    unattributed_joules: dict[str, float]
    unclaimed_joules: dict[str, float]
    """By device: what waits to be claimed; a restart cannot keep by whom."""
    counters: dict[str, CounterState]
    """By device."""
    tenants: dict[str, TenantState]
    """By model and tenant, joined."""
    histograms: dict[str, HistogramState]
    in_flight: dict[int, InFlightState]
    """By slot."""
    in_flight_numbers: dict[str, bytes]
    """By the names of `NUMBERS`: a 64 bit number for each request, in the order of the column `slot`."""


_TIMES = ("start_ns", "first_token_ns", "end_ns", "seen_ns")
NUMBERS = ("slot", "account", *_TIMES, "tokens", *SUM_COLUMNS)


def words_of(table: InFlight, engine_ids: Sequence[str]) -> dict[int, InFlightState]:
    """Return the words of all requests in flight by slot, the same objects as before where nothing has changed.

    `engine_ids` are by engine number.
    """
    return {one.slot: one.saved or _saved(one, engine_ids[one.engine]) for one in table.inferences if one is not None}


def numbers_of(table: InFlight) -> dict[str, bytes]:
    """Return the numbers of all requests in flight."""
    slots = np.flatnonzero(table.engine >= 0)
    return {"slot": slots.tobytes()} | {name: getattr(table, name)[slots].tobytes() for name in NUMBERS[1:]}


def _saved(one: Inference, engine_id: str) -> InFlightState:
    one.saved = InFlightState(
        request_id=one.request_id,
        engine_id=engine_id,
        attempt=one.attempt,
        described=one.described,
        model=one.model,
        tenant=one.tenant,
        trace_id=one.trace_id,
        arrival_ns=one.arrival_ns,
        status=one.status,
        usage=one.usage,
    )
    return one.saved


class Rows:
    """The numbers of a state's requests, with no time behind `limit_ns`; rows in the order of their last sign."""

    def __init__(self, state: LedgerState, limit_ns: int) -> None:
        columns = {
            name: np.frombuffer(state.in_flight_numbers.get(name, b""), getattr(_EMPTY, name).dtype)
            for name in NUMBERS[1:]
        }
        slots = np.frombuffer(state.in_flight_numbers.get("slot", b""), np.int64)
        order = np.argsort(columns["seen_ns"], kind="stable")
        self.slots = slots[order].tolist()
        self._columns = {name: column[order] for name, column in columns.items()}
        for name in _TIMES:
            times = self._columns[name]
            self._columns[name] = np.where(times < NEVER, np.minimum(times, limit_ns), times)

    @property
    def accounts(self) -> Int64s:
        """The number of each row's account in the state, `NO_ACCOUNT` where it has none."""
        return self._columns["account"]

    def unpaid_joules(self, row: int) -> float:
        """Return what a request used without its account having been charged, joules."""
        at = {name: float(self._columns[name][row]) for name in SUM_COLUMNS}
        used = at["prefill_fixed"] + at["prefill_marginal"] + at["decode_fixed"] + at["decode_marginal"]
        return max(0.0, used - at["paid_prefill"] - at["paid_decode"])

    def put(self, table: InFlight, rows: Sequence[int], slots: Sequence[int]) -> None:
        """Write rows into a table's slots, without their accounts."""
        for name in (*_TIMES, "tokens", *SUM_COLUMNS):
            getattr(table, name)[list(slots)] = self._columns[name][list(rows)]


_EMPTY = InFlight(0)
"""Tells the columns' types."""


def restore_words(state: InFlightState, table: InFlight, engine: int, limit_ns: int) -> Inference | None:
    """Put a request back into the table, with its engine's number; None when there is no room."""
    inference = table.open(state.request_id, state.attempt, engine)
    if inference is None:
        return None
    inference.described = state.described
    inference.model, inference.tenant, inference.trace_id = state.model, state.tenant, state.trace_id
    inference.arrival_ns = None if state.arrival_ns is None else min(state.arrival_ns, limit_ns)
    inference.status, inference.usage = state.status, state.usage
    return inference
