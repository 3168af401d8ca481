"""Who pays: accounts of model, tenant and engine, in a bounded number."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

OTHER = "other"
"""The name of everything beyond the bounds."""
Float64s = NDArray[np.float64]
RECENT_HALF_LIFE_S = 600.0
"""How long an account counts as a recent user of its engine, for spreading idle energy."""


class Accounts:
    """Joules by account. The first so many models and tenants keep their names, the rest share `other`.

    Names are never forgotten, so that no counter goes down or changes its labels while the process lives.
    """

    def __init__(self, *, models: int, tenants_per_model: int) -> None:
        self._most_models = models
        self._most_tenants = tenants_per_model
        self._tenants: dict[str, set[str]] = {}
        self._numbers: dict[tuple[str, str, str], int] = {}
        self.keys: list[tuple[str, str, str]] = []
        """Model, tenant and engine by account number."""
        self.prefill = np.zeros(64)
        self.decode = np.zeros(64)
        self.idle = np.zeros(64)
        """Idle joules of held devices, spread over those who use them (allocated basis)."""
        self.recent = np.zeros(64)
        """Attributed joules, fading with `RECENT_HALF_LIFE_S`."""
        self._of_engine: dict[str, list[int]] = {}

    def number(self, model: str, tenant: str, engine_id: str) -> int:
        """Return the account's number, opened when new; names beyond the bounds become `other`."""
        known = self._numbers.get((model, tenant, engine_id))
        if known is not None:
            return known
        model, tenant = self.bounded(model, tenant)
        key = (model, tenant, engine_id)
        known = self._numbers.get(key)
        if known is not None:
            return known
        number = len(self.keys)
        self._numbers[key] = number
        self.keys.append(key)
        self._of_engine.setdefault(engine_id, []).append(number)
        if number == len(self.prefill):
            for name in ("prefill", "decode", "idle", "recent"):
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(number)]))
        return number

    def bounded(self, model: str, tenant: str) -> tuple[str, str]:
        """Return the names under which a model and tenant are kept."""
        tenants = self._tenants.get(model)
        if tenants is None:
            if len(self._tenants) >= self._most_models:
                model = OTHER
            tenants = self._tenants.setdefault(model, set())
        if tenant not in tenants:
            if len(tenants) >= self._most_tenants:
                tenant = OTHER
            tenants.add(tenant)
        return model, tenant

    def add(self, numbers: NDArray[np.int64], prefill: Float64s, decode: Float64s) -> None:
        """Give joules (shape of `numbers`) to accounts."""
        size = len(self.prefill)
        spent_prefill = np.bincount(numbers, prefill, size)
        spent_decode = np.bincount(numbers, decode, size)
        self.prefill += spent_prefill
        self.decode += spent_decode
        self.recent += spent_prefill + spent_decode

    def fade(self, seconds: float) -> None:
        """Let recent use fade by so many seconds."""
        self.recent *= 0.5 ** (seconds / RECENT_HALF_LIFE_S)

    def spread_idle(self, engine_id: str, joules: float, nobody: tuple[str, str]) -> None:
        """Spread idle joules over an engine's accounts by their recent use; without any, `nobody` bears them."""
        numbers = self._of_engine.get(engine_id)
        if not numbers:
            numbers = [self.number(*nobody, engine_id)]
        weights = self.recent[numbers]
        total = float(weights.sum())
        # A subnormal total (hours after the last request) would divide inexactly.
        weights = weights / total if total > 1e-200 else np.full(len(numbers), 1.0 / len(numbers))
        self.idle[numbers] += joules * weights / weights.sum()

    def __iter__(self) -> Iterator[tuple[tuple[str, str, str], float, float, float]]:
        """Yield every account's key and its prefill, decode and idle joules."""
        return zip(self.keys, self.prefill.tolist(), self.decode.tolist(), self.idle.tolist(), strict=False)
