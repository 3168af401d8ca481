from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tests.snapshots import NOW_NS, events, full_device, ledger_snapshot, node_snapshot

from jouletrace.metrics import names
from jouletrace.metrics.collector import Scrape
from jouletrace.metrics.exporter import node_registry
from jouletrace.metrics.exposition import render
from jouletrace.metrics.ledger import ledger_collectors
from jouletrace.requests.account import LedgerSnapshot
from jouletrace.requests.inbox import Events

ONE_DEVICE = node_snapshot(full_device(0))


def page(account: LedgerSnapshot, counts: Events | None = None, *, heartbeat: float = 0.1) -> CollectorRegistry:
    return node_registry(
        lambda: ONE_DEVICE,
        now_ns=lambda: NOW_NS,
        heartbeat_age_seconds=lambda: heartbeat,
        stale_after_seconds=5.0,
        account=lambda: account,
        events=lambda: counts or Events(),
    )


def total(registry: CollectorRegistry, metric: names.Metric, **labels: str) -> float:
    """Return the sum over all series with these labels, as a query would."""
    return sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == metric.name and labels.items() <= sample.labels.items()
    )


def test_a_collector_declares_exactly_what_it_can_serve() -> None:
    scrape = Scrape(ONE_DEVICE, NOW_NS, stalled=False)
    for collector in ledger_collectors(ledger_snapshot, events):
        found = {
            sample.name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
            for family in collector.collect(scrape)
            for sample in family.samples
        }
        assert found == {metric.name for metric in collector.metrics}


def test_the_page_conserves_energy() -> None:
    account = ledger_snapshot()
    uuid = full_device(0).info.uuid
    own = replace(account, device_joules={uuid: account.device_joules[uuid]})
    registry = page(own)
    served = (
        total(registry, names.ATTRIBUTED_ENERGY_JOULES)
        + total(registry, names.IDLE_ENERGY_JOULES)
        + total(registry, names.UNATTRIBUTED_ENERGY_JOULES)
    )
    assert served + account.pending_joules["vllm-0"] == pytest.approx(100_000.0)


def test_labels_and_values() -> None:
    registry = page(ledger_snapshot(), events())
    assert total(registry, names.ATTRIBUTED_ENERGY_JOULES, tenant="acme", phase="decode") == 50_000.25
    assert total(registry, names.ALLOCATED_ENERGY_JOULES, model="flux") == 11_000
    assert total(registry, names.REQUESTS, status="cancelled") == 1
    assert total(registry, names.REQUESTS_IN_FLIGHT, engine="vllm-0") == 17
    assert total(registry, names.TOKENS, direction="cached_input") == 1024
    assert total(registry, names.UNITS_MADE, unit="frame") == 4
    assert total(registry, names.ATTRIBUTION_COVERAGE_RATIO, engine="vllm-0") == 0.985
    assert total(registry, names.EVENTS) == 1050
    assert total(registry, names.EVENTS_DROPPED, source="http") == 5


def test_the_age_of_the_account_is_known_once_it_was_settled() -> None:
    settled = replace(ledger_snapshot(), settled_ns=NOW_NS - 4_250_000_000)
    assert total(page(settled), names.ACCOUNT_AGE_SECONDS) == 4.25
    assert b"jouletrace_account_age_seconds" not in render(page(LedgerSnapshot()), "")[0]


def test_a_gpu_without_an_index_is_left_out() -> None:
    registry = page(ledger_snapshot())
    assert {
        sample.labels["uuid"]
        for family in registry.collect()
        for sample in family.samples
        if sample.name == names.IDLE_ENERGY_JOULES.name
    } == {full_device(0).info.uuid}


def test_the_histogram_is_cumulative_and_carries_trace_ids() -> None:
    body, _ = render(page(ledger_snapshot()), "application/openmetrics-text;version=1.0.0")
    families = text_string_to_metric_families(body.decode())  # type: ignore[no-untyped-call]
    [histogram] = [family for family in families if family.name == names.REQUEST_ENERGY_JOULES.name]
    buckets = {s.labels["le"]: s for s in histogram.samples if s.name.endswith("_bucket")}
    assert {bound: sample.value for bound, sample in buckets.items()} == {"1.0": 2, "10.0": 2, "100.0": 5, "+Inf": 6}
    first = buckets["1.0"].exemplar
    assert first.labels == {"trace_id": "0af7651916cd43dd8448eb211c80319c"}
    assert (first.value, float(first.timestamp)) == (0.5, NOW_NS / 1e9)
    assert buckets["10.0"].exemplar is None
    assert {s.name: s.value for s in histogram.samples if "le" not in s.labels} == {
        "jouletrace_request_energy_joules_sum": 1234.5,
        "jouletrace_request_energy_joules_count": 6,
    }
    text, _ = render(page(ledger_snapshot()), "")
    assert b'trace_id="' not in text


def test_an_empty_account_has_no_series() -> None:
    registry = page(LedgerSnapshot())
    served = {sample.name for family in registry.collect() for sample in family.samples}
    assert not served & {metric.name for metric in names.LEDGER}


def test_the_account_does_not_depend_on_the_sampler() -> None:
    registry = page(ledger_snapshot(), events(), heartbeat=60.0)
    assert total(registry, names.ATTRIBUTED_ENERGY_JOULES) == 80_000
    assert total(registry, names.EVENTS) == 1050
