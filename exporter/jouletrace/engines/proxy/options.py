"""What `jouletrace proxy` can be told on its command line."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from jouletrace.config import ConfigError, LogFormat, LogLevel, parse_duration, split_address

DEFAULT_JOULETRACE: Final = "http://127.0.0.1:9841"
DEFAULT_LISTEN: Final = "127.0.0.1:8088"


@dataclass(frozen=True, slots=True)
class Options:
    """What `jouletrace proxy` was told."""

    upstream: str
    listen: tuple[str, ...] = (DEFAULT_LISTEN,)
    jouletrace: str = DEFAULT_JOULETRACE
    """URL or Unix socket that records go to."""
    jouletrace_api: str | None = None
    """URL that is asked for energy; by default where the records go, or `DEFAULT_JOULETRACE` for a socket."""
    token_file: Path | None = None
    """Read again when the daemon refuses its token."""
    engine_id: str | None = None
    engine_kind: str | None = None
    gpu_uuids: tuple[str, ...] = ()
    tenant_headers: tuple[str, ...] = ()
    energy_budget_seconds: float = 0.15
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"

    @property
    def api_url(self) -> str:
        """URL that is asked for energy."""
        return self.jouletrace_api or (self.jouletrace if _is_url(self.jouletrace) else DEFAULT_JOULETRACE)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the proxy's flags."""
    parser.add_argument("--upstream", required=True, metavar="URL", help="the inference server that answers")
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ADDRESS",
        help=f"where clients connect, repeatable (default: {DEFAULT_LISTEN})",
    )
    parser.add_argument(
        "--jouletrace",
        default=DEFAULT_JOULETRACE,
        metavar="URL|SOCKET",
        help="the daemon, or one of its Unix sockets (default: %(default)s)",
    )
    parser.add_argument(
        "--jouletrace-api", metavar="URL", help=f"where energy is asked for, with a socket ({DEFAULT_JOULETRACE})"
    )
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="the daemon's ingest.token_file")
    parser.add_argument("--engine-id", metavar="ID", help="the engine behind, as the daemon knows it")
    parser.add_argument(
        "--engine-kind", metavar="KIND", help="announce the engine to a daemon that does not find it: vllm, ollama, ..."
    )
    parser.add_argument("--gpu-uuid", action="append", metavar="UUID", help="a GPU of the announced engine, repeatable")
    parser.add_argument(
        "--tenant-header",
        action="append",
        metavar="NAME",
        help="a header that names who pays, repeatable; list only what a gateway of yours sets",
    )
    parser.add_argument(
        "--energy-budget",
        default="150ms",
        metavar="DURATION",
        help="the longest that an answer is held up for its energy; from 1s on it waits for the final figure, "
        "0s adds nothing to answers (default: %(default)s)",
    )
    parser.add_argument("--log.level", dest="log_level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument("--log.format", dest="log_format", choices=("auto", "json", "console"), default="auto")


def read_options(flags: argparse.Namespace) -> Options:
    """Return the options; raises ConfigError with the flag's name and the mend."""
    for name in ("upstream", "jouletrace_api"):
        _check_url(f"--{name.replace('_', '-')}", getattr(flags, name))
    if not flags.jouletrace.startswith("/"):
        _check_url("--jouletrace", flags.jouletrace, " or the absolute path of a Unix socket")
    for address in flags.listen or ():
        try:
            split_address(address)
        except ValueError as error:
            raise ConfigError(f"--listen: {error}; write HOST:PORT, such as {DEFAULT_LISTEN}") from None
    if flags.engine_kind and not flags.engine_id:
        raise ConfigError("--engine-kind: announces an engine, which needs a name; add --engine-id")
    if flags.gpu_uuid and not flags.engine_kind:
        raise ConfigError("--gpu-uuid: belongs to an engine that is announced; add --engine-kind")
    try:
        budget_seconds = parse_duration(flags.energy_budget)
    except ValueError as error:
        raise ConfigError(f"--energy-budget: {error}; write 150ms, or 5s for final figures") from None
    return Options(
        upstream=flags.upstream,
        listen=tuple(flags.listen or (DEFAULT_LISTEN,)),
        jouletrace=flags.jouletrace,
        jouletrace_api=flags.jouletrace_api,
        token_file=_with_token(flags.token_file),
        engine_id=flags.engine_id,
        engine_kind=flags.engine_kind,
        gpu_uuids=tuple(flags.gpu_uuid or ()),
        tenant_headers=tuple(name.lower() for name in flags.tenant_header or ()),
        energy_budget_seconds=budget_seconds,
        log_level=flags.log_level,
        log_format=flags.log_format,
    )


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _check_url(flag: str, text: str | None, others: str = "") -> None:
    if text is None:
        return
    try:
        parts = urlsplit(text)
        is_fine = _is_url(text) and bool(parts.hostname) and not parts.query and parts.port != 0
    except ValueError:
        is_fine = False
    if not is_fine:
        raise ConfigError(f"{flag}: {text!r} is not a URL such as http://127.0.0.1:8000{others}")


def _with_token(path: Path | None) -> Path | None:
    if path is None:
        return None
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file: {path} cannot be read ({error}); see its owner and mode") from None
    if not token:
        raise ConfigError(f"--token-file: {path} is empty; it must hold the token of ingest.token_file")
    return path
