from dataclasses import replace

from tests.snapshots import NOW_NS, SECOND_NS, full_device, lost_device, node_snapshot

from jouletrace.snapshot import DeviceStatus, NodeSnapshot
from jouletrace.web.health import Readiness, readiness


def judged(snapshot: NodeSnapshot, *, later_seconds: int = 0, heartbeat: float = 0.5) -> Readiness:
    return readiness(snapshot, NOW_NS + later_seconds * SECOND_NS, 5.0, heartbeat)


def test_ready_when_every_device_has_a_fresh_sample() -> None:
    assert judged(node_snapshot(full_device(0), full_device(1))) == Readiness(ready=True)


def test_no_devices_is_not_ready() -> None:
    assert judged(NodeSnapshot(NOW_NS, "nvml")) == Readiness(
        ready=False, reasons=("The source nvml has given no GPU yet.",)
    )


def test_each_bad_device_gets_one_line() -> None:
    starting = replace(full_device(2), status=DeviceStatus.STARTING, timeline_end_ns=None)
    found = judged(node_snapshot(full_device(0), lost_device(1), starting))
    assert not found.ready
    assert not found.stalled
    assert found.reasons == (
        "GPU 1 (GPU-3b7c1f0e-5d1a-4c52-9d2b-000000000001): The GPU has fallen off the bus (Xid 79).",
        "GPU 2 (GPU-3b7c1f0e-5d1a-4c52-9d2b-000000000002): There is no energy sample yet.",
    )


def test_a_lost_device_without_words_gets_some() -> None:
    silent = replace(lost_device(0), problem="")
    assert judged(node_snapshot(silent)).reasons[0].endswith("It is lost; jouletrace looks for it again and again.")


def test_an_old_sample_is_not_fresh() -> None:
    node = node_snapshot(full_device(0))
    assert judged(node, later_seconds=4).ready
    late = judged(node, later_seconds=5)
    assert late.reasons == (
        "GPU 0 (GPU-3b7c1f0e-5d1a-4c52-9d2b-000000000000): Its newest energy sample is 5.8 s old; 5 s is the limit.",
    )


def test_a_hanging_sampler_is_named_before_the_devices_go_stale() -> None:
    found = judged(node_snapshot(full_device(0)), heartbeat=12.34)
    assert found.stalled
    assert not found.ready
    assert found.reasons[0].startswith("The sampler has not come back for 12.3 s: a driver call hangs.")
    assert len(found.reasons) == 1


def test_the_overdue_call_is_named() -> None:
    found = readiness(node_snapshot(full_device(0)), NOW_NS, 5.0, 12.0, "nvmlDeviceGetSamples on GPU 3")
    assert "for 12.0 s: nvmlDeviceGetSamples on GPU 3 hangs." in found.reasons[0]
