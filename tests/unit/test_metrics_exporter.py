from collections.abc import Iterable
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from structlog.testing import capture_logs
from tests.snapshots import NOW_NS, SECOND_NS, full_device, lost_device, node_snapshot, sampler_snapshot

from jouletrace.gpu.readings import Pipe, ThrottleReason
from jouletrace.metrics import names
from jouletrace.metrics.collector import Scrape, family
from jouletrace.metrics.exporter import Exporter, node_collectors, node_registry
from jouletrace.snapshot import DeviceStatus, NodeSnapshot


def page_of(snapshot: NodeSnapshot, *, now_ns: int = NOW_NS, heartbeat: float = 0.1) -> CollectorRegistry:
    return node_registry(
        lambda: snapshot,
        now_ns=lambda: now_ns,
        heartbeat_age_seconds=lambda: heartbeat,
        stale_after_seconds=5.0,
    )


def value(page: CollectorRegistry, name: str, /, **labels: str) -> float | None:
    return page.get_sample_value(name, labels)


def test_up_needs_devices_all_of_them_and_a_sampler_that_comes_back() -> None:
    good = node_snapshot(full_device(0), full_device(1))
    assert value(page_of(good), "jouletrace_up", source="nvml") == 1
    assert value(page_of(good, heartbeat=5.1), "jouletrace_up", source="nvml") == 0
    assert value(page_of(node_snapshot()), "jouletrace_up", source="nvml") == 0
    assert value(page_of(NodeSnapshot(NOW_NS, "nvml")), "jouletrace_up", source="nvml") == 0


def test_sample_age_grows_while_a_device_is_lost() -> None:
    lost = lost_device(1)
    labels = {"gpu": "1", "uuid": lost.info.uuid}
    page = page_of(node_snapshot(lost))
    later = page_of(node_snapshot(lost), now_ns=NOW_NS + 10 * SECOND_NS)
    assert value(page, "jouletrace_sample_age_seconds", **labels) == 42
    assert value(later, "jouletrace_sample_age_seconds", **labels) == 52


def test_a_stalled_sampler_leaves_counters_and_ages() -> None:
    device = full_device(0)
    ids = {"gpu": "0", "uuid": device.info.uuid}
    page = page_of(node_snapshot(device), now_ns=NOW_NS + 60 * SECOND_NS, heartbeat=60.0)
    assert value(page, "jouletrace_gpu_energy_joules_total", **ids) == 123456.789
    assert value(page, "jouletrace_sample_age_seconds", **ids) == 60.75
    assert value(page, "jouletrace_gpu_power_watts", **ids) is None
    assert value(page, "jouletrace_energy_agreement_ratio", **ids) is None


def test_driver_calls_and_errors() -> None:
    page = page_of(node_snapshot())
    assert value(page, "jouletrace_driver_call_seconds_count", call="nvmlDeviceGetSamples") == 300
    assert value(page, "jouletrace_driver_call_seconds_sum", call="nvmlDeviceGetSamples") == 0.75
    call, code = "nvmlDeviceGetTotalEnergyConsumption", "NVML_ERROR_GPU_IS_LOST"
    assert value(page, "jouletrace_driver_errors_total", call=call, code=code) == 3


def test_the_process_account_is_there() -> None:
    page = page_of(node_snapshot())
    resident = value(page, "process_resident_memory_bytes")
    assert resident is not None
    assert resident > 1e6
    assert value(page, "process_cpu_seconds_total") is not None


def test_eight_devices_with_everything_stay_under_600_series_whatever_the_driver_says() -> None:
    wild = [
        replace(
            full_device(gpu),
            xid_errors=dict.fromkeys(range(10000), 1),
            temperature_celsius={f"t{i}": 1.0 for i in range(10_000)},
            ecc_errors={f"e{i}": 1 for i in range(10_000)},
        )
        for gpu in range(8)
    ]
    sampler = replace(sampler_snapshot(), call_errors={("call", str(code)): 1 for code in range(10_000)})
    normal = node_snapshot(*(full_device(gpu) for gpu in range(8)))

    def series(snapshot: NodeSnapshot) -> int:
        return sum(len(metric.samples) for metric in page_of(snapshot).collect())

    assert series(normal) < 600
    fixed = len(Pipe) + len(ThrottleReason) + 40
    assert series(replace(node_snapshot(*wild), sampler=sampler)) < 8 * (fixed + 33) + 257 + 50


class _Moody:
    name = "moody"
    metrics = (names.UP,)

    def __init__(self) -> None:
        self.broken = True

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        yield family(names.UP)
        if self.broken:
            raise ValueError("no")


def test_a_failing_collector_costs_only_itself_and_is_logged_once() -> None:
    moody = _Moody()
    own = CollectorRegistry()
    own.register(
        Exporter(
            node_snapshot,
            [moody, *(c for c in node_collectors() if c.name != "source")],
            now_ns=lambda: NOW_NS,
            heartbeat_age_seconds=lambda: 0.0,
            stale_after_seconds=5.0,
        )
    )
    with capture_logs() as logs:
        for _ in range(3):
            assert value(own, "jouletrace_collector_success", collector="moody") == 0
            assert value(own, "jouletrace_collector_success", collector="energy") == 1
            assert value(own, "jouletrace_sampler_stretch_ratio") == 1.5
        moody.broken = False
        for _ in range(2):
            assert value(own, "jouletrace_collector_success", collector="moody") == 1
    assert [(entry["log_level"], entry["collector"]) for entry in logs] == [
        ("error", "moody"),
        ("info", "moody"),
    ]


def test_collectors_declare_each_metric_once() -> None:
    declared = [metric for collector in node_collectors() for metric in collector.metrics]
    assert sorted(m.name for m in [*declared, names.COLLECTOR_SUCCESS]) == sorted(m.name for m in names.ALL)
    assert len({collector.name for collector in node_collectors()}) == len(node_collectors())


@pytest.mark.parametrize("status", list(DeviceStatus))
def test_gaps_and_rejections_are_counted_in_any_state(status: DeviceStatus) -> None:
    device = replace(full_device(0), status=status)
    ids = {"gpu": "0", "uuid": device.info.uuid}
    page = page_of(node_snapshot(device))
    assert value(page, "jouletrace_energy_gap_seconds_total", **ids) == 0.5
    assert value(page, "jouletrace_rejected_samples_total", **ids) == 2
    assert value(page, "jouletrace_hardware_energy_resets_total", **ids) == 1
