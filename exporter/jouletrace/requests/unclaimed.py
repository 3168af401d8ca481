"""Energy that was used by requests nobody has named yet, by time: it waits for their records, then expires.

Two kinds of rows. Steps that only count their members say how many joules a decoding sequence and a prefill token
cost, so a request that comes later with its boundaries takes exactly its part. Time in which the GPU worked while no
request was known has only a total: those who claim it first share it equally.
"""

import numpy as np
from numpy.typing import NDArray

from jouletrace.requests.law import Law
from jouletrace.requests.split import AnonymousShares, Shares

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]

_COLUMNS = (
    "sequences",
    "sequences_claimed",
    "decode_fixed_each",
    "decode_marginal_each",
    "tokens",
    "tokens_claimed",
    "token_fixed_each",
    "token_marginal_each",
    "shared",
    "unopened_joules",
    "untold",
)
MOST_ROWS = 65_536
"""5 minutes of 200 steps a second; beyond it the oldest rows expire early. 6 MB."""


class Unclaimed:
    """Rows in order of time; a claim covers every row whose middle lies in it (tokens come out at ends of steps)."""

    def __init__(self) -> None:
        self._end_ns = np.empty(0, np.int64)
        self._middle_ns = np.empty(0, np.int64)
        self._columns = {name: np.empty(0) for name in _COLUMNS}
        self.joules = 0.0
        """What still waits."""
        self.untold_joules = 0.0
        """The part of it for whose time nothing at all is known of the engine."""

    def __len__(self) -> int:
        return len(self._end_ns)

    @property
    def start_ns(self) -> int:
        """The middle of the oldest row; a claim that ends before it finds nothing."""
        return int(self._middle_ns[0]) if len(self) else 2**62

    def append_unknown(self, start_ns: Int64s, end_ns: Int64s, joules: Float64s, *, told: bool) -> None:
        """Add time (shape (n,)) in which the GPU used `joules` while no request was known.

        `told`: whether the engine's own counters say that it worked then.
        """
        ones = np.ones(len(joules))
        total = float(joules.sum())
        self._append(
            start_ns, end_ns, total, shared=ones, unopened_joules=joules, untold=np.zeros(len(joules)) if told else ones
        )
        self.untold_joules += 0.0 if told else total

    def append_steps(
        self,
        start_ns: Int64s,
        end_ns: Int64s,
        shares: AnonymousShares,
        sequences: Float64s,
        tokens: Float64s,
    ) -> None:
        """Add steps (shape (n,)) that count so many decoding sequences and prefill tokens without naming them."""
        held = sequences * (shares.decode_fixed_each + shares.decode_marginal_each)
        held += tokens * (shares.token_fixed_each + shares.token_marginal_each)
        self._append(
            start_ns,
            end_ns,
            float(held.sum()),
            sequences=sequences,
            decode_fixed_each=shares.decode_fixed_each,
            decode_marginal_each=shares.decode_marginal_each,
            tokens=tokens,
            token_fixed_each=shares.token_fixed_each,
            token_marginal_each=shares.token_marginal_each,
        )

    def _append(self, start_ns: Int64s, end_ns: Int64s, joules: float, **columns: Float64s) -> None:
        """Add rows that follow all present ones in time."""
        self._end_ns = np.concatenate((self._end_ns, end_ns))
        self._middle_ns = np.concatenate((self._middle_ns, (start_ns + end_ns) // 2))
        for name in _COLUMNS:
            added = columns.get(name)
            self._columns[name] = np.concatenate(
                (self._columns[name], np.zeros(len(end_ns)) if added is None else added)
            )
        if (np.diff(self._end_ns[-len(end_ns) - 1 :]) < 0).any():
            # Steps and unexplained time of one pass come in two calls.
            order = np.argsort(self._end_ns, kind="stable")
            self._end_ns, self._middle_ns = self._end_ns[order], self._middle_ns[order]
            self._columns = {name: column[order] for name, column in self._columns.items()}
        self.joules += joules

    def claim(
        self,
        *,
        decode_from_ns: Int64s,
        decode_until_ns: Int64s,
        prompt_from_ns: Int64s,
        prompt_until_ns: Int64s,
        prompt_tokens: Float64s,
        law: Law,
    ) -> Shares:
        """Give each claimant (shape (n,)) its part of the rows that its two spans cover; return the joules given.

        An empty span (from = until) claims nothing. No row gives more than it holds: where more claim than were
        counted, the late ones share what is left.
        """
        count = len(decode_from_ns)
        spans = np.searchsorted(
            self._middle_ns, np.stack((decode_from_ns, decode_until_ns, prompt_from_ns, prompt_until_ns)), side="right"
        )
        spans[1] = np.maximum(spans[0], spans[1])
        spans[3] = np.maximum(spans[2], spans[3])
        nothing = Shares(*(np.zeros(count) for _ in range(4)))
        if not count or not len(self):
            return nothing
        low = int(min(spans[0].min(), spans[2].min()))
        high = int(max(spans[1].max(), spans[3].max()))
        if low >= high:
            return nothing
        rows = {name: column[low:high] for name, column in self._columns.items()}
        decode_first, decode_last, prompt_first, prompt_last = spans - low
        tokens = _curve(rows["tokens"])
        # First come, first served: a prompt's tokens are the last ones computed before its first token.
        wanted = np.maximum(prompt_tokens, 1.0)
        newest = np.searchsorted(tokens, tokens[prompt_last] - wanted, side="right") - 1
        prompt_first = np.where(tokens[prompt_last] > 0, np.maximum(prompt_first, newest), prompt_first)
        decoding = _overlaps(decode_first, decode_last, high - low)
        prompting = _overlaps(prompt_first, prompt_last, high - low)
        _open(rows, decoding + prompting, law)
        shared = rows["shared"] > 0
        claimants = np.where(shared, decoding + prompting, decoding)
        left = rows["sequences"] - rows["sequences_claimed"]
        given = np.clip(np.divide(left, claimants, out=np.zeros(high - low), where=claimants > 0), 0.0, 1.0)
        rows["sequences_claimed"] += given * claimants
        each = rows["decode_fixed_each"] + rows["decode_marginal_each"]
        self.untold_joules = max(0.0, self.untold_joules - float((given * claimants * each) @ rows["untold"]))
        fixed = _curve(rows["decode_fixed_each"] * given)
        marginal = _curve(rows["decode_marginal_each"] * given)
        prompt_fixed = _curve(np.where(shared, rows["decode_fixed_each"] * given, 0.0))
        prompt_marginal = _curve(np.where(shared, rows["decode_marginal_each"] * given, 0.0))
        passed = tokens[prompt_last] - tokens[prompt_first]
        rate = np.divide(wanted, passed, out=np.zeros(count), where=passed > 0)
        asked = rows["tokens"] * _overlaps(prompt_first, prompt_last, high - low, rate)
        left = rows["tokens"] - rows["tokens_claimed"]
        given = np.clip(np.divide(left, asked, out=np.zeros(high - low), where=asked > 0), 0.0, 1.0)
        rows["tokens_claimed"] += given * asked
        token_fixed = _curve(rows["tokens"] * rows["token_fixed_each"] * given)
        token_marginal = _curve(rows["tokens"] * rows["token_marginal_each"] * given)

        def between(curve: Float64s, first: Int64s, last: Int64s) -> Float64s:
            part: Float64s = curve[last] - curve[first]
            return part

        shares = Shares(
            between(prompt_fixed, prompt_first, prompt_last) + rate * between(token_fixed, prompt_first, prompt_last),
            between(prompt_marginal, prompt_first, prompt_last)
            + rate * between(token_marginal, prompt_first, prompt_last),
            between(fixed, decode_first, decode_last),
            between(marginal, decode_first, decode_last),
        )
        self.joules -= float(shares.total().sum())
        return shares

    def expire(self, before_ns: int) -> float:
        """Drop the rows that end before a time (and the oldest beyond the bound); return what they still held."""
        gone = max(int(np.searchsorted(self._end_ns, before_ns)), len(self) - MOST_ROWS)
        if gone <= 0:
            return 0.0
        self._end_ns, self._middle_ns = self._end_ns[gone:], self._middle_ns[gone:]
        for name in _COLUMNS:
            self._columns[name] = self._columns[name][gone:]
        held = self._held()
        left = max(0.0, float(held.sum()))
        self.untold_joules = max(0.0, float(held @ self._columns["untold"]))
        # What remains is summed anew, so that rounding does not build up and nothing is lost with it.
        expired = max(0.0, self.joules - left)
        self.joules -= expired
        return expired

    def _held(self) -> Float64s:
        """Return what each row still holds."""
        rows = self._columns
        sequences = rows["sequences"] - rows["sequences_claimed"]
        each = rows["decode_fixed_each"] + rows["decode_marginal_each"]
        tokens = rows["tokens"] - rows["tokens_claimed"]
        token_each = rows["token_fixed_each"] + rows["token_marginal_each"]
        held: Float64s = sequences * each + tokens * token_each + rows["unopened_joules"]
        return held


def _open(rows: dict[str, Float64s], claimants: Float64s, law: Law) -> None:
    """Turn rows of unknown membership into rows of as many sequences as claim them now, prompts included."""
    at = np.flatnonzero((rows["unopened_joules"] > 0) & (claimants > 0))
    number = claimants[at]
    each = rows["unopened_joules"][at] / number
    whole = law.fixed_joules + law.decode_sequence_joules * number
    fixed = np.divide(law.fixed_joules, whole, out=np.zeros(len(at)), where=whole > 0)
    rows["decode_fixed_each"][at] = each * fixed
    rows["decode_marginal_each"][at] = each * (1.0 - fixed)
    rows["sequences"][at] = number
    rows["unopened_joules"][at] = 0.0


def _overlaps(first: Int64s, last: Int64s, rows: int, weights: Float64s | None = None) -> Float64s:
    """Return by row how many spans [first, last) cover it, or the sum of their weights."""
    steps = np.bincount(first, weights, rows + 1) - np.bincount(last, weights, rows + 1)
    covered: Float64s = np.cumsum(steps)[:rows].astype(np.float64)
    # Sums of weights may leave rounding dust where none covers.
    return np.maximum(covered, 0.0)


def _curve(rates: Float64s) -> Float64s:
    return np.concatenate(([0.0], np.cumsum(rates)))
