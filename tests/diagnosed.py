"""A result of `analyze` with a diagnosis whose numbers are known by construction."""

import copy
from typing import Any

VERDICTS = (
    "idle",
    "parked",
    "underutilized",
    "memory_bound",
    "compute_bound",
    "transfer_bound",
    "balanced",
)
SHARES = {"static": 0.25, "memory": 0.375, "tensor": 0.125, "other_compute": 0.125, "links": 0.0, "unexplained": 0.125}
"""Parts of every phase's joules by driver: multiples of 1/24, so that a bar of 24 cells shows them exactly."""
S = 1_000_000_000
START_NS = 1_795_372_950 * S


def phase(number: int, verdict: str, **changed: Any) -> dict[str, Any]:
    joules = 1000.0 * (number + 1)
    found = {
        "name": f"phase{number}",
        "labels": {"batch": number},
        "start_ns": START_NS + 10 * number * S,
        "end_ns": START_NS + (10 * number + 10) * S,
        "energy_joules": joules,
        "low": 0.99 * joules,
        "high": 1.02 * joules,
        "average_watts": joules / 10,
        "drivers": {driver: share * joules for driver, share in SHARES.items()},
        "verdict": verdict,
        "flags": ["power_capped"] if number == 4 else [],
        "confidence": 0.87,
        "evidence": {"dram_ratio": 0.612},
    }
    return {**found, **changed}


def request(number: int, joules: float, **changed: Any) -> dict[str, Any]:
    found = {
        "id": f"r{number}",
        "tenant": f"tenant{number % 2}",
        "energy_joules": joules,
        "low": joules - 1,
        "high": joules + 1,
        "prefill_joules": joules / 4,
        "decode_joules": 3 * joules / 4,
        "method": "steps",
    }
    return {**found, **changed}


def result() -> dict[str, Any]:
    """Seven phases of 10 s and 1,000 to 7,000 J, one of each verdict; 28,000 J in all, 100 requests of 1 to 100 J."""
    return {
        "format": 1,
        "gpu": {
            "name": "NVIDIA H200",
            "uuid": "GPU-1",
            "driver_version": "580.1",
            "memory_total_bytes": 141 * 2**30,
            "power_limit_watts": 700.0,
        },
        "energy_source": "power_ring",
        "energy_joules": 28_000.0,
        "counter_joules": 28_028.0,
        "phases": [phase(number, verdict) for number, verdict in enumerate(VERDICTS)],
        "requests": [request(number, float(number)) for number in range(1, 101)],
        "ledger": {
            "attributed_joules": 5_050.0,
            "idle_joules": {"bare": 1_000.0, "parked": 2_000.0},
            "unattributed_joules": 19_950.0,
            "device_joules": 28_000.0,
            "residual_joules": 0.0,
        },
        "warnings": [],
    }


def undiagnosed() -> dict[str, Any]:
    """The same as it was before there was a diagnosis."""
    found = copy.deepcopy(result())
    for one in found["phases"]:
        for key in ("drivers", "verdict", "flags", "confidence", "evidence"):
            del one[key]
    return found


def series(seconds: int = 70) -> dict[str, Any]:
    """Second by second the watts of the phases above; verdicts as theirs."""
    at = [min(second // 10, 6) for second in range(seconds)]
    watts = [100.0 * (number + 1) for number in at]
    return {
        "times_ns": [START_NS + (second + 1) * S for second in range(seconds)],
        "seconds": [1.0] * seconds,
        "watts": watts,
        "verdict": [VERDICTS[number] for number in at],
        "flags": [["power_capped"] if number == 4 else [] for number in at],
        "joules": {driver: [share * one for one in watts] for driver, share in SHARES.items()},
    }
