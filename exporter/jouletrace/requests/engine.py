"""One engine's side of the ledger: its steps and requests that wait to be settled, and how long they may wait."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jouletrace.energy.timeline import DEPTH_NS
from jouletrace.requests import law as laws
from jouletrace.requests.account import EngineState, EngineTotals
from jouletrace.requests.inflight import NOBODY, Inference, InFlight
from jouletrace.requests.law import Law, LawBook, PrefillSchedule, Provenance
from jouletrace.requests.loads import Loads, LoadSpans, ModelShare
from jouletrace.requests.records import EngineRecord, LoadRecord, RequestRecord, Role, StepRecord, Usage
from jouletrace.requests.split import (
    NEVER,
    Activity,
    AnonymousShares,
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
SILENT_NS = 300 * S
"""An engine that has told nothing for this long is taken to have no feed."""
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
    loads: LoadSpans
    """When an engine worked whose requests nobody tells, or told yet; empty for another."""

    def edges(self) -> Int64s:
        """Return every time at which the engine's members may change."""
        times = [self.step_from_ns, self.step_until_ns, np.array([self.from_ns, self.until_ns], np.int64)]
        if self.boundaries is not None:
            times.append(self.boundaries.edges())
        times.append(np.clip(self.loads.edges(), self.from_ns, self.until_ns))
        return np.concatenate(times)


@dataclass(frozen=True, slots=True)
class Seen:
    """A plan laid over slices of time, shapes (slices,)."""

    step: Int64s
    """Number of the step, -1 for none."""
    by_boundaries: Bools
    """Whether boundaries say that requests were active, outside of steps."""
    activity: Activity | None
    running: Float64s
    """Requests in the batch by the engine's own counters, outside of steps and boundaries; 0 where it did not work."""

    @property
    def by_loads(self) -> Bools:
        """Whether only the engine's counters say that requests were active."""
        return self.running > 0

    @property
    def active(self) -> Bools:
        """Whether the slice belongs to requests of this engine."""
        return (self.step >= 0) | self.by_boundaries | self.by_loads


class Engine:
    """State of one engine; the ledger owns it."""

    def __init__(self, number: int, record: EngineRecord, book: LawBook, settled_ns: int) -> None:
        self.number = number
        self.settled_ns = settled_ns
        self.tenant = ""
        """Who pays for requests that name nobody."""
        self.ids: dict[str, Inference] = {}
        """The newest life of each request id."""
        self.superseded: dict[str, list[Inference]] = {}
        """Unsettled earlier lives and attempts of ids in use."""
        self.unclaimed = Unclaimed()
        self.loads = Loads()
        self.requested_ns = 0
        """When a request was last told; 0 for never."""
        self.told_from_ns = 0
        """When the oldest request began that was told since the counters were all that was known."""
        self.living_pids: set[int] = set()
        """Processes that announced it and were there at the last look."""
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
        self.totals = EngineTotals()
        """What it has used and done in this process's time."""
        self._state = EngineState()
        self._begun: dict[tuple[int, int], tuple[float, float]] = {}
        """Joules and seconds so far of steps that a pass has cut, by start and end."""
        self._whole_until_ns = 0
        """Where the newest step ended that is settled whole."""
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

    @property
    def state(self) -> EngineState:
        """What it last said of its queue."""
        return replace(self._state, max_num_seqs=self.record.max_num_seqs)

    def note_queue(self, record: StepRecord) -> None:
        """Take over what a step tells of the queue, unless a newer one has told."""
        if record.running is None and record.waiting is None and record.kv_usage is None:
            return
        if record.end_ns >= self._state.t_ns:
            preemptions = self._state.preemptions
            self._state = EngineState(
                record.end_ns, record.running, record.waiting, record.kv_usage, preemptions=preemptions
            )

    def note_load(self, load: LoadRecord) -> bool:
        """Take in what the engine's counters say; False when it has been told before."""
        if not self.loads.add(load):
            return False
        if load.end_ns >= self._state.t_ns:
            self._state = EngineState(
                load.end_ns, load.running, load.waiting, load.kv_usage, preemptions=load.preemptions
            )
        return True

    def note_requested(self, record: RequestRecord, now_ns: int, *, is_first: bool) -> None:
        """Note that its requests are told, and from when on; `is_first` for the first since it told of none."""
        if is_first:
            self.told_from_ns = now_ns
        began_ns = record.arrival_ns or record.scheduled_ns or record.first_token_ns or record.end_ns or now_ns
        self.told_from_ns = min(self.told_from_ns, began_ns)
        self.requested_ns = now_ns

    def lives_by_loads(self, now_ns: int) -> bool:
        """Whether its counters are all that is known: they are told, and no request has been for minutes."""
        return self.loads.told_ns > now_ns - SILENT_NS and not self.is_requested(now_ns)

    def is_requested(self, now_ns: int) -> bool:
        """Whether its requests are told: one has been in the last minutes, or is in flight."""
        # A long stream tells nothing for minutes; its tokens come with its end and must not be counted before.
        return self.requested_ns > max(0, now_ns - SILENT_NS) or any(one.described for one in self.ids.values())

    def keep_ns(self, now_ns: int) -> int:
        """Return for how long its unclaimed energy waits for requests; none ever came to one that only counts."""
        if self.requested_ns == 0 and self.lives_by_loads(now_ns):
            return 0
        return max(UNCLAIMED_NS, round(self.hold_ns(now_ns)))

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

    def loads_horizon(self, now_ns: int) -> int:
        """Return up to when its time may be settled beside engines that tell of requests."""
        return min(now_ns - BASE_LAG_NS, max(self.loads.told_ns, now_ns - STEP_PATIENCE_NS))

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

    def plan(self, until_ns: int, table: InFlight, now_ns: int) -> Plan:
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
        loads = self.loads.spans(
            self.settled_ns, until_ns if self.lives_by_loads(now_ns) else min(until_ns, self.told_from_ns)
        )
        return Plan(self.settled_ns, until_ns, steps, begin, finish, slots, boundaries, loads)

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
        free = (step < 0) & (middle >= plan.from_ns)
        if busy is not None:
            # A request that waits while its GPU does nothing burns nothing: that is idle.
            free &= busy
        seen = None if plan.boundaries is None else activity(plan.boundaries, edges)
        by_boundaries = np.zeros(len(middle), np.bool_) if seen is None else seen.active & free
        running = np.where(free & ~by_boundaries, plan.loads.at(middle), 0.0)
        return Seen(step, by_boundaries, seen, running)

    def use(self, joules: float) -> None:
        """Count busy energy of its devices, whoever it will turn out to belong to."""
        self.busy_joules += joules
        self.totals = replace(self.totals, busy_joules=self.totals.busy_joules + joules)

    def use_untold(self, joules: float) -> None:
        """Count busy energy of time in which nothing is known of its requests."""
        self.use(joules)
        self.totals = replace(self.totals, unclaimed_joules=self.totals.unclaimed_joules + joules)

    def note_claimed(self, joules: float) -> None:
        """Count such energy as that of somebody who was told late."""
        self.totals = replace(self.totals, unclaimed_joules=max(0.0, self.totals.unclaimed_joules - joules))

    def bear_idle(self, joules: float) -> None:
        """Count its part of the idle energy of the devices that it holds."""
        self.totals = replace(self.totals, idle_joules=self.totals.idle_joules + joules)

    def count_ended(self, usages: Sequence[Usage], joules: float, *, requests: int) -> None:
        """Count what requests that are settled, or all of them by the engine's counters, consumed and produced.

        `joules` is what that took, `requests` how many ended (0 for what only counters tell).
        """
        units = dict(self.totals.units)
        for usage in usages:
            if usage.unit is not None:
                units[usage.unit] = units.get(usage.unit, 0.0) + usage.count
        self.totals = replace(
            self.totals,
            ended_requests=self.totals.ended_requests + requests,
            made_joules=self.totals.made_joules + joules,
            output_tokens=self.totals.output_tokens + sum(usage.output for usage in usages),
            input_tokens=self.totals.input_tokens + sum(usage.input for usage in usages),
            units=units,
        )

    def distribute(
        self, plan: Plan, seen: Seen, edges: Int64s, joules: Float64s, *, slack: float, table: InFlight
    ) -> None:
        """Give the engine's energy by slice to its requests; counted members' part waits to be claimed.

        What belongs to nobody collects in the table's slot for nobody. Everything is worked out before anything is
        booked: when this raises, nothing of the energy has been given to anybody.
        """
        steps = self._share_steps(plan, seen, joules, len(table.engine)) if plan.steps else None
        boundaries = self._share_boundaries(plan, seen, edges, joules)
        active = np.diff(edges)[seen.active].sum() / 1e9
        self.totals = replace(self.totals, active_seconds=self.totals.active_seconds + float(active))
        if steps is not None:
            self._book_steps(plan, steps, slack, table)
        if boundaries is not None:
            self._book_boundaries(plan, boundaries, slack, table)
        if seen.by_loads.any():
            self._book_loads(seen, edges, joules)
        self.settled_ns = plan.until_ns

    def _book_loads(self, seen: Seen, edges: Int64s, joules: Float64s) -> None:
        """Let energy wait of which only the counters know: a request that is told yet takes its part."""
        at = seen.by_loads
        self.unclaimed.append_unknown(edges[:-1][at], edges[1:][at], joules[at], told=True)
        seconds = float(np.diff(edges)[at] @ seen.running[at]) / 1e9
        self.totals = replace(self.totals, sequence_seconds=self.totals.sequence_seconds + seconds)

    def count_shares(self, joules: float, shares: Sequence[ModelShare]) -> None:
        """Count by phase energy that models share by their engine's counters."""
        if not self.counting:
            # Of counted steps the phases are counted already.
            self._count_phases(
                joules * sum(share.prefill for share in shares),
                joules * sum(share.decode for share in shares),
                joules * sum(share.fixed for share in shares),
            )

    def pass_by(self, plan: Plan) -> None:
        """Leave the time of a plan behind whose energy could not be distributed."""
        self._begun.clear()
        self.settled_ns = max(self.settled_ns, plan.until_ns)

    def _share_boundaries(self, plan: Plan, seen: Seen, edges: Int64s, joules: Float64s) -> "_SharedTime | None":
        boundaries, sight, taken = plan.boundaries, seen.activity, seen.by_boundaries
        if boundaries is None or sight is None or not taken.any():
            return None
        shares = split_boundaries(joules, taken, boundaries, sight, law=self.split_law, schedule=self.schedule)
        prompting = np.append(boundaries.group_members, 0)[sight.group[taken]]
        seconds = np.diff(edges)[taken] / 1e9
        return _SharedTime(
            shares=shares,
            joules=float(joules[taken].sum()),
            company=company(joules, boundaries, sight, edges),
            decode_seconds=float(seconds @ sight.decodes[taken]),
            sequence_seconds=float(seconds @ (sight.decodes[taken] + prompting)),
            prompt_tokens=float(boundaries.group_tokens.sum()),
        )

    def _book_boundaries(self, plan: Plan, found: "_SharedTime", slack: float, table: InFlight) -> None:
        energy, sequences, prompted = found.company
        table.decode_energy[plan.slots] += energy
        table.decode_company[plan.slots] += sequences
        table.decode_prompts[plan.slots] += prompted
        table.add(found.shares, plan.slots)
        total = found.shares.total()
        table.boundary_joules[plan.slots] += total
        if self.schedule is PrefillSchedule.EXCLUSIVE:
            table.exclusive_joules[plan.slots] += total
        table.error_joules[plan.slots] += total * (laws.boundary_error(self.schedule, self.law) + slack)
        # Rounding of cumulative sums (1e-16 of the pass) must not be lost from the account.
        table.decode_marginal[NOBODY] += found.joules - float(total.sum())
        self._count_shares(found.shares)
        self.totals = replace(self.totals, sequence_seconds=self.totals.sequence_seconds + found.sequence_seconds)
        self._learn_rates(found.shares, found.decode_seconds, found.prompt_tokens)

    def _share_steps(self, plan: Plan, seen: Seen, joules: Float64s, slots: int) -> "_SharedSteps":
        inside = seen.step >= 0
        by_step = sums(seen.step[inside], joules[inside], len(plan.steps))
        members = _members(plan.steps)
        return _SharedSteps(by_step, members, *split_steps(by_step, members, self.law, slots))

    def _book_steps(self, plan: Plan, found: "_SharedSteps", slack: float, table: InFlight) -> None:
        steps, members, shares = plan.steps, found.members, found.shares
        table.add(shares)
        total = shares.total()
        table.error_joules += total * (laws.STEPS_ERROR + slack)
        table.decode_marginal[NOBODY] += float(found.empty.sum())
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
            counted, sequences = found.counted.of(other, part), members.other_decodes[other]
            tokens = (members.other_prefill_tokens * part)[other]
            self.unclaimed.append_steps(starts[other], plan.step_until_ns[other], counted, sequences, tokens)
            waiting = self.unclaimed.joules - before
            self._count_phases(
                float(tokens @ (counted.token_fixed_each + counted.token_marginal_each)),
                float(sequences @ (counted.decode_fixed_each + counted.decode_marginal_each)),
                float(tokens @ counted.token_fixed_each + sequences @ counted.decode_fixed_each),
            )
        rest = float(found.joules.sum()) - float(total.sum()) - float(found.empty.sum()) - waiting
        table.decode_marginal[NOBODY] += rest
        self._count_shares(shares)
        self._count_steps(plan, found)
        seconds = (plan.step_until_ns - plan.step_from_ns) / 1e9
        decodes = members.decode_count + members.other_decodes
        self._learn_rates(shares, float(seconds @ decodes), float(members.prefill_tokens.sum()))

    def _count_shares(self, shares: Shares) -> None:
        fixed = float(shares.prefill_fixed.sum()), float(shares.decode_fixed.sum())
        self._count_phases(
            fixed[0] + float(shares.prefill_marginal.sum()), fixed[1] + float(shares.decode_marginal.sum()), sum(fixed)
        )

    def _count_phases(self, prefill: float, decode: float, fixed: float) -> None:
        totals = self.totals
        self.totals = replace(
            totals,
            prefill_joules=totals.prefill_joules + prefill,
            decode_joules=totals.decode_joules + decode,
            fixed_joules=totals.fixed_joules + fixed,
        )

    def _count_steps(self, plan: Plan, found: "_SharedSteps") -> None:
        """Count the steps that end in this pass, with the energy and time that earlier passes found of them.

        A step that came when part of its time was settled is left out: its energy would not fit its work.
        """
        members, seconds = found.members, (plan.step_until_ns - plan.step_from_ns) / 1e9
        joules, lasted = found.joules.copy(), seconds.copy()
        chosen = np.ones(len(plan.steps), np.bool_)
        begun, self._begun = self._begun, {}
        for at, step in enumerate(plan.steps):
            if plan.from_ns <= step.start_ns and step.end_ns <= plan.until_ns:
                continue
            key = (step.start_ns, step.end_ns)
            # Of two steps that overlap, the later-ended one began behind the other.
            began_ns = max(step.start_ns, self._whole_until_ns)
            known = begun.get(key, (0.0, 0.0) if began_ns >= plan.from_ns - HOST_GAP_NS else None)
            if known is not None:
                joules[at] += known[0]
                lasted[at] += known[1]
                if step.end_ns > plan.until_ns:
                    self._begun[key] = (float(joules[at]), float(lasted[at]))
            chosen[at] = known is not None and step.end_ns <= plan.until_ns
        whole_ns = [step.end_ns for step, is_whole in zip(plan.steps, chosen.tolist(), strict=True) if is_whole]
        self._whole_until_ns = max(whole_ns, default=self._whole_until_ns)
        decodes = members.decode_count + members.other_decodes
        prefills = members.prefill_count + members.other_prefills
        prompting = np.repeat(np.arange(len(chosen)), members.prefill_count)
        tokens = sums(prompting, members.prefill_tokens, len(chosen)) + members.other_prefill_tokens
        totals, passes = self.totals, members.passes[chosen]
        self.totals = replace(
            totals,
            sequence_seconds=totals.sequence_seconds + float(seconds @ (decodes + prefills)),
            step_joules=totals.step_joules + float(joules[chosen].sum()),
            step_seconds=totals.step_seconds + float(lasted[chosen].sum()),
            steps=totals.steps + float(passes.sum()),
            step_prefill_tokens=totals.step_prefill_tokens + float(tokens[chosen].sum()),
            step_decode_sequences=totals.step_decode_sequences + float(passes @ decodes[chosen]),
            step_kv_tokens=totals.step_kv_tokens + float(members.kv_tokens[chosen].sum()),
        )

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
        untold = self.unclaimed.untold_joules
        shares = self.unclaimed.claim(
            decode_from_ns=decode_from,
            decode_until_ns=np.maximum(end, decode_from),
            prompt_from_ns=np.where(prompt, start, prompt_until),
            prompt_until_ns=prompt_until,
            prompt_tokens=np.where(np.isnan(tokens), self.typical_prompt, tokens),
            law=self.law,
        )
        self.note_claimed(untold - self.unclaimed.untold_joules)
        table.add(shares, slots)
        if not self.counting:
            # Of counted steps the phases are known, and counted, before anybody claims them.
            self._count_shares(shares)
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


@dataclass(frozen=True, slots=True)
class _SharedTime:
    """What boundaries gave to the requests of a plan."""

    shares: Shares
    joules: float
    company: tuple[Float64s, Float64s, Float64s]
    decode_seconds: float
    sequence_seconds: float
    prompt_tokens: float


@dataclass(frozen=True, slots=True)
class _SharedSteps:
    """What the steps of a plan gave to their members."""

    joules: Float64s
    members: StepMembers
    shares: Shares
    counted: AnonymousShares
    empty: Float64s


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
