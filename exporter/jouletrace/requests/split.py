"""Who gets what of measured energy: pure arithmetic on arrays, no state.

A step's energy is shared by `fixed/|S| + c_p * prefill tokens + c_d [+ c_kv * context]`, scaled to what was measured
(design section 5). With boundaries alone the steps are inferred: between two events the number of decoding sequences
is known, one prompt (or group of prompts with one first-token time) is prefilled at a time, and the number of passes
follows from the measured energy and the law.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jouletrace.requests.law import Law, PrefillSchedule

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]
Bools = NDArray[np.bool_]

SAME_STEP_NS = 1_000_000
"""First tokens this close came out of one step: the shortest decode step measured is 5 ms (8B, H200)."""
NEVER = 2**62
"""A time that has not come, in nanoseconds."""
_BISECTIONS = 48
"""Halvings of the chunk size: from one token to a million within 1e-8."""


def sums(numbers: Int64s, weights: Float64s, count: int) -> Float64s:
    """Return the sum of the weights of each number below `count`."""
    return np.bincount(numbers, weights, count).astype(np.float64, copy=False)


@dataclass(frozen=True, slots=True)
class Shares:
    """Joules by request, each of shape (requests,): what a pass adds to each."""

    prefill_fixed: Float64s
    prefill_marginal: Float64s
    decode_fixed: Float64s
    decode_marginal: Float64s

    def total(self) -> Float64s:
        """Return all joules by request."""
        return self.prefill_fixed + self.prefill_marginal + self.decode_fixed + self.decode_marginal


@dataclass(frozen=True, slots=True)
class StepMembers:
    """Steps, in order of time, with their members in flat lists."""

    passes: Float64s
    kv_tokens: Float64s
    prefill_count: Int64s
    """Named prefilling requests by step; their slots and tokens lie flat in `prefill_slots` and `prefill_tokens`."""
    prefill_slots: Int64s
    prefill_tokens: Float64s
    decode_count: Int64s
    decode_slots: Int64s
    other_prefills: Float64s
    """Prefilling requests that the step only counts."""
    other_prefill_tokens: Float64s
    other_decodes: Float64s
    """Decoding requests that the step only counts."""


@dataclass(frozen=True, slots=True)
class AnonymousShares:
    """What belongs to members that a step only counts, joules by step: per decoding sequence and per prefill token."""

    decode_fixed_each: Float64s
    decode_marginal_each: Float64s
    token_fixed_each: Float64s
    token_marginal_each: Float64s

    def of(self, steps: Bools, part: Float64s) -> "AnonymousShares":
        """Return the shares of some of the steps, when only a part of each step's tokens shares what it used."""
        return AnonymousShares(
            self.decode_fixed_each[steps],
            self.decode_marginal_each[steps],
            (self.token_fixed_each / part)[steps],
            (self.token_marginal_each / part)[steps],
        )


def split_steps(
    joules: Float64s, steps: StepMembers, law: Law, requests: int
) -> tuple[Shares, AnonymousShares, Float64s]:
    """Share each step's joules (shape (steps,)) among its members.

    Returns the named members' shares by slot (shape (requests,)), the counted members' shares by step, and what
    steps without any member used, by step.
    """
    prefill_step = np.repeat(np.arange(len(joules)), steps.prefill_count)
    tokens = sums(prefill_step, steps.prefill_tokens, len(joules)) + steps.other_prefill_tokens
    decodes = steps.decode_count + steps.other_decodes
    members = steps.prefill_count + steps.other_prefills + decodes
    fixed = steps.passes * law.fixed_joules
    decode_each = steps.passes * law.decode_sequence_joules + law.kv_token_joules * steps.kv_tokens / np.maximum(
        decodes, 1
    )
    predicted = fixed + law.prefill_token_joules * tokens + decode_each * decodes
    empty = members == 0
    # A law without fixed part says nothing of a prompt that computes no token: its members share equally.
    lawless = (predicted <= 0) & ~empty
    fixed = np.where(lawless, 1.0, fixed)
    predicted = np.where(lawless | empty, 1.0, predicted)
    scale = np.where(empty, 0.0, joules) / predicted
    fixed_each = scale * fixed / np.maximum(members, 1)
    decode_each = scale * decode_each
    token_each = scale * law.prefill_token_joules
    shares = Shares(
        sums(steps.prefill_slots, fixed_each[prefill_step], requests),
        sums(steps.prefill_slots, token_each[prefill_step] * steps.prefill_tokens, requests),
        sums(steps.decode_slots, np.repeat(fixed_each, steps.decode_count), requests),
        sums(steps.decode_slots, np.repeat(decode_each, steps.decode_count), requests),
    )
    per_token = steps.other_prefills / np.maximum(steps.other_prefill_tokens, 1.0)
    counted = AnonymousShares(fixed_each, decode_each, fixed_each * per_token, token_each)
    return shares, counted, np.where(empty, joules, 0.0)


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Requests of one engine by their boundaries, and the prompts in the order in which they are prefilled.

    First come, first served: a prompt's (or group's) prefill lies in (max(its start, the first token before it), its
    first token]. Arrays of shape (requests,) and (groups,).
    """

    decode_from_ns: Int64s
    end_ns: Int64s
    group: Int64s
    """Number of the request's group, -1 when its prefill does not lie in this pass."""
    tokens: Float64s
    """Prompt tokens to compute."""
    group_from_ns: Int64s
    group_until_ns: Int64s
    group_tokens: Float64s
    group_members: Int64s

    @staticmethod
    def of(
        start_ns: Int64s,
        first_token_ns: Int64s,
        end_ns: Int64s,
        tokens: Float64s,
        *,
        from_ns: int,
        until_ns: int,
    ) -> "Boundaries":
        """Arrange requests (shape (requests,), times that have not come are NEVER) for the pass (from_ns, until_ns]."""
        decode_from = first_token_ns.copy()
        group = np.full(len(start_ns), -1, np.int64)
        prompts = np.flatnonzero(
            (first_token_ns > from_ns) & (first_token_ns <= until_ns) & (start_ns < first_token_ns)
        )
        prompts = prompts[np.argsort(first_token_ns[prompts], kind="stable")]
        if not len(prompts):
            none, nothing = np.empty(0, np.int64), np.empty(0)
            return Boundaries(decode_from, np.maximum(end_ns, decode_from), group, tokens, none, none, nothing, none)
        first = first_token_ns[prompts]
        heads = np.flatnonzero(np.concatenate(([True], np.diff(first) > SAME_STEP_NS)))
        tails = np.concatenate((heads[1:], [len(prompts)])) - 1
        group[prompts] = np.repeat(np.arange(len(heads)), tails - heads + 1)
        until = first[tails]
        begin = np.maximum(np.minimum.reduceat(start_ns[prompts], heads), np.concatenate(([from_ns], until[:-1])))
        decode_from[prompts] = until[group[prompts]]
        return Boundaries(
            decode_from,
            np.maximum(end_ns, decode_from),
            group,
            tokens,
            begin,
            until,
            np.add.reduceat(tokens[prompts], heads),
            tails - heads + 1,
        )

    def edges(self) -> Int64s:
        """Return the times at which the set of active requests changes."""
        return np.concatenate((self.decode_from_ns, self.end_ns, self.group_from_ns, self.group_until_ns))


@dataclass(frozen=True, slots=True)
class Activity:
    """What boundaries say of slices of time: (edges[i], edges[i + 1]]."""

    decodes: Int64s
    """Decoding sequences by slice."""
    group: Int64s
    """Group in prefill by slice, -1 for none."""
    decode_first: Int64s
    """By request: its first slice of decoding,"""
    decode_last: Int64s
    """and the one behind its last."""

    @property
    def active(self) -> Bools:
        """Whether any request was active, by slice."""
        return (self.decodes > 0) | (self.group >= 0)


def activity(boundaries: Boundaries, edges: Int64s) -> Activity:
    """Count who is active in each slice; every edge of the boundaries in the span must be one of the edges."""
    slices = len(edges) - 1
    first = np.searchsorted(edges, np.clip(boundaries.decode_from_ns, edges[0], edges[-1]))
    last = np.searchsorted(edges, np.clip(boundaries.end_ns, edges[0], edges[-1]))
    decodes = np.cumsum(np.bincount(first, minlength=slices + 1) - np.bincount(last, minlength=slices + 1))[:slices]
    group = np.full(slices, -1, np.int64)
    if len(boundaries.group_until_ns):
        middle = (edges[:-1] + edges[1:]) // 2
        at = np.minimum(np.searchsorted(boundaries.group_until_ns, middle), len(boundaries.group_until_ns) - 1)
        inside = (middle > boundaries.group_from_ns[at]) & (middle <= boundaries.group_until_ns[at])
        group = np.where(inside, at, -1)
    return Activity(decodes, group, first, last)


def split_boundaries(
    joules: Float64s,
    take: Bools,
    boundaries: Boundaries,
    seen: Activity,
    *,
    law: Law,
    schedule: PrefillSchedule,
) -> Shares:
    """Share the joules of slices among the requests active in them; shapes (slices,) in, (requests,) out.

    Only slices in `take` are shared out (they must be active); the others help to find how fast a prompt was
    prefilled. With an exclusive schedule the prompt owns its slices. With a chunked one a slice holds
    `K = E / (a + c_d * n + c_p * c)` passes, and the chunk of c tokens is the one with which the prompt's tokens fit
    into the slices of its prefill.
    """
    groups, groups_joules = len(boundaries.group_tokens), np.where(take, joules, 0.0)
    in_group = seen.group >= 0
    prompt = np.flatnonzero(in_group)
    at = seen.group[prompt]
    decodes = seen.decodes.astype(np.float64)
    decode_fixed, decode_marginal = np.zeros(len(joules)), np.zeros(len(joules))
    alone = (seen.decodes > 0) & ~in_group
    passes = groups_joules[alone] / (law.fixed_joules + law.decode_sequence_joules * decodes[alone])
    decode_fixed[alone] = passes * law.fixed_joules / decodes[alone]
    decode_marginal[alone] = passes * law.decode_sequence_joules
    if schedule is PrefillSchedule.EXCLUSIVE:
        whole = law.fixed_joules + law.prefill_token_joules * boundaries.group_tokens
        fixed_part = np.divide(law.fixed_joules, whole, out=np.ones(groups), where=whole > 0)
        owned = sums(at, groups_joules[prompt], groups)
        group_fixed, group_marginal = owned * fixed_part, owned * (1.0 - fixed_part)
    else:
        steady = law.fixed_joules + law.decode_sequence_joules * decodes[prompt]
        chunk = _chunks(joules[prompt], steady, at, boundaries.group_tokens, law.prefill_token_joules)[at]
        cost = steady + law.prefill_token_joules * chunk
        # Without a fixed part and without tokens a pass costs nothing: what was measured is then shared per sequence.
        passes = groups_joules[prompt] / np.where(cost > 0, cost, 1.0)
        fixed = np.where(cost > 0, law.fixed_joules, 1.0) * passes
        members = boundaries.group_members[at]
        decode_fixed[prompt] = fixed / (decodes[prompt] + members)
        decode_marginal[prompt] = passes * law.decode_sequence_joules
        group_fixed = sums(at, decode_fixed[prompt] * members, groups)
        group_marginal = sums(at, passes * law.prefill_token_joules * chunk, groups)
    curves = [np.concatenate(([0.0], np.cumsum(curve))) for curve in (decode_fixed, decode_marginal)]
    decoded = [curve[seen.decode_last] - curve[seen.decode_first] for curve in curves]
    return Shares(*_among_members(boundaries, group_fixed, group_marginal), *decoded)


def company(
    joules: Float64s, boundaries: Boundaries, seen: Activity, edges: Int64s
) -> tuple[Float64s, Float64s, Float64s]:
    """Return what went on while each request decoded: joules, sequence-seconds and prompt tokens, shapes (requests,).

    A prompt's tokens are spread over its prefill by energy.
    """
    in_group = seen.group >= 0
    at = seen.group[in_group]
    spent = sums(at, joules[in_group], len(boundaries.group_tokens))
    part = np.divide(joules[in_group], spent[at], out=np.zeros(len(at)), where=spent[at] > 0)
    tokens = np.zeros(len(joules))
    tokens[in_group] = part * boundaries.group_tokens[at]
    rates = (joules, seen.decodes * np.diff(edges) / 1e9, tokens)
    curves = [np.concatenate(([0.0], np.cumsum(rate))) for rate in rates]
    energy, sequences, prompts = (curve[seen.decode_last] - curve[seen.decode_first] for curve in curves)
    return energy, sequences, prompts


def _chunks(joules: Float64s, steady: Float64s, group: Int64s, tokens: Float64s, token_joules: float) -> Float64s:
    """Return the chunk by group with which sum(joules * c / (steady + token_joules * c)) meets the group's tokens.

    A chunk is at most the whole prompt, which is also the answer when even that does not fit.
    """
    low, high = np.zeros(len(tokens)), tokens.copy()
    for _ in range(_BISECTIONS if len(tokens) else 0):
        middle = 0.5 * (low + high)
        each = middle[group]
        cost = steady + token_joules * each
        done = sums(group, joules * each / np.where(cost > 0, cost, 1.0), len(tokens))
        enough = done >= tokens
        high = np.where(enough, middle, high)
        low = np.where(enough, low, middle)
    return high


def _among_members(boundaries: Boundaries, fixed: Float64s, marginal: Float64s) -> Sequence[Float64s]:
    """Share groups' joules among their requests: the fixed part equally, the marginal part by tokens."""
    member = boundaries.group >= 0
    at = boundaries.group[member]
    total = boundaries.group_tokens[at]
    equal = 1.0 / boundaries.group_members[at]
    by_tokens = np.divide(boundaries.tokens[member], total, out=equal.copy(), where=total > 0)
    results = []
    for joules, part in ((fixed, equal), (marginal, by_tokens)):
        mine = np.zeros(len(boundaries.group))
        mine[member] = joules[at] * part
        results.append(mine)
    return results
