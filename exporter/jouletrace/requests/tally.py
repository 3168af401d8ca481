"""What has been served: ended requests, tokens and units by model and tenant, joules per request by model."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from jouletrace.requests.histogram import JoulesHistogram
from jouletrace.requests.records import Status, Unit, Usage
from jouletrace.requests.state import HistogramState, TenantState

_Key = TypeVar("_Key")


class Tally:
    """Totals since the first start; they never go down."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str, Status], int] = {}
        self.tokens: dict[tuple[str, str, str], int] = {}
        self.units: dict[tuple[str, str, Unit], int] = {}
        self.histograms: dict[str, JoulesHistogram] = {}

    def count(
        self, model: str, tenant: str, status: Status, usage: Usage, *, joules: float, trace_id: str | None, end_ns: int
    ) -> None:
        """Count a request that has ended."""
        _increase(self.requests, (model, tenant, status), 1)
        self.count_work(model, tenant, usage)
        histogram = self.histograms.get(model)
        if histogram is None:
            histogram = self.histograms[model] = JoulesHistogram()
        histogram.observe(joules, trace_id, end_ns)

    def count_work(self, model: str, tenant: str, usage: Usage) -> None:
        """Count what was consumed and made."""
        if usage.unit is not None:
            _increase(self.units, (model, tenant, usage.unit), usage.count)
        else:
            _increase(self.tokens, (model, tenant, "input"), usage.input)
            _increase(self.tokens, (model, tenant, "cached_input"), usage.cached_input)
            _increase(self.tokens, (model, tenant, "output"), usage.output)

    def tenants(self) -> dict[str, TenantState]:
        """Return the totals of each model and tenant for a journal, by both names joined."""
        states: dict[str, TenantState] = {}

        def state(model: str, tenant: str) -> TenantState:
            return states.setdefault(f"{model}\x1f{tenant}", TenantState(model, tenant, {}, {}, {}))

        for (model, tenant, status), count in self.requests.items():
            state(model, tenant).requests[status] = count
        for (model, tenant, direction), count in self.tokens.items():
            state(model, tenant).tokens[direction] = count
        for (model, tenant, unit), count in self.units.items():
            state(model, tenant).units[unit] = count
        return states

    @classmethod
    def restored(cls, tenants: Iterable[TenantState], histograms: Mapping[str, HistogramState]) -> "Tally":
        """Return totals that go on from a journal's; exemplars do not outlive a restart."""
        tally = cls()
        for state in tenants:
            for status, count in state.requests.items():
                tally.requests[state.model, state.tenant, status] = count
            for direction, count in state.tokens.items():
                tally.tokens[state.model, state.tenant, direction] = count
            for unit, count in state.units.items():
                tally.units[state.model, state.tenant, unit] = count
        for model, kept in histograms.items():
            histogram = tally.histograms[model] = JoulesHistogram()
            histogram.counts, histogram.total_joules = list(kept.counts), kept.total_joules
        return tally


def _increase(totals: dict[_Key, int], key: _Key, by: int) -> None:
    totals[key] = totals.get(key, 0) + by
