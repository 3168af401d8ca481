"""What a device draws while it does nothing: bare (no process holds a context) and parked (one does).

Learnt live as the median of quiet windows, kept across restarts by UUID. Never the minimum ever seen: a single
low reading, or a start under load, would stay wrong for ever.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Annotated

import msgspec

SETTLE_WINDOWS = 3
"""Quiet windows skipped after work: clocks fall and leakage cools for 2-3 s after load (H200 recording)."""
ENOUGH_WINDOWS = 5
"""A level is published once this many windows of one kind were seen."""
KEPT_WINDOWS = 120
QUIET_ACTIVITY = 0.01
"""Busy and bandwidth ratios up to this are housekeeping (idle H200 phases read at most 0.1 %)."""
BARE_MEMORY_PART = 0.015
"""Where the driver does not list processes: more memory in use than this part means that somebody holds a
context. A bare H200 holds 0.43 % (615 of 143,771 MiB)."""
WORK_POWER_PART = 0.05
"""Where power alone has to tell: work draws more than the parked level and this part of the way from it to the limit
(H200: 150 W; parked and warm 128 W, host copies 130 W, a loop of tiny kernels 189 W)."""
UNLEARNT_WORK_PART = 0.3
"""The same as a part of the limit where no parked level is learnt (H200 parked: 0.17; decode at 20 % duty 0.29)."""
FORMAT = 1


class IdleKind(StrEnum):
    """The two ways of doing nothing."""

    BARE = "bare"
    PARKED = "parked"


class IdleLevel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A learnt level."""

    watts: Annotated[float, msgspec.Meta(gt=0)]
    windows: Annotated[int, msgspec.Meta(ge=1)]
    """How many quiet windows it was learnt from, at most `KEPT_WINDOWS`."""
    learnt_ns: int


class LearntLevels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state file: levels by device UUID and kind."""

    format: int
    devices: dict[str, dict[IdleKind, IdleLevel]] = {}


@dataclass(slots=True)
class Baseline:
    """Learns one device's idle levels."""

    levels: dict[IdleKind, IdleLevel] = field(default_factory=dict)
    _windows: dict[IdleKind, deque[float]] = field(default_factory=dict)
    _kind: IdleKind | None = None
    _quiet: int = 0
    _waiting: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=KEPT_WINDOWS))
    """Ends and watts of the quiet windows since processes were last looked at."""

    def observe(
        self,
        t_ns: int,
        watts: float,
        *,
        context: bool | None,
        busiest_ratio: float | None,
        context_ns: int | None = None,
    ) -> IdleKind | None:
        """Take in a window's mean power; return which idle it was, or None when it was not idle or not known.

        `t_ns`: the window's end; `context`: whether any process holds the device, as seen at `context_ns` (None:
        with the window). A window is learnt when a look at or after its end still says the same, as a process may
        have come or gone since the look before. `busiest_ratio`: the highest activity ratio of the window (None:
        not known, so nothing is learnt).
        """
        kind = None if context is None else IdleKind.PARKED if context else IdleKind.BARE
        if kind is not self._kind:
            self._kind, self._quiet = kind, 0
            self._waiting.clear()
        if kind is None:
            return None
        quiet = busiest_ratio is not None and busiest_ratio <= QUIET_ACTIVITY
        self._quiet = self._quiet + 1 if quiet else 0
        if self._quiet > SETTLE_WINDOWS:
            self._waiting.append((t_ns, watts))
        seen_ns = t_ns if context_ns is None else context_ns
        while self._waiting and self._waiting[0][0] <= seen_ns:
            self._learn(kind, *self._waiting.popleft())
        return kind if quiet else None

    def _learn(self, kind: IdleKind, t_ns: int, watts: float) -> None:
        windows = self._windows.setdefault(kind, deque(maxlen=KEPT_WINDOWS))
        windows.append(watts)
        known = self.levels.get(kind)
        if len(windows) >= ENOUGH_WINDOWS and (known is None or len(windows) >= min(known.windows, KEPT_WINDOWS // 4)):
            self.levels[kind] = IdleLevel(median(windows), len(windows), t_ns)


def holds_context(processes: int | None, memory_used_bytes: int | None, memory_total_bytes: int | None) -> bool | None:
    """Return whether a process holds the device, from the process list or else from memory in use."""
    if processes is not None:
        return processes > 0
    if memory_used_bytes is None or not memory_total_bytes:
        return None
    return memory_used_bytes > BARE_MEMORY_PART * memory_total_bytes


def work_watts(parked_watts: float | None, limit_watts: float | None) -> float | None:
    """Return the mean power over a second above which work ran, where nothing but power tells; None without a limit.

    High on purpose: between this and the parked level nobody can tell light work from a warm device.
    """
    if limit_watts is None:
        return None
    if parked_watts is None or parked_watts >= limit_watts:
        return UNLEARNT_WORK_PART * limit_watts
    return parked_watts + WORK_POWER_PART * (limit_watts - parked_watts)


def encode(levels: Mapping[str, Mapping[IdleKind, IdleLevel]]) -> bytes:
    """Return the state file's content."""
    state = LearntLevels(FORMAT, {uuid: dict(kinds) for uuid, kinds in levels.items()})
    return msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n"


def decode(content: bytes) -> dict[str, dict[IdleKind, IdleLevel]]:
    """Return the levels of a state file; raises ValueError with a reason when it cannot be used."""
    try:
        state = msgspec.json.decode(content, type=LearntLevels)
    except msgspec.DecodeError as failure:
        raise ValueError(str(failure)) from None
    if state.format != FORMAT:
        raise ValueError(f"format {state.format} is not known to this version (it knows {FORMAT})")
    return {uuid: dict(kinds) for uuid, kinds in state.devices.items()}
