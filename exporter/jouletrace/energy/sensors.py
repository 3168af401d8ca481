"""How a power sensor looks at the GPU: its update period, the window it averages over, its lag.

Published measurements say that these belong to the product, not to the card: SC24 artefact of arXiv 2312.02741
(Overall_Results.xlsx, more than 70 GPUs) and our own H200 recordings. The period is measured at start; window
and lag cannot be seen without a known load, so the product's are taken from this table and the bounds of an
energy say what that leaves open.
"""

from dataclasses import dataclass

MS = 1_000_000

INSTANT_LAG_NS = 7 * MS
"""POWER_INSTANT's window ends 5-10 ms before the value changes (fitted against the ring of an H200)."""


@dataclass(frozen=True, slots=True)
class SensorModel:
    """One power sensor: a value that appears at t is the mean over (t - lag - window, t - lag]."""

    update_ns: int
    window_ns: int
    lag_ns: int

    @property
    def seen_part(self) -> float:
        """The part of the time that the sensor sees at all, 0 to 1."""
        return min(1.0, self.window_ns / self.update_ns)

    @property
    def delay_ns(self) -> int:
        """How far the time that a value stands for lies before the time at which it is held.

        A value stands for one update period centred on its window, and is held for the period after it appeared.
        """
        return self.lag_ns + (self.window_ns + self.update_ns) // 2

    @property
    def time_error_ns(self) -> int:
        """How far energy may truly have gone from where the value's delay puts it.

        Of the period that a value stands for it does not tell when the energy went, nor of the time for which it
        is held when it appeared: half a window and half a period. The lag is taken to be as uncertain as it is long.
        """
        return self.lag_ns + (self.window_ns + self.update_ns) // 2


_QUARTER = SensorModel(100 * MS, 25 * MS, INSTANT_LAG_NS)
_WHOLE = SensorModel(100 * MS, 100 * MS, INSTANT_LAG_NS)
_INSTANT = {
    "pascal": SensorModel(20 * MS, 10 * MS, INSTANT_LAG_NS),
    "volta": SensorModel(20 * MS, 10 * MS, INSTANT_LAG_NS),
    "turing": _WHOLE,
    "ampere": _WHOLE,
    "ga100": _QUARTER,
    "ada": _WHOLE,
    "hopper": _QUARTER,
}
"""POWER_INSTANT by architecture. GA100 is Ampere by NVML's enumeration and is told apart by name."""

AVERAGE = SensorModel(100 * MS, 1_000 * MS, 0)
"""POWER_AVERAGE and nvmlDeviceGetPowerUsage on Ampere and later: a 1 s boxcar, refreshed every 100 ms (H200)."""


def instant_model(architecture: str, update_ns: int | None = None) -> SensorModel:
    """Return the model of POWER_INSTANT on an architecture (lower case, `ga100` for A100 and A30).

    `update_ns` is the measured update period. An architecture that nobody has published is taken as the worst
    known one, a quarter seen, so that bounds stay honest.
    """
    model = _INSTANT.get(architecture, _QUARTER)
    if update_ns is None or update_ns == model.update_ns:
        return model
    return SensorModel(update_ns, round(update_ns * model.seen_part), model.lag_ns)
