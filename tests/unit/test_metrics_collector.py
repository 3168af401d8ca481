from dataclasses import replace

from tests.snapshots import NOW_NS, full_device, lost_device, node_snapshot

from jouletrace.metrics import names
from jouletrace.metrics.collector import (
    Scrape,
    empty_family,
    first_and_other,
    per_device,
    per_device_and_kind,
)
from jouletrace.snapshot import DeviceStatus


def test_only_devices_that_answer_are_readable() -> None:
    starting = replace(full_device(2), status=DeviceStatus.STARTING)
    snapshot = node_snapshot(full_device(0), lost_device(1), starting)
    assert [d.info.gpu for d in Scrape(snapshot, NOW_NS, stalled=False).readable] == [0]
    assert [d.info.gpu for d in Scrape(snapshot, NOW_NS, stalled=True).readable] == []
    assert len(Scrape(snapshot, NOW_NS, stalled=True).devices) == 3


def test_a_value_that_is_absent_makes_no_series() -> None:
    blind = replace(full_device(1), power_watts=None)
    family = per_device(names.GPU_POWER_WATTS, [full_device(0), blind], lambda d: d.power_watts)
    assert [(s.name, s.labels["gpu"], s.value) for s in family.samples] == [("jouletrace_gpu_power_watts", "0", 431.25)]


def test_zero_is_a_value() -> None:
    asleep = replace(full_device(0), power_watts=0.0)
    family = per_device(names.GPU_POWER_WATTS, [asleep], lambda d: d.power_watts)
    assert [s.value for s in family.samples] == [0.0]


def test_kinds_outside_the_closed_set_are_never_exported() -> None:
    device = replace(full_device(0), clock_hertz={f"domain{i}": 1e9 for i in range(1000)} | {"sm": 2e9})
    family = per_device_and_kind(names.GPU_CLOCK_HERTZ, [device], lambda d: d.clock_hertz)
    assert [(s.labels["domain"], s.value) for s in family.samples] == [("sm", 2e9)]


def test_counters_beyond_the_limit_go_to_other_and_stay_monotone() -> None:
    counts = dict.fromkeys(range(40), 1)
    assert first_and_other(counts, 32) == (dict.fromkeys(range(32), 1), 8)
    counts[5] += 1
    counts[39] += 1
    counts[100] = 7
    first, other = first_and_other(counts, 32)
    assert list(first) == list(range(32))
    assert first[5] == 2
    assert other == 8 + 1 + 7


def test_empty_families_have_the_type_of_the_metric() -> None:
    types = {metric.name: empty_family(metric).type for metric in names.ALL}
    assert types == {metric.name: metric.type for metric in names.ALL}
