"""Captured pages (vLLM 0.32, llama.cpp, Triton 2.51) and pages made from the engines' sources (the others)."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from jouletrace.engines.families import KINDS, MAX_PAGE_BYTES, Fact, Page, PageError, PageReader

PAGES = Path(__file__).parents[1] / "data" / "engines"


def page(name: str) -> bytes:
    return (PAGES / f"{name}.prom").read_bytes()


def totals(read: Page) -> dict[Fact, float]:
    found: dict[Fact, float] = {}
    for series, value in read.counters.items():
        found[series.fact] = found.get(series.fact, 0.0) + value
    return found


def test_vllm_page_as_captured() -> None:
    read = PageReader().read(page("vllm-0.32.0"))
    assert read.kind.kind == "vllm"
    assert totals(read) == {
        Fact.INPUT: 2171,
        Fact.CACHED: 640,
        Fact.OUTPUT: 425,
        Fact.STEPS: 367,
        Fact.PREEMPTIONS: 0,
    }
    assert read.gauges == {Fact.RUNNING: 0, Fact.WAITING: 0, Fact.KV_USAGE: 0, Fact.AWAKE: 1}
    assert set(read.models.values()) == {"tiny"}
    assert read.started_seconds == 1.7953921166e09


def test_vllm_page_agrees_with_the_official_parser() -> None:
    """Every family that is read, against prometheus_client's own parser."""
    official = {
        sample.name: sample.value
        for one in text_string_to_metric_families(page("vllm-0.32.0").decode())
        for sample in one.samples
        if sample.labels.get("model_name") == "tiny" and "le" not in sample.labels
    }
    read = PageReader().read(page("vllm-0.32.0"))
    for series, value in read.counters.items():
        assert official[series.name] == value


def test_old_names_of_vllm() -> None:
    old = b'vllm:gpu_cache_usage_perc{model_name="m"} 0.5\nvllm:generation_tokens_total{model_name="m"} 7\n'
    read = PageReader().read(old)
    assert read.gauges[Fact.KV_USAGE] == 0.5
    assert totals(read)[Fact.OUTPUT] == 7


def test_ray_renames_vllm() -> None:
    text = page("vllm-0.32.0").replace(b"vllm:", b"ray_vllm_")
    read = PageReader().read(text)
    assert read.kind.kind == "vllm"
    assert totals(read) == totals(PageReader().read(page("vllm-0.32.0")))


def test_llamacpp_counts_computed_tokens_and_names_no_model() -> None:
    read = PageReader().read(page("llamacpp-b11549"))
    assert totals(read) == {
        Fact.COMPUTED: 53,
        Fact.CACHED: 0,
        Fact.OUTPUT: 48,
        Fact.PREFILL_SECONDS: 0.001741,
        Fact.DECODE_SECONDS: 0.005495,
        Fact.STEPS: 48,
    }
    assert set(read.models.values()) == {""}


def test_triton_counts_inferences_and_microseconds() -> None:
    read = PageReader().read(page("triton-2.51"))
    assert totals(read) == {Fact.INFERENCES: 10, Fact.STEPS: 10, Fact.DECODE_SECONDS: pytest.approx(0.025897)}
    assert set(read.models.values()) == {"echo"}
    assert read.gauges == {Fact.WAITING: 0}


def test_sglang_ranks_add_up_and_shards_do_not() -> None:
    read = PageReader().read(page("sglang-0.5.23.made"))
    assert read.gauges[Fact.RUNNING] == 12 + 5
    assert read.gauges[Fact.WAITING] == 3
    assert read.gauges[Fact.KV_USAGE] == 0.61
    found = totals(read)
    # The realtime counters are preferred to those that move when a request ends.
    assert found[Fact.COMPUTED] == 40960 + 20480
    assert found[Fact.CACHED] == 8192
    assert found[Fact.OUTPUT] == 4800 + 2000
    assert (found[Fact.PREFILL_SECONDS], found[Fact.DECODE_SECONDS]) == (6.5, 19.5)


def test_tgi_sums_of_histograms() -> None:
    read = PageReader().read(page("tgi-3.3.made"))
    assert totals(read) == {
        Fact.INPUT: 3600,
        Fact.OUTPUT: 1440,
        Fact.PREFILL_SECONDS: 0.9,
        Fact.DECODE_SECONDS: 8.1,
        Fact.STEPS: 480,
    }
    assert read.gauges == {Fact.RUNNING: 4, Fact.WAITING: 1}


@pytest.mark.parametrize(
    ("name", "kind", "counted", "gauges"),
    [
        (
            "trtllm-1.2.made",
            "trtllm",
            {Fact.INPUT: 9000, Fact.CACHED: 1000, Fact.OUTPUT: 4000},
            {Fact.RUNNING: 7, Fact.WAITING: 2, Fact.KV_USAGE: 0.43, Fact.MAX_RUNNING: 64},
        ),
        (
            "nim-1.x.made",
            "nim",
            {Fact.INPUT: 700, Fact.OUTPUT: 300},
            {Fact.RUNNING: 3, Fact.WAITING: 0, Fact.KV_USAGE: 0.12},
        ),
        (
            "dynamo-1.6.made",
            "dynamo",
            {Fact.INPUT: 4100, Fact.CACHED: 100, Fact.OUTPUT: 900},
            {Fact.RUNNING: 2, Fact.WAITING: 1},
        ),
    ],
)
def test_pages_made_from_lists_of_metrics(
    name: str, kind: str, counted: dict[Fact, float], gauges: dict[Fact, float]
) -> None:
    read = PageReader().read(page(name))
    assert (read.kind.kind, totals(read), dict(read.gauges)) == (kind, counted, gauges)


def test_a_dynamo_worker_shows_its_engine() -> None:
    text = page("vllm-0.32.0").replace(b'engine="0"', b'dynamo_component="backend",engine="0"')
    assert PageReader().read(text).kind.kind == "vllm"


def test_labels_with_escapes() -> None:
    text = (
        rb'vllm:generation_tokens_total{model_name="a\"}, {\\x\n",engine="0"} 4 1700000000000' + b"\n"
        rb'vllm:generation_tokens_total{engine="1",model_name="b"} 5 # {trace_id="x"} 1' + b"\r\n"
    )
    read = PageReader().read(text)
    assert sorted((read.models[series.labels], value) for series, value in read.counters.items()) == [
        ('a"}, {\\x?', 4),
        ("b", 5),
    ]


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1", "x", "1e999", ""])
def test_what_is_no_count_is_passed_over(value: str) -> None:
    text = f'vllm:generation_tokens_total{{model_name="m"}} {value}\nvllm:prompt_tokens_total{{model_name="m"}} 3\n'
    assert totals(PageReader().read(text.encode())) == {Fact.INPUT: 3}


def test_an_empty_page_of_a_known_kind_has_no_counters() -> None:
    assert PageReader().read(b"", "tgi").counters == {}
    with pytest.raises(PageError, match="no metrics of a known engine"):
        PageReader().read(b"python_info 1\n")


def test_large_pages_are_refused_and_bounded() -> None:
    with pytest.raises(PageError, match="over 4 MiB"):
        PageReader().read(b"vllm:x 1\n" * (10 << 20 >> 3))
    line = b'vllm:generation_tokens_total{model_name="%d"} 1\n'
    text = b"".join(line % number for number in range(60_000))
    assert len(text) < MAX_PAGE_BYTES
    start = time.perf_counter()
    assert len(PageReader().read(text).counters) == 4096
    assert time.perf_counter() - start < 1.0


def test_hostile_lines_take_linear_time() -> None:
    text = b'vllm:generation_tokens_total{a="' + b"\\" * 1_000_000 + b'x="' * 300_000
    start = time.perf_counter()
    PageReader().read(b"vllm:x 1\n" + text)
    assert time.perf_counter() - start < 1.0


NAMES = [source.name for kind in KINDS.values() for sources in kind.facts.values() for source in sources]
PIECES = st.one_of(
    st.sampled_from(NAMES).map(str.encode),
    st.sampled_from([b"{", b"}", b'"', b"\\", b"\n", b" ", b",", b"=", b"#", b"model_name", b'tp_rank="', b"1", b"e9"]),
    st.binary(max_size=6),
)


@given(st.lists(PIECES, max_size=60).map(b"".join))
@settings(max_examples=300, deadline=None)
def test_garbage_never_breaks_the_reader(garbage: bytes) -> None:
    reader = PageReader()
    read = reader.read(b"vllm:num_requests_running 1\n" + garbage)
    assert all(0 <= value < float("inf") for value in read.counters.values())
    assert all(len(model) <= 128 and model.isprintable() for model in read.models.values())


def test_a_vllm_page_is_read_in_under_two_milliseconds() -> None:
    reader, text = PageReader(), page("vllm-0.32.0")
    reader.read(text)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        reader.read(text)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.002
