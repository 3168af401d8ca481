"""The collectors of the ledger: who used the energy, and which records came in."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client.core import Exemplar, Metric

from jouletrace.metrics import names
from jouletrace.metrics.collector import Collector, Scrape, family, histogram_family
from jouletrace.requests.account import Buckets, LedgerSnapshot
from jouletrace.requests.inbox import Events


class LedgerCollector:
    """Joules, requests and tokens by model, tenant and engine."""

    name = "ledger"
    metrics = (
        names.ATTRIBUTED_ENERGY_JOULES,
        names.ALLOCATED_ENERGY_JOULES,
        names.IDLE_ENERGY_JOULES,
        names.UNATTRIBUTED_ENERGY_JOULES,
        names.REQUEST_ENERGY_JOULES,
        names.REQUESTS,
        names.REQUESTS_IN_FLIGHT,
        names.TOKENS,
        names.UNITS_MADE,
        names.ATTRIBUTION_COVERAGE_RATIO,
        names.ACCOUNT_AGE_SECONDS,
    )

    def __init__(self, account: Callable[[], LedgerSnapshot]) -> None:
        self._account = account

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the families, all from one account."""
        account = self._account()
        yield _by_labels(names.ATTRIBUTED_ENERGY_JOULES, account.attributed_joules)
        yield _by_labels(names.ALLOCATED_ENERGY_JOULES, account.allocated_joules)
        # The index is the driver's business: a GPU that it has not shown since the start has no series yet.
        gpus = {device.info.uuid: str(device.info.gpu) for device in scrape.devices}
        idle = {
            (gpus[uuid], uuid, kind): joules for (uuid, kind), joules in account.idle_joules.items() if uuid in gpus
        }
        yield _by_labels(names.IDLE_ENERGY_JOULES, idle)
        rest = {(gpus[uuid], uuid): joules for uuid, joules in account.unattributed_joules.items() if uuid in gpus}
        yield _by_labels(names.UNATTRIBUTED_ENERGY_JOULES, rest)
        yield _histogram(account.request_joules)
        yield _by_labels(names.REQUESTS, account.requests)
        yield _by_label(names.REQUESTS_IN_FLIGHT, account.in_flight)
        yield _by_labels(names.TOKENS, account.tokens)
        yield _by_labels(names.UNITS_MADE, account.units)
        yield _by_label(names.ATTRIBUTION_COVERAGE_RATIO, account.coverage)
        # The account may be settled between the look at the clock and the look at it.
        age_ns = max(0, scrape.now_ns - account.settled_ns)
        yield _by_labels(names.ACCOUNT_AGE_SECONDS, {(): age_ns / 1e9} if account.settled_ns else {})


class EventCollector:
    """Records that came in and that were dropped."""

    name = "events"
    metrics = (names.EVENTS, names.EVENTS_DROPPED)

    def __init__(self, events: Callable[[], Events]) -> None:
        self._events = events

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the families."""
        events = self._events()
        yield _by_label(names.EVENTS, events.received)
        yield _by_labels(names.EVENTS_DROPPED, events.dropped)


def ledger_collectors(account: Callable[[], LedgerSnapshot], events: Callable[[], Events]) -> tuple[Collector, ...]:
    """Return the collectors of the ledger rows."""
    return (LedgerCollector(account), EventCollector(events))


def _by_label(metric: names.Metric, values: Mapping[str, float]) -> Metric:
    return _by_labels(metric, {(label,): value for label, value in values.items()})


def _by_labels(metric: names.Metric, values: Mapping[Any, float]) -> Metric:
    """Return one series per key, a tuple of the metric's labels."""
    result = family(metric)
    for labels, value in values.items():
        result.add_metric(labels, value)
    return result


def _histogram(by_model: Mapping[str, Buckets]) -> Metric:
    result = histogram_family(names.REQUEST_ENERGY_JOULES)
    for model, buckets in by_model.items():
        rows: list[Any] = []
        bounds = [*map(str, buckets.bounds), "+Inf"]
        for bound, count, example in zip(bounds, buckets.counts, buckets.exemplars, strict=True):
            if example is None:
                rows.append((bound, count))
            else:
                trace_id, joules, wall_ns = example
                rows.append((bound, count, Exemplar({"trace_id": trace_id}, joules, wall_ns / 1e9)))
        result.add_metric((model,), rows, buckets.total_joules)
    return result
