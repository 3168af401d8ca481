"""What engines' own counters say of the work of each span of time, and how they share energy that no request claims."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jouletrace.requests.law import Law
from jouletrace.requests.records import LoadRecord, ModelLoad, Usage

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]

MOST_LOADS = 4096
"""Loads that wait, an hour of one a second; older ones are forgotten, as is an engine's time that has no device."""
TYPICAL_BATCH = 8.0
"""Assumed where neither steps nor running requests are told."""


@dataclass(frozen=True, slots=True)
class ModelShare:
    """The part of some energy that one model used: the phases of all models add up to 1."""

    model: str
    prefill: float
    decode: float
    fixed: float
    """Of both, what steps cost however many take part, as the law has it."""


@dataclass(frozen=True, slots=True)
class LoadSpans:
    """Spans of time in which an engine worked; arrays of shape (spans,), in order and apart from each other."""

    start_ns: Int64s
    end_ns: Int64s
    running: Float64s
    """Requests in the batch."""

    def edges(self) -> Int64s:
        """Return the times at which a span begins or ends."""
        return np.concatenate((self.start_ns, self.end_ns))

    def at(self, times_ns: Int64s) -> Float64s:
        """Return the running requests at some times, 0 where the engine did not work."""
        if not len(self.end_ns):
            return np.zeros(len(times_ns))
        row = np.minimum(np.searchsorted(self.end_ns, times_ns), len(self.end_ns) - 1)
        inside = (times_ns > self.start_ns[row]) & (times_ns <= self.end_ns[row])
        return np.where(inside, self.running[row], 0.0)


class Loads:
    """The load records of one engine that are not yet accounted for."""

    def __init__(self) -> None:
        self._waiting: deque[LoadRecord] = deque(maxlen=MOST_LOADS)
        self._shares: tuple[ModelShare, ...] = ()
        self.told_ns = 0
        """Up to when loads have been told."""

    def add(self, load: LoadRecord) -> bool:
        """Keep a load; False when its time has been told before."""
        if load.end_ns <= self.told_ns:
            return False
        self.told_ns = load.end_ns
        self._waiting.append(load)
        return True

    def spans(self, from_ns: int, until_ns: int) -> LoadSpans:
        """Return when the engine worked, as far as it lies between two times."""
        found = [
            (max(load.start_ns, from_ns), min(load.end_ns, until_ns), float(max(load.running or 0, 1)))
            for load in self._waiting
            if load.start_ns < until_ns and load.end_ns > from_ns and _worked(load)
        ]
        starts, ends, running = zip(*found, strict=True) if found else ((), (), ())
        start_ns, end_ns = np.array(starts, np.int64), np.array(ends, np.int64)
        # The sender says each time once, but its clock may have been set back.
        start_ns[1:] = np.maximum(start_ns[1:], end_ns[:-1])
        return LoadSpans(start_ns, np.maximum(start_ns, end_ns), np.array(running, np.float64))

    def release(self, until_ns: int) -> list[LoadRecord]:
        """Return and forget the loads that ended up to a time."""
        released = []
        while self._waiting and self._waiting[0].end_ns <= until_ns:
            released.append(self._waiting.popleft())
        return released

    def shares(self, loads: Sequence[LoadRecord], law: Law) -> Sequence[ModelShare]:
        """Return who used the energy of the time of some loads; of loads without work, whoever worked last.

        Empty as long as no load has told of work.
        """
        parts = [(load, part) for load in loads for part in load.models]
        is_timed = any(_seconds(part) > 0 for _, part in parts)
        by_model: dict[str, Float64s] = {}
        for load, part in parts:
            weights = _predicted(part.usage, load, law)
            if is_timed:
                # What the engine measured tells the phases apart better than a law that may be another model's.
                whole = weights.sum()
                fixed = weights[2] / whole if whole > 0 else 0.0
                times = np.array([part.prefill_seconds or 0.0, part.decode_seconds or 0.0])
                weights = np.array([times[0], times[1] * (1.0 - fixed), times[1] * fixed])
            by_model[part.model] = by_model.get(part.model, np.zeros(3)) + weights
        total = float(sum(weights.sum() for weights in by_model.values()))
        if total > 0:
            self._shares = tuple(
                ModelShare(
                    model,
                    prefill=float(weights[0]) / total,
                    decode=float(weights[1] + weights[2]) / total,
                    fixed=float(weights[2]) / total,
                )
                for model, weights in by_model.items()
            )
        return self._shares


def _worked(load: LoadRecord) -> bool:
    return bool(load.running or load.steps) or any(
        part.usage.input or part.usage.output or part.usage.count or _seconds(part) for part in load.models
    )


def _seconds(part: ModelLoad) -> float:
    return (part.prefill_seconds or 0.0) + (part.decode_seconds or 0.0)


def _predicted(usage: Usage, load: LoadRecord, law: Law) -> Float64s:
    """Return the joules that the law predicts: of prefill, of decoding without the fixed part, and of that."""
    if usage.unit is not None:
        return np.array([0.0, usage.count * law.decode_sequence_joules, usage.count * law.fixed_joules])
    whole = sum(part.usage.output for part in load.models)
    if load.steps and whole:
        batch = max(whole / load.steps, 1.0)
    else:
        batch = float(load.running) if load.running else TYPICAL_BATCH
    return np.array(
        [
            (usage.input - usage.cached_input) * law.prefill_token_joules,
            usage.output * law.decode_sequence_joules,
            usage.output * law.fixed_joules / batch,
        ]
    )
