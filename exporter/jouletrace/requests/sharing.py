"""Which engine gets which part of a device's energy in a pass: pure arithmetic on slices of time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jouletrace.requests.devices import BusyTrack, DeviceView
from jouletrace.requests.split import NEVER

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """An engine that owns a device, as far as sharing it goes; arrays of shape (slices,)."""

    active: Bools
    """Whether the slice belongs to requests of the engine."""
    time_share: Float64s
    """The engine's part of the device's SM time; 0 where nobody could tell."""
    silent: bool
    """Whether the engine has told nothing for minutes, so that its requests are not known."""
    last_active_ns: int


@dataclass(frozen=True, slots=True, eq=False)
class DeviceShares:
    """Where a device's energy of a pass goes, joules; given + silent + left = used."""

    used_joules: float
    settled_ns: int
    """Up to where the device's energy is handed out by this."""
    given: Sequence[Float64s]
    """By owner and slice: to its requests."""
    silent: Sequence[float]
    """By owner: used by an engine that tells nothing."""
    left: Float64s
    """By slice: of no owner's requests,"""
    worked: Bools
    """and whether the device worked all the same."""


def share_device(
    view: DeviceView, edges: Int64s, begin_ns: int, until_ns: int, owners: Sequence[Owner]
) -> DeviceShares:
    """Share a device's energy of the time from `begin_ns` on, which must not have been handed out, among its owners.

    Where one engine is active it gets the slice. Where several are, they share by SM time. An engine that has SM
    time but has told nothing for minutes keeps its part: nobody else's requests used it.
    """
    end_ns = max(begin_ns, min(until_ns, view.timeline.end_ns))
    energies = view.timeline.energies_at(np.minimum(np.maximum(edges, begin_ns), end_ns))
    used: Float64s = np.maximum(np.diff(energies), 0.0)
    given, silent = _by_owner(used, owners)
    taken = sum((*given, *silent), start=np.zeros(len(used)))
    worked = np.zeros(len(used), np.bool_)
    if view.busy is not None:
        last_active_ns = max((owner.last_active_ns for owner in owners), default=0)
        worked = _unexplained(view.busy, edges, [owner.active for owner in owners], last_active_ns)
    return DeviceShares(
        used_joules=float(used.sum()),
        settled_ns=end_ns,
        given=given,
        silent=[float(part.sum()) for part in silent],
        left=np.maximum(used - taken, 0.0),
        worked=worked,
    )


def _by_owner(used: Float64s, owners: Sequence[Owner]) -> tuple[list[Float64s], list[Float64s]]:
    """Return by owner what its requests get and what goes to its silence, by slice."""
    if len(owners) == 1:
        return [np.where(owners[0].active, used, 0.0)], [np.zeros(len(used))]
    if not owners:
        return [], []
    shares = np.array([owner.time_share for owner in owners])
    known = (shares > 0).sum(axis=0)
    # An engine that the reading does not know, or saw idle, counts as an average one while it is active.
    usual = np.where(known > 0, shares.sum(axis=0) / np.maximum(known, 1), 1.0)
    silences = [owner.silent and not owner.active.any() for owner in owners]
    weights = [
        share if is_silent else np.where(owner.active, np.where(share > 0, share, usual), 0.0)
        for owner, share, is_silent in zip(owners, shares, silences, strict=True)
    ]
    total = np.sum(weights, axis=0)
    somebody = np.any([owner.active for owner in owners], axis=0)
    scale = np.divide(used, total, out=np.zeros(len(used)), where=somebody & (total > 0))
    nothing = np.zeros(len(used))
    given = [nothing if is_silent else weight * scale for weight, is_silent in zip(weights, silences, strict=True)]
    silent = [weight * scale if is_silent else nothing for weight, is_silent in zip(weights, silences, strict=True)]
    return given, silent


def slices(known: Sequence[Int64s], views: Sequence[DeviceView], from_ns: int, until_ns: int) -> Int64s:
    """Return all times from from_ns to until_ns at which something may change, sorted: the edges of the slices."""
    times = [np.array([from_ns, until_ns], np.int64), *known]
    times += [view.busy.changes(from_ns, until_ns) for view in views if view.busy is not None]
    # What np.unique(np.clip()) returns, which takes three times as long on the few of a quiet pass.
    edges: Int64s = np.minimum(np.maximum(np.concatenate(times), from_ns), until_ns)
    edges.sort()
    return edges[np.concatenate(([True], edges[1:] > edges[:-1]))]


def any_busy(tracks: Sequence[BusyTrack | None], times_ns: Int64s) -> Bools | None:
    """Return where any device may have worked; None when one of them cannot tell."""
    known = [track.around(times_ns) for track in tracks if track is not None]
    if not known or len(known) < len(tracks):
        return None
    worked: Bools = np.any(known, axis=0)
    return worked


def _unexplained(track: BusyTrack, edges: Int64s, actives: Sequence[Bools], last_active_ns: int) -> Bools:
    """Return the slices in which a device worked too far from any request's activity to have been its blur."""
    middle = (edges[:-1] + edges[1:]) // 2
    worked = track.at(middle)
    active = np.any(actives, axis=0) if actives else np.zeros(len(middle), np.bool_)
    before = np.maximum.accumulate(np.where(active, edges[1:], last_active_ns))
    after = np.minimum.accumulate(np.where(active, edges[:-1], NEVER)[::-1])[::-1]
    alone: Bools = worked & (middle - before > track.blur_ns) & (after - middle > track.blur_ns)
    return alone
