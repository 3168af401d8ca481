import json
from importlib import resources
from pathlib import Path

import pytest

from jouletrace.diagnosis.reference import TASKS, shipped

FITS = json.loads((Path(__file__).parents[1] / "data/mlenergy_h100_fits.json").read_text())["fits"]
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize("fit", FITS, ids=lambda one: f"{one['model_id']}-{one['num_gpus']}-{one['task']}")
def test_shipped_laws_are_those_of_the_independent_fits(fit: dict[str, object]) -> None:
    key = (fit["model_id"], fit["num_gpus"], fit["task"])
    (sweep,) = [one for one in shipped().sweeps if (one.model_id, one.num_gpus, one.task) == key]
    assert sweep.fixed_joules == pytest.approx(fit["fixed_J_per_step"])
    assert sweep.sequence_joules == pytest.approx(fit["marginal_J_per_output_token"])
    assert sweep.mean_error == pytest.approx(fit["mape"], abs=1e-4)
    assert len(sweep.points) == fit["n"]


def test_all_h100_language_rows_are_there() -> None:
    sweeps = shipped().sweeps
    assert len({sweep.model_id for sweep in sweeps}) == 29
    assert sum(len(sweep.points) for sweep in sweeps) == 405
    assert {sweep.task for sweep in sweeps} == set(TASKS)


def test_a_measured_batch_gets_the_published_figure() -> None:
    # The leaderboard's rows: 0.455 J per token at max_num_seqs 8, 0.070 at 512 (a mean batch of 409).
    low = shipped().measurement(LLAMA, 8.0)
    assert low is not None
    assert (low.gpu_model, low.num_gpus, low.task) == ("H100", 1, "lm-arena-chat")
    assert low.joules_per_token == pytest.approx(0.455, rel=0.005)
    assert low.half_fixed_batch == pytest.approx(48, abs=0.5)
    assert (low.batch_low, low.batch_high) == (pytest.approx(8, abs=0.1), pytest.approx(691, abs=1))


def test_between_two_batches_it_follows_a_over_b_through_both() -> None:
    reference = shipped()
    (sweep,) = [one for one in reference.sweeps if one.model_id == LLAMA]
    for (low, above), (high, below) in zip(sweep.points, sweep.points[1:], strict=False):
        b = (below * high - above * low) / (high - low)
        a = (above - b) * low
        found = reference.measurement(LLAMA, (low * high) ** 0.5)
        assert found is not None
        assert found.joules_per_token == pytest.approx(a / (low * high) ** 0.5 + b)
        assert found.nearest_batch == low


@pytest.mark.parametrize("batch", [0.0, 7.0, 700.0, float("nan"), float("inf")])
def test_outside_the_measured_range_it_says_nothing(batch: float) -> None:
    assert shipped().measurement(LLAMA, batch) is None


@pytest.mark.parametrize(
    "name",
    [
        LLAMA,
        "Meta-Llama/llama-3.1-8b-instruct",
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "Llama-3.1-8B-Instruct",
        "/models/meta-llama/Llama-3.1-8B-Instruct/",
        "/data/Llama-3.1-8B-Instruct",
        "./Llama-3.1-8B-Instruct",
        "/models/huggingface/hub/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/0e9e39f249a16976918f6564b8830bc894c89659",
    ],
)
def test_names_of_the_same_model(name: str) -> None:
    found = shipped().measurement(name, 64.0)
    assert found is not None
    assert found.model_id == LLAMA


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "m",
        "llama",
        "someone/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B-Instruct-FP8",
        "/models/Llama-3.1-8B-Instruct-awq",
        "models--nobody--Llama-3.1-8B-Instruct",
    ],
)
def test_other_models_have_no_reference(name: str) -> None:
    assert shipped().measurement(name, 64.0) is None


def test_of_several_sweeps_chat_and_the_same_number_of_gpus_come_first() -> None:
    reference = shipped()

    def chosen(model: str, batch: float, devices: int = 1) -> tuple[str, int]:
        found = reference.measurement(model, batch, devices=devices)
        assert found is not None
        return found.task, found.num_gpus

    assert chosen("Qwen/Qwen3-8B", 32) == ("lm-arena-chat", 1)
    assert chosen("Qwen/Qwen3-30B-A3B-Instruct-2507", 32, 1) == ("lm-arena-chat", 1)
    assert chosen("Qwen/Qwen3-30B-A3B-Instruct-2507", 32, 2) == ("lm-arena-chat", 2)
    # One GPU was measured up to a batch of 89 only.
    assert chosen("Qwen/Qwen3-30B-A3B-Instruct-2507", 200, 1) == ("lm-arena-chat", 2)
    assert chosen("Qwen/Qwen3-235B-A22B-Thinking-2507", 16, 8) == ("gpqa", 8)
    assert chosen("Qwen/Qwen3-Coder-30B-A3B-Instruct", 64) == ("sourcegraph-fim", 1)


def test_licence_and_attribution_travel_with_the_data() -> None:
    folder = resources.files("jouletrace") / "diagnosis" / "mlenergy"
    assert "Apache License" in (folder / "LICENSE-APACHE-2.0.txt").read_text()
    attribution = (folder / "ATTRIBUTION.md").read_text()
    for needed in ("ML.ENERGY", "2601.22076", "2505.06371", "Changes", "0cd52dab897c5d91a45f4d413038f3b8b4251b0f"):
        assert needed in attribution
