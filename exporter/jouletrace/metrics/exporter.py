"""The exporter: all collectors behind one registry, and its account of itself."""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric

import jouletrace
from jouletrace.diagnosis.node import DiagnosisSnapshot
from jouletrace.engines.otlp.tee import TeeCounts
from jouletrace.metrics import names
from jouletrace.metrics.collector import (
    OTHER,
    Collector,
    Scrape,
    empty_family,
    family,
    first_and_other,
    per_device,
    summary_family,
)
from jouletrace.metrics.device import device_collectors
from jouletrace.metrics.diagnosis import diagnosis_collectors
from jouletrace.metrics.ledger import ledger_collectors
from jouletrace.metrics.otlp import TeeCollector
from jouletrace.metrics.workloads import WorkloadCollector
from jouletrace.requests.account import LedgerSnapshot
from jouletrace.requests.inbox import Events
from jouletrace.snapshot import DeviceStatus, NodeSnapshot
from jouletrace.workloads.service import WorkloadSnapshot

MAX_DRIVER_ERRORS = 256
"""Pairs of driver call and return code with a series of their own. jouletrace makes about 30 different calls
and a broken GPU answers them with two or three codes."""

_log = structlog.get_logger(__name__)


class SourceCollector:
    """Whether devices can be read, how fresh they are and how well their sensors fare."""

    name = "source"
    metrics = (
        names.UP,
        names.SAMPLE_AGE_SECONDS,
        names.SENSOR_UPDATE_INTERVAL_SECONDS,
        names.ENERGY_AGREEMENT_RATIO,
        names.ENERGY_GAP_SECONDS,
        names.REJECTED_SAMPLES,
        names.HARDWARE_ENERGY_RESETS,
    )

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the families."""
        devices, readable, now_ns = scrape.devices, scrape.readable, scrape.now_ns
        lost = any(device.status is DeviceStatus.LOST for device in devices)
        up = family(names.UP)
        up.add_metric((scrape.snapshot.source,), 1 if devices and not lost and not scrape.stalled else 0)
        yield up
        yield per_device(
            names.SAMPLE_AGE_SECONDS,
            devices,
            lambda d: None if d.timeline_end_ns is None else max(0, now_ns - d.timeline_end_ns) / 1e9,
        )
        intervals = family(names.SENSOR_UPDATE_INTERVAL_SECONDS)
        for device in readable:
            for sensor, seconds in device.sensor_intervals.items():
                intervals.add_metric((str(device.info.gpu), sensor), seconds)
        yield intervals
        yield per_device(names.ENERGY_AGREEMENT_RATIO, readable, lambda d: d.agreement_ratio)
        yield per_device(names.ENERGY_GAP_SECONDS, devices, lambda d: d.gap_seconds)
        yield per_device(names.REJECTED_SAMPLES, devices, lambda d: d.rejected_samples)
        yield per_device(names.HARDWARE_ENERGY_RESETS, devices, lambda d: d.counter_resets)


class SamplerCollector:
    """What sampling costs and which calls fail."""

    name = "sampler"
    metrics = (
        names.DRIVER_CALL_SECONDS,
        names.DRIVER_ERRORS,
        names.SAMPLER_CPU_SECONDS,
        names.SAMPLER_STRETCH_RATIO,
    )

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the families."""
        sampler = scrape.snapshot.sampler
        calls = summary_family(names.DRIVER_CALL_SECONDS)
        for call, count in sampler.call_count.items():
            calls.add_metric((call,), count, sampler.call_seconds.get(call, 0.0))
        yield calls
        errors = family(names.DRIVER_ERRORS)
        first, other = first_and_other(sampler.call_errors, MAX_DRIVER_ERRORS)
        for pair, count in first.items():
            errors.add_metric(pair, count)
        if other:
            errors.add_metric((OTHER, OTHER), other)
        yield errors
        cpu = family(names.SAMPLER_CPU_SECONDS)
        cpu.add_metric((), sampler.cpu_seconds)
        yield cpu
        stretch = family(names.SAMPLER_STRETCH_RATIO)
        stretch.add_metric((), sampler.stretch)
        yield stretch


class BuildCollector:
    """Which jouletrace this is."""

    name = "build"
    metrics = (names.BUILD_INFO,)

    def __init__(self, version: str, python_version: str) -> None:
        self._labels = (version, python_version)

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the info family."""
        result = family(names.BUILD_INFO)
        result.add_metric(self._labels, 1)
        yield result


class ReloadCollector:
    """Whether files that change while the daemon runs are in force as they are now."""

    name = "reload"
    metrics = (names.FILE_RELOAD_SUCCESS,)

    def __init__(self, reloads: Callable[[], Mapping[str, bool]]) -> None:
        self._reloads = reloads

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the family, with a series for each key that names files."""
        result = family(names.FILE_RELOAD_SUCCESS)
        for key, is_current in self._reloads().items():
            result.add_metric((key,), 1 if is_current else 0)
        yield result


class Exporter:
    """All collectors as one collector of prometheus_client, so that a scrape sees one snapshot.

    A collector that fails costs only itself: its metrics are missing, `jouletrace_collector_success` is 0,
    and the log says so once when it begins and once when it ends.
    """

    def __init__(
        self,
        snapshot: Callable[[], NodeSnapshot],
        collectors: Sequence[Collector],
        *,
        now_ns: Callable[[], int],
        heartbeat_age_seconds: Callable[[], float],
        stale_after_seconds: float,
    ) -> None:
        self._snapshot = snapshot
        self._collectors = collectors
        self._now_ns = now_ns
        self._heartbeat_age_seconds = heartbeat_age_seconds
        self._stale_after_seconds = stale_after_seconds
        self._failing: set[str] = set()

    def describe(self) -> Iterable[Metric]:
        """Return every family without samples; `?name[]=` finds this collector by them."""
        for collector in self._collectors:
            for metric in collector.metrics:
                yield empty_family(metric)
        yield empty_family(names.COLLECTOR_SUCCESS)

    def collect(self) -> Iterable[Metric]:
        """Return the families that have samples, all from one snapshot."""
        stalled = self._heartbeat_age_seconds() > self._stale_after_seconds
        scrape = Scrape(self._snapshot(), self._now_ns(), stalled)
        success = family(names.COLLECTOR_SUCCESS)
        for collector in self._collectors:
            families = self._families(collector, scrape)
            success.add_metric((collector.name,), 0 if families is None else 1)
            for each in families or ():
                if each.samples:
                    yield each
        yield success

    def _families(self, collector: Collector, scrape: Scrape) -> list[Metric] | None:
        try:
            families = list(collector.collect(scrape))
        except Exception:
            if collector.name not in self._failing:
                self._failing.add(collector.name)
                _log.exception(
                    "A part of the metrics could not be made and is missing; please report this.",
                    collector=collector.name,
                )
            return None
        if collector.name in self._failing:
            self._failing.discard(collector.name)
            _log.info("A part of the metrics is served again.", collector=collector.name)
        return families


def node_collectors(
    account: Callable[[], LedgerSnapshot] = LedgerSnapshot,
    events: Callable[[], Events] = Events,
    diagnosis: Callable[[], DiagnosisSnapshot] = DiagnosisSnapshot,
    tee: Callable[[], TeeCounts | None] = lambda: None,
    workloads: Callable[[], WorkloadSnapshot] = WorkloadSnapshot,
    reloads: Callable[[], Mapping[str, bool]] = dict,
) -> tuple[Collector, ...]:
    """Return all collectors of the node, in the order of the page."""
    build = BuildCollector(jouletrace.__version__, platform.python_version())
    return (
        build,
        *device_collectors(),
        *ledger_collectors(account, events),
        TeeCollector(tee),
        *diagnosis_collectors(diagnosis, account),
        WorkloadCollector(workloads),
        SourceCollector(),
        SamplerCollector(),
        ReloadCollector(reloads),
    )


def node_registry(
    snapshot: Callable[[], NodeSnapshot],
    *,
    now_ns: Callable[[], int],
    heartbeat_age_seconds: Callable[[], float],
    stale_after_seconds: float,
    account: Callable[[], LedgerSnapshot] = LedgerSnapshot,
    events: Callable[[], Events] = Events,
    diagnosis: Callable[[], DiagnosisSnapshot] = DiagnosisSnapshot,
    tee: Callable[[], TeeCounts | None] = lambda: None,
    workloads: Callable[[], WorkloadSnapshot] = WorkloadSnapshot,
    reloads: Callable[[], Mapping[str, bool]] = dict,
) -> CollectorRegistry:
    """Return a registry that serves the node's metrics and those of this process.

    `now_ns` is the clock of the snapshot's times; `account` and `events` are the ledger's, `diagnosis` is the
    diagnosis' snapshot; `tee` says what became of spans that are passed on, `workloads` who runs on the GPUs,
    `reloads` which keys' files are in force as they are. Readings are taken for old, and are not served, once the
    sampler's heart has not beaten for `stale_after_seconds`.
    """
    registry = CollectorRegistry(auto_describe=True)
    exporter = Exporter(
        snapshot,
        node_collectors(account, events, diagnosis, tee, workloads, reloads),
        now_ns=now_ns,
        heartbeat_age_seconds=heartbeat_age_seconds,
        stale_after_seconds=stale_after_seconds,
    )
    registry.register(exporter)
    ProcessCollector(registry=registry)
    return registry
