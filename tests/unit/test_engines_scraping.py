"""From pages to loads: resets, ranks, changed families, mistakes."""

import re
from pathlib import Path

import pytest

from jouletrace.config import EngineTarget
from jouletrace.engines.families import PageError, PageReader
from jouletrace.engines.scraping import LoadMeter, falls_asleep, target_of
from jouletrace.requests.records import LoadRecord, ModelLoad, Unit, Usage, check_load

PAGES = Path(__file__).parents[1] / "data" / "engines"
S = 1_000_000_000
VLLM = (PAGES / "vllm-0.32.0.prom").read_text()


def changed(text: str, **values: float) -> str:
    """A page with other values of some families."""
    for name, value in values.items():
        text, count = re.subn(rf"(?m)^(vllm:{name}\{{[^}}]*\}}) .*$", rf"\g<1> {value}", text)
        assert count, name
    return text


def loads(*pages: str, names: tuple[str, ...] = ()) -> list[LoadRecord | None]:
    """The loads of pages that come a second apart."""
    reader, meter, found = PageReader(), LoadMeter(), []
    for second, text in enumerate(pages):
        page = reader.read(text.encode())
        found.append(meter.load("e", page, second * S, names))
        meter.advance(page, second * S)
    for one in found:
        if one is not None:
            check_load(one)
    return found


def test_differences_between_captured_pages() -> None:
    later = changed(
        VLLM,
        prompt_tokens_total=3171,
        prompt_tokens_cached_total=840,
        generation_tokens_total=525,
        iteration_tokens_total_count=387,
        num_requests_running=5,
        num_requests_waiting=2,
        kv_cache_usage_perc=0.7,
        num_preemptions_total=3,
    )
    assert loads(VLLM, later) == [
        None,
        LoadRecord(
            engine_id="e",
            start_ns=0,
            end_ns=S,
            models=(ModelLoad(model="tiny", usage=Usage(input=1000, cached_input=200, output=100)),),
            steps=20,
            running=5,
            waiting=2,
            kv_usage=0.7,
            preemptions=3,
        ),
    ]


def test_nothing_done_is_a_load_without_models() -> None:
    [_, idle] = loads(VLLM, VLLM)
    assert idle is not None
    assert (idle.models, idle.steps, idle.running) == ((), 0, 0)


def test_a_restarted_engine_counts_from_nothing() -> None:
    fresh = changed(VLLM, prompt_tokens_total=40, prompt_tokens_cached_total=0, generation_tokens_total=10)
    [_, load] = loads(VLLM, fresh)
    assert load is not None
    assert load.models[0].usage == Usage(input=40, output=10)


def test_a_restarted_engine_that_is_already_further_shows_by_its_start() -> None:
    fresh = changed(VLLM, generation_tokens_total=5000).replace("1.7953921166e+09", "1.7953922166e+09")
    [_, load] = loads(VLLM, fresh)
    assert load is not None
    assert load.models[0].usage.output == 5000


def test_one_rank_that_restarts_does_not_hide_the_other() -> None:
    line = 'vllm:generation_tokens_total{{engine="{}",model_name="m"}} {}\n'
    before = line.format(0, 1000) + line.format(1, 1000)
    after = line.format(0, 1100) + line.format(1, 30)
    gone = line.format(0, 1150)
    back = line.format(0, 1150) + line.format(1, 50)
    outputs = [load.models[0].usage.output if load and load.models else 0 for load in loads(before, after, gone, back)]
    assert outputs == [0, 100 + 30, 50, 20]


def test_several_models_and_one_that_comes_later() -> None:
    line = (
        'nv_inference_count{{model="{}",version="1"}} {}\n'
        'nv_inference_compute_infer_duration_us{{model="{}",version="1"}} {}\n'
    )
    before = line.format("a", 10, "a", 1e6)
    after = line.format("a", 14, "a", 3e6) + line.format("b", 3, "b", 5e5)
    [_, load] = loads(before, after)
    assert load is not None
    assert load.models == (
        ModelLoad(model="a", usage=Usage(unit=Unit.INFERENCE, count=4), decode_seconds=2.0),
        ModelLoad(model="b", usage=Usage(unit=Unit.INFERENCE, count=3), decode_seconds=0.5),
    )


def test_triton_s_seconds_are_those_of_the_batch() -> None:
    """Eight inferences in one execution of 0.1 s: Triton counts 0.8 s."""
    text = (
        'nv_inference_count{{model="a"}} {}\nnv_inference_exec_count{{model="a"}} {}\n'
        'nv_inference_compute_infer_duration_us{{model="a"}} {}\n'
    )
    [_, load] = loads(text.format(0, 0, 0), text.format(8, 1, 800_000))
    assert load is not None
    assert load.models[0].decode_seconds == pytest.approx(0.1)


def test_llamacpp_computed_tokens_and_the_name_that_its_page_lacks() -> None:
    text = (PAGES / "llamacpp-b11549.prom").read_text()
    later = text.replace("prompt_tokens_total 53", "prompt_tokens_total 93").replace("cached_total 0", "cached_total 7")
    [_, load] = loads(text, later, names=("tiny",))
    assert load is not None
    assert load.models == (
        ModelLoad(model="tiny", usage=Usage(input=47, cached_input=7), prefill_seconds=0.0, decode_seconds=0.0),
    )
    [_, load] = loads(text, later)
    assert load is not None
    assert load.models[0].model == "unknown"


def test_another_family_that_takes_over_is_not_counted_twice() -> None:
    ended = 'sglang:generation_tokens_total{model_name="m"} '
    running = 'sglang:realtime_tokens_total{mode="decode",model_name="m"} '
    found = loads(f"{ended}400\n", f"{ended}500\n{running}520\n", f"{ended}500\n{running}560\n")
    outputs = [load.models[0].usage.output if load and load.models else 0 for load in found]
    assert outputs == [0, 0, 40]


def test_another_engine_on_the_port_begins_anew() -> None:
    other = 'sglang:generation_tokens_total{model_name="m"} '
    assert loads(VLLM, f"{other}7\n", f"{other}9\n")[1] is None


def test_a_sleeping_engine_runs_nothing() -> None:
    asleep = VLLM.replace('sleep_state="awake"} 1.0', 'sleep_state="awake"} 0.0')
    [_, load] = loads(VLLM, changed(asleep, num_requests_running=3))
    assert load is not None
    assert load.running == 0


def test_counters_that_jump_are_refused() -> None:
    with pytest.raises(PageError, match="faster than any engine"):
        loads(VLLM, changed(VLLM, generation_tokens_total=1e15))


def test_seconds_and_steps_that_jump_are_refused() -> None:
    """They weigh the joules of models and phases: the sum of two such is no number any more."""
    page = 'sglang:generation_tokens_total{model_name="m"} %d\n'
    page += 'sglang:forward_execution_seconds_total{model_name="m",category="%s"} %g\n'
    for category in ("extend", "decode"):
        with pytest.raises(PageError, match="faster than any engine"):
            loads(page % (1, category, 1), page % (2, category, 1e308))
    with pytest.raises(PageError, match="faster than any engine"):
        loads(VLLM, changed(VLLM, iteration_tokens_total_count=1e300))


def test_rest_and_time_that_stands_still() -> None:
    reader, meter = PageReader(), LoadMeter()
    meter.rest(5 * S)
    page = reader.read(VLLM.encode())
    meter.advance(page, 0)
    meter.rest(100 * S)
    load = meter.load("e", page, 101 * S)
    assert load is not None
    assert (load.start_ns, load.end_ns) == (100 * S, 101 * S)
    # Somebody has set the clock back.
    load = meter.load("e", page, 90 * S)
    assert load is not None
    assert load.start_ns == load.end_ns


@pytest.mark.parametrize(
    ("arguments", "sleeps"),
    [
        (["llama-server", "--sleep-idle-seconds", "300"], True),
        (["llama-server", "--sleep-idle-seconds=60"], True),
        (["llama-server", "--sleep-idle-seconds", "-1"], False),
        (["llama-server"], False),
    ],
)
def test_falls_asleep(arguments: list[str], sleeps: bool) -> None:
    assert falls_asleep(arguments) is sleeps


def test_configured_targets() -> None:
    target = target_of(EngineTarget(url="http://10.0.0.1:8000/".rstrip("/"), kind="nim", gpu_uuids=("GPU-1",)))
    assert (target.url, target.engine_id, target.kind, target.gpu_uuids) == (
        "http://10.0.0.1:8000",
        "nim-10.0.0.1:8000",
        "nim",
        ("GPU-1",),
    )
