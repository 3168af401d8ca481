import pytest
from prometheus_client import CollectorRegistry
from tests.snapshots import NOW_NS, node_snapshot

from jouletrace.engines.otlp.tee import Drop, TeeCounts
from jouletrace.metrics.exporter import Exporter
from jouletrace.metrics.otlp import TeeCollector

PREFIX = "jouletrace_otlp_"


def registry(counts: TeeCounts | None) -> CollectorRegistry:
    made = CollectorRegistry()
    made.register(
        Exporter(
            node_snapshot,
            [TeeCollector(lambda: counts)],
            now_ns=lambda: NOW_NS,
            heartbeat_age_seconds=lambda: 0.5,
            stale_after_seconds=5.0,
        )
    )
    return made


def test_what_was_passed_on_and_what_was_not() -> None:
    made = registry(TeeCounts(120, {Drop.BUFFER_FULL: 7}, 4096))
    assert made.get_sample_value(f"{PREFIX}exports_forwarded_total") == 120
    assert made.get_sample_value(f"{PREFIX}exports_dropped_total", {"reason": "buffer_full"}) == 7
    assert made.get_sample_value(f"{PREFIX}forward_buffer_bytes") == 4096


@pytest.mark.parametrize("name", ["exports_forwarded_total", "forward_buffer_bytes"])
def test_without_a_collector_there_are_no_series(name: str) -> None:
    assert registry(None).get_sample_value(PREFIX + name) is None
