import math
from typing import Any

import pytest

from jouletrace.engines.otlp.spans import Span, engine_kind, engine_role, is_request, request_record
from jouletrace.requests.records import RecordError, RequestRecord, Role, Status, Usage

START = 1_795_375_992_000_000_000
S = 1_000_000_000
TRACE = "0af7651916cd43dd8448eb211c80319c"


def span(name: str = "llm_request", seconds: float = 1.0, *, failed: bool = False, **attributes: Any) -> Span:
    told = {name.replace("__", "."): value for name, value in attributes.items()}
    return Span(name, TRACE, "00f067aa0ba902b7", START, START + round(seconds * S), failed, told)


def vllm(seconds: float = 1.0, *, failed: bool = False, **attributes: Any) -> RequestRecord:
    named = {"gen_ai__request__id": "r1"} | {f"gen_ai__{name}": value for name, value in attributes.items()}
    return request_record(span("llm_request", seconds, failed=failed, **named), "vllm", "e")


@pytest.mark.parametrize(
    ("name", "kind", "role"),
    [
        ("llm_request", "vllm", Role.MIXED),
        (" Req 4fc1a2b3", "sglang", Role.MIXED),
        ("Req 4fc1a2b3", "sglang", Role.MIXED),
        ("prefill Req 4fc1a2b3", "sglang", Role.PREFILL),
        ("decode Req 4fc1a2b3", "sglang", Role.DECODE),
        ("chat_completions", "tgi", Role.MIXED),
        ("Load weights", None, None),
        ("GET /v1/Req uests", None, None),
        ("http-request", None, None),
        ("", None, None),
    ],
)
def test_names_tell_the_kind(name: str, kind: str | None, role: Role | None) -> None:
    assert engine_kind(name) == kind
    if kind is not None:
        assert engine_role(name, kind) is role


def test_both_generations_of_token_names() -> None:
    older = vllm(usage__prompt_tokens=25, usage__completion_tokens=12)
    newer = vllm(usage__input_tokens=25, usage__output_tokens=12)
    assert older.usage == newer.usage == Usage(input=25, output=12)


def test_numbers_as_text_and_as_whole_floats() -> None:
    assert vllm(usage__prompt_tokens="25", usage__completion_tokens=12.0).usage == Usage(input=25, output=12)


@pytest.mark.parametrize("tokens", [-1, 2**41, 1.5, math.nan, math.inf, True, "many", "9" * 30, ("1",)])
def test_numbers_of_tokens_that_cannot_be(tokens: object) -> None:
    with pytest.raises(RecordError, match="prompt_tokens: is not a number of tokens"):
        vllm(usage__prompt_tokens=tokens)


def test_more_cached_than_asked_for_is_all_of_it() -> None:
    assert vllm(usage__prompt_tokens=25, usage__cached_tokens=32).usage == Usage(input=25, cached_input=25)


def test_moments_are_counted_back_from_the_end() -> None:
    record = vllm(
        1.1,
        latency__e2e=1.0,
        latency__time_to_first_token=0.45,  # 50 ms of that in a busy front end
        latency__time_in_queue=0.1,
        latency__time_in_model_prefill=0.25,
        latency__time_in_model_decode=0.6,
    )
    assert record.arrival_ns == START
    assert record.end_ns == START + S
    assert record.first_token_ns == START + 400_000_000
    assert record.scheduled_ns == START + 150_000_000


def test_without_phases_the_time_to_first_token_serves() -> None:
    record = vllm(latency__time_to_first_token=0.4, latency__time_in_queue=0.1)
    assert (record.scheduled_ns, record.first_token_ns) == (START + S // 10, START + 4 * S // 10)


@pytest.mark.parametrize("years", [1.7e9, -1.0, math.nan, math.inf, "x"])
def test_a_moment_that_never_came_is_left_out(years: object) -> None:
    record = vllm(
        latency__e2e=years, latency__time_in_model_decode=years, latency__time_to_first_token=years,
        latency__time_in_queue=years,
    )  # fmt: skip
    assert (record.scheduled_ns, record.first_token_ns, record.end_ns) == (None, None, START + S)


def test_a_request_of_sglang() -> None:
    # Attributes as set by convert_to_span_attrs and convert_to_gen_ai_span_attrs of SGLang 0.5.23.
    told = {
        "rid": "5f0c", "module": "sglang::request", "gen_ai__request__id": "5f0c",
        "gen_ai__usage__prompt_tokens": 812, "gen_ai__usage__cached_tokens": 512,
        "gen_ai__usage__completion_tokens": 64,
        "gen_ai__response__model": "Qwen/Qwen3-8B", "gen_ai__response__finish_reasons": '["stop"]',
        "gen_ai__latency__time_to_first_token": 0.25, "gen_ai__latency__e2e": 1.0,
        "gen_ai__latency__time_in_model_decode": 0.75, "gen_ai__latency__time_in_model_prefill": 0.24,
    }  # fmt: skip
    record = request_record(span(" Req 5f0c", 1.0, **told), "sglang", "s")
    assert record == RequestRecord(
        request_id="5f0c", engine_id="s", model="Qwen/Qwen3-8B", trace_id=TRACE, arrival_ns=START,
        first_token_ns=START + S // 4, end_ns=START + S, status=Status.FINISHED,
        usage=Usage(input=812, cached_input=512, output=64),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reasons", "status"),
    [
        ('["abort"]', Status.CANCELLED),
        (("abort",), Status.CANCELLED),
        (("stop", "error"), Status.FAILED),
        (("length",), Status.FINISHED),
        ("not json", Status.FINISHED),
        ("1", Status.FINISHED),
        ("[" * 100_000, Status.FINISHED),
        (1.5, Status.FINISHED),
    ],
)
def test_finish_reasons(reasons: object, status: Status) -> None:
    assert vllm(response__finish_reasons=reasons).status is status


def test_a_span_with_an_error_is_a_failed_request() -> None:
    assert vllm(failed=True, response__finish_reasons=("stop",)).status is Status.FAILED


def test_a_request_of_tgi() -> None:
    # Durations as Rust prints them; TGI divides the inference time by the tokens, here 37 (router/src/server.rs).
    inference_ns = 740_000_123
    told = {
        "total_time": "751.5ms", "validation_time": "498.2µs", "queue_time": "1.001801ms",
        "inference_time": f"{inference_ns / 1e6}ms", "time_per_token": f"{inference_ns // 37 / 1e6}ms",
    }  # fmt: skip
    record = request_record(span("generate", 0.8, **told), "tgi", "t")
    assert record.request_id == "tgi-00f067aa0ba902b7"
    assert record.scheduled_ns == START + 1_500_001
    assert record.end_ns == START + 751_500_000
    assert record.usage == Usage(output=37)


def test_spans_inside_a_request_of_tgi_are_none() -> None:
    assert not is_request(span("generate"), "tgi")
    assert is_request(span("generate", total_time="1s", inference_time="1s"), "tgi")


def test_a_request_has_an_id() -> None:
    assert not is_request(span("llm_request"), "vllm")
    assert not is_request(span("llm_request", gen_ai__request__id=7), "vllm")
    assert is_request(span(" Req 1", rid="1"), "sglang")


def test_names_that_are_too_long_are_cut_as_the_plugin_cuts_them() -> None:
    record = vllm(request__id="x" * 300 + "end", response__model="m" * 300)
    assert (len(record.request_id), record.request_id[-3:]) == (256, "end")
    assert record.model == "m" * 128


def test_times_that_contradict_each_other() -> None:
    with pytest.raises(RecordError, match="lies before"):
        vllm(-1.0)
    with pytest.raises(RecordError, match="is missing"):
        request_record(Span("llm_request", TRACE, "", 0, S, False, {"gen_ai.request.id": "r"}), "vllm", "e")


def test_a_trace_id_of_zeros_is_none() -> None:
    nothing = Span("llm_request", "0" * 32, "", START, START, False, {"gen_ai.request.id": "r"})
    assert request_record(nothing, "vllm", "e").trace_id is None
