import pytest

from jouletrace.requests.roofline import PEAKS, ModelDescription, peak_of, prior

LLAMA_8B = ModelDescription(parameters=8.03e9, layers=32, kv_heads=8, head_dim=128)


def test_kv_bytes_of_a_known_model() -> None:
    # Llama-3.1-8B in bf16 keeps 128 KiB per token (its config.json: 32 layers, 8 KV heads, 128 wide).
    assert LLAMA_8B.kv_bytes_per_token == 131_072


@pytest.mark.parametrize(
    ("model", "measured_fixed"),
    [
        # H100 chat sweeps of the ML.ENERGY data, joules per step over all GPUs.
        (LLAMA_8B, 3.16),
        (ModelDescription(parameters=32.8e9, layers=64, kv_heads=8, head_dim=128), 11.47),
        (ModelDescription(parameters=70.6e9, layers=80, kv_heads=8, head_dim=128), 27.43),
    ],
)
def test_the_fixed_part_comes_near_published_sweeps_of_another_gpu(
    model: ModelDescription, measured_fixed: float
) -> None:
    assert prior(model, PEAKS["H100"]).fixed_joules == pytest.approx(measured_fixed, rel=0.35)


def test_fewer_bytes_and_fewer_active_weights_cost_less() -> None:
    whole = prior(LLAMA_8B, PEAKS["H200"])
    fp8 = prior(ModelDescription(parameters=8.03e9, layers=32, kv_heads=8, head_dim=128, weight_bytes=1), PEAKS["H200"])
    sparse = prior(
        ModelDescription(parameters=8.03e9, active_parameters=2e9, layers=32, kv_heads=8, head_dim=128), PEAKS["H200"]
    )
    assert fp8.fixed_joules == pytest.approx(whole.fixed_joules / 2)
    assert sparse.prefill_token_joules == pytest.approx(whole.prefill_token_joules * 2 / 8.03)
    longer = prior(LLAMA_8B, PEAKS["H200"], context_tokens=8192)
    assert longer.decode_sequence_joules > 3 * whole.decode_sequence_joules


def test_gpus_are_known_by_their_nvml_names() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") is PEAKS["H100"]
    assert peak_of("NVIDIA A100-SXM4-80GB") is PEAKS["A100"]
    assert peak_of("NVIDIA GeForce GTX 1080") is None


@pytest.mark.parametrize("field", ["parameters", "layers", "kv_heads", "head_dim", "weight_bytes"])
def test_a_description_refuses_what_is_not_positive(field: str) -> None:
    good = {"parameters": 1e9, "layers": 1, "kv_heads": 1, "head_dim": 1, "weight_bytes": 2.0}
    with pytest.raises(ValueError, match=field):
        ModelDescription(**(good | {field: 0}))  # type: ignore[arg-type]
