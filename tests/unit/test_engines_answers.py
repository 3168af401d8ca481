"""Streams as real servers sent them (vLLM 0.32, llama.cpp, transformers 5.19; shortened), and as they come broken."""

import json
import random
from itertools import pairwise

import pytest

from jouletrace.engines.answers import MAX_EVENT_BYTES, Answer, AnswerStream, is_inference

VLLM_ROLE = (
    b'data: {"id":"chatcmpl-r1","model":"tiny","choices":[{"index":0'
    b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}\n\n'
)
VLLM_TOKEN = (
    b'data: {"id":"chatcmpl-r1","model":"tiny","choices":[{"index":0'
    b',"delta":{"content":"\xda\x8d"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
)
VLLM_FINISH = (
    b'data: {"id":"chatcmpl-r1","model":"tiny","choices":[{"index":0'
    b',"delta":{"content":""},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]}\n\n'
)
VLLM_USAGE = (
    b'data: {"id":"chatcmpl-r1","model":"tiny","choices":[],"usage":{'
    b'"prompt_tokens":18,"total_tokens":21,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":16}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
VLLM_STREAM = VLLM_ROLE + VLLM_TOKEN + VLLM_FINISH + VLLM_USAGE + DONE
TRANSFORMERS_STREAM = (
    b'data: {"id":"req-7","choices":[{"delta":{"role":"assistant"},"index":0}],"model":"tiny-llama@main"}\n\n'
    b'data: {"id":"req-7","choices":[{"delta":{"content":"="},"index":0}],"model":"tiny-llama@main"}\n\n'
    b'data: {"id":"req-7","choices":[{"delta":{},"index":0,"finish_reason":"length"}],"model":"tiny-llama@main"'
    b',"usage": {"completion_tokens": 4, "prompt_tokens": 18, "total_tokens": 22}}\n\n'
)
OLLAMA_LINE = b'{"model":"llama3.2","message":{"role":"assistant","content":"Hi"},"done":false}\n'
OLLAMA_LAST = (
    b'{"model":"llama3.2","created_at":"2026-11-22T00:00:01Z","message":{"role":"assistant","content":""},"done":true,'
    b'"done_reason":"stop","total_duration":4883583458,"load_duration":1334875,"prompt_eval_count":26,'
    b'"prompt_eval_duration":342546000,"eval_count":282,"eval_duration":4535599000}\n'
)


def watch(
    data: bytes, cuts: list[int], *, is_sse: bool = True, drops_usage: bool = False
) -> tuple[bytes, AnswerStream]:
    """Feed a stream in pieces; return what came out before the end, and the watcher."""
    stream = AnswerStream(Answer(), is_sse=is_sse, drops_usage=drops_usage)
    edges = [0, *cuts, len(data)]
    passed = b"".join(stream.feed(data[a:b]) for a, b in pairwise(edges))
    return passed + stream.end(), stream


def test_a_stream_of_vllm_is_read_and_passes_unchanged() -> None:
    passed, stream = watch(VLLM_STREAM, [])
    assert passed == VLLM_STREAM.removesuffix(DONE)
    assert stream.held == DONE
    assert stream.answer.usage == {"input": 18, "cached_input": 16, "output": 3}
    assert (stream.answer.model, stream.answer.ended, stream.answer.failed) == ("tiny", True, False)


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_may_be_cut_anywhere(seed: int) -> None:
    # Network pieces know no events: the outcome must not depend on them.
    generator = random.Random(seed)
    crlf = bool(seed % 2)
    data = VLLM_STREAM.replace(b"\n", b"\r\n") if crlf else VLLM_STREAM
    cuts = sorted(generator.sample(range(1, len(data)), 40))
    passed, stream = watch(data, cuts, drops_usage=True)
    expected = VLLM_ROLE + VLLM_TOKEN + VLLM_FINISH
    assert passed.replace(b"\r\n", b"\n") == expected
    assert stream.held.replace(b"\r\n", b"\n") == DONE
    assert stream.answer.usage == {"input": 18, "cached_input": 16, "output": 3}
    assert stream.began


def test_the_opening_is_no_token() -> None:
    stream = AnswerStream(Answer(), is_sse=True)
    stream.feed(b": ping\n\n" + VLLM_ROLE)
    assert not stream.began
    stream.feed(VLLM_TOKEN)
    assert stream.began


def test_usage_in_a_chunk_with_text_is_kept() -> None:
    # transformers sends it always, in its last chunk, and no [DONE].
    passed, stream = watch(TRANSFORMERS_STREAM, [], drops_usage=True)
    assert passed == TRANSFORMERS_STREAM
    assert stream.held == b""
    assert stream.answer.ended
    assert stream.answer.usage == {"input": 18, "cached_input": 0, "output": 4}


def test_words_in_the_text_are_not_taken_for_counts() -> None:
    text = 'data: [DONE]\n\n"usage": {"prompt_tokens": 9}'
    event = b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"
    passed, stream = watch(event * 3, [len(event) + 20])
    assert passed == event * 3
    assert stream.answer.usage is None
    assert not stream.answer.ended


def test_ollama_counts_in_its_last_line() -> None:
    passed, stream = watch(OLLAMA_LINE * 2 + OLLAMA_LAST, [30, 200], is_sse=False)
    assert passed == OLLAMA_LINE * 2
    assert stream.held == OLLAMA_LAST
    assert stream.answer.usage == {"input": 26, "cached_input": 0, "output": 282}
    assert stream.answer.decode_ns == 4535599000
    assert stream.began


def test_ollamas_last_line_may_lack_its_newline() -> None:
    passed, stream = watch(OLLAMA_LINE + OLLAMA_LAST.rstrip(), [], is_sse=False)
    assert passed == OLLAMA_LINE
    assert stream.held == OLLAMA_LAST.rstrip()
    assert stream.answer.ended


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        # OpenAI's Responses: the counts are in the last event's `response`.
        (
            b'event: response.created\ndata: {"type":"response.created","response":{"model":"m","usage":null}}\n\n'
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"x"}\n\n'
            b'event: response.completed\ndata: {"type":"response.completed","response":{"model":"m","usage":'
            b'{"input_tokens":7,"input_tokens_details":{"cached_tokens":2},"output_tokens":5,"total_tokens":12}}}\n\n',
            {"input": 7, "cached_input": 2, "output": 5},
        ),
        # Anthropic's Messages: input at first, without what the cache had; output at the end.
        (
            b'event: message_start\ndata: {"type":"message_start","message":{"model":"m","usage":{"input_tokens":7,'
            b'"cache_read_input_tokens":2,"cache_creation_input_tokens":1,"output_tokens":1}}}\n\n'
            b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"x"}}\n\n'
            b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":5}}\n\n'
            b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
            {"input": 10, "cached_input": 2, "output": 5},
        ),
    ],
)
def test_other_dialects(events: bytes, expected: dict[str, int]) -> None:
    passed, stream = watch(events, [100, 101])
    assert passed == events
    assert stream.answer.usage == expected
    assert stream.answer.ended
    assert stream.answer.model == "m"
    assert stream.began


def test_timings_of_llama_cpp() -> None:
    # prompt_n is without what the cache had; usage is with it.
    timings = {"cache_n": 5, "prompt_n": 7, "prompt_ms": 3.0, "predicted_n": 16, "predicted_ms": 12.5}
    alone, beside = Answer(), Answer()
    alone.read({"content": "x", "stop": True, "timings": timings})
    beside.read({"usage": {"prompt_tokens": 12, "completion_tokens": 16}, "timings": timings})
    for answer in (alone, beside):
        assert answer.usage == {"input": 12, "cached_input": 5, "output": 16}
        assert answer.decode_ns == 12_500_000
    assert alone.ended


@pytest.mark.parametrize(
    "usage",
    [
        *({"prompt_tokens": value} for value in (-1, "7", None, True, 2**41, 1.5, [7])),
        {"prompt_tokens_details": 3},
    ],
)
def test_counts_that_make_no_sense_are_no_counts(usage: dict[str, object]) -> None:
    answer = Answer()
    answer.read({"model": "m", "usage": usage})
    assert answer.usage is None


def test_more_cached_than_there_were_is_not_believed() -> None:
    answer = Answer()
    answer.read({"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 9}, "completion_tokens": 1}})
    assert answer.usage == {"input": 3, "cached_input": 3, "output": 1}


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error": {"message": "CUDA out of memory", "code": 500}}\n\n',
        b'error: {"code":500,"message":"slot unavailable"}\n\n',
        b'data: {"type":"error","error":{"type":"overloaded_error"}}\n\n',
    ],
)
def test_an_error_in_a_stream(event: bytes) -> None:
    passed, stream = watch(VLLM_TOKEN + event + DONE, [])
    assert passed == VLLM_TOKEN + event
    assert stream.answer.failed


def test_a_stream_that_is_cut_has_not_ended() -> None:
    passed, stream = watch(VLLM_ROLE + VLLM_TOKEN + VLLM_FINISH[:50], [])
    assert passed == VLLM_ROLE + VLLM_TOKEN + VLLM_FINISH[:50]
    assert not stream.answer.ended


def test_garbage_passes() -> None:
    garbage = b"data: {nonsense\n\ndata: " + b"[" * 100_000 + b'"usage": {\n\n\x00\xff\n\n' + VLLM_USAGE
    passed, stream = watch(garbage, [7, 5000])
    assert passed == garbage
    assert stream.answer.usage == {"input": 18, "cached_input": 16, "output": 3}


def test_an_endless_event_is_not_collected() -> None:
    stream = AnswerStream(Answer(), is_sse=True)
    piece = b"x" * (MAX_EVENT_BYTES // 4)
    passed = [stream.feed(piece) for _ in range(6)]
    assert b"".join(passed) == piece * 6
    assert passed[-1] == piece


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/v1/chat/completions", True),
        ("POST", "/openai/v1/completions/", True),
        ("POST", "/api/chat", True),
        ("POST", "/v1/embeddings", True),
        ("GET", "/v1/chat/completions", False),
        ("GET", "/metrics", False),
        ("POST", "/api/pull", False),
        ("POST", "/tokenize", False),
    ],
)
def test_which_paths_are_inference(method: str, path: str, expected: bool) -> None:
    assert is_inference(method, path) is expected
