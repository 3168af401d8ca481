"""What a request has probably used since its engine was last settled: for provisional answers alone.

The energy since then is known up to the timeline's end and goes on at its last power. It is shared among the requests
that were active meanwhile by what prompt tokens and sequence seconds cost in the passes before, so that the estimates
of all of them add up to what was measured.
"""

from collections.abc import Sequence

import numpy as np

from jouletrace.energy.timeline import Timeline
from jouletrace.requests.engine import BASE_LAG_NS, Engine
from jouletrace.requests.inflight import InFlight, Int64s
from jouletrace.requests.split import NEVER

LAST_NS = 500_000_000
"""Mean power of the timeline's last half second stands for what follows: 25 samples of the ring."""


def unsettled_joules(
    engine: Engine, table: InFlight, slot: int, timelines: Sequence[Timeline], now_ns: int
) -> tuple[float, float]:
    """Return prefill and decode joules of the request in `slot` from the engine's horizon to now_ns."""
    from_ns = engine.settled_ns
    if engine.sends_steps(now_ns) and engine.last_step_end_ns < now_ns - BASE_LAG_NS:
        # Behind its last step nothing ran.
        now_ns = engine.last_step_end_ns
    mine = np.flatnonzero((table.engine == engine.number) & (table.start_ns < now_ns) & (table.end_ns > from_ns))
    at = int(np.searchsorted(mine, slot))
    if at == len(mine) or mine[at] != slot or now_ns <= from_ns:
        return 0.0, 0.0
    begin = np.maximum(table.start_ns[mine], from_ns)
    finish = np.minimum(table.end_ns[mine], now_ns)
    first = table.first_token_ns[mine]
    # Who has shown no first token and has collected nothing is taken to have computed its prompt, and to decode: many
    # feeds tell of the first token only at the end.
    fresh = (first > from_ns) & (table.joules(mine) == 0)
    tokens = np.where(np.isnan(table.tokens[mine]), engine.typical_prompt, table.tokens[mine])
    decoding = np.maximum(finish - np.maximum(begin, np.where(first >= NEVER, begin, first)), 0) / 1e9
    token_joules, sequence_watts = engine.token_joules, engine.sequence_watts
    if not sequence_watts > 0:
        # Nothing is known of this engine yet: everybody has had the same part of the time.
        token_joules, sequence_watts, decoding = 0.0, 1.0, (finish - begin) / 1e9
    prefill_weight = np.where(fresh, tokens * token_joules, 0.0)
    decode_weight = decoding * sequence_watts
    total = float((prefill_weight + decode_weight).sum())
    if not total > 0:
        return 0.0, 0.0
    joules = sum(_energy(timeline, begin, finish, now_ns) for timeline in timelines)
    return float(prefill_weight[at]) * joules / total, float(decode_weight[at]) * joules / total


def _energy(timeline: Timeline, begin: Int64s, finish: Int64s, now_ns: int) -> float:
    """Return a device's energy while any of the requests was active, with the time it does not know yet."""
    order = np.argsort(begin, kind="stable")
    start, until = begin[order], np.maximum.accumulate(finish[order])
    # A stretch of activity begins where nobody before reaches.
    new = np.concatenate(([True], start[1:] > until[:-1]))
    starts, ends = start[new], until[np.concatenate((new[1:], [True]))]
    known = float(np.diff(timeline.energies_at(np.stack((starts, ends), axis=1)), axis=1).sum())
    behind_ns = int((np.maximum(ends - timeline.end_ns, 0) - np.maximum(starts - timeline.end_ns, 0)).sum())
    if behind_ns <= 0:
        return known
    last_ns = max(timeline.start_ns, timeline.end_ns - LAST_NS)
    span_ns = timeline.end_ns - last_ns
    watts = (timeline.energy_at(timeline.end_ns) - timeline.energy_at(last_ns)) / (span_ns / 1e9) if span_ns else 0.0
    return known + watts * min(behind_ns, now_ns - timeline.end_ns) / 1e9
