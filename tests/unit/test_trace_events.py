from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from jouletrace.requests.law import PrefillSchedule
from jouletrace.requests.records import RequestRecord, Status, StepRecord, check_step
from jouletrace.trace.events import Fidelity, engine_of, records, schedule_of, steady_phases, step_windows
from jouletrace.trace.recording import Recording, RecordingError, read

REPOSITORY = Path(__file__).parents[2]
EXCLUSIVE = read(REPOSITORY / "exporter/jouletrace/demo/recording.json.gz")
CHUNKED = read(REPOSITORY / "tests/data/h200-c-chunked.json.gz")
S = 1_000_000_000


@pytest.mark.parametrize(("recording", "iterations", "requests"), [(EXCLUSIVE, 2818, 725), (CHUNKED, 15381, 643)])
def test_every_event_becomes_a_record(recording: Recording, iterations: int, requests: int) -> None:
    told = [record for _, record in records(recording, Fidelity.STEPS)]
    steps = [record for record in told if isinstance(record, StepRecord)]
    assert len(steps) == iterations
    for step in steps:
        check_step(step)
        assert step.prefill or step.decode
    ends = [one for one in told if isinstance(one, RequestRecord) and one.status is Status.FINISHED]
    assert len(ends) == requests
    boundaries = [record for _, record in records(recording, Fidelity.BOUNDARIES)]
    assert Counter(type(record) for record in boundaries) == {RequestRecord: 3 * requests}


def test_decode_members_are_those_with_a_first_token_and_no_end() -> None:
    # The events of exclusive decode steps tell only how many took part.
    counts = [event["n"] for event in EXCLUSIVE.events if event["kind"] == "iteration" and event["iter"] == "decode"]
    found = [
        len(record.decode or ())
        for _, record in records(EXCLUSIVE, Fidelity.STEPS)
        if isinstance(record, StepRecord) and not record.prefill
    ]
    assert found == counts


def test_output_tokens_are_those_of_the_steps() -> None:
    made: Counter[str] = Counter()
    told: dict[str, int] = {}
    for _, record in records(CHUNKED, Fidelity.STEPS):
        if isinstance(record, StepRecord):
            for name in record.decode or ():
                made[name] += record.steps
        elif record.usage is not None and record.status is Status.FINISHED:
            told[record.request_id] = record.usage.output
    # The first token comes out of prefill; a decode step of several passes may run past the last one.
    assert all(told[name] - 1 <= count <= told[name] + 2 for name, count in made.items())


def test_the_schedule_is_seen() -> None:
    assert schedule_of(EXCLUSIVE) is PrefillSchedule.EXCLUSIVE
    assert schedule_of(CHUNKED) is PrefillSchedule.CHUNKED
    assert schedule_of(replace(CHUNKED, events=())) is None
    assert engine_of(replace(CHUNKED, events=())) is None


def test_steady_phases_tell_their_work() -> None:
    spans = steady_phases(CHUNKED)
    assert len(spans) == 15
    assert all(3.9 * S < span.end_ns - span.start_ns < 4.2 * S for span in spans)
    per_step = {(span.prefill_tokens / span.steps, span.decode_sequences / span.steps) for span in spans}
    assert per_step == {(p, n) for p in (0, 128, 256, 512) for n in (0, 8, 32, 64)} - {(0, 0)}


def test_step_windows_hold_every_step_of_busy_time_once() -> None:
    spans = step_windows(CHUNKED)
    assert all(span.end_ns - span.start_ns >= S for span in spans)
    assert all(later.start_ns >= earlier.end_ns for earlier, later in pairwise(spans))
    steps = sum(event["steps"] for event in CHUNKED.events if event["kind"] == "iteration")
    # At 2 requests a second most busy times are shorter than a second.
    assert 0.8 * steps < sum(span.steps for span in spans) <= steps


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"kind": "first_token", "t_ns": 5}, "event 0 .first_token. has no 'id'"),
        ({"kind": "request_start", "t_ns": 5, "id": "a"}, "has no 'prompt_tokens'"),
        ({"kind": "iteration", "t_ns": 5, "start_ns": 1, "iter": "prefill", "ids": ["a"], "tokens": []}, "no sense"),
    ],
)
def test_an_event_that_makes_no_sense_is_named(event: dict, words: str) -> None:
    with pytest.raises(RecordingError, match=words):
        list(records(replace(CHUNKED, events=(event,)), Fidelity.STEPS))
