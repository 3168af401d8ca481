"""The request side of the daemon as one service: records in, the account out.

Wires the ledger to what feeds it (HTTP API, Unix sockets), to the devices' timelines and to its journal.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog
from aiohttp import web

from jouletrace.clock import Clock
from jouletrace.config import Config, ConfigError, read_tokens
from jouletrace.diagnosis.node import DiagnosisSnapshot, NodeDiagnosis
from jouletrace.diagnosis.service import DiagnosisService
from jouletrace.energy.baseline import QUIET_ACTIVITY
from jouletrace.engines.discovery import Discovery
from jouletrace.engines.doors import doors_of
from jouletrace.engines.feeds import Feed, feeds_of
from jouletrace.engines.otlp.receiver import OtlpReceiver
from jouletrace.engines.otlp.tee import TeeCounts
from jouletrace.engines.scraping import EngineScraper, target_of
from jouletrace.engines.sink import InboxSink
from jouletrace.engines.sockets import DatagramServer, StreamServer
from jouletrace.followed import FollowedFiles, Note
from jouletrace.gpu.readings import ProcessReading
from jouletrace.gpu.sampler import LiveDevice
from jouletrace.notify import PassedSockets
from jouletrace.requests.account import LedgerSnapshot, RequestEnergy, Taken
from jouletrace.requests.devices import BusyTrack, DeviceView
from jouletrace.requests.inbox import Events, Inbox, Origin
from jouletrace.requests.journal import Journal, JournalError
from jouletrace.requests.law import Law, LawBook, PrefillSchedule
from jouletrace.requests.ledger import Ledger, Limits
from jouletrace.requests.records import EngineRecord
from jouletrace.requests.roofline import PEAKS, ModelDescription, peak_of, prior
from jouletrace.requests.service import LedgerService
from jouletrace.requests.state import LedgerState
from jouletrace.unix_sockets import MODES
from jouletrace.web.access import Access
from jouletrace.web.api import Api
from jouletrace.web.entrance import Entrance
from jouletrace.workloads.cgroups import Membership, membership_of
from jouletrace.workloads.processes import lineage

SHORT_CONTAINER_ID = 12

_log = structlog.get_logger(__name__)


class LawsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file of `ledger.laws_file`."""

    engines: dict[str, Law] = {}
    """Laws by engine id, as `jouletrace calibrate` prints them."""
    models: dict[str, Law] = {}
    """Laws by model."""
    schedules: dict[str, PrefillSchedule] = {}
    """How an engine runs prompts, by engine id, where its kind says otherwise."""
    descriptions: dict[str, ModelDescription] = {}
    """Models without a law: a roofline prior is made from what their config.json says and from `gpu`."""
    gpu: str = ""
    """The GPU of the descriptions' priors, one of `roofline.PEAKS`."""

    def book(self) -> LawBook:
        """Return the laws; raises ValueError when descriptions have no known GPU."""
        priors: dict[str, Law] = {}
        if self.descriptions:
            peak = peak_of(self.gpu)
            if peak is None:
                raise ValueError(f"gpu: {self.gpu!r} is not one of {', '.join(PEAKS)}, which descriptions need")
            priors = {model: prior(description, peak) for model, description in self.descriptions.items()}
        return LawBook(engines=self.engines, models={**priors, **self.models}, schedules=self.schedules)


@dataclass(frozen=True, slots=True)
class KnownModels:
    """What the operator has said of engines and models."""

    laws: LawBook = field(default_factory=LawBook)
    descriptions: Mapping[str, ModelDescription] = field(default_factory=dict)
    """By model."""


def read_laws(file: str) -> KnownModels:
    """Return what a JSON or YAML file says; raises ConfigError with one line."""
    if not file:
        return KnownModels()
    try:
        # Not strict: YAML 1.1 takes 8.03e9 for a word.
        content = msgspec.yaml.decode(Path(file).read_bytes(), type=LawsFile, strict=False)
        return KnownModels(content.book(), content.descriptions)
    except OSError as failure:
        raise ConfigError(
            f"ledger.laws_file: {file} cannot be read ({failure.strerror}); name a file that is there"
        ) from None
    except (msgspec.DecodeError, ValueError) as failure:
        problem = " ".join(str(failure).split())
        raise ConfigError(f"ledger.laws_file: {file}: {problem}; `jouletrace calibrate` prints a law") from None


def _followed_tokens(file: str, on_change: Callable[[Sequence[str]], None]) -> FollowedFiles[Sequence[str]] | None:
    key = "ingest.token_file"

    def read(note: Note) -> Sequence[str]:
        note(Path(file))
        return read_tokens(key, Path(file))

    return FollowedFiles(key, read, on_change=on_change) if file else None


class Accounting:
    """The services around the ledger: intake, API, journal and diagnosis.

    `live` says what the devices are now, `namespaces` those of the pods on them by pod uid and container id; both are
    called from a worker thread.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        live: Callable[[], Sequence[LiveDevice]],
        namespaces: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._config = config
        self._live = live
        self._tokens = _followed_tokens(config.ingest.token_file, self._use_tokens)
        self._inbox = Inbox(int(config.ingest.queue_records), int(config.ingest.queue_mebibytes) << 20)
        limits = Limits(
            in_flight=int(config.ledger.in_flight_requests),
            settled=int(config.ledger.settled_requests),
            tenants_per_model=int(config.ledger.tenants_per_model),
        )
        known = read_laws(config.ledger.laws_file)
        laws = known.laws
        self._journal: Journal[LedgerState] | None = Journal(Path(config.state_dir), LedgerState)
        state: LedgerState | None = None
        try:
            state = self._journal.open()
        except JournalError as failure:
            _log.warning("the account cannot be saved, a restart will begin anew", problem=str(failure))
            self._journal = None
        self._ledger = PlacedLedger.begin(state, limits, laws, clock.now_ns(), self._placed, _is_alive)
        self._ledger.payer = partial(payer, namespaces)
        self._service: LedgerService[Mapping[str, DeviceView], LedgerState] = LedgerService(
            self._ledger,
            self._inbox,
            clock=clock,
            devices=self._views,
            journal=self._journal,
        )
        parked_after_seconds = config.diagnosis.parked_after
        self._node = NodeDiagnosis(laws, known.descriptions, parked_after_seconds=parked_after_seconds)
        self._diagnosis = DiagnosisService(self._node, live, lambda: self._service.snapshot)
        self._api = Api(
            self._service,
            self._inbox,
            clock=clock,
            diagnosis=lambda: self._diagnosis.snapshot,
            tokens=() if self._tokens is None else self._tokens.value,
            max_body_bytes=int(config.ingest.max_body_mebibytes) << 20,
        )
        self._otlp = OtlpReceiver(
            config,
            self._inbox,
            admission=self._api.admission,
            entrance=self._api.entrance,
            engines=lambda: self._ledger.engines,
        )
        check = self._api.admission.check
        self._stream, self._datagram = StreamServer(self._inbox, check), DatagramServer(self._inbox, check)
        self._doors = doors_of(config.engines.targets)
        self._scraper = EngineScraper(
            InboxSink(self._inbox, Origin.SCRAPE),
            [target_of(target) for target in config.engines.targets],
            doors=self._doors,
            discover=Discovery(self._holders).targets if config.engines.discover else None,
            known=lambda: self._ledger.engines,
        )
        self._feeds = feeds_of(config.engines.targets, self._inbox)
        self._serving: list[asyncio.Task[None]] = []

    @property
    def snapshot(self) -> LedgerSnapshot:
        """The account as last settled."""
        return self._service.snapshot

    @property
    def diagnosis(self) -> DiagnosisSnapshot:
        """The diagnosis as last evaluated."""
        return self._diagnosis.snapshot

    def events(self) -> Events:
        """Return the counts of records."""
        return self._inbox.events()

    @property
    def entrance(self) -> Entrance:
        """Who may send records and ask what requests used."""
        return self._api.entrance

    async def running(self, limit: int) -> list[RequestEnergy]:
        """Return provisional answers about requests in flight, those of the most joules so far first."""
        return await self._service.running(limit)

    async def recent(self, limit: int) -> list[RequestEnergy]:
        """Return the final answers about the requests that ended last, the newest first."""
        return await self._service.recent(limit)

    def followed(self) -> list[FollowedFiles[Any]]:
        """Return the files that are re-read when they change."""
        return [*([] if self._tokens is None else [self._tokens]), *self._doors.values()]

    def tee(self) -> TeeCounts | None:
        """Return the counts of spans that were passed on, None when none are to be."""
        return self._otlp.tee()

    def routes(self) -> Sequence[web.AbstractRouteDef]:
        """Return the routes of the HTTP API and of OTLP."""
        return [*self._api.routes(), *self._otlp.routes()]

    async def start(self, on_end: Callable[[BaseException], None], passed: PassedSockets, access: Access) -> None:
        """Open the sockets and begin to settle; raises SocketError, ListenError and ConfigError.

        `on_end` hears of a service that died. A socket that systemd has opened stands in for the configured one.
        `access` says what TLS the listeners of spans speak.
        """
        ingest = self._config.ingest
        mode = MODES[ingest.socket_access]
        if passed.stream is not None:
            await self._stream.serve(passed.stream)
        elif ingest.stream_path is not None:
            await self._stream.start(ingest.stream_path, mode)
        if passed.datagram is not None:
            self._datagram.serve(passed.datagram)
        elif ingest.datagram_path is not None:
            await self._datagram.start(ingest.datagram_path, mode)

        await self._otlp.start(access)

        def ended(task: asyncio.Task[None]) -> None:
            failure = None if task.cancelled() else task.exception()
            if failure is not None:
                on_end(failure)

        services: list[Feed] = [self._service, self._diagnosis, self._scraper, *self._feeds]
        for service in services:
            task = asyncio.create_task(service.run())
            task.add_done_callback(ended)
            self._serving.append(task)

    def _use_tokens(self, tokens: Sequence[str]) -> None:
        self._api.entrance.use_tokens(tokens)

    def use_models(self, known: KnownModels) -> None:
        """Take other laws and descriptions of models, from the next settling on; may be called from any thread."""
        self._ledger.next_laws = known.laws
        self._node.use_laws(known.laws, known.descriptions)

    async def stop(self) -> None:
        """Take no more records, book what came, settle and save a last time."""
        await self._stream.stop()
        await self._datagram.stop()
        await self._otlp.stop()
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)
        if self._journal is not None:
            self._journal.close()

    def _placed(self, record: EngineRecord) -> EngineRecord:
        """Return an engine with its devices filled in by the processes that hold them."""
        if record.gpu_uuids or (record.pid is None and not record.container_id and not record.pod_uid):
            return record
        held = tuple(
            device.uuid
            for device in self._live()
            if any(belongs(process.pid, record) for process in device.processes or ())
        )
        return msgspec.structs.replace(record, gpu_uuids=held) if held else record

    def _holders(self) -> Mapping[str, Sequence[int]]:
        return {device.uuid: [process.pid for process in device.processes or ()] for device in self._live()}

    def _views(self) -> Mapping[str, DeviceView]:
        return {device.uuid: self._view(device) for device in self._live()}

    def _view(self, device: LiveDevice) -> DeviceView:
        busy = None
        if len(device.busy_ends_ns):
            busy = BusyTrack(device.busy_ends_ns, device.busy_ratios > QUIET_ACTIVITY)
        return DeviceView(
            device.timeline,
            held=device.held,
            busy=busy,
            engine_shares=self._shares(device.processes or ()),
            counter=device.counter,
            limit_watts=device.info.power_limit_watts,
        )

    def _shares(self, processes: Sequence[ProcessReading]) -> Mapping[str, float] | None:
        """Return the SM-time share by engine where several processes share a device."""
        shares: dict[str, float] = {}
        for process in processes:
            if process.sm_ratio is None:
                continue
            line = lineage(process.pid)
            for engine in self._ledger.engines:
                if engine.pid in line:
                    shares[engine.engine_id] = shares.get(engine.engine_id, 0.0) + process.sm_ratio
        return shares or None


def belongs(pid: int, record: EngineRecord, proc: Path = Path("/proc")) -> bool:
    """Return whether a process is one of an engine's, by what the engine says of itself."""
    if record.pid is not None:
        return record.pid in lineage(pid, proc)
    home = membership_of(pid, proc)
    if record.container_id:
        return _is_container(home.container_id, record.container_id)
    return home.pod_uid == record.pod_uid


def payer(namespaces: Callable[[], Mapping[str, str]], record: EngineRecord) -> str:
    """Return who pays for an engine's requests that name nobody: its pod's namespace; empty while that is not known."""
    known = namespaces()
    if not known:
        return ""
    home = Membership() if record.pid is None else membership_of(record.pid)
    said = record.container_id
    container = next((key for key in known if _is_container(key, said)), "") if said else ""
    keys = (record.pod_uid, home.pod_uid, container)
    return next((known[key] for key in keys if key and key in known), "")


def _is_container(container_id: str, said: str) -> bool:
    """Return whether a container is the one that an engine says it is in; `docker ps` shows the first twelve digits."""
    return len(said) >= SHORT_CONTAINER_ID and container_id.startswith(said)


def _is_alive(record: EngineRecord) -> bool:
    """Return whether the engine's process is there."""
    return record.pid is not None and bool(lineage(record.pid))


class PlacedLedger(Ledger):
    """A ledger that asks where an engine runs when it does not say, again and again until it is known.

    A process holds no GPU yet while it imports and reads its model. One that is there holds its GPU through the
    night, whether requests come or not.
    """

    _place: Callable[[EngineRecord], EngineRecord]
    _is_alive: Callable[[EngineRecord], bool]
    payer: Callable[[EngineRecord], str] | None = None
    """Says who pays for an engine's requests that name nobody; empty where it does not know."""
    next_laws: LawBook | None = None
    """What the next settling takes over; settling happens in a thread, which must not find two laws in one pass."""

    @classmethod
    def begin(
        cls,
        state: LedgerState | None,
        limits: Limits,
        laws: LawBook,
        start_ns: int,
        place: Callable[[EngineRecord], EngineRecord],
        is_alive: Callable[[EngineRecord], bool],
    ) -> "PlacedLedger":
        """Return a new ledger, or one that goes on from a state."""
        if state is None:
            ledger: Ledger = cls(limits, laws, start_ns=start_ns)
        else:
            ledger = cls.restore(state, limits, laws, start_ns=start_ns)
        assert isinstance(ledger, cls)
        ledger._place, ledger._is_alive = place, is_alive
        return ledger

    def is_alive(self, record: EngineRecord) -> bool:
        """Return whether the engine's process is there."""
        return self._is_alive(record)

    def add_engine(self, record: EngineRecord, now_ns: int) -> Taken:
        """Book an engine, with its devices found by its processes when it names none."""
        return super().add_engine(self._place(record), now_ns)

    def settle(self, devices: Mapping[str, DeviceView], now_ns: int, *, close_ns: int | None = None) -> None:
        """Settle, after another look for the devices of engines that had none."""
        if self.next_laws is not None:
            self.use_laws(self.next_laws)
            self.next_laws = None
        for record in self.engines:
            if not record.gpu_uuids:
                self.place(self._place(record))
            tenant = self.payer(record) if self.payer else ""
            if tenant:
                self.name_payer(record.engine_id, tenant)
        super().settle(devices, now_ns, close_ns=close_ns)
