"""Writes diagnosis/mlenergy/h100.json from the ML.ENERGY Leaderboard: `python docs/make_reference.py LEADERBOARD`.

LEADERBOARD is a checkout of github.com/ml-energy/leaderboard at the commit that UPSTREAM_COMMIT names. Only H100 rows
of language tasks are taken, and of each only what the reference shows.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

UPSTREAM_COMMIT = "0cd52dab897c5d91a45f4d413038f3b8b4251b0f"
TASKS = ("lm-arena-chat", "sourcegraph-fim", "gpqa", "image-chat", "video-chat")
FEWEST_BATCHES = 4
"""Two coefficients, and two more batch sizes that can contradict them."""
TARGET = Path(__file__).parent.parent / "exporter" / "jouletrace" / "diagnosis" / "mlenergy" / "h100.json"


def sweeps(tasks: Path) -> list[dict[str, Any]]:
    """Return one entry per task, model and number of GPUs; its points are (mean batch, J per output token)."""
    found: dict[tuple[str, str, int, str], list[tuple[float, float]]] = defaultdict(list)
    for task in TASKS:
        for row in json.loads((tasks / f"{task}.json").read_text())["configurations"]:
            if row["gpu_model"] == "H100":
                key = (task, row["model_id"], row["num_gpus"], row["weight_precision"])
                found[key].append((row["avg_batch_size"], row["energy_per_token_joules"]))
    return [
        {"task": task, "model_id": model, "num_gpus": gpus, "weight_precision": precision, "points": sorted(points)}
        | fit(points)
        for (task, model, gpus, precision), points in sorted(found.items())
    ]


def fit(points: list[tuple[float, float]]) -> dict[str, float]:
    """Return a and b of a step's joules a + b * batch by least squares of relative errors; empty for few points."""
    if len({round(batch) for batch, _ in points}) < FEWEST_BATCHES:
        return {}
    # Relative to the step's joules e = j * batch: minimise sum((a / e + b * batch / e - 1)^2).
    rows = [(1 / (j * batch), 1 / j) for batch, j in points]
    aa = sum(x * x for x, _ in rows)
    ab = sum(x * y for x, y in rows)
    bb = sum(y * y for _, y in rows)
    ra, rb = sum(x for x, _ in rows), sum(y for _, y in rows)
    determinant = aa * bb - ab * ab
    a, b = (ra * bb - rb * ab) / determinant, (aa * rb - ab * ra) / determinant
    error = sum(abs(a * x + b * y - 1) for x, y in rows) / len(rows)
    return {"fixed_joules": a, "sequence_joules": b, "mean_error": round(error, 4)}


def main() -> int:
    """Write the file."""
    tasks = Path(sys.argv[1]) / "public" / "data" / "tasks"
    content = {
        "source": f"The ML.ENERGY Leaderboard v3.0, github.com/ml-energy/leaderboard at {UPSTREAM_COMMIT}; "
        "see ATTRIBUTION.md and LICENSE-APACHE-2.0.txt beside this file",
        "gpu_model": "H100",
        "sweeps": sweeps(tasks),
    }
    # One sweep a line: small, and a change shows as what it is.
    lines = ",\n".join(json.dumps(one) for one in content.pop("sweeps"))
    head = json.dumps(content)[:-1]
    TARGET.write_text(f'{head}, "sweeps": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
