import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.snapshots import (
    NOW_NS,
    SECOND_NS,
    diagnosis_snapshot,
    full_device,
    ledger_snapshot,
    lost_device,
    node_snapshot,
)

from jouletrace.clock import SystemClock
from jouletrace.energy.timeline import Timeline
from jouletrace.requests.account import Method, RequestEnergy
from jouletrace.requests.records import Status
from jouletrace.snapshot import DeviceSnapshot, DeviceStatus
from jouletrace.web.health import Readiness
from jouletrace.web.live.document import (
    Moment,
    driver_pieces,
    encode,
    node_document,
    requests_document,
    trace,
    traces,
)

MS = 1_000_000
START_NS = NOW_NS


class WallClock(SystemClock):
    """A clock whose wall time is 1 s ahead of the steady one: somebody has set it."""

    def wall_step_ns(self) -> int:
        return SECOND_NS


CLOCK = SystemClock()


def document(*devices: DeviceSnapshot, readiness: Readiness | None = None) -> dict[str, Any]:
    moment = Moment(
        now_ns=NOW_NS,
        node=node_snapshot(*devices),
        readiness=readiness or Readiness(ready=True),
        account=ledger_snapshot(),
        diagnosis=diagnosis_snapshot(),
        stale_after_seconds=5.0,
    )
    # What a browser gets.
    content: dict[str, Any] = json.loads(encode("node", node_document(moment, CLOCK)).split(b"data: ")[1])
    return content


def ring(watts: list[float], step_ns: int = 20 * MS) -> Timeline:
    timeline = Timeline(START_NS)
    ends = START_NS + step_ns * np.arange(1, len(watts) + 1)
    timeline.extend(ends, np.array(watts) * step_ns / 1e9)
    return timeline


def joules_of(piece: dict[str, Any]) -> float:
    return sum(ms * watts for ms, watts in zip(piece["steps_ms"], piece["watts"], strict=True)) / 1e3


def test_a_trace_is_the_ring_sample_by_sample() -> None:
    piece, until_ns = trace(ring([100.0, 700.0, 120.0]), 0, CLOCK)
    assert piece is not None
    assert piece["steps_ms"] == [20, 20, 20]
    assert piece["watts"] == [100, 700, 120]
    assert abs(piece["start_ms"] - START_NS / MS) < 1
    assert until_ns == START_NS + 60 * MS


def test_pieces_follow_each_other_without_a_gap() -> None:
    timeline = ring([100.0, 200.0])
    _, until_ns = trace(timeline, 0, CLOCK)
    assert trace(timeline, until_ns, CLOCK) == (None, until_ns)
    timeline.extend([START_NS + 60 * MS], [6.0])
    piece, _ = trace(timeline, until_ns, CLOCK)
    assert piece is not None
    assert (piece["steps_ms"], piece["watts"]) == ([20], [300])


@pytest.mark.parametrize("step_ns", [MS, 3 * MS, 7_300_000, 20_037_000, 100 * MS])
def test_thinning_out_keeps_the_energy(step_ns: int) -> None:
    count = 4000 * MS // step_ns
    watts = 400 + 300 * np.sin(np.arange(count) / 40)
    piece, until_ns = trace(ring(watts.tolist(), step_ns), 0, CLOCK)
    assert piece is not None
    assert len(piece["watts"]) <= 1.5 * 50 * 4
    assert joules_of(piece) == pytest.approx(watts.sum() * step_ns / 1e9, rel=1e-3)
    # Steps are rounded without drifting away.
    assert piece["start_ms"] + sum(piece["steps_ms"]) == pytest.approx(until_ns / MS, abs=1)


@pytest.mark.parametrize("step_ns", [MS, 20 * MS])
def test_a_time_of_which_nobody_knows_has_no_power(step_ns: int) -> None:
    timeline = ring([300.0] * 1000, step_ns)
    blind_ns = timeline.end_ns + 8 * SECOND_NS
    # As the meter books it: nothing, and up to the limit above it.
    timeline.extend([blind_ns], [0.0], below=[0.0], above=[5600.0])
    timeline.extend(blind_ns + step_ns * np.arange(1, 1001), np.full(1000, 300.0 * step_ns / 1e9))
    piece, _ = trace(timeline, 0, CLOCK)
    assert piece is not None
    assert set(piece["watts"]) == {300, None}
    [blind] = [ms for ms, watts in zip(piece["steps_ms"], piece["watts"], strict=True) if watts is None]
    assert blind == pytest.approx(8000, abs=1)


def test_a_short_time_without_power_is_what_was_measured() -> None:
    piece, _ = trace(ring([100.0, 0.0, 100.0]), 0, CLOCK)
    assert piece is not None
    assert piece["watts"] == [100, 0, 100]


def test_the_history_ends_with_the_window() -> None:
    timeline = ring([150.0] * 50 * 90)
    content, _ = traces([("a", timeline)], {}, timeline.end_ns, CLOCK)
    assert sum(content["a"]["steps_ms"]) == pytest.approx(60_000, abs=21)


def test_times_are_the_wall_clocks() -> None:
    piece, _ = trace(ring([100.0]), 0, WallClock())
    assert piece is not None
    assert piece["start_ms"] == pytest.approx(START_NS / MS + 1000, abs=1)


def test_drivers_go_back_as_far_as_the_window_and_then_on_from_what_was_sent() -> None:
    found = diagnosis_snapshot().devices[0]
    told, until_ns = driver_pieces([found], {}, NOW_NS, CLOCK)
    piece = told[found.uuid]
    # Spans of a second, the newest of which has ended a second ago.
    assert piece["ends_ms"] == [piece["ends_ms"][0] + 1000 * place for place in range(59)]
    assert piece["starts_ms"][1:] == piece["ends_ms"][:-1]
    assert piece["ends_ms"][-1] == pytest.approx(NOW_NS / MS - 1000, abs=1)
    assert sum(watts[-1] for watts in piece["watts"].values()) == pytest.approx(6 * (71.875 - 1 / 8), abs=0.5)
    assert driver_pieces([found], until_ns, NOW_NS, CLOCK) == ({}, {})
    sent_ns = {found.uuid: NOW_NS - 3 * SECOND_NS}
    told, _ = driver_pieces([found], sent_ns, NOW_NS, CLOCK)
    assert [len(watts) for watts in told[found.uuid]["watts"].values()] == [2] * 6


def test_a_device_that_can_be_read() -> None:
    [device] = document(full_device(0))["devices"]
    assert (device["state"], device["watts"], device["limit_watts"], device["age_seconds"]) == ("ok", 431.25, 700, 0.8)
    assert device["verdict"]["verdict"] == "memory_bound"
    assert device["verdict"]["flags"] == ["power_capped"]
    assert sum(device["drivers"]["watts"].values()) == pytest.approx(431.25, abs=0.1)
    assert device["idle_joules"] == {"bare": 5_000, "parked": 7_500}
    assert device["wasted_joules"] == {"parked": 12_345.5}


@pytest.mark.parametrize(
    ("device", "stalled", "state"),
    [
        (lost_device(0), False, "lost"),
        (replace(full_device(0), timeline_end_ns=NOW_NS - 6 * SECOND_NS), False, "stale"),
        (replace(full_device(0), status=DeviceStatus.STARTING, timeline_end_ns=None), False, "starting"),
        (full_device(0), True, "stalled"),
    ],
)
def test_a_device_that_cannot_be_read_has_no_values(device: DeviceSnapshot, stalled: bool, state: str) -> None:
    [told] = document(device, readiness=Readiness(ready=False, stalled=stalled))["devices"]
    assert told["state"] == state
    for name in ("watts", "max_watts", "temperature_celsius", "energy_source", "verdict", "drivers"):
        assert told[name] is None, name
    assert "\n" not in told["problem"]


def test_engines_and_the_account() -> None:
    told = document()
    engines = {engine["engine_id"]: engine for engine in told["engines"]}
    assert engines["vllm-0"]["in_flight"] == 17
    assert engines["vllm-0"]["waiting"] == 5
    assert engines["vllm-0"]["diagnosis"]["cause"] == "small_batch"
    assert engines["vllm-0"]["diagnosis"]["reference"] == {"gpu_model": "H100", "joules_per_token": 0.455}
    assert engines["diffusers"]["diagnosis"] is None
    account = told["account"]
    assert account["idle_joules"] == {"bare": 5_010, "parked": 7_500}
    parts = account["attributed_joules"] + account["pending_joules"] + account["unattributed_joules"]
    assert parts + sum(account["idle_joules"].values()) == account["device_joules"] == 100_010
    assert account["age_seconds"] == 1


def test_no_request_and_no_tenant_is_in_what_everybody_sees() -> None:
    text = json.dumps(document())
    assert "acme" not in text
    assert "quote" not in text


def test_requests() -> None:
    energy = RequestEnergy(
        "r1", "e", "m", "acme", Status.FINISHED, 4.0, 3.5, 4.5, 1.0, 3.0, 2.0, 2.0, 0.25, Method.STEPS, True,
        NOW_NS - 3 * SECOND_NS, NOW_NS - SECOND_NS,
    )  # fmt: skip
    told = requests_document([replace(energy, end_ns=None, final=False)], [energy], CLOCK)
    [running], [settled] = told["in_flight"], told["settled"]
    assert (running["end_ms"], running["final"]) == (None, False)
    assert settled["end_ms"] - settled["arrival_ms"] == 2000
    assert (settled["energy_joules"], settled["low"], settled["high"]) == (4.0, 3.5, 4.5)
    assert (settled["tenant"], settled["method"]) == ("acme", "steps")


def test_an_event_is_two_lines() -> None:
    event = encode("node", {"text": "a\n\nb\r"})
    assert event.count(b"\n") == 3
    assert event.endswith(b"\n\n")
