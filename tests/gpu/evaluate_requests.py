"""Compares what the daemon said of requests on a real GPU with the engine's own steps.

`python -m tests.gpu.evaluate_requests OUTDIR`: truth is each step's energy from an independent recording, divided by
the law of the steady steps; it uses nothing of jouletrace.requests.
"""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from jouletrace.energy.meter import EnergySource, Meter
from jouletrace.energy.timeline import Timeline
from jouletrace.gpu.readings import PowerSamples
from jouletrace.trace import recording

PAUSE_NS = 20_000_000
"""Longer pauses are idle time; as in jouletrace.requests."""


def timeline(path: Path) -> Timeline:
    """Return the whole recording's timeline."""
    ring = recording.read(path).streams["power_ring_20ms"]
    meter = Meter(EnergySource.POWER_RING, limit_watts=700)
    samples = np.asarray(ring.values["mw"], np.float64)
    meter.add_ring(PowerSamples(np.asarray(ring.t_ns, np.int64), samples))
    meter.flush()
    assert meter.timeline is not None
    return meter.timeline


def step_joules(timelines: list[Timeline], steps: list[dict[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return each step's energy, summed over the devices."""
    starts = np.array([step["start_ns"] for step in steps], np.int64)
    ends = np.array([step["end_ns"] for step in steps], np.int64)
    total = np.zeros(len(steps))
    for one in timelines:
        total += one.energies_at(ends) - one.energies_at(starts)
    return total


def fit(folder: Path, timelines: list[Timeline]) -> tuple[np.ndarray[Any, Any], float]:
    """Return (a, c_p, c_d) of the steady steps by least squares of relative errors, and the worst residual."""
    events = json.loads((folder / "grid-events.json").read_text())
    rows, energies = [], []
    starts = {e["t_ns"]: e for e in events if e["kind"] == "phase_start"}
    for work in (e for e in events if e["kind"] == "work"):
        start_ns = max(t for t in starts if t < work["t_ns"])
        joules = sum(t.energy_at(work["t_ns"]) - t.energy_at(start_ns) for t in timelines) / work["steps"]
        rows.append((1.0, work["prefill_tokens"], work["decode"]))
        energies.append(joules)
    design, target = np.array(rows), np.array(energies)
    law = np.linalg.lstsq(design / target[:, None], np.ones(len(target)), rcond=None)[0]
    return law, float(np.abs(design @ law / target - 1).max())


def shares(steps: list[dict[str, Any]], joules: np.ndarray[Any, Any], law: np.ndarray[Any, Any]) -> dict[str, float]:
    """Return the joules of each request: every step's energy divided among its members by the law."""
    a, c_p, c_d = law
    found: dict[str, float] = {}
    for step, energy in zip(steps, joules, strict=True):
        weights = dict.fromkeys(step["decode"], step["steps"] * c_d)
        if step["prefill"]:
            weights[step["prefill"]["id"]] = weights.get(step["prefill"]["id"], 0) + c_p * step["prefill"]["tokens"]
        fixed = a * step["steps"] / len(weights)
        total = sum(weights.values()) + fixed * len(weights)
        for request_id, weight in weights.items():
            found[request_id] = found.get(request_id, 0.0) + energy * (weight + fixed) / total
    return found


def main() -> None:
    """Print the comparison."""
    folder = Path(sys.argv[1])
    truth = json.loads((folder / "truth.json").read_text())
    answers = json.loads((folder / "answers.json").read_text())
    law, residual = fit(folder, [timeline(path) for path in sorted(folder.glob("grid*.json.gz"))])
    a, c_p, c_d = law
    print(f"law: {a:.3f} J + {c_p * 1e3:.2f} mJ/prefill token + {c_d * 1e3:.2f} mJ/sequence, worst {residual:.1%}")
    timelines = [timeline(path) for path in sorted(folder.glob("serve*.json.gz"))]
    first_ns, last_ns = max(t.start_ns for t in timelines), min(t.end_ns for t in timelines)
    steps = [s for s in truth["steps"] if s["start_ns"] > first_ns and s["end_ns"] < last_ns]
    joules = step_joules(timelines, steps)
    predicted = np.array(
        [
            s["steps"] * (a + c_d * len(s["decode"])) + (c_p * s["prefill"]["tokens"] if s["prefill"] else 0)
            for s in steps
        ]
    )
    off = predicted.sum() / joules.sum() - 1
    print(f"held-out mix: law predicts {predicted.sum():.0f} J of {joules.sum():.0f} J ({off:+.2%})")
    whole: dict[str, float] = {}
    # The host's pause before a step belongs to the step, as the ledger has it; without pauses it is the GPU's alone.
    pauses = [0] + [after["start_ns"] - before["end_ns"] for before, after in itertools.pairwise(steps)]
    led = [
        {**step, "start_ns": step["start_ns"] - (pause if pause <= PAUSE_NS else 0)}
        for step, pause in zip(steps, pauses, strict=True)
    ]
    with_pauses = step_joules(timelines, led)
    print(f"pauses of up to 20 ms before steps: {with_pauses.sum() / joules.sum() - 1:.2%} of the steps' energy")
    mine = shares(steps, with_pauses, law)
    alone = shares(steps, joules, law)
    seen = {s["prefill"]["id"] for s in truth["steps"] if s["prefill"] and s["start_ns"] <= first_ns}
    requests = [r for r in truth["requests"] if "end_ns" in r and r["end_ns"] < last_ns and r["id"] not in seen]
    errors, errors_alone = [], []
    for request in requests:
        answer = answers["answers"][request["id"]]
        if "energy_joules" not in answer:
            print("no answer", request["id"], answer)
            continue
        errors.append(answer["energy_joules"] / mine[request["id"]] - 1)
        errors_alone.append(answer["energy_joules"] / alone[request["id"]] - 1)
        whole[request["id"]] = (
            sum(t.energy_at(request["end_ns"]) - t.energy_at(request["arrival_ns"]) for t in timelines)
            / mine[request["id"]]
            - 1
        )
    size = np.abs(np.array(errors))
    median, high = np.median(size), np.percentile(size, 95)
    print(f"{len(errors)} requests: error median {median:.3%}, p95 {high:.3%}, worst {size.max():.2%}")
    print(f"against the steps without pauses: median {np.median(np.abs(errors_alone)):.3%}")
    print(f"whole-GPU window instead: median {np.median(list(whole.values())):.0%}")
    print("methods", Counter(x.get("method") for x in answers["answers"].values()))
    print("all final", all(x.get("final") for x in answers["answers"].values()))
    print({key: answers[key] for key in ("cpu", "resident_mib", "sent")}, answers["refused"][:3])
    print("ledger", json.dumps(answers["ledger"])[:3000])
    counters = answers["counters"]
    spent = [(e - s) / 1e3 for s, e in zip(counters[0]["mj"], counters[1]["mj"], strict=True)]
    print("counter over the run, J:", spent)
    # A counter value is half a tick old on average.
    begin_ns, end_ns = (look["t_ns"] - 50_000_000 for look in counters)
    own = [t.energy_at(end_ns) - t.energy_at(begin_ns) for t in timelines]
    print("recording over the same time, J:", own, [o / s - 1 for o, s in zip(own, spent, strict=True)])


if __name__ == "__main__":
    main()
