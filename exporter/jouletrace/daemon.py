"""The daemon: the one place that knows all parts. It wires them and runs them as one group."""

import asyncio
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import structlog
from aiohttp import hdrs, web

from jouletrace import logs
from jouletrace.accounting import Accounting, KnownModels, read_laws
from jouletrace.config import Config, ConfigError, changed_keys
from jouletrace.followed import FollowedFiles, reloads
from jouletrace.gpu.readings import Device, DriverMismatchError, GpuError, NoDriverError, Source
from jouletrace.gpu.sampler import DriverLostError, Intervals, Sampler
from jouletrace.metrics.exporter import node_registry
from jouletrace.notify import Supervisor, passed_sockets
from jouletrace.state import StateDirectory
from jouletrace.trace.recording import RecordingError
from jouletrace.unix_sockets import MODES
from jouletrace.web.access import Access
from jouletrace.web.application import API_PREFIX, api_application, application
from jouletrace.web.health import Readiness, readiness
from jouletrace.web.live.document import Moment
from jouletrace.web.live.stream import LiveStream
from jouletrace.web.openapi import openapi_route
from jouletrace.web.serve import WebServer
from jouletrace.workloads.service import LISTING_SECONDS, WorkloadService, WorkloadSnapshot

STANDARD_ERROR = 2
"""Its descriptor, which is there even when `sys.stderr` is something else."""
SAVE_SECONDS = 60.0
RELOADABLE = frozenset({"log.level", "log.format", "ledger.laws_file"})
"""Keys that SIGHUP applies, the file that one names included; the others need a restart."""
EXIT_FINE, EXIT_USAGE, EXIT_NO_GPU, EXIT_DRIVER_LOST = 0, 2, 3, 4
REPLAY_PREFIX = "replay:"

_log = structlog.get_logger(__name__)


class DeviceChoiceError(Exception):
    """`devices` of the configuration names a GPU that is not there; the message says which there are."""


def demo_recording() -> Path:
    """Return the recording of a real H200 that comes with the package."""
    return Path(str(resources.files("jouletrace") / "demo" / "recording.json.gz"))


def make_source(config: Config) -> Source:
    """Return the source that the configuration names; raises RecordingError when a recording is unusable."""
    recording = config.replay_file
    if recording is not None:
        from jouletrace.gpu.replay import ReplaySource  # noqa: PLC0415  (a GPU node never replays)

        return ReplaySource(recording, speed=config.replay.speed, loop=config.replay.loop)
    from jouletrace.gpu.nvml import NvmlSource  # noqa: PLC0415  (a replay needs no NVML binding)

    return NvmlSource()


def chooser(wanted: Sequence[int | str]) -> Callable[[Sequence[Device]], Sequence[Device]]:
    """Return a function that picks the wanted devices by index, UUID or unique beginning of one; all for none.

    The function raises DeviceChoiceError when one is not there or not unique.
    """

    def choose(devices: Sequence[Device]) -> Sequence[Device]:
        if not wanted:
            return devices
        chosen: dict[str, Device] = {}
        for name in wanted:
            found = [
                d for d in devices if (d.info.gpu == name if isinstance(name, int) else d.info.uuid.startswith(name))
            ]
            if len(found) != 1:
                there = ", ".join(f"{d.info.gpu} ({d.info.uuid})" for d in devices)
                raise DeviceChoiceError(
                    f"devices: {name} names {len(found) or 'no'} GPU{'s' if len(found) > 1 else ''} of this"
                    f" machine; it has {there}"
                )
            chosen[found[0].info.uuid] = found[0]
        return list(chosen.values())

    return choose


def intervals(config: Config) -> Intervals:
    """Return the sampler's intervals."""
    sampling = config.sampling
    return Intervals(
        ring=sampling.ring_interval,
        activity=sampling.activity_interval,
        graphics=sampling.graphics_interval,
        state=sampling.state_interval,
        health=sampling.health_interval,
        processes=LISTING_SECONDS if names_workloads(config) else None,
        counter=sampling.counter_interval,
        polling=1.0 / sampling.power_polling_hertz,
    )


def names_workloads(config: Config) -> bool:
    """Return whether the processes on the GPUs are to be looked at; those of a recording are not here."""
    return config.replay_file is None and (config.workloads.processes or config.workloads.pods)


def exit_code(failure: BaseException) -> int:
    """Return the exit code that a failure of the sampler means."""
    match failure:
        case DriverLostError() | DriverMismatchError():
            return EXIT_DRIVER_LOST
        case NoDriverError() | GpuError():
            return EXIT_NO_GPU
        case DeviceChoiceError() | RecordingError():
            return EXIT_USAGE
        case _:
            return 1


def explanation(failure: BaseException) -> str:
    """Return why a source cannot be used, as a sentence for an operator."""
    if isinstance(failure, DriverMismatchError):
        return f"the NVIDIA library and the kernel driver differ ({failure}): reboot, or reload the driver's modules"
    return str(failure)


def _only_reads(route: web.AbstractRouteDef) -> bool:
    return isinstance(route, web.RouteDef) and route.method != hdrs.METH_POST


def _keep_latency_low() -> None:
    """Tune the interpreter for short waits: measured on 2,000 single POSTs a second, p99 falls from 33 to 12 ms.

    The sampler's and the settling thread's turns at the interpreter get shorter, and the collector does not walk
    through what was loaded at start.
    """
    sys.setswitchinterval(0.001)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


class Daemon:
    """Builds the services from a configuration and runs them until a signal or until one of them dies."""

    def __init__(self, config: Config, reread: Callable[[], Config]) -> None:
        """`reread` returns the configuration as it is written now, or raises ConfigError."""
        self._configured = config
        """As it was written, so far as it is in force."""
        self._reread = reread
        self._supervisor = Supervisor.of(os.environ, os.getpid())
        if config.replay_file is not None:
            # A replay's levels and account must not turn up on the real node.
            config = msgspec.structs.replace(config, state_dir=str(Path(config.state_dir) / "replay"))
        self._config = config
        self._state = StateDirectory(Path(config.state_dir))
        self._source = make_source(config)
        self._ended: asyncio.Future[BaseException | None] | None = None
        self.sampler: Sampler
        self._accounting: Accounting
        self._followed: Sequence[FollowedFiles[Any]]

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit code.

        Raises ListenError and SocketError before anything is read.
        """
        # A watchdog that is not fed sends SIGABRT: the log then tells where each thread stood.
        faulthandler.enable(STANDARD_ERROR)
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        config = self._config

        def end_from_thread(failure: BaseException) -> None:
            loop.call_soon_threadsafe(self._end, failure)

        self.sampler = Sampler(
            self._source,
            intervals(config),
            choose=chooser(config.devices),
            levels=self._state.load_idle_levels(),
            cpu_budget_ratio=config.sampling.cpu_budget_ratio,
            give_up_after_seconds=config.driver.give_up_after,
            on_end=end_from_thread,
        )
        workloads = None
        if names_workloads(config):
            workloads = WorkloadService(config.workloads, self._source.clock, self.sampler.live_devices)
        self._accounting = accounting = Accounting(
            config,
            self._source.clock,
            self.sampler.live_devices,
            workloads.namespaces if workloads else dict,
        )
        web_config = config.web.config.file
        access = Access(Path(web_config) if web_config else None, accounting.entrance)
        self._followed = followed = [*accounting.followed(), *([] if access.followed is None else [access.followed])]
        make_application = partial(
            application,
            snapshot=lambda: self.sampler.snapshot,
            registry=node_registry(
                lambda: self.sampler.snapshot,
                now_ns=self._source.clock.now_ns,
                heartbeat_age_seconds=lambda: self.sampler.heartbeat_age_seconds,
                stale_after_seconds=config.readiness.stale_after,
                account=lambda: accounting.snapshot,
                events=accounting.events,
                diagnosis=lambda: accounting.diagnosis,
                tee=accounting.tee,
                reloads=lambda: reloads(followed),
                workloads=workloads.scraped if workloads else WorkloadSnapshot,
            ),
            readiness=self.readiness,
            telemetry_path=config.web.telemetry_path,
        )
        app = make_application()
        routes = [*accounting.routes(), openapi_route(config.web.telemetry_path)]
        own_ingest = config.ingest.listen_address
        app.add_routes(filter(_only_reads, routes) if own_ingest else routes)
        self._live(accounting).add_to(app)
        access.guard(app, own_rules=routes)
        server = WebServer(app, tls=lambda: access.tls, socket_mode=MODES[config.ingest.socket_access])
        passed = passed_sockets(os.environ, os.getpid())
        await server.start(() if passed.metrics else config.web.listen_address, passed=passed.metrics)
        metrics = make_application(with_live_page=False)
        access.guard(metrics)
        metrics_server = WebServer(metrics, tls=lambda: access.tls, address_flag="--web.metrics-listen-address")
        await metrics_server.start(config.web.metrics_listen_address)
        ingest = api_application(routes)
        access.guard(ingest, own_rules=routes)
        ingest_server = WebServer(ingest, tls=lambda: access.tls, address_flag="--ingest.listen-address")
        await ingest_server.start(own_ingest)
        for each in (server, metrics_server, ingest_server):
            access.on_change(each.end_connections)
        # What a replay's engine sends must come in whatever certificates others need.
        replay_server = WebServer(api_application(routes))
        await replay_server.start(("127.0.0.1:0",) if config.replay_file is not None else ())
        await accounting.start(self._end, passed, access)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, partial(self._end, None))
        reload_asked = asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, reload_asked.set)
        self.sampler.start()
        feeding = self._feed_from_recording(replay_server.urls)
        _keep_latency_low()
        for url in server.urls:
            _log.info(
                "serving",
                url=f"{url}/",
                metrics=f"{url}{config.web.telemetry_path}",
                source=self._source.name,
            )
        for path in server.paths:
            _log.info("serving", socket=path, source=self._source.name)
        for url in metrics_server.urls:
            _log.info("serving metrics alone", metrics=f"{url}{config.web.telemetry_path}")
        for url in ingest_server.urls:
            _log.info("taking records", endpoint=f"{url}{API_PREFIX}")
        if passed.metrics and config.web.listen_address != Config().web.listen_address:
            _log.warning("web.listen_address is not used: systemd's socket unit says where to listen")
        self._supervisor.ready(self._status())
        chores = [self._chore(self._save_regularly()), self._chore(self._reload_when(reload_asked))]
        chores += [self._chore(self._tell_supervisor()), *(self._chore(files.run()) for files in followed)]
        if workloads is not None:
            chores.append(self._chore(workloads.run()))
        failure = await self._ended
        self._supervisor.stopping()
        for chore in chores:
            chore.cancel()
        if failure is None:
            _log.info("stopping")
        else:
            self._explain(failure)
        if feeding is not None:
            feeding.cancel()
            await asyncio.wait({feeding})
        for each in (server, metrics_server, ingest_server, replay_server):
            await each.stop()
        access.close()
        await accounting.stop()
        stopped = await asyncio.to_thread(self.sampler.stop)
        if not stopped:
            _log.warning("leaving a driver call behind that does not return", call=self.sampler.overdue_call)
        self._state.save_idle_levels(self.sampler.learnt_levels())
        return EXIT_FINE if failure is None else exit_code(failure)

    def _live(self, accounting: Accounting) -> LiveStream:
        """Return the stream of the live monitor."""

        def moment() -> Moment:
            return Moment(
                now_ns=self._source.clock.now_ns(),
                node=self.sampler.snapshot,
                readiness=self.readiness(),
                account=accounting.snapshot,
                diagnosis=accounting.diagnosis,
                stale_after_seconds=self._config.readiness.stale_after,
            )

        return LiveStream(
            moment=moment,
            devices=self.sampler.live_devices,
            requests=accounting,
            entrance=accounting.entrance,
            clock=self._source.clock,
        )

    def readiness(self) -> Readiness:
        """Return whether every expected device has a fresh sample."""
        return readiness(
            self.sampler.snapshot,
            self._source.clock.now_ns(),
            self._config.readiness.stale_after,
            self.sampler.heartbeat_age_seconds,
            self.sampler.overdue_call,
        )

    def _status(self) -> str:
        """Return for the supervisor, in a line, how things are."""
        readiness = self.readiness()
        devices = len(self.sampler.snapshot.devices)
        return " ".join(readiness.reasons) or f"{devices} GPU{'' if devices == 1 else 's'} sampled"

    async def _tell_supervisor(self) -> None:
        """Feed the watchdog from the event loop while the sampler comes round.

        A driver call that hangs does not end the process at once: pages and metrics go on and say what is wrong. When
        it has lasted as long as failing GPUs are waited for, the watchdog is starved, and the supervisor starts anew.
        """
        beat_seconds = self._supervisor.beat_seconds
        while beat_seconds is not None:
            hung = self.sampler.heartbeat_age_seconds > self._config.driver.give_up_after
            (self._supervisor.tell if hung else self._supervisor.alive)(self._status())
            await asyncio.sleep(beat_seconds)

    def _chore(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        """Return a task whose failure ends the daemon."""

        def done(task: "asyncio.Task[None]") -> None:
            failure = None if task.cancelled() else task.exception()
            if failure is not None:
                self._end(failure)

        chore = asyncio.create_task(work)
        chore.add_done_callback(done)
        return chore

    async def _reload_when(self, asked: asyncio.Event) -> None:
        while True:
            await asked.wait()
            asked.clear()
            await self._reload()

    async def _reload(self) -> None:
        """Read the configuration anew and apply what can be; a wrong one is refused whole."""
        self._supervisor.reloading()
        for files in self._followed:
            await files.reload()
        try:
            written, known = await asyncio.to_thread(self._read_again)
        except ConfigError as failure:
            _log.error("the configuration was not reloaded, the old one stays", problem=str(failure))
        else:
            changed = changed_keys(self._configured, written)
            logs.configure(written.log.level, written.log.format)
            self._accounting.use_models(known)
            ledger = msgspec.structs.replace(self._configured.ledger, laws_file=written.ledger.laws_file)
            self._configured = msgspec.structs.replace(self._configured, log=written.log, ledger=ledger)
            _log.info(
                "the configuration was reloaded",
                applied=[key for key in changed if key in RELOADABLE],
                need_a_restart=[key for key in changed if key not in RELOADABLE],
            )
        self._supervisor.ready(self._status())

    def _read_again(self) -> tuple[Config, KnownModels]:
        written = self._reread()
        return written, read_laws(written.ledger.laws_file)

    def _feed_from_recording(self, urls: Sequence[str]) -> "asyncio.Task[None] | None":
        """In a replay, let the recording's engine send its requests through the API, as any engine would."""
        file = self._config.replay_file
        if file is None:
            return None
        from jouletrace.engines.demo import RecordedEngine  # noqa: PLC0415  (a GPU node never replays)
        from jouletrace.gpu.replay import ReplaySource  # noqa: PLC0415
        from jouletrace.trace.recording import read  # noqa: PLC0415

        assert isinstance(self._source, ReplaySource)
        try:
            token_file = self._config.ingest.token_file or None
            engine = RecordedEngine(read(file), self._source, urls[0], token_file=token_file)
        except RecordingError:
            # The sampler opens the same file and says what is wrong with it.
            return None
        return asyncio.create_task(engine.run())

    def _end(self, failure: BaseException | None) -> None:
        assert self._ended is not None
        if not self._ended.done():
            self._ended.set_result(failure)

    def _explain(self, failure: BaseException) -> None:
        if exit_code(failure) == 1:
            _log.critical("a service died of a fault in jouletrace; please report this", exc_info=failure)
        else:
            _log.critical(f"cannot go on: {explanation(failure)}")

    async def _save_regularly(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            await asyncio.to_thread(self._state.save_idle_levels, self.sampler.learnt_levels())
