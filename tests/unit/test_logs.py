import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog

from jouletrace import logs
from jouletrace.config import LogFormat, LogLevel


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def json_logs(level: LogLevel = "info") -> io.StringIO:
    stream = io.StringIO()
    logs.configure(level, "json", stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in stream.getvalue().splitlines()]


def test_a_json_line_has_time_level_event_then_fields() -> None:
    stream = json_logs()
    before = datetime.now(UTC)
    structlog.get_logger().info("listening", address=":9841", gpus=8)
    after = datetime.now(UTC)
    [line] = lines(stream)
    assert list(line) == ["ts", "level", "event", "address", "gpus"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["ts"])
    assert before.timestamp() - 0.001 <= datetime.fromisoformat(line["ts"]).timestamp() <= after.timestamp()
    assert (line["level"], line["event"], line["address"], line["gpus"]) == ("info", "listening", ":9841", 8)


@pytest.mark.parametrize(
    ("level", "written"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_levels(level: LogLevel, written: list[str]) -> None:
    stream = json_logs(level)
    logger = structlog.get_logger()
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)(name)
    assert [line["level"] for line in lines(stream)] == written


@pytest.mark.parametrize(
    ("format_", "stream", "is_json"),
    [
        ("auto", io.StringIO(), True),
        ("auto", Terminal(), False),
        ("json", Terminal(), True),
        ("console", io.StringIO(), False),
    ],
)
def test_formats(format_: LogFormat, stream: io.StringIO, is_json: bool) -> None:
    logs.configure("info", format_, stream)
    structlog.get_logger().info("listening", address=":9841")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.startswith('{"ts": ') is is_json
    assert "listening" in text
    assert ":9841" in text


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_coloured(stream: io.StringIO) -> bool:
        logs.configure("info", "console", stream)
        structlog.get_logger().info("listening")
        return "\x1b[" in stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert is_coloured(Terminal())
    assert not is_coloured(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_coloured(Terminal())


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "auto")
    structlog.get_logger().info("listening")
    captured = capsys.readouterr()
    assert json.loads(captured.err)["event"] == "listening"
    assert captured.out == ""


def test_libraries_come_out_the_same_way_from_warning_on() -> None:
    logging.getLogger().handlers.clear()  # pytest's own handlers raise on wrong arguments
    stream = json_logs("debug")
    library = logging.getLogger("aiohttp.server")
    library.info("not written")
    library.warning("slow client %s", "10.0.0.7")
    library.error("bad %d arguments", "x")
    library.log(35, "a level in between")
    assert [(line["level"], line["event"], line["logger"]) for line in lines(stream)] == [
        ("warning", "slow client 10.0.0.7", "aiohttp.server"),
        ("error", "bad %d arguments", "aiohttp.server"),
        ("warning", "a level in between", "aiohttp.server"),
    ]


def test_libraries_obey_a_higher_level() -> None:
    stream = json_logs("error")
    logging.getLogger("asyncio").warning("not written")
    logging.getLogger("asyncio").error("written")
    assert [line["event"] for line in lines(stream)] == ["written"]


def test_configuring_again_replaces() -> None:
    first = json_logs()
    second = json_logs()
    structlog.get_logger().info("ours")
    logging.getLogger("aiohttp").warning("theirs")
    assert first.getvalue() == ""
    assert [line["event"] for line in lines(second)] == ["ours", "theirs"]


@pytest.mark.parametrize("name", ["library", "ours"])
def test_an_exception_stays_on_one_json_line_and_shows_no_local_variables(name: str) -> None:
    stream = json_logs()
    hidden_value = "hunter" + "2"
    try:
        raise RuntimeError(f"broken by {len(hidden_value)} characters")
    except RuntimeError:
        if name == "library":
            logging.getLogger("aiohttp").exception("failed")
        else:
            structlog.get_logger().exception("failed")
    [line] = lines(stream)
    assert line["level"] == "error"
    assert "RuntimeError: broken by 7 characters" in line["exception"]
    assert "hunter2" not in stream.getvalue()


def test_an_exception_on_the_console_shows_no_local_variables() -> None:
    stream = io.StringIO()
    logs.configure("info", "console", stream)
    hidden_value = "hunter" + "2"
    try:
        raise RuntimeError(f"broken by {len(hidden_value)} characters")
    except RuntimeError:
        structlog.get_logger().exception("failed")
    assert "RuntimeError: broken by 7 characters" in stream.getvalue()
    assert "hunter2" not in stream.getvalue()


def test_secrets_are_masked_and_token_counts_are_not() -> None:
    stream = json_logs()
    fields = {"token": "t", "password": "p", "authorization": "a", "tokens": 5, "joules_per_token": 0.4}
    structlog.get_logger().info("x", **fields)
    [line] = lines(stream)
    assert (line["token"], line["password"], line["authorization"]) == ("***",) * 3
    assert (line["tokens"], line["joules_per_token"]) == (5, 0.4)


def test_any_field_can_be_written() -> None:
    stream = json_logs()
    endless: list[object] = []
    endless.append(endless)
    logger = structlog.get_logger()
    logger.info("a", value=float("nan"))
    logger.info("b", value=endless)
    logger.info("c", value={(1, 2): 3})
    logger.info("d", value="\udcff\n\u2028", path=io.BytesIO)
    written = lines(stream)
    assert [line["event"] for line in written] == ["a", "b", "c", "d"]
    assert written[0]["value"] == "nan"
    assert written[3]["value"] == "\udcff\n\u2028"
    assert stream.getvalue().isascii()


def test_a_closed_or_narrow_stream_does_not_stop_us() -> None:
    closed = json_logs()
    closed.close()
    structlog.get_logger().info("nobody reads this")
    raw = io.BytesIO()
    logs.configure("info", "console", io.TextIOWrapper(raw, encoding="ascii"))
    structlog.get_logger().info("46 °C")
    assert b"46 \\xb0C" in raw.getvalue()


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_does_not_stop_us() -> None:
    logs.configure("info", "json", FullDisk())
    structlog.get_logger().info("lost")
    logging.getLogger("aiohttp").error("lost")


class HandClock:
    """Nanoseconds that only move by hand."""

    def __init__(self) -> None:
        self.t_ns = 0

    def __call__(self) -> int:
        return self.t_ns


class Recorder:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def warning(self, event: str, /, **fields: Any) -> None:
        self.lines.append(("warning", event, fields))

    def info(self, event: str, /, **fields: Any) -> None:
        self.lines.append(("info", event, fields))


def test_a_failure_is_logged_once_at_each_end() -> None:
    clock, recorder = HandClock(), Recorder()
    transitions = logs.Transitions(recorder, clock)
    transitions.recovered("GPU-1", "readable again")
    assert recorder.lines == []
    for second in range(5):
        clock.t_ns = second * 1_000_000_000
        transitions.failed("GPU-1", "cannot read the energy counter", code=second)
    clock.t_ns = 7_250_000_000
    transitions.recovered("GPU-1", "readable again", gpu=1)
    transitions.recovered("GPU-1", "readable again", gpu=1)
    assert recorder.lines == [
        ("warning", "cannot read the energy counter", {"code": 0}),
        ("info", "readable again", {"gpu": 1, "duration_seconds": 7.25, "occurrences": 5}),
    ]


def test_a_second_failure_is_logged_anew() -> None:
    recorder = Recorder()
    transitions = logs.Transitions(recorder, HandClock())
    for _ in range(2):
        transitions.failed("a", "down")
        transitions.recovered("a", "up")
    assert [event for _, event, _ in recorder.lines] == ["down", "up", "down", "up"]
    assert recorder.lines[3][2]["occurrences"] == 1


def test_subjects_are_independent() -> None:
    recorder = Recorder()
    transitions = logs.Transitions(recorder, HandClock())
    transitions.failed("a", "a is down")
    transitions.failed("b", "b is down")
    transitions.recovered("a", "a is up")
    transitions.failed("b", "b is down")
    assert [event for _, event, _ in recorder.lines] == ["a is down", "b is down", "a is up"]


def test_a_flood_of_subjects_is_bounded() -> None:
    recorder = Recorder()
    transitions = logs.Transitions(recorder, HandClock(), limit=2)
    for subject in range(1000):
        transitions.failed(str(subject), "down", subject=subject)
    assert [event for _, event, _ in recorder.lines] == [
        "down",
        "down",
        "too many things fail at once: further failures are not logged until one of these ends",
    ]
    transitions.recovered("999", "up")
    transitions.recovered("0", "up")
    transitions.failed("1000", "down", subject=1000)
    assert recorder.lines[-1] == ("warning", "down", {"subject": 1000})
    assert len(recorder.lines) == 5


def test_transitions_work_with_our_logger() -> None:
    stream = json_logs()
    transitions = logs.Transitions(structlog.get_logger(), HandClock())
    transitions.failed("a", "down", gpu=0)
    transitions.recovered("a", "up", gpu=0)
    down, up = lines(stream)
    assert (down["level"], down["event"], down["gpu"]) == ("warning", "down", 0)
    assert (up["level"], up["duration_seconds"], up["occurrences"]) == ("info", 0.0, 1)
