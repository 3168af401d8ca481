"""Reads the metrics of serving engines once a second: tokens by model and the queue, without any change to the engine.

What comes out are load records. An engine that nothing else feeds gets its joules shared by them; of one whose requests
are told, they only say what its queue looks like.

A scrape must never cost energy. Health routes are not called (TGI's runs a GPU operation), and llama.cpp is asked which
models are awake first: there a scrape wakes a sleeping model, loads an unloaded one and restarts its idle timer.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec
import structlog
from aiohttp import hdrs
from yarl import URL

from jouletrace.config import EngineTarget
from jouletrace.engines.doors import OPEN, Door
from jouletrace.engines.families import (
    KINDS,
    MAX_PAGE_BYTES,
    MODEL_CHARACTERS,
    PATHS,
    Fact,
    Page,
    PageError,
    PageReader,
    SecondsOf,
    Series,
)
from jouletrace.engines.sink import Sink
from jouletrace.followed import FollowedFiles
from jouletrace.logs import Transitions
from jouletrace.requests.inbox import Loss
from jouletrace.requests.records import UNKNOWN_MODEL, EngineRecord, LoadRecord, ModelLoad, Record, Unit, Usage

INTERVAL_SECONDS: Final = 1.0
TIMEOUT_SECONDS: Final = 0.2
"""An engine answers in a few milliseconds; one that takes longer is not to be waited for, the next second will do."""
LONGEST_PAUSE_SECONDS: Final = 30.0
"""An engine that is away is asked after 1, 2, 4, ... seconds, at last this often."""
DISCOVER_SECONDS: Final = 10.0
"""How often engines are looked for: as often as the processes on the GPUs are read."""
REPEAT_SECONDS: Final = 60.0
"""How often an engine is announced again."""
MOST_PER_SECOND: Final = 1e7
"""Tokens, inferences, steps or sequences' seconds above this are a counter's mistake: 8 GPUs make 100,000 tokens a
second, and read ten times as many."""
MOST_REDIRECTS: Final = 2
"""SGLang and others send from /metrics to /metrics/."""
MOST_SERIES: Final = 16_384
"""Counters of one engine that are remembered."""

Fetch = Callable[[str], Awaitable[bytes]]
"""Returns what is at a URL of an engine."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """An engine to scrape: where, and what is known of it beforehand."""

    url: str
    """Without path: http://127.0.0.1:8000"""
    engine_id: str
    kind: str | None = None
    """None: the page will say."""
    path: str | None = None
    """None: where engines of its kind have it."""
    pid: int | None = None
    """Of the process that listens."""
    pids: frozenset[int] = frozenset()
    """Of all its processes: a feed that names one of them tells of the same engine."""
    container_id: str | None = None
    pod_uid: str | None = None
    gpu_uuids: tuple[str, ...] = ()
    max_num_seqs: int | None = None
    falls_asleep: bool = False
    """llama.cpp with `--sleep-idle-seconds`: a scrape would keep it awake."""


def target_of(configured: EngineTarget) -> Target:
    """Return what the configuration says of an engine; one without id is named after its kind, host and port."""
    url = configured.url.rstrip("/")
    return Target(
        url=url,
        engine_id=configured.engine_id or f"{configured.kind or 'engine'}-{url.partition('://')[2]}",
        kind=configured.kind,
        path=configured.metrics_path,
        gpu_uuids=configured.gpu_uuids,
    )


class LoadMeter:
    """Turns the pages of one engine into what it did between them.

    A counter that fell has begun anew, with its engine or by itself, and all that it shows is new. The first page only
    says where the counters stand.
    """

    def __init__(self) -> None:
        self._values: dict[Series, float] = {}
        self._sources: dict[Fact, int] = {}
        self._kind = ""
        self._started_seconds: float | None = None
        self._read_ns: int | None = None

    def load(self, engine_id: str, page: Page, now_ns: int, names: Sequence[str] = ()) -> LoadRecord | None:
        """Return what the engine did since the page before; None for the first page of a kind of engine.

        `names` are the models of a page that names none. Raises PageError when counters went up impossibly fast.
        """
        if self._read_ns is None or page.kind.kind != self._kind:
            return None
        start_ns = min(self._read_ns, now_ns)
        models = self._models(page, names[0] if names else UNKNOWN_MODEL)
        most = MOST_PER_SECOND * max((now_ns - start_ns) / 1e9, 1.0)
        if any(sum(facts.get(fact, 0.0) for fact in _COUNTED) > most for facts in models.values()):
            raise PageError("its counters went up faster than any engine works")
        loads = [_model_load(model, facts, page.kind.seconds_of) for model, facts in models.items()]
        preempted = [value for series, value in page.counters.items() if series.fact is Fact.PREEMPTIONS]
        gauges = page.gauges
        is_asleep = gauges.get(Fact.AWAKE) == 0
        return LoadRecord(
            engine_id=engine_id,
            start_ns=start_ns,
            end_ns=now_ns,
            models=tuple(load for load in loads if load is not None),
            steps=round(sum(facts.get(Fact.STEPS, 0.0) for facts in models.values())),
            running=0 if is_asleep else _count(gauges.get(Fact.RUNNING)),
            waiting=_count(gauges.get(Fact.WAITING)),
            kv_usage=gauges.get(Fact.KV_USAGE),
            preemptions=_count(sum(preempted)) if preempted else None,
        )

    def rest(self, now_ns: int) -> None:
        """Say that the engine did nothing up to now: it sleeps."""
        if self._read_ns is not None:
            self._read_ns = now_ns

    def advance(self, page: Page, now_ns: int) -> None:
        """Go on from this page."""
        if page.kind.kind != self._kind or len(self._values) > MOST_SERIES:
            self._values.clear()
            self._sources.clear()
        self._kind, self._started_seconds, self._read_ns = page.kind.kind, page.started_seconds, now_ns
        # Series that are missing from a page, of a rank that restarts, may come back with the same counters.
        self._values.update(page.counters)
        self._sources.update({series.fact: series.source for series in page.counters})

    def _models(self, page: Page, unnamed: str) -> dict[str, dict[Fact, float]]:
        """Return by model what was added to each counter."""
        restarted = (
            page.started_seconds is not None
            and self._started_seconds is not None
            and page.started_seconds > self._started_seconds + 1
        )
        models: dict[str, dict[Fact, float]] = {}
        for series, value in page.counters.items():
            last = self._values.get(series)
            if last is None and self._sources.get(series.fact, series.source) != series.source:
                continue  # Another family tells this from now on; what it counted so far is told already.
            added = value if last is None or value < last or restarted else value - last
            facts = models.setdefault(page.models.get(series.labels) or unnamed, {})
            facts[series.fact] = facts.get(series.fact, 0.0) + added
        return models


_COUNTED: Final = (
    *(Fact.INPUT, Fact.COMPUTED, Fact.CACHED, Fact.OUTPUT, Fact.INFERENCES),
    *(Fact.STEPS, Fact.PREFILL_SECONDS, Fact.DECODE_SECONDS),
)


def _count(value: float | None) -> int | None:
    return None if value is None or value > 2**40 else round(value)


def _model_load(model: str, facts: Mapping[Fact, float], seconds_of: SecondsOf) -> ModelLoad | None:
    """Return what one model did, None for nothing."""
    cached, output = facts.get(Fact.CACHED, 0.0), facts.get(Fact.OUTPUT, 0.0)
    prompt = facts[Fact.COMPUTED] + cached if Fact.COMPUTED in facts else facts.get(Fact.INPUT, 0.0)
    made = facts.get(Fact.INFERENCES, 0.0)
    prefill_seconds, decode_seconds = facts.get(Fact.PREFILL_SECONDS), facts.get(Fact.DECODE_SECONDS)
    steps = facts.get(Fact.STEPS, 0.0)
    if seconds_of is SecondsOf.SEQUENCES and decode_seconds is not None and 0 < steps < (output or made):
        # Those that were computed together each count their batch's time.
        decode_seconds *= steps / (output or made)
    if not (prompt or output or made or prefill_seconds or decode_seconds):
        return None
    if made and not output and not prompt:
        usage = Usage(unit=Unit.INFERENCE, count=round(made))
    else:
        usage = Usage(input=round(prompt), cached_input=min(round(cached), round(prompt)), output=round(output))
    return ModelLoad(model=model, usage=usage, prefill_seconds=prefill_seconds, decode_seconds=decode_seconds)


@dataclass(slots=True)
class _Watch:
    """What is remembered of a target."""

    target: Target
    due: float = 0.0
    failures: int = 0
    path: str | None = None
    """Where its page was found."""
    has_llama_models: bool | None = None
    """Whether it is llama.cpp, which must be asked before each scrape; None until asked."""
    was_found: bool = False
    parts: dict[str, "_Part"] = field(default_factory=dict)
    """By model of a llama.cpp router, else one under ""."""


@dataclass(slots=True)
class _Part:
    """One engine behind a target."""

    reader: PageReader = field(default_factory=PageReader)
    meter: LoadMeter = field(default_factory=LoadMeter)
    names: tuple[str, ...] = ()
    """Its models, where the page names none."""
    announced: EngineRecord | None = None
    announced_at: float = 0.0
    told_as: str = ""
    """The engine id of its last record."""


class _AwayError(Exception):
    """An engine cannot be scraped now; the message says why and what to do."""


class _AsleepError(Exception):
    """An engine must not be scraped now."""


class EngineScraper:
    """Scrapes engines and sends what they did to a sink. Belongs to the event loop.

    `discover` (called in a thread) finds engines on this machine, None does not look for any. `known` returns the
    engines that the account knows: where a feed has announced the engine already, its id is used. `doors` has by URL
    what engines ask for that do not let everybody read.
    """

    def __init__(
        self,
        sink: Sink,
        targets: Sequence[Target],
        *,
        discover: Callable[[], Sequence[Target]] | None,
        known: Callable[[], Sequence[EngineRecord]],
        doors: Mapping[str, FollowedFiles[Door]] | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        self._sink = sink
        self._targets = tuple(targets)
        self._discover = discover
        self._known = known
        self._doors = doors or {}
        self._wall_ns = wall_ns
        self._interval_seconds = interval_seconds
        self._watches: dict[str, _Watch] = {target.url: _Watch(target) for target in targets}
        self._failures = Transitions(_log, time.monotonic_ns)
        self._full = False

    async def run(self) -> None:
        """Scrape until cancelled."""
        # A few connections each: data-parallel engines have one port, and a page is asked for once a second.
        connector = aiohttp.TCPConnector(limit=64, limit_per_host=2, keepalive_timeout=30)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        headers = {"Accept": "text/plain", "Accept-Encoding": "identity", "User-Agent": "jouletrace"}
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers, auto_decompress=False
        ) as session:
            look_due = due = time.monotonic()
            while True:
                if self._discover is not None and time.monotonic() >= look_due:
                    look_due = time.monotonic() + DISCOVER_SECONDS
                    await self._look_around(self._discover)
                now = time.monotonic()
                await asyncio.gather(
                    *(self._visit(watch, session) for watch in list(self._watches.values()) if watch.due <= now)
                )
                due = max(due + self._interval_seconds, time.monotonic())
                if not self._watches:
                    # Nobody is there to be asked before the next look.
                    due = max(due, look_due)
                await asyncio.sleep(due - time.monotonic())

    async def _look_around(self, discover: Callable[[], Sequence[Target]]) -> None:
        try:
            found = await asyncio.to_thread(discover)
        except Exception:
            self._failures.failed("discovery", "engines cannot be looked for; please report this", exc_info=True)
            return
        self._failures.recovered("discovery", "engines are looked for again")
        there = {_place(target.url): target for target in found}
        configured = [_completed(target, there.pop(_place(target.url), None)) for target in self._targets]
        present = {target.url: target for target in (*there.values(), *configured)}
        for url in self._watches.keys() - present.keys():
            gone = self._watches.pop(url)
            self._say_ended(gone)
            self._failures.recovered(url, "an engine that could not be scraped is gone", url=url)
            if gone.was_found:
                _log.info("an engine is gone", engine=gone.target.engine_id, url=url)
        for url, target in present.items():
            watch = self._watches.get(url)
            if watch is not None and watch.target.pid in (None, target.pid):
                watch.target = target
            else:
                # Another process has the port: what it counts has nothing to do with what was counted before.
                if watch is not None:
                    self._say_ended(watch, unless=target.engine_id)
                self._watches[url] = _Watch(target)

    async def _visit(self, watch: _Watch, session: aiohttp.ClientSession) -> None:
        url = watch.target.url
        door = self._doors[url].value if url in self._doors else OPEN
        try:
            for name, page, names in await self._pages(watch, partial(_fetched, session, door)):
                part = watch.parts.setdefault(name, _Part())
                part.names = names or part.names
                self._take(watch, part, name, page)
        except _AsleepError:
            watch.failures = 0
            for part in watch.parts.values():
                part.meter.rest(self._wall_ns())
            return
        except (_AwayError, PageError) as error:
            watch.failures += 1
            pause = self._interval_seconds * 2.0 ** min(watch.failures - 1, 10)
            watch.due = time.monotonic() + min(pause, LONGEST_PAUSE_SECONDS)
            watch.path = None
            # One slow answer is no news.
            if watch.failures > 1 or not watch.was_found:
                self._failures.failed(
                    url,
                    "an engine's metrics cannot be read",
                    engine=watch.target.engine_id,
                    url=url,
                    problem=str(error),
                )
            return
        watch.failures = 0
        self._failures.recovered(url, "an engine's metrics can be read again", engine=watch.target.engine_id, url=url)
        if not watch.was_found:
            watch.was_found = True
            _log.info("scraping an engine", engine=watch.target.engine_id, url=url + (watch.path or ""))

    # ---------------------------------------------------------------- pages

    async def _pages(self, watch: _Watch, fetch: Fetch) -> list[tuple[str, Page, tuple[str, ...]]]:
        """Return the pages of a target: under which name, what it told, and models that it does not name."""
        target = watch.target
        if target.falls_asleep:
            raise _AsleepError
        names: tuple[str, ...] = ()
        if watch.has_llama_models is not False and target.kind in (None, "llamacpp"):
            models = await self._llama_models(fetch, target.url)
            watch.has_llama_models = models is not None or target.kind == "llamacpp"
            names = tuple(name[-MODEL_CHARACTERS:] for name in models or () if name.isprintable())
            statuses = {name: status for name, status in (models or {}).items() if status and _is_label(name)}
            if statuses:
                awake = [name for name, status in statuses.items() if status == "loaded"]
                if not awake:
                    raise _AsleepError
                return [
                    (
                        name,
                        await self._page(
                            watch, fetch, f"/metrics?model={quote(name, safe='')}&autoload=false", name, "llamacpp"
                        ),
                        (name,),
                    )
                    for name in awake
                ]
            if models is not None and await self._is_asleep(fetch, target.url):
                raise _AsleepError
        page = await self._found_page(watch, fetch, "llamacpp" if watch.has_llama_models else target.kind)
        if page.kind.kind == "tgi" and not (watch.parts and watch.parts[""].names):
            names = await self._tgi_model(fetch, target.url)
        return [("", page, names)]

    async def _found_page(self, watch: _Watch, fetch: Fetch, kind: str | None) -> Page:
        """Return the page at the path where it is; looks at every path where it may be."""
        target = watch.target
        given = watch.path or target.path
        usual = KINDS[kind].paths if kind is not None and kind in KINDS else PATHS
        paths = (given,) if given else usual
        problem: Exception = _AwayError("there is no path to ask")
        for path in paths:
            try:
                page = await self._page(watch, fetch, path, "", kind)
            except (_AwayError, PageError) as error:
                problem = error
                continue
            watch.path = path
            return page
        raise problem

    async def _page(self, watch: _Watch, fetch: Fetch, path: str, name: str, kind: str | None) -> Page:
        content = await fetch(watch.target.url + path)
        part = watch.parts.get(name)
        return (part.reader if part else PageReader()).read(content, kind)

    async def _llama_models(self, fetch: Fetch, url: str) -> dict[str, str] | None:
        """Return the models of a llama.cpp server with their status ("" where it has none); None for another server."""
        try:
            answer: Any = _document(await fetch(url + "/v1/models"))
            models = [one for one in answer["data"] if isinstance(one, dict) and isinstance(one.get("id"), str)]
        except _AwayError as error:
            if isinstance(error.__cause__, TimeoutError | aiohttp.ClientConnectionError):
                raise
            return None
        except (KeyError, TypeError):
            return None
        if not any(one.get("owned_by") == "llamacpp" or "status" in one for one in models):
            return None
        return {one["id"]: _llama_status(one) for one in models}

    async def _is_asleep(self, fetch: Fetch, url: str) -> bool:
        """Return whether a llama.cpp server says that it sleeps; `/props` is answered without waking it."""
        try:
            answer = _document(await fetch(url + "/props"))
        except _AwayError:
            return False
        return isinstance(answer, dict) and answer.get("is_sleeping") is True

    async def _tgi_model(self, fetch: Fetch, url: str) -> tuple[str, ...]:
        """Return the model of a TGI server, whose page names none."""
        try:
            answer = _document(await fetch(url + "/info"))
        except _AwayError:
            return ()
        model = answer.get("model_id") if isinstance(answer, dict) else None
        return (model,) if isinstance(model, str) and _is_label(model) else ()

    # ---------------------------------------------------------------- records

    def _take(self, watch: _Watch, part: _Part, name: str, page: Page) -> None:
        """Send what a page tells."""
        now_ns = self._wall_ns()
        own_id = watch.target.engine_id + (f":{name}" if name else "")
        records: list[Record] = []
        others = self._told_by_others(watch.target, own_id, page.kind.kind)
        if len(others) > 1:
            # Each rank tells of itself, and nobody can say which of them a page's totals belong to.
            part.meter.advance(page, now_ns)
            self._end_former(part, "", records)
            if records:
                self._sink.offer(records)
            return
        engine_id = others[0].engine_id if others else own_id
        load = part.meter.load(engine_id, page, now_ns, part.names)
        self._end_former(part, engine_id, records)
        if not others:
            engine = _engine(watch.target, engine_id, page, part.names)
            now = time.monotonic()
            if engine != part.announced or now - part.announced_at >= REPEAT_SECONDS:
                records.append(engine)
        if load is not None:
            records.append(load)
        if records and not self._sink.offer(records):
            if not self._full:
                self._full = True
                self._sink.lost(Loss.QUEUE_FULL, 1)
            return  # The next page tells all that has happened since the one before.
        self._full = False
        part.told_as = engine_id
        part.meter.advance(page, now_ns)
        if records and isinstance(records[0], EngineRecord) and not records[0].ended:
            part.announced, part.announced_at = records[0], time.monotonic()

    def _told_by_others(self, target: Target, own_id: str, kind: str) -> list[EngineRecord]:
        """Return the engines that a feed of their own has announced and that are this target."""
        ours = {part.told_as for watch in self._watches.values() for part in watch.parts.values() if part.announced}
        others = [one for one in self._known() if one.engine_id != own_id and one.engine_id not in ours]
        pids = target.pids or ({target.pid} if target.pid is not None else set())
        same = [one for one in others if one.pid in pids]
        if same:
            return same
        # A feed that knows no process, such as the proxy: an engine of this kind on these GPUs is the same one.
        gpus = set(target.gpu_uuids)
        return [
            one
            for one in others
            if one.pid is None
            and one.kind == kind
            and (set(one.gpu_uuids) == gpus if one.gpu_uuids else len(self._watches) == 1)
        ]

    def _end_former(self, part: _Part, engine_id: str, records: list[Record]) -> None:
        """Say that what was announced under another id goes by this one now."""
        if part.announced is not None and part.announced.engine_id != engine_id:
            records.append(EngineRecord(engine_id=part.announced.engine_id, kind=part.announced.kind, ended=True))
            part.announced = None

    def _say_ended(self, watch: _Watch, unless: str = "") -> None:
        records: list[Record] = []
        for part in watch.parts.values():
            self._end_former(part, unless, records)
        if records:
            self._sink.offer(records)


def _place(url: str) -> str:
    """Return host and port of a URL as discovery writes them; it does not know who speaks TLS."""
    place = url.partition("//")[2]
    return f"127.0.0.1:{place.removeprefix('localhost:')}" if place.startswith("localhost:") else place


def _completed(target: Target, found: Target | None) -> Target:
    """Return a configured target with what discovery knows of the same port."""
    if found is None:
        return target
    return Target(
        url=target.url,
        engine_id=target.engine_id,
        kind=target.kind or found.kind,
        path=target.path or found.path,
        pid=found.pid,
        pids=found.pids,
        container_id=found.container_id,
        pod_uid=found.pod_uid,
        gpu_uuids=target.gpu_uuids or found.gpu_uuids,
        max_num_seqs=found.max_num_seqs,
        falls_asleep=found.falls_asleep,
    )


def _engine(target: Target, engine_id: str, page: Page, names: Sequence[str]) -> EngineRecord:
    told = dict.fromkeys(model for model in page.models.values() if model)
    limit = _count(page.gauges.get(Fact.MAX_RUNNING)) or target.max_num_seqs
    return EngineRecord(
        engine_id=engine_id,
        kind=page.kind.kind,
        models=(tuple(told) or tuple(names))[:256],
        pid=target.pid,
        container_id=target.container_id,
        pod_uid=target.pod_uid,
        gpu_uuids=target.gpu_uuids,
        max_num_seqs=limit,
    )


def _llama_status(model: Mapping[str, Any]) -> str:
    """Return what a llama.cpp router says of a model; one that falls asleep by itself counts as asleep."""
    status = model.get("status")
    if not isinstance(status, Mapping):
        return ""
    arguments = status.get("args")
    if isinstance(arguments, list) and falls_asleep([str(one) for one in arguments]):
        return "sleeping"
    value = status.get("value")
    return value if isinstance(value, str) and value else "unloaded"


def falls_asleep(arguments: Sequence[str]) -> bool:
    """Return whether llama.cpp was told to unload its model when nobody asks for it."""
    for at, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == "--sleep-idle-seconds":
            value = value or next(iter(arguments[at + 1 : at + 2]), "")
            return not value.startswith("-")
    return False


def _document(content: bytes) -> object:
    """Return what JSON says, None for what is none."""
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _is_label(name: str) -> bool:
    """Return whether a name may stand in a record as a model."""
    return 0 < len(name) <= MODEL_CHARACTERS and name.isprintable()


async def _fetched(session: aiohttp.ClientSession, door: Door, url: str) -> bytes:
    """Return what is at a URL, at most a little more than a page may have; raises _AwayError."""
    at = URL(url)
    try:
        for _ in range(MOST_REDIRECTS + 1):
            async with session.get(
                at, allow_redirects=False, headers=door.headers, ssl=door.tls, server_hostname=door.server_name
            ) as response:
                if response.status in (401, 403):
                    raise _AwayError(
                        f"it answered {response.status}: it wants a key for this page; let it be read without, or name "
                        "the key's file in authorization.credentials_file of engines.targets"
                    )
                if response.status in (301, 302, 303, 307, 308):
                    at = _within_engine(at, response.headers.get(hdrs.LOCATION, ""))
                    continue
                if response.status != 200:
                    raise _AwayError(f"it answered {response.status}")
                content = bytearray()
                while len(content) <= MAX_PAGE_BYTES and (chunk := await response.content.read(1 << 16)):
                    content += chunk
                return bytes(content)
    except TimeoutError as error:
        raise _AwayError(f"it did not answer within {TIMEOUT_SECONDS * 1000:.0f} ms") from error
    except aiohttp.ClientConnectorCertificateError as error:
        raise _AwayError(
            f"its certificate is not trusted ({error.certificate_error}): name its authority in tls_config.ca_file of "
            "engines.targets"
        ) from error
    except (aiohttp.ClientError, ValueError) as error:
        raise _AwayError(f"{type(error).__name__}: {error}") from error
    raise _AwayError("it redirects again and again")


def _within_engine(url: URL, location: str) -> URL:
    """Return where an answer sends to; raises _AwayError for another place.

    An engine belongs to a tenant: it must not let this process ask others in its name, nor have them get its key.
    """
    to = url.join(URL(location))
    if to.origin() != url.origin():
        raise _AwayError("it redirects to another host or port: if that is the engine, name that in engines.targets")
    return to
