"""Reads what inference servers say in their answers: tokens, model, whether it ended well. Standard library only.

Tokens are what the server says it counted (OpenAI `usage`, llama.cpp `timings`, Ollama `eval_count`), never the number
of chunks: vLLM merged 32 tokens into 26 chunks at 32 requests at once, llama.cpp sent 13 chunks for 16 tokens.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeGuard

INFERENCE_PATHS: Final = (
    # OpenAI and those who speak it, Anthropic's messages, and the reranking of vLLM, SGLang and llama.cpp
    *("/chat/completions", "/completions", "/responses", "/messages", "/embeddings", "/rerank", "/score", "/pooling"),
    # Ollama
    *("/api/generate", "/api/chat", "/api/embed", "/api/embeddings"),
    # llama.cpp's own
    *("/completion", "/infill"),
)
"""Ends of the paths that make a GPU work when they are posted to."""
MAX_EVENT_BYTES: Final = 1 << 20
"""A longer event (or line) of a stream is passed on unread, and so is all after it."""
MAX_COUNT: Final = 2**40
"""More tokens than this are a server's mistake; a record with them would be refused."""
TELLING_KEYS: Final = frozenset(
    {"model", "usage", "timings", "error", "choices", "done", "stop", "type", "response", "message"}
    | {"prompt_eval_count", "eval_count", "eval_duration"}
)
"""What `Answer.read` looks at; whoever decodes large documents need decode no other keys."""

_TELLING: Final = re.compile(
    rb'\[DONE\]|"(?:usage|timings)"\s*:\s*\{|"finish_reason"\s*:\s*"|"error"\s*:\s*["{]|"(?:done|stop)"\s*:\s*true'
    rb'|"type"\s*:\s*"(?:response\.(?:completed|incomplete|failed)|message_st|error)'
)
"""In JSON text these cannot occur inside a string: its quotes are escaped."""
_SSE_EVENT: Final = re.compile(rb".*?(?:\r?\n){2,}|.+", re.DOTALL)
_LINE: Final = re.compile(rb"[^\n]*\n|[^\n]+")
_END_TYPES: Final = frozenset({"response.completed", "response.incomplete", "response.failed", "message_stop"})
_FAILURE_TYPES: Final = frozenset({"response.failed", "error"})


def is_inference(method: str, path: str) -> bool:
    """Return whether a request makes the engine work."""
    return method == "POST" and path.rstrip("/").endswith(INFERENCE_PATHS)


class Answer:
    """What one answer has said so far; made of the documents that are `read`."""

    __slots__ = ("_cached", "_input", "_output", "decode_ns", "ended", "failed", "model")

    def __init__(self) -> None:
        self.model: str | None = None
        self.decode_ns: int | None = None
        """How long the server says that it decoded."""
        self.ended = False
        """Whether it has said that this is all."""
        self.failed = False
        """Whether it has said that something went wrong."""
        self._input: int | None = None
        self._cached: int | None = None
        self._output: int | None = None

    @property
    def usage(self) -> dict[str, int] | None:
        """Return the `usage` of a request record, None as long as no counts have come."""
        if self._input is None and self._output is None:
            return None
        tokens = self._input or 0
        # A server that counts cached tokens apart from the others would give a record that contradicts itself.
        return {"input": tokens, "cached_input": min(self._cached or 0, tokens), "output": self._output or 0}

    def read(self, document: object) -> None:
        """Take in the body, or one event or line of a stream, as decoded JSON."""
        if not isinstance(document, Mapping):
            return
        kind = document.get("type")
        for part in (document, document.get("response"), document.get("message")):
            if isinstance(part, Mapping):
                self._read_part(part)
        self.failed |= bool(document.get("error")) or kind in _FAILURE_TYPES
        choices = document.get("choices")
        self.ended |= (
            document.get("done") is True
            or document.get("stop") is True
            or kind in _END_TYPES
            or (
                isinstance(choices, list) and any(isinstance(one, dict) and one.get("finish_reason") for one in choices)
            )
        )

    def _read_part(self, part: Mapping[str, Any]) -> None:
        model = part.get("model")
        if self.model is None and isinstance(model, str) and model:
            self.model = model
        usage = part.get("usage")
        if isinstance(usage, Mapping):
            self._read_usage(usage)
        timings = part.get("timings")
        if isinstance(timings, Mapping):
            self._read_timings(timings)
        if part.get("done") is True or "eval_count" in part or "prompt_eval_count" in part:  # Ollama
            self._count(part.get("prompt_eval_count"), None, part.get("eval_count"))
            self._decoded_for(part.get("eval_duration"), 1)

    def _read_usage(self, usage: Mapping[str, Any]) -> None:
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
        tokens = usage.get("prompt_tokens", usage.get("input_tokens"))
        apart = usage.get("cache_read_input_tokens")
        if _is_count(apart):
            # Anthropic counts what the cache had, and what went into it, beside the input.
            cached = apart
            made = usage.get("cache_creation_input_tokens")
            tokens = tokens + apart + (made if _is_count(made) else 0) if _is_count(tokens) else None
        self._count(tokens, cached, usage.get("completion_tokens", usage.get("output_tokens")))

    def _read_timings(self, timings: Mapping[str, Any]) -> None:
        """Take llama.cpp's: `prompt_n` without what the cache had; `usage`, where there is one, contains it."""
        computed, cached = timings.get("prompt_n"), timings.get("cache_n", 0)
        if self._input is None and _is_count(computed) and _is_count(cached):
            self._count(computed + cached, cached, timings.get("predicted_n"))
        elif self._cached is None:
            self._count(None, cached, None)
        self._decoded_for(timings.get("predicted_ms"), 1_000_000)

    def _count(self, tokens: object, cached: object, output: object) -> None:
        self._input = tokens if _is_count(tokens) else self._input
        self._cached = cached if _is_count(cached) else self._cached
        self._output = output if _is_count(output) else self._output

    def _decoded_for(self, duration: object, unit_ns: int) -> None:
        if isinstance(duration, int | float) and 0 <= duration < 2**53:
            self.decode_ns = int(duration * unit_ns)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


class AnswerStream:
    """Watches a stream of server-sent events or of JSON lines on its way; reads into `answer` what tells something.

    What is fed comes back as soon as its event is whole, but for two things: the extra event with the usage, when
    `drops_usage`, and the last event (`[DONE]`, or Ollama's last line), which is `held` for the sender to put the
    energy before it, or into it.
    """

    def __init__(self, answer: Answer, *, is_sse: bool, drops_usage: bool = False) -> None:
        self.answer = answer
        self.began = False
        """Whether the first token has come."""
        self.held = b""
        """The last event and all that came with it, until it is taken with `release`."""
        self._is_sse = is_sse
        self._drops_usage = drops_usage
        self._rest = b""
        self._is_passing = False

    def feed(self, chunk: bytes) -> bytes:
        """Take what has come, return what may go on."""
        if self._is_passing:
            return chunk
        if self.held:
            self.held += chunk
            return b""
        if self._rest:
            chunk = self._rest + chunk
        end = self._end_of_last_event(chunk)
        whole, self._rest = chunk[:end], chunk[end:]
        if len(self._rest) > MAX_EVENT_BYTES:
            self._is_passing = True
            whole, self._rest = chunk, b""
        if self.began and _TELLING.search(whole) is None:
            return whole
        return self._examined(whole)

    def end(self) -> bytes:
        """Say that no more comes; return what is left and may go on."""
        left, self._rest = self._rest, b""
        return self._examined(left) if left and not self.held else b""

    def release(self) -> bytes:
        """Return the held bytes; what is fed from now on goes on at once."""
        self._is_passing = True
        held, self.held = self.held, b""
        return held

    def _end_of_last_event(self, data: bytes) -> int:
        if not self._is_sse:
            return data.rfind(b"\n") + 1
        if data.endswith(b"\n\n"):  # Nearly always.
            return len(data)
        ends = [at + len(border) for border in (b"\n\n", b"\r\n\r\n") if (at := data.rfind(border)) >= 0]
        return max(ends, default=0)

    def _examined(self, data: bytes) -> bytes:
        passed: list[bytes] = []
        for match in (_SSE_EVENT if self._is_sse else _LINE).finditer(data):
            event = match[0]
            if self._is_last(event):
                self.held = data[match.start() :]
                break
            passed.append(event)
            for document in self._documents(event):
                self.answer.read(document)
                self.began = self.began or _has_token(document)
                if self._drops_usage and _is_usage_only(document):
                    passed.pop()
                    break
            if self.answer.ended and not self._is_sse:
                self.held = passed.pop() + data[match.end() :]
                break
        return b"".join(passed)

    def _is_last(self, event: bytes) -> bool:
        is_last = self._is_sse and event.strip().removeprefix(b"data:").strip() == b"[DONE]"
        self.answer.ended |= is_last
        return is_last

    def _documents(self, event: bytes) -> Iterator[Mapping[str, Any]]:
        for line in event.splitlines():
            if self._is_sse and not line.startswith((b"data:", b"error:")):
                continue
            try:
                document = json.loads(line.partition(b":")[2] if self._is_sse else line)
            except (ValueError, RecursionError):
                continue
            if isinstance(document, dict):
                # llama.cpp once wrote failures as `error: {...}` in place of `data: {...}`.
                yield {"error": document} if self._is_sse and line.startswith(b"error:") else document


def _has_token(document: Mapping[str, Any]) -> bool:
    """Return whether a document of a stream is more than its opening."""
    kind = document.get("type")
    if isinstance(kind, str):
        return kind.endswith("delta")
    choices = document.get("choices")
    if not isinstance(choices, list):
        return "error" not in document
    for choice in choices:
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if not isinstance(delta, dict):
            return True
        # The opening names the role and says nothing. Some tokens are no text yet: a part of a character.
        if "role" not in delta or any(value for name, value in delta.items() if name != "role"):
            return True
    return False


def _is_usage_only(document: Mapping[str, Any]) -> bool:
    return document.get("choices") == [] and isinstance(document.get("usage"), dict)
