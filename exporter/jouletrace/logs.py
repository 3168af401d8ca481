"""Logging: one line per event to one stream, as text on a terminal and as JSON elsewhere.

Our code logs through structlog with an event in plain words and fields beside it. What libraries log through
`logging` (aiohttp, asyncio) comes out the same way, from warning on.
"""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO

import structlog

from jouletrace.config import LogFormat, LogLevel

SECRET_FIELDS = frozenset({"api_key", "authorization", "cookie", "password", "secret", "token"})
"""Fields whose value is never written (whole names: `tokens` and `joules_per_token` are not secret)."""

TRANSITIONS_LIMIT = 1024
"""Failures that are remembered at once: 8 devices with some 20 driver calls each, several times over."""

_EventDict = MutableMapping[str, Any]


def configure(level: LogLevel, format: LogFormat, stream: TextIO | None = None) -> None:  # noqa: A002 - the key's name
    """Send all logs of `level` and above to `stream` (default: standard error).

    `auto` is `console` on a terminal and `json` elsewhere. A later call replaces an earlier one.
    """
    # gRPC's core writes to standard error by itself, a line for each stranger whose TLS handshake fails.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    stream = sys.stderr if stream is None else stream
    is_terminal = stream.isatty()
    lowest = logging.getLevelNamesMapping()[level.upper()]
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _add_time,
        _mask_secrets,
    ]
    if format == "json" or (format == "auto" and not is_terminal):
        processors += [structlog.processors.format_exc_info, _json_line]
    else:
        processors.append(
            structlog.dev.ConsoleRenderer(
                colors=is_terminal and not os.environ.get("NO_COLOR"),
                timestamp_key="ts",
                sort_keys=False,
                # structlog's other formatters print local variables, which may hold secrets.
                exception_formatter=structlog.dev.plain_traceback,
            )
        )
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        logger_factory=structlog.WriteLoggerFactory(file=_SteadyStream(stream)),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _LibraryHandler)]:
        root.removeHandler(handler)
    root.addHandler(_LibraryHandler())
    root.setLevel(max(logging.WARNING, lowest))


class _SteadyStream:
    """A text stream that takes any text and fails silently: a closed pipe or a full disk must not stop us."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class _LibraryHandler(logging.Handler):
    """Hands the records of `logging` to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event = record.getMessage()
        except (TypeError, ValueError, KeyError):  # the arguments do not fit the message
            event = str(record.msg)
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        # structlog knows the standard levels alone; libraries may use some in between.
        level = min(record.levelno // 10 * 10, logging.CRITICAL)
        structlog.get_logger().log(level, event, **fields)


def _add_time(logger: object, method: str, event: _EventDict) -> _EventDict:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    event["ts"] = now.removesuffix("+00:00") + "Z"
    return event


def _mask_secrets(logger: object, method: str, event: _EventDict) -> _EventDict:
    for name in SECRET_FIELDS & event.keys():
        event[name] = "***"
    return event


def _json_line(logger: object, method: str, event: _EventDict) -> str:
    """Return one line of ASCII JSON, whatever the fields hold."""
    ordered = {name: event.pop(name) for name in ("ts", "level", "event")} | dict(event)
    try:
        return json.dumps(ordered, default=str, allow_nan=False)
    except (TypeError, ValueError):  # a key that is no text, NaN (not JSON), a list that holds itself
        return json.dumps({name: str(value) for name, value in ordered.items()})


class Logger(Protocol):
    """What `Transitions` needs of a logger."""

    def warning(self, event: str, /, **fields: Any) -> Any:
        """Log a warning."""

    def info(self, event: str, /, **fields: Any) -> Any:
        """Log an information."""


@dataclass(slots=True)
class _Failure:
    since_ns: int
    occurrences: int = field(default=1)


class Transitions:
    """Logs a failure once when it starts and once when it ends. For one thread.

    `now_ns` is a clock that never goes back, in nanoseconds. At most `limit` failures are remembered;
    beyond it further ones are dropped with a single line that says so, as a flooded log helps nobody.
    """

    def __init__(self, logger: Logger, now_ns: Callable[[], int], *, limit: int = TRANSITIONS_LIMIT) -> None:
        self._logger = logger
        self._now_ns = now_ns
        self._limit = limit
        self._failures: dict[str, _Failure] = {}
        self._is_full = False

    def failed(self, key: str, event: str, **fields: Any) -> None:
        """Note that `key` failed; logs a warning with `event` and `fields` when it did not fail before."""
        failure = self._failures.get(key)
        if failure is not None:
            failure.occurrences += 1
        elif len(self._failures) < self._limit:
            self._failures[key] = _Failure(self._now_ns())
            self._logger.warning(event, **fields)
        elif not self._is_full:
            self._is_full = True
            self._logger.warning(
                "too many things fail at once: further failures are not logged until one of these ends",
                failures=self._limit,
            )

    def recovered(self, key: str, event: str, **fields: Any) -> None:
        """Note that `key` works; logs `event`, `fields`, duration and number of failures when it failed."""
        failure = self._failures.pop(key, None)
        if failure is None:
            return
        self._is_full = False
        duration_seconds = round((self._now_ns() - failure.since_ns) / 1e9, 3)
        self._logger.info(event, **fields, duration_seconds=duration_seconds, occurrences=failure.occurrences)
