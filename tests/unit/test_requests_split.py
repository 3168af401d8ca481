import numpy as np
import pytest

from jouletrace.requests.law import Law, PrefillSchedule
from jouletrace.requests.split import NEVER, Boundaries, activity, split_boundaries
from jouletrace.requests.unclaimed import Unclaimed

LAW = Law(fixed_joules=3.0, prefill_token_joules=0.02, decode_sequence_joules=0.06)


def test_chunked_boundaries_find_the_chunk_from_the_energy() -> None:
    # 10 steps of 100 prompt tokens of b beside a's decoding: 3 + 2 + 0.06 J each; then 5 decode steps of both.
    steps_joules = 10 * (3.0 + 100 * 0.02 + 0.06)
    both_joules = 5 * (3.0 + 2 * 0.06)
    boundaries = Boundaries.of(
        np.array([0, 100]),
        np.array([0, 200]),
        np.array([300, 300]),
        np.array([50.0, 1000.0]),
        from_ns=0,
        until_ns=300,
    )
    edges = np.unique(np.clip(np.concatenate((boundaries.edges(), [0, 300])), 0, 300))
    assert edges.tolist() == [0, 100, 200, 300]
    seen = activity(boundaries, edges)
    joules = np.array([0.0, steps_joules, both_joules])
    shares = split_boundaries(joules, seen.active, boundaries, seen, law=LAW, schedule=PrefillSchedule.CHUNKED)
    a, b = shares.total()
    assert a == pytest.approx(10 * (1.5 + 0.06) + 5 * (1.5 + 0.06), rel=1e-6)
    assert b == pytest.approx(10 * (1.5 + 2.0) + 5 * (1.5 + 0.06), rel=1e-6)
    assert shares.prefill_marginal[1] == pytest.approx(20.0, rel=1e-6)
    assert shares.total().sum() == pytest.approx(joules.sum(), rel=1e-12)


def test_first_tokens_of_one_step_share_its_prefill() -> None:
    ms = 1_000_000
    boundaries = Boundaries.of(
        np.array([0, 0]),
        np.array([100 * ms, 100 * ms + 400_000]),
        np.array([NEVER, NEVER]),
        np.array([100.0, 300.0]),
        from_ns=0,
        until_ns=200 * ms,
    )
    edges = np.unique(np.clip(np.concatenate((boundaries.edges(), [0, 200 * ms])), 0, 200 * ms))
    seen = activity(boundaries, edges)
    joules = np.diff(edges) / ms
    shares = split_boundaries(joules, seen.active, boundaries, seen, law=LAW, schedule=PrefillSchedule.EXCLUSIVE)
    assert shares.prefill_marginal[1] == pytest.approx(3 * shares.prefill_marginal[0])
    assert shares.prefill_fixed[1] == pytest.approx(shares.prefill_fixed[0])
    assert shares.total().sum() == pytest.approx(200.0)


def spans(*pairs: tuple[int, int]) -> dict[str, np.ndarray]:
    start, end = (np.array(column) for column in zip(*pairs, strict=True))
    return {"decode_from_ns": start, "decode_until_ns": end, "prompt_from_ns": end, "prompt_until_ns": end}


def test_unclaimed_time_is_shared_by_those_who_claim_it_first() -> None:
    waiting = Unclaimed()
    waiting.append_unknown(np.array([0, 10, 20]), np.array([10, 20, 30]), np.array([6.0, 6.0, 6.0]), told=False)
    shares = waiting.claim(**spans((0, 20), (10, 30), (0, 30)), prompt_tokens=np.zeros(3), law=LAW)
    assert shares.total() == pytest.approx([3 + 2, 2 + 3, 3 + 2 + 3])
    assert waiting.joules == pytest.approx(0)
    late = waiting.claim(**spans((0, 30)), prompt_tokens=np.zeros(1), law=LAW)
    assert late.total() == pytest.approx([0])


def test_unclaimed_rows_expire_with_what_is_left() -> None:
    waiting = Unclaimed()
    waiting.append_unknown(np.array([0, 10, 20]), np.array([10, 20, 30]), np.array([1.0, 2.0, 4.0]), told=False)
    waiting.claim(**spans((10, 20)), prompt_tokens=np.zeros(1), law=LAW)
    assert waiting.expire(25) == pytest.approx(1.0)
    assert waiting.joules == pytest.approx(4.0)
    assert waiting.expire(NEVER) == pytest.approx(4.0)
    assert len(waiting) == 0


def test_what_waits_of_time_that_nobody_told_of_falls_with_claims_and_expiry() -> None:
    waiting = Unclaimed()
    waiting.append_unknown(np.array([0, 10, 20]), np.array([10, 20, 30]), np.array([1.0, 2.0, 4.0]), told=False)
    waiting.append_unknown(np.array([30]), np.array([40]), np.array([8.0]), told=True)
    assert waiting.untold_joules == pytest.approx(7.0)
    waiting.claim(**spans((10, 40)), prompt_tokens=np.zeros(1), law=LAW)
    assert waiting.untold_joules == pytest.approx(1.0)
    waiting.expire(25)
    assert waiting.untold_joules == pytest.approx(0.0)
