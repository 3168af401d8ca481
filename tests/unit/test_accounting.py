"""The laws file, and where an engine's devices come from."""

from pathlib import Path

import pytest

from jouletrace.accounting import read_laws
from jouletrace.config import ConfigError
from jouletrace.requests.law import Law, PrefillSchedule, Provenance

LLAMA = "{parameters: 8.03e9, layers: 32, kv_heads: 8, head_dim: 128}"


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "laws.yaml"
    file.write_text(text)
    return str(file)


def test_laws_by_engine_and_model_and_priors_from_descriptions(tmp_path: Path) -> None:
    book = read_laws(
        written(
            tmp_path,
            "engines: {e: {fixed_joules: 2.5, prefill_token_joules: 0.0154, decode_sequence_joules: 0.04}}\n"
            "models: {m: {fixed_joules: 3, prefill_token_joules: 0.02, decode_sequence_joules: 0.05}}\n"
            "schedules: {e: exclusive}\n"
            f"descriptions: {{llama: {LLAMA}}}\n"
            "gpu: H200\n",
        )
    )
    assert book.law("e", ["m"]) == Law(
        fixed_joules=2.5, prefill_token_joules=0.0154, decode_sequence_joules=0.04, provenance=Provenance.CONFIGURED
    )
    assert book.law("other", ["m"]).fixed_joules == 3
    assert book.schedule("e", "vllm") is PrefillSchedule.EXCLUSIVE
    # The coefficients that two H200s gave for such a model: 2.48 J, 15.4 mJ, 40.5 mJ.
    estimate = book.law("other", ["llama"])
    assert estimate.provenance is Provenance.PRIOR
    assert estimate.fixed_joules == pytest.approx(2.48, rel=0.1)
    assert estimate.prefill_token_joules == pytest.approx(15.4e-3, rel=0.15)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1, 2]", "Expected `object`"),
        ("engines: {e: {fixed_joules: -1, prefill_token_joules: 0, decode_sequence_joules: 1}}", "fixed_joules"),
        ("engine: {}", "unknown field `engine`"),
        (f"descriptions: {{llama: {LLAMA}}}", "gpu: '' is not one of A100"),
        ("descriptions: {m: {parameters: -1, layers: 1, kv_heads: 1, head_dim: 1}}\ngpu: H100", "parameters"),
        ("a: [", "calibrate"),
    ],
)
def test_a_bad_laws_file_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as failure:
        read_laws(written(tmp_path, text))
    assert problem in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_missing_laws_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ledger\.laws_file: .* cannot be read"):
        read_laws(str(tmp_path / "none.json"))


def test_no_file_means_the_generic_prior() -> None:
    assert read_laws("").law("e", []).provenance is Provenance.PRIOR
