"""`jouletrace top`: the live monitor in a terminal, from the same stream as the page."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import ssl
import sys
import termios
import tty
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jouletrace.config import ConfigError, unix_path
from jouletrace.diagnosis.drivers import Driver
from jouletrace.trace.report import printable

DEFAULT_SOCKET: Final = Path("/run/jouletrace/web.sock")
DEFAULT_URL: Final = "http://127.0.0.1:9841"
"""Where a daemon is looked for, one after the other; the second is its default listener."""
FIRST_WAIT_SECONDS: Final = 1.0
LONGEST_WAIT_SECONDS: Final = 15.0
SILENT_SECONDS: Final = 10.0
"""A stream that says nothing for so long is dead: it has a round each second."""
MOST_EVENT_BYTES: Final = 8 << 20
"""The longest event: a window's traces of 8 GPUs take 167 kB."""
SET_BACK_MS: Final = 1000
"""News that end so long before what is known are of a clock that was set back."""
BLOCKS: Final = " ▁▂▃▄▅▆▇█"
ASCII_BLOCKS: Final = " .:-=+*#@"
DRIVER_STYLES: Final = ("bright_black", "blue", "yellow", "green", "magenta", "red")
"""Colours by the driver's place, as on the page."""
NARROWEST: Final = 60

_LOST = {
    "lost": "LOST",
    "stale": "STALE",
    "stalled": "STALLED: a driver call hangs",
    "starting": "starting",
}


class StreamError(Exception):
    """The stream cannot be followed; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """The daemon that is watched, and how to get in."""

    name: str
    """As people write it."""
    url: str
    socket: Path | None = None
    """The Unix socket behind the URL."""
    headers: Callable[[], Mapping[str, str]] = dict
    """Secrets, read from their files for each connection: they may have been replaced; raises ConfigError."""
    tls: ssl.SSLContext | None = None

    def session(self) -> aiohttp.ClientSession:
        """Return a session with it."""
        if self.socket is not None:
            return aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket)))
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self.tls or True))


def find_target(
    address: str | None,
    *,
    token_file: Path | None = None,
    user: str | None = None,
    password_file: Path | None = None,
    ca_file: Path | None = None,
    cert_file: Path | None = None,
    key_file: Path | None = None,
) -> Target:
    """Return the daemon at a URL or `unix:/PATH`; without one, the default ones are looked for.

    Secrets come from files: other users see the command line. Raises ConfigError.
    """
    if address is None:
        address = f"unix:{DEFAULT_SOCKET}" if _listens(DEFAULT_SOCKET) else DEFAULT_URL
    headers = partial(_headers, token_file, user, password_file)
    headers()  # What is wrong is told at once.
    wants_tls = any((ca_file, cert_file, key_file))
    path = unix_path(address)
    if path is None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ConfigError(
                f"{printable(address).rpartition('@')[2]}: is not where a daemon can be; write http://HOST:PORT, "
                "https://HOST:PORT or unix:/PATH, and a user as --user with --password-file"
            )
        if parts.scheme == "https":
            return Target(address, address, headers=headers, tls=_tls(ca_file, cert_file, key_file))
    if wants_tls:
        raise ConfigError(f"{address}: --ca-file, --cert-file and --key-file are for a URL that begins with https://")
    return Target(address, address if path is None else "http://localhost", path, headers)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == 0


def _headers(token_file: Path | None, user: str | None, password_file: Path | None) -> Mapping[str, str]:
    if (user is None) != (password_file is None):
        raise ConfigError("--user and --password-file go together: give both")
    if token_file is not None and user is not None:
        raise ConfigError("--token-file and --user exclude each other: the token lets in without a password")
    if token_file is not None:
        first, _, _ = _secret("--token-file", token_file).partition("\n")
        return {"Authorization": f"Bearer {first.strip()}"}
    if user is not None and password_file is not None:
        login = f"{user}:{_secret('--password-file', password_file)}"
        return {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
    return {}


def _secret(flag: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as failure:
        reason = getattr(failure, "strerror", None) or "it is not text"
        raise ConfigError(f"{flag}: {file} cannot be read ({reason}); name a file that you may read") from None


def _tls(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as failure:  # ssl.SSLError is one, too.
        raise ConfigError(
            f"--ca-file: {ca_file} cannot be used ({failure.strerror}); name a file of PEM certificates"
        ) from None
    if cert_file is not None:
        try:
            # Without a password that it could ask for, an encrypted key is refused.
            context.load_cert_chain(cert_file, key_file, password="")
        except OSError as failure:
            raise ConfigError(
                f"--cert-file, --key-file: {cert_file} cannot be used ({failure.strerror}); name a certificate and "
                "its key, unencrypted, as PEM"
            ) from None
    elif key_file is not None:
        raise ConfigError("--key-file goes with --cert-file: give both")
    return context


@dataclass(slots=True)
class Seen:
    """What the stream has told so far."""

    hello: Mapping[str, Any] = field(default_factory=dict)
    node: Mapping[str, Any] = field(default_factory=dict)
    requests: Mapping[str, Any] = field(default_factory=dict)
    traces: dict[str, deque[tuple[float, float]]] = field(default_factory=dict)
    """By uuid: (epoch ms of its end, watts) of each segment of the window."""

    def take(self, event: str, data: Any) -> None:
        """Take in an event."""
        match event:
            case "hello":
                self.hello = data
            case "node":
                self.node = data
            case "requests":
                self.requests = data
            case "trace":
                for uuid, piece in data.items():
                    self._add(uuid, piece)

    def _add(self, uuid: str, piece: Mapping[str, Any]) -> None:
        points = self.traces.setdefault(uuid, deque())
        at_ms = piece["start_ms"]
        if points and at_ms + sum(piece["steps_ms"]) < points[-1][0] - SET_BACK_MS:
            points.clear()
        last_ms = points[-1][0] if points else 0
        for step_ms, watts in zip(piece["steps_ms"], piece["watts"], strict=True):
            at_ms += step_ms
            # Of some times nobody knows.
            if at_ms > last_ms and watts is not None:
                points.append((at_ms, watts))
        window_ms = self.hello.get("window_seconds", 60) * 1000
        while points and points[0][0] < at_ms - window_ms:
            points.popleft()


async def events(session: aiohttp.ClientSession, target: Target) -> AsyncGenerator[tuple[str, Any], None]:
    """Yield the stream's events (name, data); raises StreamError when it cannot be had or ends."""
    name = target.name
    address = f"{target.url.rstrip('/')}/v1/live"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENT_SECONDS)
    try:
        async with session.get(address, headers=target.headers(), timeout=timeout) as answer:
            if answer.status != 200:
                raise StreamError(await _refusal(answer, name))
            async for event, data in _parsed(answer.content):
                yield event, data
    except ConfigError as failure:
        raise StreamError(str(failure)) from None
    except TimeoutError:
        raise StreamError(f"{name} has gone silent; look at its log") from None
    except aiohttp.ClientConnectorCertificateError as failure:
        reason = getattr(failure.certificate_error, "verify_message", "") or str(failure.certificate_error)
        raise StreamError(
            f"{name} is not trusted ({printable(reason)}); name the file of its certificate authority with --ca-file, "
            "and use a name that its certificate has"
        ) from None
    except (aiohttp.ClientError, OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure) or type(failure).__name__
        raise StreamError(
            f"{name} cannot be reached ({printable(reason)}); is `jouletrace run` running there, "
            "is this its web.listen_address, and does it want https:// or a client certificate (--cert-file)?"
        ) from None
    raise StreamError(f"{name} has ended the stream; is it being restarted?")


async def _parsed(content: aiohttp.StreamReader) -> AsyncIterator[tuple[str, Any]]:
    rest = b""
    async for part in content.iter_any():
        *whole, rest = (rest + part).split(b"\n\n")
        if len(rest) > MOST_EVENT_BYTES:
            raise ValueError("an event without an end")
        for event in whole:
            name, _, data = event.partition(b"\n")
            yield name.removeprefix(b"event: ").decode(), json.loads(data.removeprefix(b"data: "))


async def _refusal(answer: aiohttp.ClientResponse, name: str) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError, aiohttp.ClientError):
        return printable(f"{name}: {json.loads(await answer.read())['error']['message']}")
    return f"{name} answers {answer.status}: this is no jouletrace, or one from before `top`"


async def rounds(session: aiohttp.ClientSession, target: Target) -> AsyncGenerator[tuple[Seen, dict[str, Any]], None]:
    """Yield what is known after each round, and that round's events by name; raises StreamError."""
    seen = Seen()
    news: dict[str, Any] = {}
    stream = events(session, target)
    async with contextlib.aclosing(stream):
        async for name, data in stream:
            seen.take(name, data)
            news[name] = data
            # A round ends with the requests, for those who see them.
            if name == ("node" if seen.hello.get("requests_refused") else "requests"):
                yield seen, news
                news = {}


def run(target: Target, *, once: bool = False, as_json: bool = False) -> int:
    """Show the monitor of a daemon until `q`; return the exit code. Raises StreamError."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without a letter gets a mark in its place, not an error.
        sys.stdout.reconfigure(errors="replace")
    if as_json or once:
        return asyncio.run(_print(target, once=once, as_json=as_json))
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise StreamError("top needs a terminal; in a script use --once, --json or both")
    return asyncio.run(_Screen(target).run())


async def _print(target: Target, *, once: bool, as_json: bool) -> int:
    async with target.session() as session, contextlib.aclosing(rounds(session, target)) as stream:
        async for seen, news in stream:
            if as_json:
                print(json.dumps(news), flush=True)
            else:
                console = Console(highlight=False)
                console.print(view(seen, target.name, Look.of(console), height=None))
            if once:
                break
    return 0


@dataclass(frozen=True, slots=True)
class Look:
    """What the terminal can show."""

    width: int
    blocks: str

    @classmethod
    def of(cls, console: Console) -> "Look":
        """Return what a console can show."""
        unicode = "utf" in console.encoding.lower()
        return cls(max(console.width, NARROWEST), BLOCKS if unicode else ASCII_BLOCKS)


class _Screen:
    """The monitor on a whole screen, with keys."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._console = Console(highlight=False)
        self._seen = Seen()
        self._problem = "connecting"
        self._holds = False
        self._done = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._done.set)
        with (
            _keys(sys.stdin.fileno()),
            Live(self._view(), console=self._console, screen=True, auto_refresh=False) as live,
        ):
            self._live = live
            loop.add_reader(sys.stdin.fileno(), self._key)
            loop.add_signal_handler(signal.SIGWINCH, self._show)
            following = asyncio.create_task(self._follow())
            await asyncio.wait({asyncio.create_task(self._done.wait()), following}, return_when="FIRST_COMPLETED")
            loop.remove_reader(sys.stdin.fileno())
            following.cancel()
            await asyncio.wait({following})
        if not following.cancelled() and (failure := following.exception()) is not None:
            raise failure
        return 0

    async def _follow(self) -> None:
        wait_seconds = FIRST_WAIT_SECONDS
        async with self._target.session() as session:
            while True:
                try:
                    async with contextlib.aclosing(rounds(session, self._target)) as stream:
                        async for seen, _ in stream:
                            wait_seconds, self._problem, self._seen = FIRST_WAIT_SECONDS, "", seen
                            if not self._holds:
                                self._show()
                except StreamError as failure:
                    for left in range(round(wait_seconds), 0, -1):
                        self._problem = f"Old, trying again in {left} s: {failure}"
                        self._show()
                        await asyncio.sleep(1)
                    wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)

    def _key(self) -> None:
        pressed = os.read(sys.stdin.fileno(), 64)
        # An end of input is the terminal's end.
        if not pressed or b"q" in pressed:
            self._done.set()
        elif b"p" in pressed:
            self._holds = not self._holds
            self._show()

    def _show(self) -> None:
        self._live.update(self._view(), refresh=True)

    def _view(self) -> RenderableType:
        size = self._console.size
        look = Look.of(self._console)
        return view(
            self._seen,
            self._target.name,
            look,
            height=size.height,
            problem=self._problem,
            holds=self._holds,
            has_keys=True,
        )


@contextlib.contextmanager
def _keys(terminal: int) -> Iterator[None]:
    """Let single keys through, unseen."""
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


# ---------------------------------------------------------------- the view


def view(
    seen: Seen,
    name: str,
    look: Look,
    *,
    height: int | None,
    problem: str = "",
    holds: bool = False,
    has_keys: bool = False,
) -> RenderableType:
    """Return what is on the screen about the daemon of a name: at most `height` lines, everything for None."""
    lines = _head(seen, name, problem, holds)
    if not seen.node:
        return Group(*lines)
    foot = [Text("q quit   p hold", style="dim")] if has_keys else []
    node = seen.node
    head = len(lines)
    engines = [line for engine in node["engines"] for line in _engine(engine)]
    room = None if height is None else height - len(lines) - len(foot)
    each = 4
    if room is not None:
        # Fewer lines for a GPU where there are many; engines and requests get what is left.
        least = min(len(engines), room // 3)
        each = max(1, min(4, (room - least) // max(len(node["devices"]), 1)))
    for device in node["devices"]:
        lines += _device(device, seen.traces.get(device["uuid"], ()), look, node["now_ms"])[:each]
    lines += engines
    if problem:
        for line in lines[head:]:
            line.stylize("dim")
    if height is None:
        return Group(*lines, *_requests(seen, None))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    left = height - len(lines) - len(foot)
    return Group(*lines[: height - len(foot)], *(_requests(seen, left) if left >= 2 else ()), *foot)


def _head(seen: Seen, name: str, problem: str, holds: bool) -> list[Text]:
    node = seen.node
    title = Text.assemble(("jouletrace", "bold"), f" {seen.hello.get('version', '')}  {name}")
    if holds:
        title.append("  on hold", "yellow")
    lines = [title]
    if problem:
        lines.append(Text(problem, style="bold red"))
    if not node:
        return lines
    readable = [device for device in node["devices"] if device["watts"] is not None]
    account = node["account"]
    wasted = sum(account["wasted_joules"].values())
    in_flight = sum(engine["in_flight"] for engine in node["engines"])
    limit = sum(device["limit_watts"] or 0 for device in readable)
    gpus = f"{len(readable)} GPU{'' if len(readable) == 1 else 's'}"
    lines.append(
        Text.assemble(
            (f"{sum(device['watts'] for device in readable):.0f} W" if readable else "no power known", "bold"),
            f" of {limit:.0f} W, {gpus}, {in_flight} requests in flight, " if readable else ", ",
            (f"waste {joules(wasted)}", "yellow" if wasted else ""),
        )
    )
    # Before the first settling nobody knows; that is not 0.
    if account["settled_ms"] is not None:
        idle = account["idle_joules"]
        lines.append(
            Text(
                f"requests {joules(account['attributed_joules'])}, idle bare {joules(idle['bare'])} "
                f"parked {joules(idle['parked'])}, unattributed {joules(account['unattributed_joules'])}"
            )
        )
    lines += [Text(printable(reason), style="bold red") for reason in node["problems"]]
    return lines


def _device(device: Mapping[str, Any], points: Iterable[tuple[float, float]], look: Look, now_ms: int) -> list[Text]:
    """Return the lines about a GPU, the most important first."""
    name = printable(device["name"]).removeprefix("NVIDIA ")
    first = Text.assemble((f"GPU {device['gpu']:<2}", "bold"), f" {name[:14]:<14} ")
    verdict, drivers, limit = device["verdict"], device["drivers"], device["limit_watts"]
    if device["state"] != "ok":
        problem = printable(device["problem"])
        # The sampler's sentence may say it already.
        problem = problem.removeprefix(f"{device['state']} ")
        first.append(_LOST[device["state"]] + (f": {problem}" if problem else ""), "bold red")
        if device["age_seconds"] is not None:
            first.append(f" (newest sample {device['age_seconds']:.0f} s old)")
        return [first]
    first.append("   ? W" if device["watts"] is None else f"{device['watts']:4.0f} W", "bold")
    first.append(f" of {limit:.0f} W " if limit else " ")
    word = "no verdict" if verdict is None else verdict["verdict"].replace("_", " ")
    room = look.width - len(first.plain) - 24
    first.append(sparkline(points, now_ms, max(room, 4), limit, look.blocks), "cyan")
    first.append(f" {word}", "bold")
    if verdict is None:
        return [first]
    first.append(f" {verdict['confidence'] * 100:.0f} %")
    flags = ", ".join(verdict["flags"]).replace("_", " ")
    sentence = printable(verdict["sentence"].removeprefix(f"{verdict['verdict']}: "))
    held = _for_seconds((now_ms - verdict["since_ms"]) / 1000)
    # The flags come first: a narrow terminal cuts the end.
    second = Text.assemble("       ", (f"{flags}  " if flags else "", "bold yellow"), f"for {held}: {sentence}")
    return [first, second, *([_drivers(drivers, look)] if drivers else []), _more(device, verdict)]


def _drivers(drivers: Mapping[str, Any], look: Look) -> Text:
    whole = sum(drivers["watts"].values()) or 1.0
    cells = max(look.width // 5, 10)
    line = Text("       ")
    block = look.blocks[-1]
    for place, driver in enumerate(Driver):
        line.append(block * round(drivers["watts"].get(driver, 0.0) / whole * cells), DRIVER_STYLES[place])
    for place, driver in enumerate(Driver):
        line.append(f" {driver.value.replace('_', ' ')} ", DRIVER_STYLES[place])
        line.append(f"{drivers['watts'].get(driver, 0.0):.0f} W")
    return line


def _more(device: Mapping[str, Any], verdict: Mapping[str, Any]) -> Text:
    facts = []
    if device["max_watts"] is not None:
        facts.append(f"highest {device['max_watts']:.0f} W")
    if device["temperature_celsius"] is not None:
        facts.append(f"{device['temperature_celsius']:.0f} °C")
    levels = [f"{kind} {watts:.0f} W" for kind, watts in device["idle_watts"].items()]
    energies = [f"{kind} {joules(used)}" for kind, used in device["idle_joules"].items() if used]
    facts += [f"{name} {' '.join(values)}" for name, values in (("idle", levels), ("idle energy", energies)) if values]
    facts += [f"waste {cause} {joules(used)}" for cause, used in device["wasted_joules"].items() if used]
    facts += [
        f"{name.replace('_', ' ')} " + (f"{value:.3g}" if isinstance(value, float) else printable(value))
        for name, value in verdict["evidence"].items()
        if name not in ("watts", "margin")
    ]
    return Text("       " + ", ".join(facts), style="dim")


def sparkline(
    points: Iterable[tuple[float, float]],
    now_ms: float,
    cells: int,
    limit_watts: float | None,
    blocks: str = BLOCKS,
    window_ms: float = 60_000.0,
) -> str:
    """Return mean watts over time as blocks, the newest at the right; a cell without data is empty."""
    points = list(points)
    sums, counts = [0.0] * cells, [0] * cells
    most = max(limit_watts or 0.0, *(watts for _, watts in points), 1.0)
    for at_ms, watts in points:
        cell = int((at_ms - (now_ms - window_ms)) / window_ms * cells)
        if 0 <= cell < cells:
            sums[cell] += watts
            counts[cell] += 1
    top = len(blocks) - 1
    return "".join(
        blocks[max(1, min(top, round(total / count / most * top)))] if count else " "
        for total, count in zip(sums, counts, strict=True)
    )


def _engine(engine: Mapping[str, Any]) -> list[Text]:
    found = engine["diagnosis"]
    models = ", ".join(printable(model) for model in engine["models"])
    line = Text.assemble(("Engine ", "dim"), (printable(engine["engine_id"]), "bold"), f" {models}  ")
    line.append(f"{engine['in_flight']} in flight")
    if engine["waiting"] is not None:
        line.append(f", {engine['waiting']:.0f} waiting")
    if found is None:
        return [line]
    line.append(f"  {found['cause'].replace('_', ' ')}", "bold")
    if found["confidence"]:
        line.append(f" {found['confidence'] * 100:.0f} %")
    unit = found["unit"].replace("_", " ")
    if found["joules_per_unit"] is not None:
        line.append(f"  {joules(found['joules_per_unit'])}/{unit}")
    if found["reachable_joules_per_unit"] is not None:
        line.append(f" (reachable {joules(found['reachable_joules_per_unit'])})")
    if found["batch"] is not None:
        line.append(f"  batch {found['batch']:.3g}")
    if found["half_fixed_batch"] is not None:
        line.append(f", B* {found['half_fixed_batch']:.3g}")
    if engine["coverage"] is not None:
        line.append(f"  coverage {engine['coverage'] * 100:.0f} %")
    return [line, Text(f"       {printable(found['advice'])}")]


def _requests(seen: Seen, room: int | None) -> list[RenderableType]:
    refused = seen.hello.get("requests_refused")
    if refused:
        return [Text(f"Requests are not shown. {printable(refused)}", style="dim", no_wrap=True, overflow="ellipsis")]
    running, settled = seen.requests.get("in_flight", ()), seen.requests.get("settled", ())
    if room is not None:
        rows = max(room - 1, 0)
        running = running[: max(rows - min(len(settled), rows // 2), 0)]
        settled = settled[: rows - len(running)]
    if not running and not settled:
        return [Text("No request in flight or just settled.", style="dim")]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    for heading, is_number in (
        ("Request", False),
        ("Model", False),
        ("Tenant", False),
        ("State", False),
        ("Energy", True),
        ("J/token", True),
        ("Took", True),
    ):
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=True, overflow="ellipsis")
    now_ms = seen.node["now_ms"]
    for one in (*running, *settled):
        per_token = one["joules_per_output_token"]
        state = one["status"] if one["end_ms"] is None or one["final"] else "settling"
        table.add_row(
            # Rich would read brackets in a text as markup.
            Text(printable(one["request_id"])),
            Text(printable(one["model"])),
            Text(printable(one["tenant"])),
            state,
            joules(one["energy_joules"]) if one["final"] else f"~{joules(one['energy_joules'])}",
            "" if per_token is None else joules(per_token),
            _for_seconds(((one["end_ms"] or now_ms) - one["arrival_ms"]) / 1000),
        )
    return [table]


def joules(value: float) -> str:
    """Return joules with three digits and a unit."""
    for size, unit in ((1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    if value < 5e-4:  # Sums of floats seldom are 0.
        return "0 J"
    return f"{value:.0f} J" if value >= 100 else f"{value:.3g} J"


def _for_seconds(seconds: float) -> str:
    if seconds < 0:
        return "?"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
