"""One engine's side of the ledger: its steps and requests that wait to be settled, and how long they may wait."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jouletrace.energy.timeline import DEPTH_NS
from jouletrace.requests import law as laws
from jouletrace.requests.inflight import NOBODY, Inference, InFlight
from jouletrace.requests.law import Law, LawBook, PrefillSchedule, Provenance
from jouletrace.requests.records import EngineRecord, Role
from jouletrace.requests.split import (
    NEVER,
    Activity,
    Boundaries,
    Shares,
    StepMembers,
    activity,
    company,
    split_boundaries,
    split_steps,
    sums,
)
from jouletrace.requests.unclaimed import Unclaimed

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]
Bools = NDArray[np.bool_]
S = 1_000_000_000

BASE_LAG_NS = 1 * S
"""Records of what happened are given this long to arrive over a local socket in any order."""
HOST_GAP_NS = 20_000_000
"""Time between steps up to this belongs to the following step as its host overhead. On both recordings 18,156 gaps
between steps with requests in flight are below 1 ms (0.24 % of the energy); none lies between 1 and 20 ms. One ring
sample is 20 ms long: a shorter pause cannot be told from work."""
STEP_PATIENCE_NS = 5 * S
"""An engine that sends steps is waited for until its next step, but no longer: the longest step of the recordings
takes 55 ms, a prompt of 100,000 tokens on a large model a few seconds."""
STEP_MEMORY_NS = 60 * S
"""An engine counts as sending steps this long after its last one."""
PREFILL_PATIENCE_NS = 30 * S
"""How long a prompt without first token holds its time open; beyond it the request is taken to have waited in a
queue. Time to first token beyond 30 s is past every published service objective."""
FIRST_HOLD_NS = 15 * S
"""How long an engine's time stays open before anything is known of its feed: vLLM's OTLP exporter batches 5 s."""
LONGEST_HOLD_NS = 720 * S
"""Time is held open no longer than this, below the timeline's 900 s."""
HOLD_HALF_LIFE_NS = 300 * S
"""How fast the longest delay seen is forgotten."""
HOLD_MARGIN = 1.25
LATEST_DELAYS = 20
"""Delays of which the second longest counts."""
UNCLAIMED_NS = 120 * S
"""Least time for which unclaimed energy waits for its request."""
TYPICAL_PROMPT_TOKENS = 512.0
"""Assumed for a prompt whose length is not known yet and whose engine has told none."""
FEWEST_STEPS = 8
"""Output tokens below which a request does not tell how many steps its time held: a boundary is a step wide."""
SCALE_MEMORY = 0.995
"""How much of what was learnt of a law's size outlives a request: the last 200 requests count."""
TYPICAL_BATCH = 8
"""Assumed where a first token's time must be guessed."""


class Step(NamedTuple):
    """A step record with its members' slots."""

    end_ns: int
    start_ns: int
    passes: int
    kv_tokens: int
    prefill_slots: Sequence[int]
    prefill_tokens: Sequence[int]
    decode_slots: Sequence[int]
    other_prefills: int
    other_prefill_tokens: int
    other_decodes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What an engine knows of a pass (from_ns, until_ns], before any energy is known."""

    from_ns: int
    until_ns: int
    steps: Sequence[Step]
    step_from_ns: Int64s
    """When each step's share of time begins: its start, or the end of the step before."""
    step_until_ns: Int64s
    slots: Int64s
    """Requests whose boundaries matter."""
    boundaries: Boundaries | None

    def edges(self) -> Int64s:
        """Return every time at which the engine's members may change."""
        times = [self.step_from_ns, self.step_until_ns, np.array([self.from_ns, self.until_ns], np.int64)]
        if self.boundaries is not None:
            times.append(self.boundaries.edges())
        return np.concatenate(times)


@dataclass(frozen=True, slots=True)
class Seen:
    """A plan laid over slices of time, shapes (slices,)."""

    step: Int64s
    """Number of the step, -1 for none."""
    by_boundaries: Bools
    """Whether boundaries say that requests were active, outside of steps."""
    activity: Activity | None

    @property
    def active(self) -> Bools:
        """Whether the slice belongs to requests of this engine."""
        return (self.step >= 0) | self.by_boundaries


class Engine:
    """State of one engine; the ledger owns it."""

    def __init__(self, number: int, record: EngineRecord, book: LawBook, settled_ns: int) -> None:
        self.number = number
        self.settled_ns = settled_ns
        self.ids: dict[str, Inference] = {}
        """The newest life of each request id."""
        self.superseded: dict[str, list[Inference]] = {}
        """Unsettled earlier lives and attempts of ids in use."""
        self.unclaimed = Unclaimed()
        self.late: list[int] = []
        """Slots that came when part of their time was settled."""
        self.counting = False
        """Whether steps come that only count their members."""
        self.steps: list[Step] = []
        self._step_keys: set[tuple[int, int]] = set()
        self._steps_sorted = True
        self.last_step_end_ns = 0
        self._settled_step_ns = 0
        self.last_active_ns = 0
        """The latest time in the account at which its requests were active."""
        self.evidence_ns = 0
        """Everything up to here has been told, as far as live feeds go."""
        self._delays_ns: deque[int] = deque(maxlen=LATEST_DELAYS)
        self._hold_ns: float | None = None
        self._hold_seen_ns = 0
        self.device_joules: dict[str, float] = {}
        """What it has used of each device: the key by which energy that nobody claims goes back."""
        self.sequence_watts = 0.0
        """Power of one decoding sequence in the last pass with any,"""
        self.token_joules = 0.0
        """and the energy of one prompt token: for provisional answers."""
        self.busy_joules = 0.0
        self.lost_joules = 0.0
        self.told_ns = 0
        """When it last told something that counted,"""
        self.heard_ns = 0
        """and anything at all."""
        self.placed_ns = 0
        """When it last had a device."""
        self.retired_ns: int | None = None
        """When it was taken as gone; None while it is there."""
        self.accepted = 0.0
        self.dropped = 0.0
        self._shown_joules = 0.0
        self._predicted_joules = 0.0
        self._prompt_tokens = (0.0, 0)
        self.describe(record, book)

    def describe(self, record: EngineRecord, book: LawBook) -> None:
        """Take over what an engine record says, from the next pass on."""
        self.record = record
        self.law = book.law(record.engine_id, record.models)
        self.schedule = book.schedule(record.engine_id, record.kind)

    @property
    def engine_id(self) -> str:
        """The engine's id."""
        return self.record.engine_id

    # ---------------------------------------------------------------- what comes in

    def observe_delay(self, delay_ns: int, now_ns: int) -> None:
        """Note how old something was when it was told; what is older than the timeline tells nothing of the feed."""
        if delay_ns >= DEPTH_NS:
            return
        self._delays_ns.append(delay_ns)
        # One that is alone among the latest must not hold everybody's answers back.
        usual_ns = sorted(self._delays_ns)[-2:][0]
        self._hold_ns = min(max(self.hold_ns(now_ns, known_only=True), usual_ns * HOLD_MARGIN), LONGEST_HOLD_NS)
        self._hold_seen_ns = now_ns

    def hold_ns(self, now_ns: int, *, known_only: bool = False) -> float:
        """Return for how long time is held open, by the longest delay seen (fading)."""
        if self._hold_ns is None:
            return 0.0 if known_only else FIRST_HOLD_NS
        fading: float = 0.5 ** (max(0, now_ns - self._hold_seen_ns) / HOLD_HALF_LIFE_NS)
        return self._hold_ns * fading

    def note_prompt(self, tokens: float) -> None:
        """Learn how long prompts are."""
        total, count = self._prompt_tokens
        self._prompt_tokens = (total + tokens, count + 1)

    @property
    def typical_prompt(self) -> float:
        """Mean prompt tokens to compute so far."""
        total, count = self._prompt_tokens
        return total / count if count else TYPICAL_PROMPT_TOKENS

    def add_step(self, step: Step) -> bool:
        """Keep a step for the next pass; False when the same step is there already."""
        key = (step.start_ns, step.end_ns)
        if key in self._step_keys:
            return False
        self._step_keys.add(key)
        if self.steps and step.end_ns < self.steps[-1].end_ns:
            self._steps_sorted = False
        self.steps.append(step)
        self.last_step_end_ns = max(self.last_step_end_ns, step.end_ns)
        self.evidence_ns = max(self.evidence_ns, step.end_ns)
        return True

    def sends_steps(self, now_ns: int) -> bool:
        """Whether steps have come lately."""
        return self.last_step_end_ns > now_ns - STEP_MEMORY_NS and self.last_step_end_ns > 0

    def waiting_slots(self) -> Iterable[int]:
        """Return the slots that steps still to be settled name (with repeats)."""
        return chain.from_iterable((*step.prefill_slots, *step.decode_slots) for step in self.steps)

    # ---------------------------------------------------------------- how far to settle

    def horizon(self, now_ns: int, table: InFlight) -> int:
        """Return up to when this engine's time may be settled now."""
        until = now_ns - BASE_LAG_NS - round(self.hold_ns(now_ns))
        if self.sends_steps(now_ns):
            return min(until, max(self.evidence_ns, now_ns - STEP_PATIENCE_NS))
        return self._before_open_prefill(until, now_ns, table)

    def _before_open_prefill(self, until: int, now_ns: int, table: InFlight) -> int:
        """Return `until`, or the start of the prefill that would be cut: its tokens are only known whole."""
        mine = table.engine == self.number
        first = table.first_token_ns
        patience = max(PREFILL_PATIENCE_NS, self.hold_ns(now_ns))
        open_ = mine & (table.start_ns < until) & (first > until) & (table.end_ns > self.settled_ns)
        open_ &= (first < NEVER) | (table.start_ns > now_ns - patience)
        if not open_.any():
            return until
        before = first[mine & (first <= until)]
        chained = int(before.max()) if len(before) else 0
        return min(until, max(int(table.start_ns[open_].min()), chained, self.settled_ns))

    # ---------------------------------------------------------------- a pass

    def plan(self, until_ns: int, table: InFlight) -> Plan:
        """Take the steps that end or began up to `until_ns` and arrange the requests of the pass."""
        steps = self._take_steps(until_ns)
        ends = np.array([step.end_ns for step in steps], np.int64)
        starts = np.array([step.start_ns for step in steps], np.int64)
        before = np.concatenate(([self._settled_step_ns], np.maximum.accumulate(ends)))[:-1] if steps else starts
        # Steps of one engine run one after another: where two overlap, the later-ended one began behind the other.
        begin = np.where(starts - before <= HOST_GAP_NS, before, starts)
        begin = np.clip(begin, self.settled_ns, until_ns)
        finish = np.maximum(np.clip(ends, self.settled_ns, until_ns), begin)
        covered = int((finish - begin).sum())
        if steps:
            self._settled_step_ns = max(self._settled_step_ns, int(finish[-1]))
        slots = np.empty(0, np.int64)
        boundaries = None
        if until_ns - self.settled_ns - covered > (HOST_GAP_NS if steps else 0):
            slots = np.flatnonzero(
                (table.engine == self.number) & (table.start_ns < until_ns) & (table.end_ns > self.settled_ns)
            )
            boundaries = self._boundaries(slots, until_ns, table) if len(slots) else None
        return Plan(self.settled_ns, until_ns, steps, begin, finish, slots, boundaries)

    def skip(self, until_ns: int) -> None:
        """Leave the time up to `until_ns` behind without energy."""
        if until_ns > self.settled_ns:
            self._take_steps(until_ns)
            self.settled_ns = until_ns

    def _take_steps(self, until_ns: int) -> list[Step]:
        if not self._steps_sorted:
            self.steps.sort(key=lambda step: (step.end_ns, step.start_ns))
            self._steps_sorted = True
        taken = [step for step in self.steps if step.start_ns < until_ns]
        self.steps = [step for step in self.steps if step.end_ns > until_ns]
        self._step_keys = {(step.start_ns, step.end_ns) for step in self.steps}
        return taken

    def _boundaries(self, slots: Int64s, until_ns: int, table: InFlight) -> Boundaries:
        tokens = table.tokens[slots]
        return Boundaries.of(
            np.maximum(table.start_ns[slots], self.settled_ns),
            table.first_token_ns[slots],
            table.end_ns[slots],
            np.where(np.isnan(tokens), self.typical_prompt, tokens),
            from_ns=self.settled_ns,
            until_ns=until_ns,
        )

    def see(self, plan: Plan, edges: Int64s, busy: Bools | None) -> Seen:
        """Lay a plan over slices; `busy` says where any of the engine's devices may have worked (None: not known)."""
        middle = (edges[:-1] + edges[1:]) // 2
        step = np.full(len(middle), -1, np.int64)
        if len(plan.steps):
            at = np.minimum(np.searchsorted(plan.step_until_ns, middle), len(plan.steps) - 1)
            inside = (middle >= plan.step_from_ns[at]) & (middle < plan.step_until_ns[at])
            step = np.where(inside, at, -1)
        if plan.boundaries is None:
            return Seen(step, np.zeros(len(middle), np.bool_), None)
        seen = activity(plan.boundaries, edges)
        # A request that waits while its GPU does nothing burns nothing: that is idle.
        by_boundaries = seen.active & (step < 0) & (middle >= plan.from_ns)
        if busy is not None:
            by_boundaries &= busy
        return Seen(step, by_boundaries, seen)

    def distribute(
        self, plan: Plan, seen: Seen, edges: Int64s, joules: Float64s, *, slack: float, table: InFlight
    ) -> None:
        """Give the engine's energy by slice to its requests; counted members' part waits to be claimed.

        What belongs to nobody collects in the table's slot for nobody.
        """
        if plan.steps:
            self._distribute_steps(plan, seen, joules, slack, table)
        if plan.boundaries is not None and seen.activity is not None and seen.by_boundaries.any():
            shares = split_boundaries(
                joules, seen.by_boundaries, plan.boundaries, seen.activity, law=self.split_law, schedule=self.schedule
            )
            energy, sequences, prompted = company(joules, plan.boundaries, seen.activity, edges)
            table.decode_energy[plan.slots] += energy
            table.decode_company[plan.slots] += sequences
            table.decode_prompts[plan.slots] += prompted
            table.add(shares, plan.slots)
            total = shares.total()
            table.boundary_joules[plan.slots] += total
            if self.schedule is PrefillSchedule.EXCLUSIVE:
                table.exclusive_joules[plan.slots] += total
            table.error_joules[plan.slots] += total * (laws.boundary_error(self.schedule, self.law) + slack)
            # Rounding of cumulative sums (1e-16 of the pass) must not be lost from the account.
            table.decode_marginal[NOBODY] += float(joules[seen.by_boundaries].sum()) - float(total.sum())
            seconds = np.diff(edges)[seen.by_boundaries] @ seen.activity.decodes[seen.by_boundaries] / 1e9
            prompts = float(plan.boundaries.group_tokens.sum())
            self._learn_rates(shares, float(seconds), prompts)
        self.settled_ns = plan.until_ns

    def _distribute_steps(self, plan: Plan, seen: Seen, joules: Float64s, slack: float, table: InFlight) -> None:
        steps = plan.steps
        inside = seen.step >= 0
        by_step = sums(seen.step[inside], joules[inside], len(steps))
        members = _members(steps)
        shares, counted, empty = split_steps(by_step, members, self.law, len(table.engine))
        table.add(shares)
        total = shares.total()
        table.error_joules += total * (laws.STEPS_ERROR + slack)
        table.decode_marginal[NOBODY] += float(empty.sum())
        other = (members.other_decodes > 0) | (members.other_prefills > 0)
        waiting = 0.0
        if other.any():
            before = self.unclaimed.joules
            # Without its host gap: a request that arrived in the gap takes part in the step.
            began = np.array([step.start_ns for step in steps], np.int64)
            starts = np.maximum(began, plan.step_from_ns)
            # A step that two passes share brings its tokens in two parts.
            whole = np.maximum(np.array([step.end_ns for step in steps], np.int64) - began, 1)
            part = np.clip((plan.step_until_ns - starts) / whole, 1e-6, 1.0)
            self.unclaimed.append_steps(
                starts[other],
                plan.step_until_ns[other],
                counted.of(other, part),
                members.other_decodes[other],
                (members.other_prefill_tokens * part)[other],
            )
            waiting = self.unclaimed.joules - before
        table.decode_marginal[NOBODY] += float(by_step.sum()) - float(total.sum()) - float(empty.sum()) - waiting
        seconds = float(
            ((members.decode_count + members.other_decodes) * (plan.step_until_ns - plan.step_from_ns)).sum()
        )
        self._learn_rates(shares, seconds / 1e9, float(members.prefill_tokens.sum()))

    def _learn_rates(self, shares: Shares, sequence_seconds: float, prompt_tokens: float) -> None:
        decode = float(shares.decode_fixed.sum() + shares.decode_marginal.sum())
        prefill = float(shares.prefill_fixed.sum() + shares.prefill_marginal.sum())
        if sequence_seconds > 0 and decode > 0:
            self.sequence_watts = decode / sequence_seconds
        if prompt_tokens > 0 and prefill > 0:
            self.token_joules = prefill / prompt_tokens

    def claim(self, table: InFlight, slots: Int64s, until_ns: int, *, whole: bool) -> None:
        """Let requests take what is theirs of the past up to `until_ns`.

        With `whole`, prompts are claimed in one piece, once their first token is known.
        """
        if not len(slots) or not len(self.unclaimed):
            return
        start, first = table.start_ns[slots], table.first_token_ns[slots]
        end = np.minimum(table.end_ns[slots], until_ns)
        done = table.claimed_ns[slots]
        decode_from = np.minimum(np.maximum(first, done), end)
        prompt_until = np.minimum(first, until_ns)
        prompt = (done < prompt_until) & ((first <= until_ns) if whole else (start < prompt_until))
        tokens = table.tokens[slots]
        shares = self.unclaimed.claim(
            decode_from_ns=decode_from,
            decode_until_ns=np.maximum(end, decode_from),
            prompt_from_ns=np.where(prompt, start, prompt_until),
            prompt_until_ns=prompt_until,
            prompt_tokens=np.where(np.isnan(tokens), self.typical_prompt, tokens),
            law=self.law,
        )
        table.add(shares, slots)
        total = shares.total()
        table.count_joules[slots] += total
        table.error_joules[slots] += total * laws.COUNTS_ERROR
        table.claimed_ns[slots] = np.where(first <= until_ns, np.maximum(done, until_ns), done)

    @property
    def split_law(self) -> Law:
        """The law by which boundaries are split, in the size that finished requests showed.

        A prior may be of any size. A law that was measured is trusted within its own error: where an output token
        is not a step (speculative decoding) the comparison misleads, and must not spoil a good law.
        """
        if self._predicted_joules <= 0:
            return self.law
        factor = self._shown_joules / self._predicted_joules
        if self.law.provenance is not Provenance.PRIOR:
            error = self.law.error or laws.CALIBRATED_ERROR
            factor = min(max(factor, 1.0 - error), 1.0 + error)
        return self.law.scaled(factor)

    def learn_scale(self, table: InFlight, slots: Int64s, output_tokens: Float64s) -> None:
        """Compare the law with requests that have ended: each output token but the first is a step.

        Only the law's size is learnt, one number from sums, never its proportions: fitting coefficients on
        boundaries is biased by 25-40 % (reference: errors in variables).
        """
        seconds = (table.end_ns[slots] - table.first_token_ns[slots]) / 1e9
        usable = (output_tokens >= FEWEST_STEPS) & (seconds > 0) & (table.decode_energy[slots] > 0)
        if not usable.any():
            return
        chosen, steps = slots[usable], output_tokens[usable] - 1
        batch = table.decode_company[chosen] / seconds[usable]
        predicted = steps * (self.law.fixed_joules + self.law.decode_sequence_joules * batch)
        predicted += self.law.prefill_token_joules * table.decode_prompts[chosen]
        self._shown_joules = self._shown_joules * SCALE_MEMORY ** len(chosen) + float(table.decode_energy[chosen].sum())
        self._predicted_joules = self._predicted_joules * SCALE_MEMORY ** len(chosen) + float(predicted.sum())

    def returned(self, joules: float) -> Mapping[str, float]:
        """Return which device an amount that nobody claims came from."""
        total = sum(self.device_joules.values())
        if total <= 0:
            return dict.fromkeys(list(self.device_joules)[:1] or [""], joules)
        return {uuid: joules * part / total for uuid, part in self.device_joules.items()}

    def estimated_first_token_ns(self, start_ns: int, end_ns: int, prompt_tokens: float, output_tokens: int) -> int:
        """Return when the first token probably came, by the law's costs of prompt and answer in a typical batch."""
        if self.record.role is Role.PREFILL:
            return end_ns
        prompt = 0.0 if np.isnan(prompt_tokens) else self.law.prefill_token_joules * prompt_tokens
        each = self.law.fixed_joules / TYPICAL_BATCH + self.law.decode_sequence_joules
        return start_ns + round((end_ns - start_ns) * prompt / max(prompt + each * max(output_tokens, 1), 1e-12))


def _members(steps: Sequence[Step]) -> StepMembers:
    count = len(steps)
    (_, _, passes, kv, prefills, tokens, decodes, other_prefills, other_tokens, other_decodes) = zip(
        *steps, strict=True
    )
    prefill_count = np.fromiter(map(len, prefills), np.int64, count)
    decode_count = np.fromiter(map(len, decodes), np.int64, count)
    named, decoding = int(prefill_count.sum()), int(decode_count.sum())
    return StepMembers(
        passes=np.array(passes, np.float64),
        kv_tokens=np.array(kv, np.float64),
        prefill_count=prefill_count,
        prefill_slots=np.fromiter(chain.from_iterable(prefills), np.int64, named),
        prefill_tokens=np.fromiter(chain.from_iterable(tokens), np.float64, named),
        decode_count=decode_count,
        decode_slots=np.fromiter(chain.from_iterable(decodes), np.int64, decoding),
        other_prefills=np.array(other_prefills, np.float64),
        # A prompt that computes nothing (all cached) still takes part: as one token it can be claimed.
        other_prefill_tokens=np.maximum(other_tokens, np.minimum(other_prefills, 1)).astype(np.float64),
        other_decodes=np.array(other_decodes, np.float64),
    )
