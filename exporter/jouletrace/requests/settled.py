"""Answers of settled requests, kept for look-up in a bounded number and time: about 250 bytes each."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jouletrace.requests.account import Method, RequestEnergy
from jouletrace.requests.records import Status
from jouletrace.requests.split import NEVER

Int64s = NDArray[np.int64]

FLOATS = ("prefill_fixed", "prefill_marginal", "decode_fixed", "decode_marginal", "low", "high")
_STATUSES = tuple(Status)
_METHODS = tuple(Method)


class Settled:
    """A ring of rows; the oldest make room."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._row_by_key: dict[tuple[int, str], int] = {}
        self._keys: list[tuple[int, str] | None] = []
        self._words: list[tuple[str, str, str] | None] = []
        """Engine id, model, tenant: one tuple per account, shared by its rows."""
        self._floats = np.zeros((capacity, len(FLOATS)))
        self._times = np.zeros((capacity, 3), np.int64)
        """Arrival, end, settled."""
        self._codes = np.zeros((capacity, 2), np.int8)
        """Status, method."""
        self._output = np.zeros(capacity, np.int64)
        self._attempts = np.zeros(capacity, np.int32)
        self._next = 0
        self._oldest = 0
        self._count = 0

    def add(
        self,
        keys: Sequence[tuple[int, str]],
        words: Sequence[tuple[str, str, str]],
        *,
        floats: NDArray[np.float64],
        times: Int64s,
        statuses: Sequence[Status],
        methods: NDArray[np.int8],
        output: Sequence[int],
        attempts: Sequence[int],
    ) -> None:
        """Keep rows: keys (engine number, request id), (engine id, model, tenant), `FLOATS`, times and the rest."""
        if not self._capacity:
            return
        # A batch larger than the ring would write rows over each other.
        skip = max(0, len(keys) - self._capacity)
        for offset in range(skip, len(keys)):
            row = self._next
            if row < len(self._keys):
                self._forget(row)
                self._keys[row], self._words[row] = keys[offset], words[offset]
            else:
                self._keys.append(keys[offset])
                self._words.append(words[offset])
            self._row_by_key[keys[offset]] = row
            self._next = (row + 1) % self._capacity
        kept = len(keys) - skip
        rows = (self._next - kept + np.arange(kept)) % self._capacity
        self._floats[rows] = floats[skip:]
        self._times[rows] = times[skip:]
        self._codes[rows, 0] = [_STATUSES.index(status) for status in statuses[skip:]]
        self._codes[rows, 1] = methods[skip:]
        self._output[rows] = output[skip:]
        self._attempts[rows] = attempts[skip:]
        self._count = min(self._capacity, self._count + kept)
        self._oldest = self._next if self._count == self._capacity else self._oldest

    def expire(self, before_ns: int) -> None:
        """Forget rows that were settled before a time."""
        while self._count and self._times[self._oldest, 2] < before_ns:
            self._forget(self._oldest)
            self._oldest = (self._oldest + 1) % self._capacity
            self._count -= 1

    def life(self, engine: int, request_id: str) -> tuple[int, int, int] | None:
        """Return attempt, arrival and end (ns) of a settled request, or None when it is not known."""
        row = self._row_by_key.get((engine, request_id))
        if row is None:
            return None
        return int(self._attempts[row]), int(self._times[row, 0]), int(self._times[row, 1])

    def get(self, engine: int, request_id: str) -> RequestEnergy | None:
        """Return the final answer for a request, or None when it is not known (any more)."""
        row = self._row_by_key.get((engine, request_id))
        if row is None:
            return None
        words = self._words[row]
        assert words is not None
        values = dict(zip(FLOATS, self._floats[row].tolist(), strict=True))
        output = int(self._output[row])
        arrival_ns, end_ns, _ = self._times[row].tolist()
        return answer(
            request_id,
            words,
            _STATUSES[self._codes[row, 0]],
            values=values,
            output=output,
            method=method_of(int(self._codes[row, 1])),
            final=True,
            arrival_ns=arrival_ns,
            end_ns=end_ns,
        )

    def _forget(self, row: int) -> None:
        key = self._keys[row]
        if key is not None and self._row_by_key.get(key) == row:
            del self._row_by_key[key]
        self._keys[row] = self._words[row] = None


def method_of(code: int) -> Method:
    """Return the method with a code, its place in `Method`."""
    return _METHODS[code]


def answer(
    request_id: str,
    words: tuple[str, str, str],
    status: Status,
    *,
    values: dict[str, float],
    output: int,
    method: Method,
    final: bool,
    arrival_ns: int,
    end_ns: int,
) -> RequestEnergy:
    """Return a request's answer from its parts by the names of `FLOATS`."""
    prefill = values["prefill_fixed"] + values["prefill_marginal"]
    decode = values["decode_fixed"] + values["decode_marginal"]
    joules = prefill + decode
    return RequestEnergy(
        request_id=request_id,
        engine_id=words[0],
        model=words[1],
        tenant=words[2],
        status=status,
        energy_joules=joules,
        low=values["low"],
        high=values["high"],
        prefill_joules=prefill,
        decode_joules=decode,
        fixed_joules=values["prefill_fixed"] + values["decode_fixed"],
        marginal_joules=values["prefill_marginal"] + values["decode_marginal"],
        joules_per_output_token=joules / output if output else None,
        method=method,
        final=final,
        arrival_ns=arrival_ns,
        end_ns=None if end_ns == NEVER else end_ns,
    )
