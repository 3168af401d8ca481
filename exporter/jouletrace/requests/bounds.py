"""How a request's energy was found, and how far it may be off."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from jouletrace.requests.account import Method
from jouletrace.requests.devices import DeviceView, brackets
from jouletrace.requests.engine import Engine
from jouletrace.requests.inflight import InFlight
from jouletrace.requests.law import Provenance

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]


def methods(table: InFlight, slots: Int64s, engines: Sequence[Engine]) -> NDArray[np.int8]:
    """Return the method by which most of each request's energy was found, as its place in `Method`."""
    order = list(Method)
    by_boundaries = np.array(
        [
            order.index(
                Method.BOUNDARIES_PRIOR if engine.law.provenance is Provenance.PRIOR else Method.BOUNDARIES_CALIBRATED
            )
            for engine in engines
        ]
    )[table.engine[slots]]
    exclusive = table.exclusive_joules[slots]
    codes = np.where(
        2 * exclusive > table.boundary_joules[slots], order.index(Method.BOUNDARIES_EXCLUSIVE), by_boundaries
    )
    counts = table.count_joules[slots]
    steps = table.joules(slots) - counts - table.boundary_joules[slots]
    codes = np.where(counts > table.boundary_joules[slots], order.index(Method.STEP_COUNTS), codes)
    most_by_steps = (steps > 0) & (2 * steps >= table.joules(slots))
    # A request without energy yet is told by the feed its engine has.
    stepwise = np.array([engine.last_step_end_ns > 0 for engine in engines])[table.engine[slots]]
    most_by_steps |= stepwise & (table.joules(slots) <= 0)
    found: NDArray[np.int8] = np.where(most_by_steps, order.index(Method.STEPS), codes).astype(np.int8)
    return found


def edge_errors(table: InFlight, slots: Int64s, devices_of: Callable[[int], Sequence[DeviceView]]) -> Float64s:
    """Return how far requests' joules may be off because their edges fall into sensor samples.

    The share of power that a request had beside an edge, times what of the sample the edge could be off by.
    """
    total = np.zeros(len(slots))
    numbers = table.engine[slots]
    for number in np.unique(numbers):
        mine = np.flatnonzero(numbers == number)
        chosen = slots[mine]
        first = table.first_token_ns[chosen]
        end = table.end_ns[chosen]
        start = np.minimum(table.start_ns[chosen], first)
        first = np.minimum(first, end)
        energy = np.zeros((3, len(chosen)))
        off = np.zeros((3, len(chosen)))
        for view in devices_of(int(number)):
            for row, times in enumerate((start, first, end)):
                energy[row] += view.timeline.energies_at(times)
                off[row] += brackets(view, times)
        prefill = _part(table.prefill(chosen), energy[1] - energy[0])
        decode = _part(table.decode(chosen), energy[2] - energy[1])
        total[mine] = prefill * off[0] + np.abs(prefill - decode) * off[1] + decode * off[2]
    return np.minimum(total, table.joules(slots))


def _part(joules: Float64s, of: Float64s) -> Float64s:
    """Return the quotient, at most 1."""
    part: Float64s = np.minimum(np.divide(joules, of, out=np.zeros(len(of)), where=of > 0), 1.0)
    return part
