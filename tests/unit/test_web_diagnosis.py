from dataclasses import replace

import msgspec
from tests.snapshots import NOW_NS, SECOND_NS, diagnosis_snapshot

from jouletrace.web.diagnosis import diagnosis_document


class ShiftedClock:
    """A steady clock that the wall clock is an hour ahead of."""

    def now_ns(self) -> int:
        return NOW_NS

    def to_wall(self, steady_ns: int) -> int:
        return steady_ns + 3600 * SECOND_NS


def test_a_device_s_sentence_stands_with_its_evidence() -> None:
    document = msgspec.json.decode(msgspec.json.encode(diagnosis_document(diagnosis_snapshot(), ShiftedClock())))
    device, lost = document["devices"]
    assert (device["gpu"], device["verdict"], device["flags"]) == (0, "memory_bound", ["power_capped"])
    assert device["sentence"].startswith("memory_bound: ")
    assert device["evidence"] == {"dram_intensity_ratio": 0.61, "source": "gpm"}
    assert device["end_ns"] == NOW_NS + 3599 * SECOND_NS
    assert device["wasted_joules"] == {"parked": 12_345.5}
    assert lost["wasted_joules"] == {}


def test_a_device_that_is_not_read_any_more_is_marked() -> None:
    snapshot = diagnosis_snapshot()
    first, second = snapshot.devices
    lost = replace(second, end_ns=NOW_NS - 60 * SECOND_NS)
    document = diagnosis_document(replace(snapshot, devices=(first, lost)), ShiftedClock())
    assert [device["stale"] for device in document["devices"]] == [False, True]


def test_an_engine_s_cause_comes_with_advice_law_and_reference() -> None:
    document = msgspec.json.decode(msgspec.json.encode(diagnosis_document(diagnosis_snapshot(), ShiftedClock())))
    [engine] = document["engines"]
    assert (engine["engine_id"], engine["cause"]) == ("vllm-0", "small_batch")
    assert engine["advice"].endswith("more of the traffic.")
    assert engine["law"]["fixed_joules"] == 3.16
    assert engine["reference"]["gpu_model"] == "H100"
    assert engine["end_ns"] - engine["start_ns"] == 30 * SECOND_NS
