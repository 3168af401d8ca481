from dataclasses import replace

from tests.snapshots import NOW_NS, full_device, lost_device, node_snapshot

from jouletrace.metrics.collector import Scrape
from jouletrace.metrics.device import device_collectors
from jouletrace.snapshot import DeviceSnapshot, DeviceStatus

# What jouletrace counts itself; nothing else may be served for a device that cannot be read.
OWN_COUNTERS = {
    "jouletrace_gpu_energy_joules_total",
    "jouletrace_gpu_dram_bytes_total",
    "jouletrace_gpu_busy_seconds_total",
    "jouletrace_gpu_pcie_bytes_total",
    "jouletrace_gpu_nvlink_bytes_total",
    "jouletrace_gpu_xid_errors_total",
}


def served(*devices: DeviceSnapshot, stalled: bool = False) -> dict[str, list[tuple[dict[str, str], float]]]:
    scrape = Scrape(node_snapshot(*devices), NOW_NS, stalled=stalled)
    result: dict[str, list[tuple[dict[str, str], float]]] = {}
    for collector in device_collectors():
        for family in collector.collect(scrape):
            for sample in family.samples:
                result.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return result


def test_a_collector_declares_exactly_what_it_can_serve() -> None:
    scrape = Scrape(node_snapshot(full_device(0)), NOW_NS, stalled=False)
    for collector in device_collectors():
        found = {sample.name for family in collector.collect(scrape) for sample in family.samples}
        assert found == {metric.name for metric in collector.metrics}, collector.name


def test_values_of_a_full_device() -> None:
    page = served(full_device(0))
    ids = {"gpu": "0", "uuid": "GPU-3b7c1f0e-5d1a-4c52-9d2b-000000000000"}
    assert page["jouletrace_gpu_energy_joules_total"] == [(ids, 123456.789)]
    assert page["jouletrace_gpu_idle_power_watts"] == [
        (ids | {"kind": "bare"}, 79.25),
        (ids | {"kind": "parked"}, 121.5),
    ]
    assert page["jouletrace_gpu_xid_errors_total"] == [(ids | {"xid": "31"}, 1), (ids | {"xid": "79"}, 2)]
    assert len(page["jouletrace_gpu_busy_seconds_total"]) == 8
    [(info, one)] = page["jouletrace_gpu_info"]
    assert one == 1
    assert info == ids | {
        "name": "NVIDIA H200",
        "architecture": "hopper",
        "driver_version": "580.159.04",
        "pci_bus_id": "00000000:10:00.0",
        "energy_source": "power_ring",
        "mig": "false",
    }


def test_a_lost_device_keeps_its_own_counters_and_nothing_else() -> None:
    lost = replace(full_device(0), status=DeviceStatus.LOST)
    page = served(lost)
    assert set(page) == OWN_COUNTERS | {"jouletrace_gpu_info"}
    assert page["jouletrace_gpu_info"][0][0]["energy_source"] == ""
    before = served(full_device(0))
    assert all(page[name] == before[name] for name in OWN_COUNTERS)


def test_a_stalled_sampler_is_like_a_loss_of_all_devices() -> None:
    assert set(served(full_device(0), full_device(1), stalled=True)) == OWN_COUNTERS | {"jouletrace_gpu_info"}


def test_a_device_that_was_never_read_has_no_energy() -> None:
    starting = replace(full_device(0), status=DeviceStatus.STARTING, timeline_end_ns=None, energy_joules=0.0)
    assert "jouletrace_gpu_energy_joules_total" not in served(starting)


def test_a_device_with_no_sensors_beyond_power_has_few_series() -> None:
    poor = replace(lost_device(1), status=DeviceStatus.OK)
    assert set(served(poor)) == {
        "jouletrace_gpu_info",
        "jouletrace_gpu_energy_joules_total",
        "jouletrace_gpu_power_watts",
        "jouletrace_gpu_power_limit_watts",
        "jouletrace_gpu_clock_hertz",
        "jouletrace_gpu_temperature_celsius",
        "jouletrace_gpu_memory_total_bytes",
        "jouletrace_gpu_xid_errors_total",
    }


def test_a_storm_of_xids_stays_within_its_limit() -> None:
    storm = replace(full_device(0), xid_errors=dict.fromkeys(range(1000), 2))
    xids = served(storm)["jouletrace_gpu_xid_errors_total"]
    assert len(xids) == 33
    assert xids[-1][0]["xid"] == "other"
    assert sum(value for _, value in xids) == 2000
