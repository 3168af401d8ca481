"""Compares what daemon and proxy said of a served model with the engine's own steps and the hardware counter.

`python -m tests.gpu.evaluate_server OUTDIR`: prints it as JSON. Truth is each step's energy from an independent
recording, divided by the law of the steady steps (as in `tests.gpu.evaluate_requests`); it uses nothing of
jouletrace.requests.
Errors are parts of 1; joules, tokens and watts as the names say.
"""

import gzip
import itertools
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from jouletrace.energy.timeline import Timeline
from tests.gpu.evaluate_requests import PAUSE_NS, fit, shares, step_joules, timeline

COUNTER_LAG_NS = 50_000_000
"""A value of the hardware counter is half a tick of 100 ms old on average."""
Row = dict[str, Any]


def evaluate(folder: Path) -> Row:
    """Return the comparison; raises what a file that is missing or not whole raises."""
    answers = json.loads((folder / "answers.json").read_text())
    truth = json.loads(gzip.decompress((folder / "truth.json.gz").read_bytes()))
    measured = timeline(folder / "serve.json.gz")
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "grid-events.json").write_text(json.dumps(truth["steady"]))
        law, residual = fit(Path(scratch), [measured])
    steps = _with_pauses(truth["steps"])
    joules = step_joules([measured], steps)
    phases = {name: _Phase(name, answers, truth, measured) for name in answers["phases"]}
    result: Row = {
        "gpu": answers["gpu"],
        "law": dict(zip(("fixed_joules", "prefill_token_joules", "decode_sequence_joules"), law.tolist(), strict=True)),
        "law_worst_residual": residual,
        "steps": len(steps),
        "seconds_at": answers["seconds_at"],
        "exit_codes": answers["exit_codes"],
    }
    for name, phase in phases.items():
        result[name] = phase.account() | phase.tokens() | phase.per_token(steps, joules)
    if "proxy" in phases:
        result["proxy"] |= _requests(answers, shares(steps, joules, law), phases["proxy"])
        result["provisional"] = _provisional(answers)
    return {name: _rounded(value) for name, value in result.items()}


def _with_pauses(steps: list[Row]) -> list[Row]:
    """Return the steps with the host's pauses before them, as the ledger has it."""
    pauses = [0] + [after["start_ns"] - before["end_ns"] for before, after in itertools.pairwise(steps)]
    return [
        {**step, "start_ns": step["start_ns"] - (pause if pause <= PAUSE_NS else 0)}
        for step, pause in zip(steps, pauses, strict=True)
    ]


class _Phase:
    """One phase, between two looks at the account."""

    def __init__(self, name: str, answers: Row, truth: Row, measured: Timeline) -> None:
        looks = answers["phases"][name]
        self._before, self._after = looks["before"], looks["after"]
        self.from_ns, self.until_ns = (looks[at]["ledger"]["settled_ns"] for at in ("before", "after"))
        rows = np.array(answers["counter"], np.int64)
        first_ns, times = rows[0, 0], rows[:, 0] - rows[0, 0] - COUNTER_LAG_NS
        at = np.array([self.from_ns, self.until_ns], np.int64) - first_ns
        # The phase begins and ends at rest, where the counter goes up evenly.
        begin_mj, end_mj = np.interp(at, times, rows[:, 1] - rows[0, 1])
        self.meter_joules = float(end_mj - begin_mj) / 1e3
        self._recorded_joules = measured.energy_at(self.until_ns) - measured.energy_at(self.from_ns)
        self._truth = [one for one in truth["requests"] if self.from_ns <= one["arrival_ns"] < self.until_ns]
        self._model = answers["model"]

    def parts(self) -> dict[str, float]:
        """Return what the account's totals grew by."""
        before, after = (look["ledger"]["totals"] for look in (self._before, self._after))
        return {name: after[name] - before[name] for name in after}

    def account(self) -> Row:
        """Return the account beside the hardware counter."""
        parts = self.parts()
        whole = sum(parts[f"{kind}_joules"] for kind in ("attributed", "pending", "idle", "unattributed"))
        return {
            "seconds": (self.until_ns - self.from_ns) / 1e9,
            "counter_joules": self.meter_joules,
            "recording_against_counter": self._recorded_joules / self.meter_joules - 1,
            "account": parts,
            "account_against_counter": whole / self.meter_joules - 1,
            "attributed_by_tenant": self._grown("attributed", "tenant", "joules", model=self._model),
            "attributed_by_phase": self._grown("attributed", "phase", "joules", model=self._model),
            "attributed_to_other_models": sum(self._grown("attributed", "model", "joules").values())
            - sum(self._grown("attributed", "model", "joules", model=self._model).values()),
            "dropped": self._grown("dropped", "reason", "count"),
            "events": self._grown("events", "source", "received"),
        }

    def _grown(self, table: str, by: str, value: str, **only: str) -> dict[str, float]:
        found: Counter[str] = Counter()
        for sign, look in ((-1, self._before), (1, self._after)):
            for row in look["ledger"][table]:
                if all(row[name] == wanted for name, wanted in only.items()):
                    found[row[by]] += sign * row[value]
        return {name: grown for name, grown in found.items() if grown}

    def tokens(self) -> Row:
        """Return the tokens as the engine, its metrics page and the account have counted them."""
        page = {
            direction: _total(self._after["server_metrics"], name) - _total(self._before["server_metrics"], name)
            for direction, name in (("input", "vllm:prompt_tokens_total"), ("output", "vllm:generation_tokens_total"))
        }
        return {
            "tokens": {
                "truth": self._made(),
                "metrics_page": page,
                "account": self._grown("tokens", "direction", "count", model=self._model),
            },
            "requests_of_the_engine": len(self._truth),
        }

    def _made(self) -> dict[str, int]:
        return {"input": sum(r["prompt"] for r in self._truth), "output": sum(r["output"] for r in self._truth)}

    def per_token(self, steps: list[Row], joules: np.ndarray[Any, Any]) -> Row:
        """Return attributed against busy energy, and both per token."""
        mine = [self.from_ns <= step["start_ns"] and step["end_ns"] <= self.until_ns for step in steps]
        busy = float(joules[np.array(mine)].sum())
        attributed = sum(self._grown("attributed", "model", "joules", model=self._model).values())
        made = self._made()
        return {
            "busy_joules": busy,
            "attributed_joules": attributed,
            "attributed_against_busy": attributed / busy - 1,
            "joules_per_output_token": {"account": attributed / made["output"], "truth": busy / made["output"]},
            "joules_per_token": {
                name: part / sum(made.values()) for name, part in (("account", attributed), ("truth", busy))
            },
        }


def _total(page: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE))


def _requests(answers: Row, truth: dict[str, float], phase: _Phase) -> Row:
    """Return the requests' final figures against the counter, and each against the engine's steps."""
    asked = {one["request_id"]: one for one in answers["requests"] if one["phase"] == "proxy"}
    finals = {name: one for name, one in answers["finals"].items() if one.get("final")}
    summed, parts = sum(one["energy_joules"] for one in finals.values()), phase.parts()
    rest = parts["idle_joules"] + parts["unattributed_joules"] + parts["pending_joules"]
    off = {name: one["energy_joules"] / truth[name] - 1 for name, one in finals.items() if name in truth}
    inside = [one["low"] <= truth[name] <= one["high"] for name, one in finals.items() if name in truth]
    by_kind = {
        "streamed": [value for name, value in off.items() if asked[name]["stream"]],
        "whole": [value for name, value in off.items() if not asked[name]["stream"]],
    }
    usages = [one["usage"] for one in asked.values() if one["usage"]]
    return {
        "requests": len(asked),
        "final": len(finals),
        "methods": Counter(one.get("method", "none") for one in answers["finals"].values()),
        "statuses": Counter(one.get("status", "none") for one in answers["finals"].values()),
        "requests_joules": summed,
        "requests_idle_unattributed_against_counter": (summed + rest) / phase.meter_joules - 1,
        "request_error": {"all": _spread(list(off.values()))}
        | {name: _spread(values) for name, values in by_kind.items() if values},
        "truth_within_bounds": sum(inside) / max(len(inside), 1),
        "tenants_right": all(one.get("tenant") == asked[name]["tenant"] for name, one in finals.items()),
        "usages_that_clients_saw": len(usages),
        "usages_right": all(
            (one["usage"]["prompt_tokens"], one["usage"]["completion_tokens"]) == (one["prompt"], one["output"])
            for one in asked.values()
            if one["usage"]
        ),
    }


def _provisional(answers: Row) -> Row:
    """Return what clients saw with their answers, and how far it was from the final figures."""
    asked = [one for one in answers["requests"] if one["phase"] == "proxy"]
    seen = [one for one in asked if one["energy"]]
    off: dict[str, list[float]] = {"all": [], "streamed": [], "whole": []}
    for one in seen:
        final = answers["finals"][one["request_id"]]
        if final.get("final") and not one["energy"]["final"]:
            ratio = one["energy"]["energy_joules"] / final["energy_joules"] - 1
            off["all"].append(ratio)
            off["streamed" if one["stream"] else "whole"].append(ratio)
    return {
        "comments_in_streams": sum(one["stream"] for one in seen),
        "of_streams": sum(one["stream"] for one in asked),
        "objects_in_bodies": sum(not one["stream"] for one in seen),
        "headers": sum(one["header_joules"] is not None for one in asked),
        "of_whole_answers": sum(not one["stream"] for one in asked),
        "headers_equal_objects": all(
            one["header_joules"] == one["energy"]["energy_joules"] for one in seen if one["header_joules"] is not None
        ),
        "already_final": sum(one["energy"]["final"] for one in seen),
        "against_final": {name: _spread(values) for name, values in off.items() if values},
    }


def _spread(values: list[float]) -> Row:
    size = np.abs(np.array(values))
    if not len(size):
        return {"count": 0}
    return {
        "count": len(values),
        "median": float(np.median(size)),
        "p95": float(np.percentile(size, 95)),
        "worst": float(size.max()),
        "mean_signed": float(np.mean(values)),
    }


def _rounded(value: Any) -> Any:
    """Return a figure with the six digits that it may be trusted for."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    """Print the comparison."""
    print(json.dumps(evaluate(Path(sys.argv[1])), indent=1))


if __name__ == "__main__":
    main()
