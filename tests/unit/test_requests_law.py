import pytest

from jouletrace.requests.law import GENERIC, Law, LawBook, PrefillSchedule, Provenance, boundary_error


def law(a: float) -> Law:
    return Law(fixed_joules=a, prefill_token_joules=0.01, decode_sequence_joules=0.02)


def test_the_engine_goes_before_its_model_and_the_default() -> None:
    book = LawBook(engines={"e": law(1)}, models={"m": law(2)})
    assert book.law("e", ["m"]).fixed_joules == 1
    assert book.law("f", ["x", "m"]).fixed_joules == 2
    assert book.law("f", ["x"]) is GENERIC


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("vllm", PrefillSchedule.CHUNKED),
        ("SGLang", PrefillSchedule.CHUNKED),
        ("llamacpp", PrefillSchedule.EXCLUSIVE),
        ("diffusion", PrefillSchedule.EXCLUSIVE),
    ],
)
def test_the_kind_tells_how_prompts_run(kind: str, schedule: PrefillSchedule) -> None:
    assert LawBook().schedule("e", kind) is schedule
    other = next(one for one in PrefillSchedule if one is not schedule)
    assert LawBook(schedules={"e": other}).schedule("e", kind) is other


def test_bounds_widen_from_calibration_to_prior() -> None:
    calibrated = Law(
        fixed_joules=1,
        prefill_token_joules=0.1,
        decode_sequence_joules=0.1,
        provenance=Provenance.CALIBRATED,
        error=0.11,
    )
    assert boundary_error(PrefillSchedule.CHUNKED, calibrated) == 0.11
    assert boundary_error(PrefillSchedule.EXCLUSIVE, GENERIC) < 0.11 < boundary_error(PrefillSchedule.CHUNKED, GENERIC)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_law_refuses_what_is_no_energy(bad: float) -> None:
    with pytest.raises(ValueError, match="prefill_token_joules"):
        Law(fixed_joules=1, prefill_token_joules=bad, decode_sequence_joules=0.1)


def test_a_law_under_which_decoding_is_free_is_refused() -> None:
    with pytest.raises(ValueError, match="cost nothing"):
        Law(fixed_joules=0, prefill_token_joules=1, decode_sequence_joules=0)
