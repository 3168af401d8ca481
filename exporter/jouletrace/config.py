"""The configuration tree, and everything that is generated from it.

A key is a field of a `Section`: its annotation holds the form its values are written in, its bounds and its
one-sentence description; its default is the field's. The YAML file, the flags, the environment variables,
`--print-config` and the reference page all follow from the fields: a new key is added in one place.

Precedence: defaults < file < environment < flags.
"""

import argparse
import difflib
import math
import os
import re
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import msgspec
from msgspec import Meta

VARIABLE_PREFIX = "JOULETRACE_"
"""Every environment variable that starts so must be a key's, or be named by `IGNORED_VARIABLES`."""

IGNORED_VARIABLES = frozenset({"JOULETRACE_NVML_SHIM"})
"""Variables with our prefix that are not configuration: the switch of the tests' stand-in for the driver."""

SERVICE_LINK = re.compile(
    r"JOULETRACE_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
"""Variables that Kubernetes puts into every pod of a namespace with a Service called `jouletrace` or
`jouletrace-*` (kubernetes.io, "Accessing the Service", `enableServiceLinks`); not configuration either."""

FILE_LIMIT_BYTES = 1 << 20
"""A larger file is not a configuration; without a limit, a wrong path could fill the memory."""

TOKEN_CHARACTERS = 1024
"""Longest token; HTTP headers may have 8190 bytes here."""

MOST_TOKENS = 8
"""Tokens of a file; a rotation needs two, and each is compared with what every request sends."""

FILE_DEPTH = 16
"""Deepest nesting of a file that is looked at (the parser recurses without a limit); the tree is two deep."""

SHOWN_CHARACTERS = 60
"""An error shows at most this much of a wrong value."""


class ConfigError(Exception):
    """The configuration is wrong; the text is one line naming the key, the value, its origin and the mend."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class _RefusedError(Exception):
    """A value is wrong: what is the matter (`problem`), what to write (`mend`), which part of it is meant."""

    def __init__(self, problem: str, mend: str, part: object = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.mend = mend
        self.part = part


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as `500ms`, `10s`, `1m30s` or `2h`; raises ValueError."""
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise ValueError(f"{text!r} is not a duration")
    hours, minutes, seconds, milliseconds = (int(part or 0) for part in match.groups())
    return (((hours * 60 + minutes) * 60 + seconds) * 1000 + milliseconds) / 1000


def format_duration(seconds: float) -> str:
    """Return `seconds`, rounded to the millisecond, as `parse_duration` reads it."""
    rest = round(seconds * 1000)
    parts = []
    for unit, unit_ms in (("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, rest = divmod(rest, unit_ms)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def split_address(address: str) -> tuple[str | None, int]:
    """Return host and port of a listen address such as `:9841`, `localhost:9841` or `[::1]:9841`.

    The host is `None` for all interfaces; port 0 is any free one. Raises ValueError for anything else.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{address!r} has no port")
    if not host:
        return None, int(port)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        valid = _is_numeric_address(socket.AF_INET6, host.partition("%")[0])
    elif re.fullmatch("[0-9.]+", host):
        valid = _is_numeric_address(socket.AF_INET, host)
    else:
        valid = _HOST_NAME.fullmatch(host) is not None
    if not valid:
        raise ValueError(f"{address!r} has no valid host")
    return host, int(port)


def unix_path(address: str) -> Path | None:
    """Return the path of a listen address such as `unix:/run/jouletrace/web.sock`, None for any other address."""
    return Path(address.removeprefix("unix:")) if address.startswith("unix:/") else None


def read_token(key: str, file: Path) -> str:
    """Return the word in a file that `key` names; raises ConfigError when there is none."""
    [token] = _read_words(key, file, most=1)
    return token


def read_tokens(key: str, file: Path) -> tuple[str, ...]:
    """Return the words in a file that `key` names, one a line; raises ConfigError when there is none."""
    return _read_words(key, file, most=MOST_TOKENS)


def _read_words(key: str, file: Path, most: int) -> tuple[str, ...]:
    longest = most * (TOKEN_CHARACTERS + 2)  # Lines may end with \r\n.
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            text = opened.read(longest + 1)
    except OSError as error:
        raise ConfigError(
            f"{key}: {file} cannot be read ({error.strerror}); "
            "make it a file that the daemon's user may read, or remove the key"
        ) from None
    except UnicodeDecodeError:
        text = ""
    words = [line.strip() for line in text.split("\n") if line.strip()]
    fine = all(re.fullmatch(f"[!-~]{{1,{TOKEN_CHARACTERS}}}", word) for word in words)
    if not 1 <= len(words) <= most or not fine or len(text) > longest:
        more = f"; further ones, {most} in all, on lines of their own" if most > 1 else ""
        raise ConfigError(
            f"{key}: {file} does not hold a token; write one word of up to "
            f"{TOKEN_CHARACTERS} ASCII characters into it, for example with `openssl rand -hex 32`{more}"
        )
    return tuple(words)


def default_state_dir(environment: Mapping[str, str], user_id: int) -> str:
    """Return where learnt levels are kept when nothing is configured.

    That is what systemd made for the service (systemd.exec, StateDirectory=), for root /var/lib/jouletrace,
    for others a directory under $XDG_STATE_HOME (XDG Base Directory 0.8; relative paths are void) or the home
    directory. The result need not exist.
    """
    given = environment.get("STATE_DIRECTORY", "").partition(":")[0]
    if given.startswith("/"):
        return given
    if user_id != 0:
        for base, below in (("XDG_STATE_HOME", "jouletrace"), ("HOME", ".local/state/jouletrace")):
            if environment.get(base, "").startswith("/"):
                return str(Path(environment[base], below))
    return "/var/lib/jouletrace"


def default_socket(environment: Mapping[str, str], file: str) -> str:
    """Return where a socket is when nothing is configured: in what systemd made for the service (systemd.exec,
    RuntimeDirectory=), else nowhere, which is empty.
    """
    given = environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return str(Path(given, file)) if given.startswith("/") else ""


_DURATION = re.compile("(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s)?(?:([0-9]{1,9})ms)?")
_HEADER = re.compile("([!#$%&'*+.^_`|~0-9A-Za-z-]+): *([!-~](?:[ -~]*[!-~])?)")
"""A header field of RFC 9110 section 5, in ASCII."""
_HOST_NAME = re.compile("[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


def _is_numeric_address(family: socket.AddressFamily, text: str) -> bool:
    try:
        socket.inet_pton(family, text)
    except OSError:
        return False
    return True


# --- how values are written ---


class Form(ABC):
    """How the values of one kind are written, in YAML and as the text of a flag or a variable."""

    metavar = "TEXT"

    def from_text(self, text: str) -> object:
        """Return what YAML would hold for the text of a flag or variable; what it cannot read stays text."""
        return text

    @abstractmethod
    def read(self, raw: object) -> object:
        """Return the value that YAML's `raw` stands for; raises `_RefusedError`."""

    def write(self, value: Any) -> object:
        """Return what YAML holds for `value`."""
        return value

    @abstractmethod
    def allowed(self, meta: Meta) -> str:
        """Return in words which values are allowed; goes behind "write"."""


class _Duration(Form):
    metavar = "DURATION"

    def read(self, raw: object) -> object:
        mend = "write a duration such as 500ms, 10s, 1m30s or 2h"
        if isinstance(raw, str):
            try:
                return parse_duration(raw)
            except ValueError:
                raw = _Number().from_text(raw)
        if isinstance(raw, int | float) and not isinstance(raw, bool):
            if 0.001 <= raw < 1e9:
                mend = f"write {format_duration(raw)}"
            raise _RefusedError("has no unit", mend)
        raise _RefusedError("is not a duration", mend)

    def write(self, value: float) -> object:
        return format_duration(value)

    def allowed(self, meta: Meta) -> str:
        assert meta.ge is not None
        assert meta.le is not None
        return f"a duration from {format_duration(meta.ge)} to {format_duration(meta.le)}"


class _Number(Form):
    metavar = "NUMBER"

    def from_text(self, text: str) -> object:
        try:
            return float(text)
        except ValueError:
            return text

    def read(self, raw: object) -> object:
        if isinstance(raw, bool) or not isinstance(raw, int | float):
            raise _RefusedError("is not a number", "write a number such as 1 or 0.5")
        if isinstance(raw, float) and not math.isfinite(raw):
            raise _RefusedError("is not a finite number", "write a number such as 1 or 0.5")
        return raw

    def write(self, value: float) -> object:
        return int(value) if value.is_integer() else value

    def allowed(self, meta: Meta) -> str:
        return f"a number from {meta.ge:g} to {meta.le:g}"


class _Switch(Form):
    metavar = "true|false"

    def from_text(self, text: str) -> object:
        return {"true": True, "false": False}.get(text.lower(), text)

    def read(self, raw: object) -> object:
        if not isinstance(raw, bool):
            raise _RefusedError("is neither true nor false", "write true or false")
        return raw

    def allowed(self, meta: Meta) -> str:
        return "true or false"


class _Choice(Form):
    def __init__(self, choices: Sequence[str]) -> None:
        self.choices = choices
        self.metavar = "|".join(choices)

    def read(self, raw: object) -> object:
        if raw not in self.choices:
            raise _RefusedError("is not one of the choices", f"write {_alternatives(self.choices)}")
        return raw

    def allowed(self, meta: Meta) -> str:
        return _alternatives(self.choices)


class _Text(Form):
    """Printable text that a pattern describes."""

    def __init__(self, metavar: str, pattern: str, words: str) -> None:
        self.metavar = metavar
        self._pattern = re.compile(pattern)
        self._words = words

    def read(self, raw: object) -> object:
        if not isinstance(raw, str):
            raise _RefusedError("is not text", f"write {self._words}")
        if not raw.isprintable():
            raise _RefusedError("holds characters that cannot be printed", f"write {self._words}")
        if not self._pattern.fullmatch(raw):
            raise _RefusedError("is not valid", f"write {self._words}")
        return raw

    def allowed(self, meta: Meta) -> str:
        return self._words


class _Address(Form):
    metavar = "HOST:PORT"
    mend = "write host:port, [IPv6]:port or :port for all interfaces"

    def read(self, raw: object) -> object:
        if not isinstance(raw, str):
            raise _RefusedError("is not an address", self.mend)
        try:
            split_address(raw)
        except ValueError:
            raise _RefusedError("is not an address to listen on", self.mend) from None
        return raw

    def allowed(self, meta: Meta) -> str:
        return "host:port, [IPv6]:port or :port"


class _WebAddress(_Address):
    """An address, or a Unix socket."""

    metavar = "HOST:PORT|unix:PATH"
    mend = "write host:port, [IPv6]:port, :port for all interfaces, or unix:/path for a Unix socket"

    def read(self, raw: object) -> object:
        if isinstance(raw, str) and raw.isprintable() and unix_path(raw) is not None:
            return raw
        return super().read(raw)

    def allowed(self, meta: Meta) -> str:
        return "host:port, [IPv6]:port, :port or unix:/path"


class _Device(Form):
    metavar = "GPU"

    def from_text(self, text: str) -> object:
        return int(text) if re.fullmatch("[0-9]{1,4}", text) else text

    def read(self, raw: object) -> object:
        raw = self.from_text(raw) if isinstance(raw, str) else raw
        if isinstance(raw, int) and not isinstance(raw, bool) and 0 <= raw < 10_000:
            return raw
        if isinstance(raw, str) and re.fullmatch("GPU-[0-9A-Za-z-]+", raw):
            return raw
        raise _RefusedError("is not a GPU", "write an index such as 0 or a UUID such as GPU-8932f937")

    def allowed(self, meta: Meta) -> str:
        return "GPU indices, UUIDs or unique beginnings of UUIDs"


class _List(Form):
    """A list; as text its items stand between commas."""

    def __init__(self, item: Form) -> None:
        self.item = item
        self.metavar = item.metavar

    def from_text(self, text: str) -> object:
        return [self.item.from_text(part.strip()) for part in text.split(",")]

    def read(self, raw: object) -> object:
        if not isinstance(raw, list):
            raise _RefusedError("is not a list", "write its items in brackets and with commas between, as in [a, b]")
        values: dict[object, None] = {}
        for item in raw:
            try:
                value = self.item.read(item)
            except _RefusedError as error:
                raise _RefusedError(error.problem, error.mend, _show(item)) from None
            if value in values:
                raise _RefusedError("stands there twice", "remove one", _show(item))
            values[value] = None
        return tuple(values)

    def write(self, value: Sequence[object]) -> object:
        return [self.item.write(item) for item in value]

    def allowed(self, meta: Meta) -> str:
        return f"a list of {self.item.allowed(meta)}"


class EngineAuthorization(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """`authorization` of an engine, as in Prometheus' scrape configuration."""

    credentials_file: Annotated[str, Meta(pattern=r"^/", max_length=4096)]
    type: Annotated[str, Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$", max_length=64)] = "Bearer"


class EngineTlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """`tls_config` of an engine, as in Prometheus' scrape configuration."""

    ca_file: Annotated[str, Meta(pattern=r"^/", max_length=4096)] | None = None
    server_name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]+$", max_length=253)] | None = None
    """The name that its certificate is for, where its URL has another."""
    insecure_skip_verify: bool = False


class EngineTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A serving engine whose metrics are read."""

    url: Annotated[str, Meta(pattern=r"^https?://[^\s/?#@]+$", max_length=256)]
    """Without path."""
    kind: Literal["vllm", "sglang", "trtllm", "tgi", "llamacpp", "triton", "dynamo", "nim"] | None = None
    engine_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    gpu_uuids: Annotated[tuple[str, ...], Meta(max_length=64)] = ()
    metrics_path: Annotated[str, Meta(pattern=r"^/\S*$", max_length=256)] | None = None
    models: Annotated[tuple[str, ...], Meta(max_length=256)] = ()
    """What it serves, where neither its page nor its files say so."""
    forward_pass: Annotated[tuple[str, ...], Meta(max_length=64)] = ()
    """ZeroMQ endpoints of its forward-pass metrics, one for each data-parallel rank."""
    request_log: Annotated[str, Meta(pattern=r"^/", max_length=4096)] | None = None
    """Folder of SGLang's request files."""
    authorization: EngineAuthorization | None = None
    tls_config: EngineTlsConfig | None = None


class _EngineTarget(Form):
    """An engine: its URL, or in the file a mapping."""

    metavar = "URL"

    def read(self, raw: object) -> object:
        mend = f"write {self.allowed(Meta())}"
        if not isinstance(raw, str | dict):
            raise _RefusedError("is not an engine", mend)
        try:
            target = msgspec.convert({"url": raw} if isinstance(raw, str) else raw, EngineTarget)
        except msgspec.ValidationError as error:
            raise _RefusedError(f"is not an engine ({error})", mend) from None
        if target.tls_config is not None and not target.url.startswith("https:"):
            raise _RefusedError("has a tls_config, which http does not use", "write https:// or remove tls_config")
        return target

    def write(self, value: EngineTarget) -> object:
        tree: dict[str, object] = msgspec.to_builtins(value)
        return (
            value.url
            if set(tree) == {"url"}
            else {name: list(v) if isinstance(v, tuple) else v for name, v in tree.items()}
        )

    def allowed(self, meta: Meta) -> str:
        fields = ", ".join(EngineTarget.__struct_fields__)
        return f"URLs such as http://127.0.0.1:8000, or in the file mappings of {fields}"


Duration = Annotated[float, _Duration()]
"""Seconds in the tree, Prometheus style text outside; bounds are required."""
Number = Annotated[float, _Number()]
"""A finite number; bounds are required."""
Switch = Annotated[bool, _Switch()]
"""True or false; the flag has a `--no-` form."""
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "json", "console"]
SocketAccess = Literal["owner", "group", "everyone"]


# --- the tree ---


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the tree. The first line of a section's docstring heads its part of the reference."""


class Log(Section, frozen=True):
    """What the daemon writes to standard error."""

    level: Annotated[LogLevel, Meta(description="The least severe messages that are written.")] = "info"
    format: Annotated[
        LogFormat,
        Meta(description="JSON lines or text for people; `auto` is text on a terminal and JSON elsewhere."),
    ] = "auto"


class WebConfigFile(Section, frozen=True):
    """Who may read: TLS and passwords, as for other Prometheus exporters."""

    file: Annotated[
        str,
        _Text("FILE", ".*", "a path, or nothing"),
        Meta(
            description="The web configuration of the Prometheus exporter toolkit: TLS, client certificates, "
            "passwords, headers and a rate limit; it and the files that it names are re-read when they change."
        ),
    ] = ""


class Web(Section, frozen=True):
    """Where metrics, health and the live page are served."""

    listen_address: Annotated[
        tuple[str, ...],
        _List(_WebAddress()),
        Meta(
            min_length=1,
            description="The addresses to listen on; `:port` means all interfaces, port 0 a free one, `unix:/path` a "
            "Unix socket with the mode of `ingest.socket_access`, whose clients are of this machine and speak plain "
            "HTTP.",
        ),
    ] = (":9841",)
    metrics_listen_address: Annotated[
        tuple[str, ...],
        _List(_Address()),
        Meta(
            description="More addresses, at which metrics and health alone are served: `web.listen_address` may then "
            "stay on loopback, with the live page and `/v1/`."
        ),
    ] = ()
    telemetry_path: Annotated[
        str,
        # Under /-/ stand health and readiness, at / the live page.
        _Text(
            "PATH",
            r"(?!/-(/|$))(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+",
            "a path such as /metrics, not under /-/",
        ),
        Meta(description="The path of the metrics."),
    ] = "/metrics"
    config: WebConfigFile = WebConfigFile()


class Ingest(Section, frozen=True):
    """How records of engines, steps and requests come in, besides HTTP."""

    listen_address: Annotated[
        tuple[str, ...],
        _List(_Address()),
        Meta(
            description="The addresses at which `/v1/` takes records; if there are any, `web.listen_address` takes "
            "none and only answers."
        ),
    ] = ()
    stream_socket: Annotated[
        str,
        _Text("PATH", "(/.*|off)?", "an absolute path, off, or nothing"),
        Meta(
            description="The Unix stream socket for NDJSON records; if empty, `$RUNTIME_DIRECTORY/ingest.sock`, and "
            "none without that variable."
        ),
    ] = ""
    datagram_socket: Annotated[
        str,
        _Text("PATH", "(/.*|off)?", "an absolute path, off, or nothing"),
        Meta(
            description="The Unix datagram socket, for senders that must never wait; if empty, "
            "`$RUNTIME_DIRECTORY/ingest.dgram`, and none without that variable."
        ),
    ] = ""
    socket_access: Annotated[
        SocketAccess,
        Meta(description="Who may connect to the Unix sockets: `owner` is mode 0600, `group` 0660, `everyone` 0666."),
    ] = "group"
    token_file: Annotated[
        str,
        _Text("FILE", "(/.*)?", "an absolute path, or nothing"),
        Meta(
            description="A file with the token that every HTTP client of `/v1/` must send as `Authorization: Bearer`, "
            "or up to 8 of which each is good, one a line; it is re-read when it changes. If empty, only clients on "
            "this machine are answered."
        ),
    ] = ""
    max_body_mebibytes: Annotated[
        Number, Meta(ge=1, le=256, description="The largest body of one HTTP request, unpacked.")
    ] = 8.0
    # A burst of 50,000 must fit. A queued record takes about 1 kB.
    queue_records: Annotated[
        Number,
        Meta(ge=1024, le=500_000, description="Records that may wait to be booked before senders are slowed down."),
    ] = 65536.0
    queue_mebibytes: Annotated[
        Number,
        Meta(
            ge=8,
            le=4096,
            description="Memory that waiting records may take, about, before senders are slowed down.",
        ),
    ] = 64.0

    @property
    def stream_path(self) -> Path | None:
        """The stream socket; `None` when there is none."""
        return Path(self.stream_socket) if self.stream_socket.startswith("/") else None

    @property
    def datagram_path(self) -> Path | None:
        """The datagram socket; `None` when there is none."""
        return Path(self.datagram_socket) if self.datagram_socket.startswith("/") else None

    def tokens(self) -> tuple[str, ...]:
        """Return what `token_file` holds, nothing without one; raises ConfigError when it holds no token."""
        return read_tokens("ingest.token_file", Path(self.token_file)) if self.token_file else ()


class Otlp(Section, frozen=True):
    """How engines' spans come in over OTLP, besides `/v1/traces` at `web.listen_address`, and where they go on to."""

    listen_address: Annotated[
        tuple[str, ...],
        _List(_Address()),
        Meta(
            description="More addresses at which `/v1/traces` is served, with TLS where `web.config.file` has it; "
            "OTLP's own port is 4318."
        ),
    ] = ()
    grpc_listen_address: Annotated[
        tuple[str, ...],
        _List(_Address()),
        Meta(
            description="The addresses at which spans are taken over gRPC, with TLS where `web.config.file` has it; "
            "needs `jouletrace[grpc]`. OTLP's own port is 4317."
        ),
    ] = ()
    forward_url: Annotated[
        str,
        _Text("URL", "(https?://[^\\s/?#@]+/[^\\s]*)?", "a URL such as http://collector:4318/v1/traces, or nothing"),
        Meta(description="The collector to which all spans go on unchanged; if empty, they end here."),
    ] = ""
    forward_headers_file: Annotated[
        str,
        _Text("FILE", "(/.*)?", "an absolute path, or nothing"),
        Meta(description="A file with headers for the collector, a line `Name: value` each, such as its API key."),
    ] = ""
    # 10,000 spans/s of 600 bytes for 30 s are 180 MB.
    forward_buffer_mebibytes: Annotated[
        Number,
        Meta(
            ge=1,
            le=65536,
            description="Memory for spans that wait while the collector is away; further ones are dropped.",
        ),
    ] = 256.0

    def forward_headers(self) -> dict[str, str]:
        """Return what `forward_headers_file` holds; raises ConfigError when it holds anything but headers."""
        if not self.forward_headers_file:
            return {}
        try:
            lines = Path(self.forward_headers_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(
                f"otlp.forward_headers_file: {self.forward_headers_file} cannot be read ({reason}); "
                "make it a file that the daemon's user may read, or remove the key"
            ) from None
        headers: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            match = _HEADER.fullmatch(line.strip())
            if match is not None:
                headers[match[1]] = match[2]
            elif line.strip():
                raise ConfigError(
                    f"otlp.forward_headers_file: line {number} of {self.forward_headers_file} is not a header; "
                    "write Name: value"
                )
        return headers


class Engines(Section, frozen=True):
    """Which serving engines' own metrics are read, for joules per token without any change to them."""

    discover: Annotated[
        Switch,
        Meta(
            description="Whether engines on this machine are found by the processes on its GPUs and read each second."
        ),
    ] = True
    targets: Annotated[
        tuple[EngineTarget, ...],
        _List(_EngineTarget()),
        Meta(
            description="Engines on this machine's GPUs that are read though nobody finds them; in the file an item "
            "may also be a mapping that says its GPUs (`gpu_uuids`), its `kind`, `engine_id`, `models` and "
            "`metrics_path`, the ZeroMQ endpoints of its forward-pass metrics (`forward_pass`), the folder of "
            "SGLang's request files (`request_log`), and, as in Prometheus' scrape configuration, `authorization` "
            "(`credentials_file`, `type`) and `tls_config` (`ca_file`, `server_name`, `insecure_skip_verify`), whose "
            "files are re-read when they change."
        ),
    ] = ()


class Workloads(Section, frozen=True):
    """What is told of the processes on the GPUs. Needs the host's process ids; without effect on a recording."""

    processes: Annotated[
        Switch,
        Meta(description="Whether the workloads on each GPU are listed as `jouletrace_gpu_process_info`."),
    ] = False
    pods: Annotated[
        Switch,
        Meta(
            description="Whether Kubernetes pods are named and their energy is exported as "
            "`jouletrace_pod_energy_joules_total`."
        ),
    ] = False
    pod_resources_socket: Annotated[
        str,
        _Text("FILE", "(/.*)?", "an absolute path, or nothing"),
        Meta(
            description="The socket of the kubelet's pod-resources API, which needs `jouletrace[grpc]`; if empty, the "
            "kubelet is not asked."
        ),
    ] = "/var/lib/kubelet/pod-resources/kubelet.sock"
    pod_logs_dir: Annotated[
        str,
        _Text("DIRECTORY", "(/.*)?", "an absolute path, or nothing"),
        Meta(
            description="Where the kubelet keeps the logs of pods, in folders named after them; if empty, it is not "
            "looked at."
        ),
    ] = "/var/log/pods"


class Ledger(Section, frozen=True):
    """How energy is divided among requests, and how much of it is remembered."""

    laws_file: Annotated[
        str,
        _Text("FILE", "(/.*)?", "an absolute path, or nothing"),
        Meta(
            description="A JSON or YAML file with step-energy laws by engine id (`engines`) or model (`models`), as "
            "`jouletrace calibrate` prints them, or model descriptions for a roofline prior; if empty, that of an 8B "
            "model on an H200 is used."
        ),
    ] = ""
    in_flight_requests: Annotated[
        Number, Meta(ge=16, le=1_000_000, description="Requests in flight that are accounted for at once.")
    ] = 16384.0
    settled_requests: Annotated[
        Number, Meta(ge=16, le=10_000_000, description="Ended requests whose energy can still be asked for.")
    ] = 100000.0
    tenants_per_model: Annotated[
        Number, Meta(ge=1, le=10_000, description="Tenants of a model with series of their own; the rest is `other`.")
    ] = 200.0


class Sampling(Section, frozen=True):
    """How often the GPUs are read. Longer intervals cost less; energy stays exact with the power ring."""

    # The H200's ring holds 2.36 s (measured); a harvest every 2 s still has slack for one late round.
    ring_interval: Annotated[
        Duration,
        Meta(ge=0.1, le=2.0, description="How often the power ring, which is 2.36 s deep, is harvested."),
    ] = 1.0
    # GPM percentages are wrong over less than 100 ms (measured on an H200).
    activity_interval: Annotated[
        Duration,
        Meta(ge=0.1, le=10.0, description="How often memory bandwidth, pipe and link activity (GPM) are read."),
    ] = 0.5
    graphics_interval: Annotated[
        Duration,
        Meta(
            ge=0.1,
            le=60.0,
            description="How often the part of the time with any kernel running (GPM) is read; takes 2 ms each.",
        ),
    ] = 30.0
    state_interval: Annotated[
        Duration,
        Meta(ge=0.1, le=60.0, description="How often clocks, temperatures, memory and throttle state are read."),
    ] = 1.0
    health_interval: Annotated[
        Duration,
        Meta(ge=1.0, le=600.0, description="How often processes, power limit and memory errors are read."),
    ] = 10.0
    # One read of the counter costs 2 to 25 ms (measured on an H200), hence not under a second.
    counter_interval: Annotated[
        Duration,
        Meta(ge=1.0, le=60.0, description="How often the hardware energy counter is read to check the sum."),
    ] = 10.0
    power_polling_hertz: Annotated[
        Number,
        Meta(
            ge=1,
            le=1000,
            description="Power readings per second on GPUs with neither power ring nor energy counter.",
        ),
    ] = 100.0
    cpu_budget_ratio: Annotated[
        Number,
        Meta(
            ge=0.005,
            le=1,
            description="The share of one CPU core that sampling may use before it slows itself down.",
        ),
    ] = 0.03


class Readiness(Section, frozen=True):
    """When `/-/ready` says no."""

    stale_after: Annotated[
        Duration,
        Meta(ge=0.2, le=600.0, description="A GPU without a sample for this long is not ready."),
    ] = 5.0


class Diagnosis(Section, frozen=True):
    """What is called waste."""

    parked_after: Annotated[
        Duration,
        Meta(
            ge=1.0,
            le=604800.0,
            description="A GPU that an engine holds without any request for longer wastes its energy from then on.",
        ),
    ] = 600.0


class Driver(Section, frozen=True):
    """What to do when the driver fails."""

    give_up_after: Annotated[
        Duration,
        Meta(
            ge=1.0,
            le=86400.0,
            description="When every GPU fails for this long, the process ends with exit code 4.",
        ),
    ] = 120.0


class Replay(Section, frozen=True):
    """How a recording is played; without effect unless `source` is one."""

    speed: Annotated[Number, Meta(ge=0.1, le=1000, description="How many times faster than it was recorded.")] = 1.0
    loop: Annotated[Switch, Meta(description="Whether to start over at the end of the recording.")] = True


class Config(Section, frozen=True):
    """The whole configuration; `load` makes it."""

    source: Annotated[
        str,
        _Text("SOURCE", "nvml|replay:.+", "nvml or replay:FILE"),
        Meta(description="Where readings come from: the driver, or a recording that is played like a GPU."),
    ] = "nvml"
    state_dir: Annotated[
        str,
        _Text("DIRECTORY", "(/.*)?", "an absolute path"),
        Meta(
            description="Where learnt levels are kept; if empty, the first of `$STATE_DIRECTORY`, for root "
            "`/var/lib/jouletrace`, `$XDG_STATE_HOME/jouletrace` and `~/.local/state/jouletrace`."
        ),
    ] = ""
    devices: Annotated[
        tuple[int | str, ...],
        _List(_Device()),
        Meta(description="The GPUs to watch; if empty, all of them."),
    ] = ()
    log: Log = Log()
    web: Web = Web()
    ingest: Ingest = Ingest()
    otlp: Otlp = Otlp()
    engines: Engines = Engines()
    workloads: Workloads = Workloads()
    ledger: Ledger = Ledger()
    sampling: Sampling = Sampling()
    diagnosis: Diagnosis = Diagnosis()
    readiness: Readiness = Readiness()
    driver: Driver = Driver()
    replay: Replay = Replay()

    @property
    def replay_file(self) -> Path | None:
        """The recording to play; `None` when the driver is the source."""
        kind, _, file = self.source.partition(":")
        return Path(file) if kind == "replay" else None


# --- its keys ---


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the tree."""

    name: str
    """Dotted, as in `sampling.ring_interval`."""
    form: Form
    annotation: Any
    meta: Meta
    default: Any

    @property
    def flag(self) -> str:
        """The key's flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The key's environment variable."""
        return VARIABLE_PREFIX + self.name.replace(".", "_").upper()

    @property
    def description(self) -> str:
        """What the key means, one sentence."""
        return self.meta.description or ""

    def value_in(self, config: Config) -> Any:
        """Return the key's value in `config`."""
        value: Any = config
        for part in self.name.split("."):
            value = getattr(value, part)
        return value


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, msgspec.structs.FieldInfo]]:
    """Yield the dotted name and the field of every key and section below `section`."""
    for field in msgspec.structs.fields(section):
        yield prefix + field.name, field
        if not _is_key(field):
            yield from _walk(field.type, f"{prefix}{field.name}.")


def _is_key(field: msgspec.structs.FieldInfo) -> bool:
    return get_origin(field.type) is Annotated


def _key(name: str, field: msgspec.structs.FieldInfo) -> Key:
    kind, *notes = get_args(field.type)
    form = next((note for note in notes if isinstance(note, Form)), None) or _Choice(get_args(kind))
    meta = next(note for note in notes if isinstance(note, Meta))
    return Key(name, form, field.type, meta, field.default)


KEYS: Mapping[str, Key] = {name: _key(name, field) for name, field in _walk(Config, "") if _is_key(field)}
"""Every key by its name, in the order of the tree."""

_SECTIONS = {
    name: (field.type.__doc__ or "").partition("\n")[0] for name, field in _walk(Config, "") if not _is_key(field)
}


# --- reading ---


@dataclass(frozen=True, slots=True)
class _Setting:
    """A value as somebody gave it: `shown` for people, `origin` in words."""

    raw: object
    shown: str
    origin: str


def load(config_file: Path | None, environment: Mapping[str, str], flags: argparse.Namespace | None) -> Config:
    """Return the configuration: defaults, then the file, the environment and the flags, each over the last.

    `environment` is the process's; an empty variable counts as not set. `flags` is what a parser with
    `add_flags` returned; its other attributes are left alone. Raises `ConfigError`; a wrong value is refused
    even where a later layer overrides it.
    """
    settings: dict[str, _Setting] = {}
    values: dict[str, object] = {}
    for layer in (_file_settings(config_file), _variable_settings(environment), _flag_settings(flags)):
        for name, setting in layer:
            values[name] = _value(KEYS[name], setting)
            settings[name] = setting
    if not values.get("state_dir"):
        values["state_dir"] = default_state_dir(environment, os.geteuid())
    for name, file in (("ingest.stream_socket", "ingest.sock"), ("ingest.datagram_socket", "ingest.dgram")):
        if not values.get(name):
            values[name] = default_socket(environment, file)
    config = msgspec.convert(_nested(values), Config)
    _check_combinations(config, settings)
    return config


def _value(key: Key, setting: _Setting) -> object:
    """Return the key's checked value; raises `ConfigError`."""
    allowed = key.form.allowed(key.meta)
    try:
        if setting.raw is None:
            raise _RefusedError("has no value", f"write {allowed}, or remove the line")
        value = key.form.read(setting.raw)
        try:
            return msgspec.convert(value, key.annotation)
        except msgspec.ValidationError:
            raise _RefusedError("is out of range", f"write {allowed}") from None
    except _RefusedError as error:
        shown = setting.shown if error.part is None else error.part
        raise ConfigError(f"{setting.origin}: {key.name}: {shown} {error.problem}; {error.mend}") from None


def _nested(values: Mapping[str, object]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = value
    return tree


def _check_combinations(config: Config, settings: Mapping[str, _Setting]) -> None:
    """Refuse values that are fine alone and impossible together; raises `ConfigError`."""

    def refuse(name: str, other: str, problem: str, mend: str) -> NoReturn:
        blamed = name if name in settings else other
        held = (f"{each} {KEYS[each].form.write(KEYS[each].value_in(config))}" for each in (name, other))
        raise ConfigError(f"{settings[blamed].origin}: {' and '.join(held)} do not go together: {problem}; {mend}")

    if config.readiness.stale_after <= config.sampling.ring_interval:
        refuse(
            "readiness.stale_after",
            "sampling.ring_interval",
            "every GPU would be stale between two samples",
            f"set readiness.stale_after to more than {format_duration(config.sampling.ring_interval)}",
        )
    if config.driver.give_up_after < config.readiness.stale_after:
        refuse(
            "driver.give_up_after",
            "readiness.stale_after",
            "the process would end while it is still ready",
            f"set driver.give_up_after to {format_duration(config.readiness.stale_after)} or more",
        )
    for name, addresses in (
        ("web.listen_address", config.web.listen_address),
        ("web.metrics_listen_address", config.web.metrics_listen_address),
        ("ingest.listen_address", config.ingest.listen_address),
    ):
        _check_addresses(name, addresses, settings)


def _check_addresses(name: str, addresses: Sequence[str], settings: Mapping[str, _Setting]) -> None:
    addresses = [address for address in addresses if unix_path(address) is None]
    everywhere = {port for host, port in map(split_address, addresses) if host is None}
    for address in addresses:
        host, port = split_address(address)
        if host is not None and port != 0 and port in everywhere:
            raise ConfigError(
                f"{settings[name].origin}: {name}: {address} is already part of :{port}, "
                "which is all interfaces; remove one of them"
            )


def _variable_settings(environment: Mapping[str, str]) -> Iterator[tuple[str, _Setting]]:
    by_variable = {key.variable: key for key in KEYS.values()}
    for variable, text in sorted(environment.items()):
        if not variable.startswith(VARIABLE_PREFIX) or _is_foreign(variable, text):
            continue
        key = by_variable.get(variable)
        if key is None:
            # The value stays unsaid: what an unknown variable holds may be a secret.
            near = _nearest(
                variable.removeprefix(VARIABLE_PREFIX),
                [key.variable.removeprefix(VARIABLE_PREFIX) for key in KEYS.values()],
            )
            mend = f"did you mean {VARIABLE_PREFIX}{near}?" if near else "remove it from the environment"
            raise ConfigError(f"environment variable {_clip(variable)}: is not a known key; {mend}")
        if text:
            yield (
                key.name,
                _Setting(key.form.from_text(text), _show(text), f"environment variable {variable}"),
            )


def _is_foreign(variable: str, text: str) -> bool:
    """Return whether a variable with our prefix is somebody else's."""
    if variable in IGNORED_VARIABLES or SERVICE_LINK.fullmatch(variable):
        return True
    # `..._PORT` could also be a wrong guess at a key, but Kubernetes' holds a URL such as tcp://10.0.0.7:9841.
    return variable.endswith("_PORT") and "://" in text


def _flag_settings(flags: argparse.Namespace | None) -> Iterator[tuple[str, _Setting]]:
    for name, given in vars(flags).items() if flags is not None else ():
        key = KEYS.get(name)
        if key is None:
            continue
        raw: Any
        if isinstance(given, list):
            texts = ",".join(given)
            raw, shown = key.form.from_text(texts), _show(texts)
        elif isinstance(given, str):
            raw, shown = key.form.from_text(given), _show(given)
        else:
            raw, shown = given, _show(given)
        yield name, _Setting(raw, shown, f"flag {key.flag}")


def _file_settings(path: Path | None) -> Iterator[tuple[str, _Setting]]:
    if path is None:
        return
    file = _printable(str(path))
    text = _file_text(path)
    # PyYAML takes 20 ms to import; runs without a file do not need it.
    import yaml  # noqa: PLC0415

    try:
        _refuse_unreadable_structure(file, text)
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        try:
            root = loader.get_single_node()
            if root is not None and not _is_null(root):
                yield from _section_settings(file, loader, root, "")
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = _line(mark) if mark is not None else ""
        parts = (getattr(error, name, None) for name in ("context", "problem", "reason"))
        problem = ", ".join(_printable(str(part)) for part in parts if part)
        raise ConfigError(
            f"{file}{line}: the file is not valid YAML ({problem}); mend this line or the one before it"
        ) from None


def _file_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        problem = "does not exist; create it or point --config.file elsewhere"
    except IsADirectoryError:
        problem = "is a directory; point --config.file at a file in it"
    except PermissionError:
        problem = "may not be read by this user; change its owner or mode"
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', error)}); point --config.file at a readable file"
    else:
        if len(content) > FILE_LIMIT_BYTES:
            problem = "is larger than 1 MiB; point --config.file at a configuration file"
        else:
            try:
                return content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                line = content.count(b"\n", 0, error.start) + 1
                problem = f"is not UTF-8 text (line {line}); save it as UTF-8"
    raise ConfigError(f"configuration file {_printable(str(path))} {problem}")


def _refuse_unreadable_structure(file: str, text: str) -> None:
    """Refuse what makes a small file large or the parser recurse; raises `ConfigError`, `yaml.YAMLError`."""
    import yaml  # noqa: PLC0415

    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        place = f"{file}{_line(event.start_mark)}"
        if getattr(event, "anchor", None) is not None:
            raise ConfigError(f"{place}: anchors and aliases (& and *) are not allowed; write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > FILE_DEPTH:
            raise ConfigError(f"{place}: the file is nested too deeply; write sections with keys below them")


def _line(mark: Any) -> str:
    return f":{mark.line + 1}"


def _section_settings(file: str, loader: Any, node: Any, prefix: str) -> Iterator[tuple[str, _Setting]]:
    """Yield the settings below a node of the file; raises `ConfigError`."""
    section = prefix.rstrip(".")
    place = file + _line(node.start_mark)
    if node.id != "mapping":
        kind = "a list" if node.id == "sequence" else "a plain value"
        if not section:
            raise ConfigError(f"{place}: the file holds {kind}; write keys such as source: nvml")
        below = ", ".join(_keys_below(prefix))
        raise ConfigError(f"{place}: {section}: is a section, not {kind}; write below it, indented, {below}")
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        word = key_node.value
        place = file + _line(key_node.start_mark)
        if not isinstance(word, str):
            raise ConfigError(f"{place}: {section or 'the file'}: a key must be a word; remove the brackets")
        name = prefix + word
        if word in seen:
            raise ConfigError(f"{place}: {_clip(name)}: is already set in line {seen[word]}; remove one of the two")
        seen[word] = key_node.start_mark.line + 1
        if name in _SECTIONS:
            if not _is_null(value_node):
                yield from _section_settings(file, loader, value_node, name + ".")
        elif name in KEYS and "." not in word:
            yield name, _node_setting(loader, value_node, name, place)
        else:
            raise ConfigError(f"{place}: {_clip(name)}: is not a known key; {_mend_of_unknown(word, prefix)}")


def _is_null(node: Any) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _node_setting(loader: Any, node: Any, name: str, origin: str) -> _Setting:
    try:
        raw = loader.construct_object(node, deep=True)
    except (ValueError, OverflowError, AttributeError, TypeError, LookupError):
        # PyYAML's constructors fail with these on values such as 0x_ or 2024-99-99.
        allowed = KEYS[name].form.allowed(KEYS[name].meta)
        raise ConfigError(f"{origin}: {name}: {_show(node.value)} cannot be read; write {allowed}") from None
    # A number is shown as it stands in the file, so 010 is not shown as 8.
    is_plain = raw is not None and not isinstance(raw, str) and node.id == "scalar"
    return _Setting(raw, _clip(node.value) if is_plain else _show(raw), origin)


def _mend_of_unknown(word: str, prefix: str) -> str:
    wanted = (prefix + word).replace("-", "_").lower()
    section, _, last = wanted.rpartition(".")
    if wanted in KEYS and "." in word:
        return f'write "{section}:" and, indented below it, "{last}:"'
    if wanted in KEYS or wanted in _SECTIONS:
        return f"did you mean {wanted}?"
    elsewhere = [name for name in KEYS if name.rpartition(".")[2] == last]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    here = _keys_below(prefix)
    near = _nearest(word, here)
    meant = prefix + near if near else _nearest(wanted, list(KEYS))
    return f"did you mean {meant}?" if meant else f"known here: {', '.join(here)}"


def _keys_below(prefix: str) -> list[str]:
    """Return the names that may stand in a section."""
    return list(dict.fromkeys(name[len(prefix) :].split(".")[0] for name in KEYS if name.startswith(prefix)))


def _nearest(wrong: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(wrong[:SHOWN_CHARACTERS], known, n=1)), None)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _clip(text: str) -> str:
    """Return text that somebody else wrote, short and on one line."""
    return _printable(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def _show(value: object) -> str:
    """Return a wrong value for people."""
    match value:
        case None:
            return "the key"
        case bool():
            return "true" if value else "false"
        case str():
            return f'"{_clip(value)}"'
        case list():
            return "the list" if value else "the empty list"
        case int() if abs(value) > sys.maxsize:
            return "the number"  # Python refuses to print integers of more than 4300 digits.
        case int() | float():
            return str(value)
        case _:
            return f"the {type(value).__name__}"


def _alternatives(choices: Sequence[str]) -> str:
    return ", ".join(choices[:-1]) + " or " + choices[-1]


# --- writing ---


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every key to `parser`; `load` reads and checks them. Absent flags leave no trace."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for key in KEYS.values():
        section = key.name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"configuration: {section}" if section else "configuration")
        default = _default_text(key)
        text = f"{key.description} (default: {default})".replace("`", "").replace("%", "%%")
        options: dict[str, Any]
        if isinstance(key.form, _Switch):
            options = {"action": argparse.BooleanOptionalAction}
        else:
            options = {"metavar": key.form.metavar}
            if isinstance(key.form, _List):
                options["action"] = "append"
                text += " Repeatable."
        groups[section].add_argument(key.flag, dest=key.name, default=argparse.SUPPRESS, help=text, **options)


def changed_keys(before: Config, after: Config) -> list[str]:
    """Return the names of the keys that differ, in the order of the tree."""
    return [key.name for key in KEYS.values() if key.value_in(before) != key.value_in(after)]


def to_yaml(config: Config) -> str:
    """Return `config` as the YAML file that `load` reads back to an equal one."""
    import yaml  # noqa: PLC0415

    tree = _nested({key.name: key.form.write(key.value_in(config)) for key in KEYS.values()})
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1_000_000))


def _default_text(key: Key) -> str:
    written = key.form.write(key.default)
    if isinstance(written, bool):
        return "true" if written else "false"
    if isinstance(written, list):
        return ", ".join(map(str, written)) or "empty"
    return str(written) or "empty"


def reference_markdown() -> str:
    """Return docs/configuration.md: what every key means, and its default, bounds, flag and variable."""
    defaults = to_yaml(Config()).rstrip()
    lines = [
        "<!-- Generated from exporter/jouletrace/config.py. Do not edit: run `make docs`. -->",
        "# Configuration",
        "",
        "Everything has a default. A YAML file (`--config.file`), environment variables and flags change it, "
        "each over the one before: defaults < file < environment < flags. `--print-config` shows the result "
        "as a file.",
        "",
        "- Durations are written as `500ms`, `10s`, `1m30s` or `2h`; a number without a unit is refused.",
        "- Flags and variables follow from the key: `log.level` is `--log.level` and `JOULETRACE_LOG_LEVEL`.",
        "- Lists are YAML lists in the file, values between commas in a variable, and a repeated flag.",
        "- A key that is true or false has two flags: `--replay.loop` and `--no-replay.loop`.",
        "- An empty variable counts as not set. Variables that Kubernetes makes for a Service named "
        "`jouletrace` are ignored.",
        "- Anything else that is unknown, set twice or impossible is refused, with exit code 2 and one line "
        "that names it. Anchors and aliases are refused, and so is a file of more than 1 MiB.",
        "",
        "The defaults as a file:",
        "",
        "```yaml",
        defaults,
        "```",
    ]
    section = None
    for key in KEYS.values():
        parent = key.name.rpartition(".")[0]
        if parent != section:
            section = parent
            lines += ["", f"## {section}" if section else "## Top level", ""]
            lines += [_SECTIONS[section], ""] if section else []
            lines += ["| Key, flag, variable | Default | Values | Meaning |", "|---|---|---|---|"]
        names = "<br>".join(f"`{name}`" for name in (key.name, key.flag, key.variable))
        default, allowed = _default_text(key), key.form.allowed(key.meta)
        lines.append(f"| {names} | {default} | {allowed} | {key.description} |")
    return "\n".join(lines) + "\n"
