"""Requests that are not settled yet: their words in objects, their numbers in columns for whole passes at a time."""

import msgspec
import numpy as np
from numpy.typing import NDArray

from jouletrace.requests.records import Status, Usage
from jouletrace.requests.split import NEVER, Shares

Int64s = NDArray[np.int64]
NOBODY = 0
"""Slot of whoever found no room: what it collects is unattributed."""
NO_ACCOUNT = -1
NOTHING = Usage()


class InFlightState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What has been told of a request in flight; its numbers lie in `LedgerState.in_flight_numbers`."""

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


# Without gc, as nothing in it refers back to it: a collector that walks through 16,384 of them stops the process.
class Inference(msgspec.Struct, eq=False, gc=False):
    """One request in flight, as far as it has been described."""

    request_id: str
    attempt: int
    slot: int
    engine: int
    """The engine's number."""
    described: bool = False
    """Whether a request record has come (not only a step that names it)."""
    model: str | None = None
    tenant: str | None = None
    trace_id: str | None = None
    arrival_ns: int | None = None
    status: Status = Status.RUNNING
    usage: Usage = NOTHING
    saved: InFlightState | None = None
    """Its words as they were last saved; None when they have changed since."""


class InFlight:
    """A table with one slot per request in flight; slot 0 is nobody's."""

    def __init__(self, capacity: int) -> None:
        size = capacity + 1
        self.inferences: list[Inference | None] = [None] * size
        self._free = list(range(capacity, 0, -1))
        self.engine = np.full(size, -1, np.int64)
        """Number of the engine, -1 for a free slot."""
        self.account = np.full(size, NO_ACCOUNT, np.int64)
        self.start_ns = np.full(size, NEVER, np.int64)
        """When it was scheduled, or else arrived."""
        self.first_token_ns = np.full(size, NEVER, np.int64)
        self.end_ns = np.full(size, NEVER, np.int64)
        self.seen_ns = np.zeros(size, np.int64)
        """The latest time at which it is known to have lived."""
        self.claimed_ns = np.full(size, NEVER, np.int64)
        """Up to where it has claimed energy of its engine's past; NEVER: it has nothing to claim."""
        self.tokens = np.full(size, np.nan)
        """Prompt tokens to compute (without cached ones); NaN while not known."""
        self.prefill_fixed = np.zeros(size)
        self.prefill_marginal = np.zeros(size)
        self.decode_fixed = np.zeros(size)
        self.decode_marginal = np.zeros(size)
        self.count_joules = np.zeros(size)
        """The part of its joules found by steps that only count,"""
        self.boundary_joules = np.zeros(size)
        """and by boundaries; the rest is by named steps."""
        self.exclusive_joules = np.zeros(size)
        """The part of the latter with exclusive prefill."""
        self.error_joules = np.zeros(size)
        """How far the methods may be off, and sensors beyond their edges."""
        self.decode_energy = np.zeros(size)
        """What its engine used while it decoded, joules,"""
        self.decode_company = np.zeros(size)
        """the sequences that decoded with it (itself included), times seconds,"""
        self.decode_prompts = np.zeros(size)
        """and the prompt tokens that were computed meanwhile: all three by boundaries."""
        self.paid_prefill = np.zeros(size)
        self.paid_decode = np.zeros(size)
        """What its account has been charged already."""

    def open(self, request_id: str, attempt: int, engine: int) -> Inference | None:
        """Return a new request with everything unknown, or None when no slot is free."""
        if not self._free:
            return None
        slot = self._free.pop()
        inference = Inference(request_id, attempt, slot, engine)
        self.inferences[slot] = inference
        self.engine[slot] = engine
        return inference

    def release(self, slots: Int64s) -> None:
        """Free slots and wipe their numbers."""
        self.engine[slots] = -1
        self.account[slots] = NO_ACCOUNT
        for name in ("start_ns", "first_token_ns", "end_ns", "claimed_ns"):
            getattr(self, name)[slots] = NEVER
        self.seen_ns[slots] = 0
        self.tokens[slots] = np.nan
        self.wipe_sums(slots)
        for slot in slots.tolist():
            self.inferences[slot] = None
        self._free.extend(slots.tolist())

    def wipe_sums(self, slots: Int64s) -> None:
        """Set everything that slots have collected to 0."""
        for name in SUM_COLUMNS:
            getattr(self, name)[slots] = 0.0

    def add(self, shares: Shares, slots: Int64s | None = None) -> None:
        """Add shares, of all slots or (shape of `slots`, each at most once) of these."""
        at = slice(None) if slots is None else slots
        self.prefill_fixed[at] += shares.prefill_fixed
        self.prefill_marginal[at] += shares.prefill_marginal
        self.decode_fixed[at] += shares.decode_fixed
        self.decode_marginal[at] += shares.decode_marginal

    def joules(self, slots: Int64s) -> NDArray[np.float64]:
        """Return all energy of slots so far."""
        total: NDArray[np.float64] = self.prefill(slots) + self.decode(slots)
        return total

    def prefill(self, slots: Int64s) -> NDArray[np.float64]:
        """Return the prefill energy of slots so far."""
        total: NDArray[np.float64] = self.prefill_fixed[slots] + self.prefill_marginal[slots]
        return total

    def decode(self, slots: Int64s) -> NDArray[np.float64]:
        """Return the decode energy of slots so far."""
        total: NDArray[np.float64] = self.decode_fixed[slots] + self.decode_marginal[slots]
        return total


SUM_COLUMNS = (
    "prefill_fixed",
    "prefill_marginal",
    "decode_fixed",
    "decode_marginal",
    "count_joules",
    "boundary_joules",
    "exclusive_joules",
    "error_joules",
    "decode_energy",
    "decode_company",
    "decode_prompts",
    "paid_prefill",
    "paid_decode",
)
