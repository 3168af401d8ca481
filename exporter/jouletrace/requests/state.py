"""What of the ledger outlives a restart."""

from collections.abc import Sequence
from math import isnan

import msgspec
import numpy as np

from jouletrace.requests.inflight import NO_ACCOUNT, SUM_COLUMNS, Inference, InFlight
from jouletrace.requests.records import EngineRecord, Status, Unit, Usage
from jouletrace.requests.split import NEVER


class AccountState(msgspec.Struct, frozen=True):
    """An account's totals, joules."""

    model: str
    tenant: str
    engine_id: str
    prefill: float
    decode: float
    idle: float


class InFlightState(msgspec.Struct, frozen=True):
    """A request in flight; times that have not come are None."""

    request_id: str
    engine_id: str
    attempt: int
    described: bool
    model: str | None
    tenant: str | None
    trace_id: str | None
    arrival_ns: int | None
    status: Status
    usage: Usage
    start_ns: int | None
    first_token_ns: int | None
    end_ns: int | None
    seen_ns: int
    tokens: float | None
    account: int | None
    sums: tuple[float, ...]
    """By the names of `inflight.SUM_COLUMNS`."""


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
    tenants: dict[str, TenantState]
    """By model and tenant, joined."""
    histograms: dict[str, HistogramState]
    in_flight: dict[int, InFlightState]
    """By slot."""


def requests_of(table: InFlight, engine_ids: Sequence[str]) -> dict[int, InFlightState]:
    """Return all requests in flight by slot; `engine_ids` by engine number."""
    live = [one for one in table.inferences if one is not None]
    slots = np.array([one.slot for one in live], np.int64)
    times = [getattr(table, name)[slots].tolist() for name in ("start_ns", "first_token_ns", "end_ns", "seen_ns")]
    tokens, accounts = table.tokens[slots].tolist(), table.account[slots].tolist()
    sums = np.stack([getattr(table, name)[slots] for name in SUM_COLUMNS], axis=1).tolist()
    return {
        one.slot: InFlightState(
            request_id=one.request_id,
            engine_id=engine_ids[one.engine],
            attempt=one.attempt,
            described=one.described,
            model=one.model,
            tenant=one.tenant,
            trace_id=one.trace_id,
            arrival_ns=one.arrival_ns,
            status=one.status,
            usage=one.usage,
            start_ns=_known(start_ns),
            first_token_ns=_known(first_ns),
            end_ns=_known(end_ns),
            seen_ns=seen_ns,
            tokens=None if isnan(prompt) else prompt,
            account=None if account == NO_ACCOUNT else account,
            sums=tuple(parts),
        )
        for one, start_ns, first_ns, end_ns, seen_ns, prompt, account, parts in zip(
            live, *times, tokens, accounts, sums, strict=True
        )
    }


def unpaid_joules(state: InFlightState) -> float:
    """Return what a request used without its account having been charged, joules."""
    parts = dict(zip(SUM_COLUMNS, state.sums, strict=True))
    used = parts["prefill_fixed"] + parts["prefill_marginal"] + parts["decode_fixed"] + parts["decode_marginal"]
    return max(0.0, used - parts["paid_prefill"] - parts["paid_decode"])


def not_after(state: InFlightState, limit_ns: int) -> InFlightState:
    """Return a request with every time that is known at most `limit_ns`."""
    names = ("arrival_ns", "start_ns", "first_token_ns", "end_ns", "seen_ns")
    known = {name: getattr(state, name) for name in names}
    return msgspec.structs.replace(state, **{name: min(at, limit_ns) for name, at in known.items() if at is not None})


def restore_request(state: InFlightState, table: InFlight, engine: int, account: int) -> Inference | None:
    """Put a request back into the table, with its engine's number and its account; None when there is no room."""
    inference = table.open(state.request_id, state.attempt, engine)
    if inference is None:
        return None
    inference.described = state.described
    inference.model, inference.tenant, inference.trace_id = state.model, state.tenant, state.trace_id
    inference.arrival_ns, inference.status, inference.usage = state.arrival_ns, state.status, state.usage
    slot = inference.slot
    for name in ("start_ns", "first_token_ns", "end_ns"):
        value = getattr(state, name)
        getattr(table, name)[slot] = NEVER if value is None else value
    table.seen_ns[slot] = state.seen_ns
    table.tokens[slot] = np.nan if state.tokens is None else state.tokens
    table.account[slot] = account
    for name, total in zip(SUM_COLUMNS, state.sums, strict=True):
        getattr(table, name)[slot] = total
    return inference


def _known(time_ns: int) -> int | None:
    return None if time_ns >= NEVER else time_ns
