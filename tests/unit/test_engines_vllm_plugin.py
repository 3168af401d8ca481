import asyncio
import importlib.util
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from jouletrace.engines import vllm_plugin
from jouletrace.requests.decoding import RecordDecoder
from jouletrace.requests.records import EngineRecord, Record, RequestRecord, Role, Status, StepRecord, Usage

DATA = Path(__file__).parents[1] / "data" / "engines"
SHAPES = json.loads((DATA / "vllm-shapes.json").read_text())
"""Names and defaults of vLLM's own classes, by version."""
S = 1_000_000_000
NOW = 1_795_375_992.5


class Daemon:
    """The daemon's end: a datagram socket, read by the decoder that the daemon has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.datagrams = 0
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.setblocking(False)

    def records(self) -> list[Record]:
        """Return what has come since the last look; every line must be a good record."""
        lines: list[bytes] = []
        while True:
            try:
                lines += self.sock.recv(1 << 18).split(b"\n")
            except BlockingIOError:
                break
            self.datagrams += 1
        part = RecordDecoder().lines(lines)
        assert not part.errors
        return list(part.records)

    def close(self) -> None:
        self.sock.close()
        self.path.unlink()


@pytest.fixture(name="daemon")
def fixture_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "d")
    monkeypatch.setenv("JOULETRACE_DATAGRAM_SOCKET", str(daemon.path))
    monkeypatch.setenv("JOULETRACE_ENGINE_ID", "e")
    yield daemon
    daemon.sock.close()


Plugin = Callable[..., Any]


@pytest.fixture(name="plugin")
def fixture_plugin() -> Iterator[Plugin]:
    """Return what makes plug-ins, as vLLM does, and closes them in the end."""
    made: list[Any] = []

    def make(vllm_config: Any, engine_index: int = 0, factory: Any = vllm_plugin.StatLogger, **more: Any) -> Any:
        made.append(factory(vllm_config, engine_index, **more))
        return made[-1]

    yield make
    for each in made:
        each.close()


def config(**parallel: Any) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        scheduler_config=SimpleNamespace(max_num_seqs=256, max_num_batched_tokens=2048),
        model_config=SimpleNamespace(served_model_name=["llama", "llama-alias"]),
        kv_transfer_config=None,
    )


def built(shape: dict[str, Any], **values: Any) -> Any:
    """Return an object with the fields that a version of vLLM has, and no other."""
    unknown = set(values) - set(shape["fields"]) - set(shape["properties"])
    assert not unknown, unknown
    return SimpleNamespace(**{**shape["fields"], **values})


def step(
    version: str, *, at: float, first: int = 0, intervals: tuple[float, ...] = (), tokens: int = 0, finished: Any = ()
) -> Any:
    """Return a version's IterationStats of a step whose output came at a time."""
    shapes = SHAPES[version]
    prompt: dict[str, Any] = {"num_prompt_tokens": tokens}
    if "PromptTokenStats" in shapes:
        prompt["prompt_token_stats"] = built(shapes["PromptTokenStats"], computed=tokens, total=tokens)
    return built(
        shapes["IterationStats"],
        iteration_timestamp=at,
        time_to_first_tokens_iter=[0.25] * first,
        inter_token_latencies_iter=list(intervals),
        finished_requests=list(finished),
        **prompt,
    )


def queue(version: str, running: int, **values: Any) -> Any:
    return built(
        SHAPES[version]["SchedulerStats"], num_running_reqs=running, num_waiting_reqs=3, kv_cache_usage=0.5, **values
    )


def details(**values: Any) -> Any:
    return built(
        SHAPES["0.32.0"]["SchedulerIterationDetails"],
        **{
            "num_ctx_requests": 0,
            "num_ctx_tokens": 0,
            "num_generation_requests": 0,
            "num_generation_tokens": 0,
            "elapsed_ms": 0.0,
            **values,
        },
    )


def steps(daemon: Daemon) -> list[StepRecord]:
    return [record for record in daemon.records() if isinstance(record, StepRecord)]


# ---------------------------------------------------------------- the interface


def interface(version: str, **more: Any) -> dict[str, ModuleType]:
    """Return modules with a version's StatLoggerBase, as vLLM has them."""
    methods: dict[str, Any] = {}
    for name, method in SHAPES[version]["StatLoggerBase"]["methods"].items():
        body = eval(f"lambda {', '.join(method['arguments'])}, *_: None")  # noqa: S307  (our own test data)
        methods[name] = abstractmethod(body) if method["abstract"] else body
    loggers = ModuleType("vllm.v1.metrics.loggers")
    loggers.StatLoggerBase = type("StatLoggerBase", (ABC,), {**methods, **more})  # type: ignore[attr-defined]
    names = ("vllm", "vllm.v1", "vllm.v1.metrics")
    return {**{name: ModuleType(name) for name in names}, loggers.__name__: loggers}


def loaded(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the plug-in as a vLLM with these modules imports it."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert vllm_plugin.__file__ is not None
    spec = importlib.util.spec_from_file_location("plugin_in_vllm", vllm_plugin.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", SHAPES)
def test_each_version_can_load_and_use_it(
    version: str, daemon: Daemon, plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = interface(version)
    factory = loaded(modules, monkeypatch).StatLogger
    # What vLLM demands of a plug-in before it starts.
    assert isinstance(factory, type)
    assert issubclass(factory, modules["vllm.v1.metrics.loggers"].StatLoggerBase)
    logger = plugin(config(), 0, factory)
    logger.log_engine_initialized()
    logger.record(
        scheduler_stats=queue(version, 1),
        iteration_stats=step(version, at=NOW, first=1, tokens=100),
        mm_cache_stats=None,
        engine_idx=0,
    )
    logger.record(queue(version, 1), step(version, at=NOW + 0.02, intervals=(0.02,)), engine_idx=0)
    logger.record(queue(version, 0), None, mm_cache_stats=object(), engine_idx=0)
    logger.log()
    logger.record_sleep_state(1, 2)
    engine, prefill, decode = daemon.records()
    assert engine == EngineRecord(engine_id="e", kind="vllm", models=("llama", "llama-alias"), max_num_seqs=256)
    assert isinstance(prefill, StepRecord)
    assert (prefill.prefill_tokens, prefill.prefill_requests, prefill.decode_requests) == (100, 1, 0)
    assert (prefill.running, prefill.waiting, prefill.kv_usage) == (1, 3, 0.5)
    assert isinstance(decode, StepRecord)
    assert (decode.prefill_tokens, decode.decode_requests) == (0, 1)


def test_a_future_interface_with_more_methods_does_not_stop_the_engine(
    daemon: Daemon, plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record_planets(self: object, planets: int) -> int:
        raise NotImplementedError

    modules = interface("0.32.0", record_planets=abstractmethod(record_planets))
    logger = plugin(object(), 0, loaded(modules, monkeypatch).StatLogger, moons=2)
    assert logger.record_planets(9) is None
    logger.record(object(), object(), planets=3)
    logger.record(scheduler_stats=SimpleNamespace(iteration_details=details()), iteration_stats=SimpleNamespace())
    assert daemon.records() == [EngineRecord(engine_id="e", kind="vllm")]


def test_a_vllm_without_the_base_class_gets_an_import_error_which_it_only_logs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = {"vllm": ModuleType("vllm")}
    with pytest.raises(ImportError, match="StatLoggerBase"):
        loaded(modules, monkeypatch)


def test_it_imports_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules); import jouletrace.engines.vllm_plugin;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    root = str(Path(vllm_plugin.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.stdout.split() == ["jouletrace"]


def test_the_package_offers_it_to_vllm() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [(name, value)] = project["entry-points"]["vllm.stat_logger_plugins"].items()
    assert EntryPoint(name, value, "vllm.stat_logger_plugins").load() is vllm_plugin.StatLogger


# ---------------------------------------------------------------- the engine


@pytest.mark.parametrize(
    ("parallel", "index", "engine_id"),
    [
        ({}, 0, "e"),
        ({"data_parallel_size": 1, "_api_process_count": 1}, 0, "e"),
        ({"data_parallel_size": 4, "_api_process_count": 4}, 3, "e-dp3"),
    ],
)
def test_each_data_parallel_rank_is_an_engine(
    parallel: dict[str, int], index: int, engine_id: str, daemon: Daemon, plugin: Plugin
) -> None:
    plugin(config(**parallel), index)
    [engine] = daemon.records()
    assert engine.engine_id == engine_id


def test_without_a_name_it_is_called_after_host_and_process_and_all_servers_agree(
    daemon: Daemon, plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOULETRACE_ENGINE_ID")
    plugin(config())
    plugin(config(_api_process_count=2))
    host = socket.gethostname()
    assert [r.engine_id for r in daemon.records()] == [f"vllm-{host}-{os.getpid()}", f"vllm-{host}-{os.getppid()}"]


@pytest.mark.parametrize(
    ("kv_role", "role"), [("kv_producer", Role.PREFILL), ("kv_consumer", Role.DECODE), ("kv_both", Role.MIXED)]
)
def test_disaggregated_servers_tell_their_role(kv_role: str, role: Role, daemon: Daemon, plugin: Plugin) -> None:
    given = config()
    given.kv_transfer_config = SimpleNamespace(kv_role=kv_role)
    given.model_config.served_model_name = "m" * 200
    plugin(given)
    assert daemon.records() == [
        EngineRecord(engine_id="e", kind="vllm", models=("m" * 128,), max_num_seqs=256, role=role)
    ]


# ---------------------------------------------------------------- when steps were


def test_steps_with_details_carry_vllms_own_counts_and_the_work_of_all_gpus(daemon: Daemon, plugin: Plugin) -> None:
    logger = plugin(config(tensor_parallel_size=4, pipeline_parallel_size=2))
    iteration = details(num_ctx_requests=2, num_ctx_tokens=700, num_generation_requests=5, elapsed_ms=30.0)
    work = built(
        SHAPES["0.32.0"]["PerfStats"], num_flops_per_gpu=10**12, num_read_bytes_per_gpu=10**9, num_write_bytes_per_gpu=5
    )
    logger.record(
        queue("0.32.0", 7, iteration_details=iteration, perf_stats=work, num_skipped_waiting_reqs=4),
        step("0.32.0", at=NOW, first=1, intervals=(0.03,) * 5, tokens=1400),
    )
    [found] = steps(daemon)
    assert (found.end_ns, found.end_ns - found.start_ns) == (round(NOW * S), 30_000_000)
    assert (found.prefill_requests, found.prefill_tokens, found.decode_requests) == (2, 700, 5)
    assert (found.running, found.waiting) == (7, 7)
    assert (found.flops, found.bytes) == (8e12, 8 * (10**9 + 5))


def test_reported_times_that_overlap_do_not(daemon: Daemon, plugin: Plugin) -> None:
    """The lab's recording has a step of 5.6 ms that is reported 1.3 ms after the one before."""
    logger = plugin(config())
    for at, elapsed_ms in ((NOW, 47.0), (NOW + 0.0013, 5.6), (NOW + 0.0041, 2.5)):
        decode = details(num_generation_requests=1, elapsed_ms=elapsed_ms)
        logger.record(queue("0.32.0", 1, iteration_details=decode), step("0.32.0", at=at))
    found = steps(daemon)
    assert [round((each.end_ns - each.start_ns) / 1e6, 1) for each in found] == [47.0, 1.3, 2.5]
    assert found[0].end_ns == found[1].start_ns <= found[1].end_ns <= found[2].start_ns


def test_a_busy_event_loop_does_not_shift_ends(daemon: Daemon, plugin: Plugin) -> None:
    """Steps of 20 ms whose output waits up to 15 ms for the event loop end 20 ms apart all the same."""
    logger = plugin(config())
    waits = [0.0002, 0.012, 0.0003, 0.015, 0.004, 0.0002, 0.009, 0.0]
    for number, wait in enumerate(waits):
        at = NOW + 0.02 * number + wait
        logger.record(queue("0.20.0", 2), step("0.20.0", at=at, intervals=(0.02, 0.02) if number else ()))
    ends = [each.end_ns for each in steps(daemon)]
    truth = [round((NOW + 0.02 * number) * S) for number in range(1, len(waits))]
    assert max(abs(end - true) for end, true in zip(ends, truth, strict=True)) < 400_000


def test_without_details_a_step_begins_where_the_last_ended_or_with_its_oldest_arrival(
    daemon: Daemon, plugin: Plugin
) -> None:
    logger = plugin(config())
    logger.record(queue("0.20.0", 1), step("0.20.0", at=NOW, first=2, tokens=5000))
    logger.record(queue("0.20.0", 0), step("0.20.0", at=NOW + 0.02, intervals=(0.02,)))
    logger.record(queue("0.20.0", 1), step("0.20.0", at=NOW + 60, first=1, tokens=10))
    first, second, third = steps(daemon)
    assert first.end_ns - first.start_ns == 250_000_000
    assert first.prefill_tokens == 2048  # No more than a pass can hold.
    assert second.start_ns == first.end_ns
    assert third.end_ns - third.start_ns == 250_000_000


def test_a_stall_is_no_step_and_the_clock_may_be_set(daemon: Daemon, plugin: Plugin) -> None:
    logger = plugin(config())
    for at in (NOW, NOW + 60, NOW - 3600, NOW - 3599.98):
        logger.record(queue("0.20.0", 1), step("0.20.0", at=at, intervals=(0.02,)))
    found = steps(daemon)
    assert [each.end_ns for each in found] == [round(at * S) for at in (NOW, NOW + 60, NOW - 3600, NOW - 3599.98)]
    assert found[1].end_ns - found[1].start_ns == 5 * S
    assert found[3].end_ns - found[3].start_ns == 20_000_000


def test_passes_without_requests_are_no_steps(daemon: Daemon, plugin: Plugin) -> None:
    logger = plugin(config())
    empty = built(SHAPES["0.32.0"]["PerfStats"], num_read_bytes_per_gpu=657_408)
    logger.record(queue("0.32.0", 0, perf_stats=empty), None)
    logger.record(queue("0.32.0", 0, iteration_details=details(is_dummy=True, elapsed_ms=9.0)), None)
    logger.record(None, None)
    assert steps(daemon) == []


def test_one_of_several_servers_tells_steps_only_when_vllm_counts_them_for_all(daemon: Daemon, plugin: Plugin) -> None:
    logger = plugin(config(_api_process_count=2))
    logger.record(queue("0.32.0", 8), step("0.32.0", at=NOW, intervals=(0.02,) * 4))
    logger.record(None, step("0.32.0", at=NOW + 0.02, intervals=(0.02,) * 4))
    counted = details(num_generation_requests=8, elapsed_ms=20.0)
    logger.record(queue("0.32.0", 8, iteration_details=counted), step("0.32.0", at=NOW + 0.04, intervals=(0.02,) * 4))
    [found] = steps(daemon)
    assert found.decode_requests == 8


# ---------------------------------------------------------------- requests


def finished(version: str = "0.32.0", reason: str = "STOP", **values: Any) -> Any:
    times = {"e2e_latency": 3.0, "queued_time": 0.1, "prefill_time": 0.2, "decode_time": 2.5}
    known = {"num_prompt_tokens": 40, "num_generation_tokens": 7, **times, **values}
    return built(SHAPES[version]["FinishedRequestStats"], finish_reason=SimpleNamespace(name=reason), **known)


def test_a_finished_request_has_its_tokens_and_times(daemon: Daemon, plugin: Plugin) -> None:
    logger = plugin(config())
    ended = finished(request_id='chatcmpl-"1"', num_cached_tokens=16)
    logger.record(queue("0.32.0", 0), step("0.32.0", at=NOW, finished=[ended]))
    end_ns = round(NOW * S)
    assert daemon.records()[1:] == [
        RequestRecord(
            request_id='chatcmpl-"1"',
            engine_id="e",
            model="llama",
            arrival_ns=end_ns - 3 * S,
            scheduled_ns=end_ns - 2_700_000_000,
            first_token_ns=end_ns - 2_500_000_000,
            end_ns=end_ns,
            status=Status.FINISHED,
            usage=Usage(input=40, cached_input=16, output=7),
        )
    ]


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        # Aborted before its first token: vLLM subtracts moments that never came.
        (
            {"reason": "ABORT", "decode_time": 86_400.0, "prefill_time": -86_399.0},
            {"status": Status.CANCELLED, "first_token_ns": None, "scheduled_ns": None},
        ),
        ({"reason": "ERROR", "num_cached_tokens": -1}, {"status": Status.FAILED}),
        ({"num_cached_tokens": 99}, {"usage": Usage(input=40, cached_input=40, output=7)}),
        ({"num_cached_tokens": None}, {"usage": Usage(input=40, output=7)}),
        ({"prefill_time": 2.9}, {"scheduled_ns": round(NOW * S) - 3 * S}),
    ],
)
def test_odd_requests_are_still_good_records(
    values: dict[str, Any], fields: dict[str, Any], daemon: Daemon, plugin: Plugin
) -> None:
    logger = plugin(config())
    logger.record(queue("0.32.0", 0), step("0.32.0", at=NOW, finished=[finished(request_id="r", **values)]))
    [record] = daemon.records()[1:]
    assert {name: getattr(record, name) for name in fields} == fields


def test_a_vllm_that_does_not_name_its_requests_gives_steps_only(daemon: Daemon, plugin: Plugin) -> None:
    logger = plugin(config())
    logger.record(
        queue("0.12.0", 1), step("0.12.0", at=NOW, intervals=(0.02,), finished=[finished("0.12.0")], tokens=5)
    )
    assert [type(record) for record in daemon.records()] == [EngineRecord, StepRecord]


# ---------------------------------------------------------------- the daemon is away or behind


def test_a_daemon_that_is_restarted_learns_of_the_engine_and_misses_nothing(
    daemon: Daemon, plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm_plugin, "RETRY_SECONDS", 0.05)
    logger = plugin(config())
    daemon.records()
    daemon.close()
    with caplog.at_level(logging.INFO, "vllm.jouletrace"):
        for number in range(3):
            logger.record(queue("0.20.0", 1), step("0.20.0", at=NOW + number, intervals=(0.02,)))
        again = Daemon(tmp_path / "d")
        time.sleep(0.06)
        logger.record(queue("0.20.0", 1), step("0.20.0", at=NOW + 3, intervals=(0.02,)))
    kinds = [type(record) for record in again.records()]
    again.sock.close()
    assert kinds == [EngineRecord, StepRecord, StepRecord, StepRecord, StepRecord]
    assert logger.dropped == 0
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert str(tmp_path / "d") in caplog.text


def test_a_missing_daemon_costs_the_oldest_records_and_no_time(
    plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JOULETRACE_DATAGRAM_SOCKET", str(tmp_path / "nobody"))
    logger = plugin(config())
    begin = time.perf_counter()
    for number in range(5000):
        logger.record(queue("0.20.0", 1), step("0.20.0", at=NOW + number * 0.02, intervals=(0.02,)))
    assert time.perf_counter() - begin < 2.0
    assert logger.dropped == 4000
    assert len(caplog.records) == 1
    assert "JOULETRACE_DATAGRAM_SOCKET" in caplog.text


async def test_what_the_kernel_does_not_take_at_once_comes_a_little_later(daemon: Daemon, plugin: Plugin) -> None:
    logger = plugin(config())
    for number in range(700):  # The kernel queues 10 datagrams, or 512.
        logger.record(queue("0.20.0", 1), step("0.20.0", at=NOW + number * 0.02, intervals=(0.02,)))
    found = steps(daemon)
    assert len(found) < 700
    for _ in range(100):
        await asyncio.sleep(0.01)
        found += steps(daemon)
    assert [each.end_ns for each in found] == sorted(each.end_ns for each in found)
    assert (len(found), logger.dropped) == (700, 0)


# ---------------------------------------------------------------- cost


def median_us(daemon: Daemon, record: Callable[[int], None], rounds: int = 5) -> float:
    """Return the median time of a call in the quietest of some rounds, with the daemon's end kept empty."""
    best = float("inf")
    for _ in range(rounds):
        taken: list[int] = []
        for number in range(300):
            begin = time.perf_counter_ns()
            record(number)
            taken.append(time.perf_counter_ns() - begin)
            daemon.records()
        best = min(best, statistics.median(taken) / 1e3)
    return best


@pytest.mark.parametrize("has_details", [False, True])
def test_a_step_of_256_requests_costs_less_than_10_microseconds(
    has_details: bool, daemon: Daemon, plugin: Plugin
) -> None:
    logger = plugin(config())
    iteration = details(num_generation_requests=256, elapsed_ms=20.0) if has_details else None
    told = queue("0.32.0", 256, iteration_details=iteration)
    stats = [step("0.32.0", at=NOW + 0.02 * number, intervals=(0.02,) * 256) for number in range(300)]
    cost = median_us(daemon, lambda number: logger.record(told, stats[number]))
    assert logger.dropped == 0
    assert cost < 10.0


# ---------------------------------------------------------------- what real vLLM sent


@pytest.mark.parametrize("name", ["plain", "full"])
def test_what_the_plugin_sent_from_real_vllm(name: str) -> None:
    """Captured by tests/engines/vllm_cpu.py: twelve requests, at most 256 tokens a pass."""
    part = RecordDecoder().lines((DATA / f"vllm-0.32.0-{name}.datagrams.jsonl").read_bytes().split(b"\n"))
    assert not part.errors
    found = [record for record in part.records if isinstance(record, StepRecord)]
    ended = [record for record in part.records if isinstance(record, RequestRecord)]
    assert {record.request_id for record in ended} == {f"chatcmpl-req-{number}" for number in range(12)}
    usage = [record.usage for record in ended if record.usage is not None]
    assert sum(each.output for each in usage) == sum(20 + number for number in range(12))
    assert sum(each.decode_requests or 0 for each in found) == sum(each.output - 1 for each in usage)
    assert all(before.end_ns <= after.start_ns for before, after in pairwise(found))
    if name == "full":
        computed = sum(each.input - each.cached_input for each in usage)
        assert sum(each.prefill_tokens or 0 for each in found) == computed
