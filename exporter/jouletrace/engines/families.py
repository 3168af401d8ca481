"""What the metrics pages of serving engines tell, by kind of engine, and a reader that looks at nothing else.

Names are those of vLLM 0.33, SGLang 0.5.23, TGI 3, TensorRT-LLM 1.2 (`trtllm-serve`), Triton 2.51, llama.cpp b11549,
NIM for LLMs and Dynamo 1.6, with the older names that some of them had. A page of vLLM is 50 kB, of which 10 lines
count: buckets, `_created` and everything else are never parsed.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

MAX_PAGE_BYTES: Final = 4 << 20
"""A longer page is not an engine's: vLLM's is 50 kB, with 16 data-parallel ranks 500 kB."""
MAX_SERIES: Final = 4096
"""Series of one family that are read: 64 ranks with 64 models."""
MAX_LABELS: Final = 8192
"""Different label sets that a reader remembers."""
MODEL_CHARACTERS: Final = 128
"""What a record takes as model; of a longer one the end is kept, which is where paths differ."""


class Fact(StrEnum):
    """What a sample tells of an engine."""

    INPUT = "input"
    """Prompt tokens, those that a cache had included (counter)."""
    COMPUTED = "computed"
    """Prompt tokens that were computed (counter); instead of `INPUT`."""
    CACHED = "cached"
    """Prompt tokens that a cache had (counter)."""
    OUTPUT = "output"
    """Generated tokens (counter)."""
    PREFILL_SECONDS = "prefill_seconds"
    """Time of prefill (counter),"""
    DECODE_SECONDS = "decode_seconds"
    """and of decoding, or of all computing where there are no phases (counter)."""
    INFERENCES = "inferences"
    """Inferences of models without tokens (counter)."""
    STEPS = "steps"
    """Forward passes (counter)."""
    PREEMPTIONS = "preemptions"
    """Requests that were stopped to make room (counter)."""
    RUNNING = "running"
    """Requests in the batch now."""
    WAITING = "waiting"
    """Requests in the queue now."""
    KV_USAGE = "kv_usage"
    """Part of the KV cache in use now, 0 to 1."""
    MAX_RUNNING = "max_running"
    """Most requests that run at once."""
    AWAKE = "awake"
    """0 while the engine sleeps."""


GAUGES: Final = frozenset({Fact.RUNNING, Fact.WAITING, Fact.KV_USAGE, Fact.MAX_RUNNING, Fact.AWAKE})


class SecondsOf(StrEnum):
    """What an engine's `PREFILL_SECONDS` and `DECODE_SECONDS` add up."""

    DEVICE = "device"
    """Time of the batch: ratios of it are ratios of GPU time."""
    SEQUENCES = "sequences"
    """Time of each sequence: eight that decode together count eight times."""


@dataclass(frozen=True, slots=True)
class Source:
    """A family, or those of its series where a label has one of some values."""

    name: str
    label: str = ""
    values: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class EngineKind:
    """How the page of one kind of engine is read."""

    kind: str
    """As in an engine record."""
    mark: str
    """The beginning of the names that only this kind has."""
    facts: Mapping[Fact, Sequence[Source]]
    """By fact the families that tell it, the better one first: the first that is on the page counts."""
    paths: Sequence[str] = ("/metrics",)
    port: int = 8000
    """The port unless configured."""
    seconds_of: SecondsOf = SecondsOf.DEVICE

    def renamed(self, mark: str) -> "EngineKind":
        """Return the same engine behind Ray, which writes `ray_vllm_x` for `vllm:x`."""
        facts = {
            fact: tuple(
                Source(mark + source.name.removeprefix(self.mark), source.label, source.values) for source in sources
            )
            for fact, sources in self.facts.items()
        }
        return EngineKind(self.kind, mark, facts, self.paths, self.port, self.seconds_of)


def _of(name: str, label: str = "", *values: str) -> Source:
    return Source(name, label, frozenset(values))


_VLLM: Final = EngineKind(
    "vllm",
    "vllm:",
    {
        Fact.INPUT: (_of("vllm:prompt_tokens_total"),),
        Fact.CACHED: (
            _of("vllm:prompt_tokens_cached_total"),
            _of("vllm:prompt_tokens_by_source_total", "source", "local_cache_hit", "external_kv_transfer"),
        ),
        Fact.OUTPUT: (_of("vllm:generation_tokens_total"),),
        Fact.STEPS: (_of("vllm:iteration_tokens_total_count"),),
        Fact.PREEMPTIONS: (_of("vllm:num_preemptions_total"),),
        Fact.RUNNING: (_of("vllm:num_requests_running"),),
        Fact.WAITING: (_of("vllm:num_requests_waiting"),),
        Fact.KV_USAGE: (_of("vllm:kv_cache_usage_perc"), _of("vllm:gpu_cache_usage_perc")),
        Fact.AWAKE: (_of("vllm:engine_sleep_state", "sleep_state", "awake"),),
    },
)
_SGLANG: Final = EngineKind(
    "sglang",
    "sglang:",
    {
        # The realtime counters move while requests run, the others when requests end.
        Fact.INPUT: (_of("sglang:prompt_tokens_total"),),
        Fact.COMPUTED: (_of("sglang:realtime_tokens_total", "mode", "prefill_compute"),),
        Fact.CACHED: (
            _of("sglang:realtime_tokens_total", "mode", "prefill_cache"),
            _of("sglang:cached_tokens_total"),
        ),
        Fact.OUTPUT: (
            _of("sglang:realtime_tokens_total", "mode", "decode"),
            _of("sglang:generation_tokens_total"),
        ),
        # Categories are SGLang's forward modes; a mixed pass carries prompts beside decoding sequences.
        Fact.PREFILL_SECONDS: (
            _of("sglang:forward_execution_seconds_total", "category", "extend", "prefill", "mixed", "split_prefill"),
        ),
        Fact.DECODE_SECONDS: (
            _of("sglang:forward_execution_seconds_total", "category", "decode", "target_verify", "draft_extend"),
        ),
        Fact.RUNNING: (_of("sglang:num_running_reqs"),),
        Fact.WAITING: (_of("sglang:num_queue_reqs"),),
        Fact.KV_USAGE: (_of("sglang:token_usage"),),
        Fact.MAX_RUNNING: (_of("sglang:max_running_requests"),),
        Fact.PREEMPTIONS: (_of("sglang:num_retracted_requests_total"),),
    },
    port=30000,
)
_TRTLLM: Final = EngineKind(
    "trtllm",
    "trtllm_",
    {
        Fact.INPUT: (_of("trtllm_prompt_tokens_total"),),
        Fact.CACHED: (_of("trtllm_prompt_cached_tokens_total"),),
        Fact.OUTPUT: (_of("trtllm_generation_tokens_total"),),
        Fact.RUNNING: (_of("trtllm_num_requests_running"),),
        Fact.WAITING: (_of("trtllm_num_requests_waiting"),),
        Fact.KV_USAGE: (_of("trtllm_kv_cache_utilization"),),
        Fact.MAX_RUNNING: (_of("trtllm_max_num_active_requests"),),
    },
    # `/metrics` is another thing there: JSON, and what is read once is gone for those who read it next.
    paths=("/prometheus/metrics",),
)
_TGI: Final = EngineKind(
    "tgi",
    "tgi_",
    {
        Fact.INPUT: (_of("tgi_request_input_length_sum"),),
        Fact.OUTPUT: (_of("tgi_request_generated_tokens_sum"),),
        Fact.PREFILL_SECONDS: (_of("tgi_batch_inference_duration_sum", "method", "prefill"),),
        Fact.DECODE_SECONDS: (_of("tgi_batch_inference_duration_sum", "method", "decode"),),
        Fact.STEPS: (_of("tgi_batch_inference_count", "method", "decode"),),
        Fact.RUNNING: (_of("tgi_batch_current_size"),),
        Fact.WAITING: (_of("tgi_queue_size"),),
    },
    port=3000,
)
_LLAMACPP: Final = EngineKind(
    "llamacpp",
    "llamacpp:",
    {
        Fact.COMPUTED: (_of("llamacpp:prompt_tokens_total"),),
        Fact.CACHED: (_of("llamacpp:prompt_tokens_cached_total"),),
        Fact.OUTPUT: (_of("llamacpp:tokens_predicted_total"),),
        Fact.PREFILL_SECONDS: (_of("llamacpp:prompt_seconds_total"),),
        Fact.DECODE_SECONDS: (_of("llamacpp:tokens_predicted_seconds_total"),),
        Fact.STEPS: (_of("llamacpp:n_decode_total"),),
        Fact.RUNNING: (_of("llamacpp:requests_processing"),),
        Fact.WAITING: (_of("llamacpp:requests_deferred"),),
        Fact.KV_USAGE: (_of("llamacpp:kv_cache_usage_ratio"),),
    },
    port=8080,
    seconds_of=SecondsOf.SEQUENCES,
)
_TRITON: Final = EngineKind(
    "triton",
    "nv_inference_",
    {
        Fact.INFERENCES: (_of("nv_inference_count"),),
        Fact.DECODE_SECONDS: (_of("nv_inference_compute_infer_duration_us"),),
        Fact.STEPS: (_of("nv_inference_exec_count"),),
        Fact.WAITING: (_of("nv_inference_pending_request_count"),),
    },
    port=8002,
    seconds_of=SecondsOf.SEQUENCES,
)
_DYNAMO: Final = EngineKind(
    "dynamo",
    "dynamo_frontend_",
    {
        Fact.INPUT: (_of("dynamo_frontend_input_sequence_tokens_sum"),),
        Fact.CACHED: (_of("dynamo_frontend_cached_tokens_sum"),),
        Fact.OUTPUT: (
            _of("dynamo_frontend_output_tokens_total"),
            _of("dynamo_frontend_output_sequence_tokens_sum"),
        ),
        Fact.RUNNING: (_of("dynamo_frontend_inflight_requests"),),
        Fact.WAITING: (_of("dynamo_frontend_queued_requests"),),
    },
    port=8000,
)
_NIM: Final = EngineKind(
    "nim",
    "prompt_tokens_total",
    {
        Fact.INPUT: (_of("prompt_tokens_total"),),
        Fact.OUTPUT: (_of("generation_tokens_total"),),
        Fact.RUNNING: (_of("num_requests_running"),),
        Fact.WAITING: (_of("num_requests_waiting"),),
        Fact.KV_USAGE: (_of("gpu_cache_usage_perc"),),
    },
    paths=("/v1/metrics", "/metrics"),
)

KINDS: Final[Mapping[str, EngineKind]] = {
    one.kind: one for one in (_VLLM, _SGLANG, _TRTLLM, _TGI, _LLAMACPP, _TRITON, _DYNAMO, _NIM)
}
"""By kind, in the order in which a page is tried: a Dynamo worker shows its engine's names, and Triton those of the
vLLM inside it, which tell more than its own."""
_VARIANTS: Final = (
    *(KINDS[kind] for kind in ("vllm", "sglang", "trtllm", "tgi", "llamacpp")),
    _VLLM.renamed("ray_vllm_"),
    _SGLANG.renamed("ray_sglang_"),
    *(KINDS[kind] for kind in ("triton", "dynamo", "nim")),
)
PATHS: Final = tuple(dict.fromkeys(path for one in KINDS.values() for path in one.paths))
"""Where a page may be when the kind is not known, `/metrics` first."""

_MICROSECONDS: Final = "_us"
_SAMPLE: Final = re.compile(rb'(\{(?:[^"}\n]|"(?:[^"\\\n]|\\.)*")*\})?[ \t]+([^ \t\r\n]+)')
_LABEL: Final = re.compile(rb'([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\\n]|\\.)*)"')
_ESCAPE: Final = re.compile(r"\\(.)")
_RANK: Final = re.compile("[0-9]{1,6}")
_MODEL_LABELS: Final = ("model_name", "model")
_SHARDS: Final = ("pp_rank", "tp_rank")
"""Labels of processes that compute one batch together, each of which counts all of it (SGLang with
`--enable-metrics-for-all-schedulers`)."""


class PageError(ValueError):
    """A page is not that of an engine; the message says why."""


@dataclass(frozen=True, slots=True)
class Series:
    """One counter on a page."""

    fact: Fact
    source: int
    """Which of the fact's sources it is, from 0."""
    name: str
    labels: bytes
    """As they stand on the page."""


@dataclass(frozen=True, slots=True)
class Page:
    """What one page told."""

    kind: EngineKind
    counters: Mapping[Series, float]
    models: Mapping[bytes, str]
    """By labels: the model that they name, "" for none."""
    gauges: Mapping[Fact, float] = field(default_factory=dict)
    """Added up over ranks and models; of `KV_USAGE` the fullest, of `AWAKE` the least."""
    started_seconds: float | None = None
    """When the process started, epoch seconds."""


@dataclass(frozen=True, slots=True)
class _Labels:
    model: str
    values: Mapping[str, str]
    shard: tuple[int, ...]
    rank: tuple[tuple[str, str], ...]
    """All labels but those of the shard."""


class PageReader:
    """Reads the pages of one engine; remembers what label sets mean, as they hardly change."""

    def __init__(self) -> None:
        self._labels: dict[bytes, _Labels] = {}

    def read(self, page: bytes, expected: str | None = None) -> Page:
        """Return what a page tells; raises PageError.

        `expected` is the kind whose page it is if it names none: some have no series before the first request.
        """
        if len(page) > MAX_PAGE_BYTES:
            raise PageError(f"the page is over {MAX_PAGE_BYTES >> 20} MiB, which no engine's is")
        text = b"\n" + page
        kind = next((one for one in _VARIANTS if _is_marked(text, one.mark.encode())), KINDS.get(expected or ""))
        if kind is None:
            raise PageError("the page has no metrics of a known engine")
        counters: dict[Series, float] = {}
        gauges: dict[Fact, float] = {}
        models: dict[bytes, str] = {}
        for fact, sources in kind.facts.items():
            for number, source in enumerate(sources):
                found = self._samples(text, source)
                if not found:
                    continue
                if fact in GAUGES:
                    values = [value for _, _, value in found]
                    gauges[fact] = _together(fact, values)
                else:
                    for raw, labels, value in found:
                        counters[Series(fact, number, source.name, raw)] = value
                        models[raw] = labels.model
                break
        started = [value for _, _, value in self._samples(text, _STARTED)]
        return Page(kind, counters, models, gauges, started[0] if len(started) == 1 else None)

    def _samples(self, text: bytes, source: Source) -> list[tuple[bytes, _Labels, float]]:
        """Return the labels and values of a family's series, without those that say the same as another."""
        found = []
        for raw, value in _lines(text, source.name.encode()):
            labels = self._labels.get(raw)
            if labels is None:
                labels = self._remember(raw)
            if not source.label or labels.values.get(source.label) in source.values:
                found.append((raw, labels, value))
        if any(labels.shard for _, labels, _ in found):
            first: dict[tuple[object, ...], tuple[bytes, _Labels, float]] = {}
            for one in found:
                known = first.get(one[1].rank)
                if known is None or one[1].shard < known[1].shard:
                    first[one[1].rank] = one
            found = list(first.values())
        return found

    def _remember(self, raw: bytes) -> _Labels:
        if len(self._labels) >= MAX_LABELS:
            self._labels.clear()
        labels = self._labels[raw] = _labels(raw)
        return labels


_STARTED: Final = Source("process_start_time_seconds")


def _is_marked(text: bytes, mark: bytes) -> bool:
    return b"\n" + mark in text or b"\n# TYPE " + mark in text


def _lines(text: bytes, name: bytes) -> Iterator[tuple[bytes, float]]:
    """Yield labels and value of the lines of a name; what is not a finite number from 0 on is passed over."""
    wanted = b"\n" + name
    at = text.find(wanted)
    count = 0
    while at >= 0 and count < MAX_SERIES:
        at += len(wanted)
        match = _SAMPLE.match(text, at)
        if match is not None:
            count += 1
            try:
                value = float(match[2])
            except ValueError:
                value = math.nan
            if 0 <= value < math.inf:
                yield match[1] or b"", value / 1e6 if name.endswith(_MICROSECONDS.encode()) else value
        at = text.find(wanted, at)


def _labels(raw: bytes) -> _Labels:
    values = {
        name.decode(): _ESCAPE.sub(_unescaped, text.decode(errors="replace")) for name, text in _LABEL.findall(raw)
    }
    model = next((values[name] for name in _MODEL_LABELS if values.get(name)), "")
    model = "".join(letter if letter.isprintable() else "?" for letter in model[-MODEL_CHARACTERS:])
    shard = tuple(int(values[name]) if _RANK.fullmatch(values[name]) else 0 for name in _SHARDS if name in values)
    rank = tuple((name, value) for name, value in values.items() if name not in _SHARDS)
    return _Labels(model, values, shard, rank)


def _unescaped(escape: re.Match[str]) -> str:
    return "\n" if escape[1] == "n" else escape[1]


def _together(fact: Fact, values: Sequence[float]) -> float:
    match fact:
        case Fact.KV_USAGE:
            return min(max(values), 1.0)
        case Fact.AWAKE:
            return min(values)
        case _:
            return sum(values)
