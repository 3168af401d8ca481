"""The collectors of the diagnosis: what limits a device, what an engine's tokens cost, and what is wasted."""

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import TypeVar

from prometheus_client.core import Metric

from jouletrace.diagnosis.causes import Cause
from jouletrace.diagnosis.node import DeviceFinding, DiagnosisSnapshot, EngineFinding
from jouletrace.diagnosis.step_energy import Known
from jouletrace.diagnosis.verdicts import Verdict
from jouletrace.diagnosis.waste import WasteCause
from jouletrace.metrics import names
from jouletrace.metrics.collector import Collector, Scrape, family
from jouletrace.requests.account import LedgerSnapshot
from jouletrace.requests.records import UNKNOWN_MODEL

Kind = TypeVar("Kind", bound=StrEnum)


class DeviceDiagnosisCollector:
    """Drivers, verdicts, flags and waste by device."""

    name = "diagnosis"
    metrics = (
        names.DRIVER_ENERGY_JOULES,
        names.DIAGNOSIS_VERDICT,
        names.DIAGNOSIS_CONFIDENCE_RATIO,
        names.DIAGNOSIS_SECONDS,
        names.DIAGNOSIS_ENERGY_JOULES,
        names.DIAGNOSIS_FLAG_SECONDS,
        names.WASTED_ENERGY_JOULES,
    )

    def __init__(self, diagnosis: Callable[[], DiagnosisSnapshot]) -> None:
        self._diagnosis = diagnosis

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the families. A verdict on a device that cannot be read now is none."""
        snapshot = self._diagnosis()
        found = snapshot.devices
        readable = {device.info.uuid for device in scrape.readable}
        now = [one for one in found if one.uuid in readable]
        yield _by_kind(names.DRIVER_ENERGY_JOULES, found, lambda one: one.driver_joules)
        yield _by_kind(
            names.DIAGNOSIS_VERDICT,
            now,
            lambda one: {verdict: float(verdict is one.judgement.verdict) for verdict in Verdict},
        )
        confidence = family(names.DIAGNOSIS_CONFIDENCE_RATIO)
        for one in now:
            confidence.add_metric((str(one.gpu), one.uuid), one.judgement.confidence)
        yield confidence
        yield _by_kind(names.DIAGNOSIS_SECONDS, found, lambda one: one.verdict_seconds)
        yield _by_kind(names.DIAGNOSIS_ENERGY_JOULES, found, lambda one: one.verdict_joules)
        yield _by_kind(names.DIAGNOSIS_FLAG_SECONDS, found, lambda one: one.flag_seconds)
        wasted = family(names.WASTED_ENERGY_JOULES)
        for one in found:
            for cause in WasteCause:
                joules = snapshot.wasted_joules.get((one.uuid, cause), 0.0)
                wasted.add_metric((str(one.gpu), one.uuid, cause), joules)
        yield wasted


class EngineDiagnosisCollector:
    """Causes and step energies by engine."""

    name = "engine_diagnosis"
    metrics = (
        names.ENGINE_CAUSE,
        names.ENGINE_UNIT_ENERGY_JOULES,
        names.ENGINE_REFERENCE_UNIT_ENERGY_JOULES,
        names.ENGINE_STEP_FIXED_JOULES,
        names.ENGINE_STEP_MARGINAL_JOULES,
        names.ENGINE_BATCH_SEQUENCES,
        names.ENGINE_QUEUE_REQUESTS,
    )

    def __init__(self, diagnosis: Callable[[], DiagnosisSnapshot], account: Callable[[], LedgerSnapshot]) -> None:
        self._diagnosis = diagnosis
        self._account = account

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the families."""
        cause, energy = family(names.ENGINE_CAUSE), family(names.ENGINE_UNIT_ENERGY_JOULES)
        reference = family(names.ENGINE_REFERENCE_UNIT_ENERGY_JOULES)
        fixed, marginal = family(names.ENGINE_STEP_FIXED_JOULES), family(names.ENGINE_STEP_MARGINAL_JOULES)
        batch = family(names.ENGINE_BATCH_SEQUENCES)
        for engine, found in self._diagnosis().engines.items():
            labels = (engine, _model(found))
            diagnosis, law, measured = found.diagnosis, found.law, found.reference
            for each in Cause:
                cause.add_metric((*labels, each), float(each is diagnosis.cause))
            for part, joules in diagnosis.decomposition.items():
                energy.add_metric((*labels, diagnosis.unit, part), joules)
            if measured is not None:
                reference.add_metric((*labels, measured.gpu_model, str(measured.num_gpus)), measured.joules_per_token)
            if law.known not in (Known.UNKNOWN, Known.PRIOR):
                fixed.add_metric(labels, law.fixed_joules)
                marginal.add_metric(labels, law.sequence_joules)
            if diagnosis.batch is not None:
                batch.add_metric(labels, diagnosis.batch)
        yield from (cause, energy, reference, fixed, marginal, batch)
        queue = family(names.ENGINE_QUEUE_REQUESTS)
        for engine, state in self._account().engine_states.items():
            for name, count in (("running", state.running), ("waiting", state.waiting)):
                if count is not None:
                    queue.add_metric((engine, name), count)
        yield queue


def diagnosis_collectors(
    diagnosis: Callable[[], DiagnosisSnapshot], account: Callable[[], LedgerSnapshot]
) -> tuple[Collector, ...]:
    """Return the collectors of the diagnosis rows."""
    return (DeviceDiagnosisCollector(diagnosis), EngineDiagnosisCollector(diagnosis, account))


def _by_kind(
    metric: names.Metric,
    found: Iterable[DeviceFinding],
    values: Callable[[DeviceFinding], Mapping[Kind, float]],
) -> Metric:
    result = family(metric)
    for one in found:
        for kind, value in values(one).items():
            result.add_metric((str(one.gpu), one.uuid, kind), value)
    return result


def _model(found: EngineFinding) -> str:
    return found.models[0] if found.models else UNKNOWN_MODEL
