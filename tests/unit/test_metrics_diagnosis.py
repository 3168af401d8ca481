from dataclasses import replace

import pytest
from prometheus_client.core import Metric
from tests.snapshots import NOW_NS, diagnosis_snapshot, ledger_snapshot, node_snapshot

from jouletrace.diagnosis.node import DiagnosisSnapshot
from jouletrace.diagnosis.step_energy import StepLaw
from jouletrace.metrics import names
from jouletrace.metrics.collector import Scrape
from jouletrace.metrics.diagnosis import diagnosis_collectors
from jouletrace.snapshot import DeviceStatus


def served(snapshot: DiagnosisSnapshot, *, stalled: bool = False) -> dict[str, Metric]:
    scrape = Scrape(node_snapshot(), NOW_NS, stalled=stalled)
    return {
        family.samples[0].name: family
        for collector in diagnosis_collectors(lambda: snapshot, ledger_snapshot)
        for family in collector.collect(scrape)
        if family.samples
    }


def test_a_collector_declares_exactly_what_it_can_serve() -> None:
    declared = {
        metric.name
        for collector in diagnosis_collectors(diagnosis_snapshot, ledger_snapshot)
        for metric in collector.metrics
    }
    assert served(diagnosis_snapshot()).keys() == declared == {metric.name for metric in names.DIAGNOSIS}


def test_one_verdict_and_one_cause_at_a_time() -> None:
    page = served(diagnosis_snapshot())
    verdicts = {sample.labels["verdict"]: sample.value for sample in page[names.DIAGNOSIS_VERDICT.name].samples}
    causes = {sample.labels["cause"]: sample.value for sample in page[names.ENGINE_CAUSE.name].samples}
    assert {name for name, value in verdicts.items() if value} == {"memory_bound"}
    assert {name for name, value in causes.items() if value} == {"small_batch"}
    assert set(verdicts) == set(names.DIAGNOSIS_VERDICT.values)
    assert set(causes) == set(names.ENGINE_CAUSE.values)


def test_a_lost_device_keeps_its_totals_and_has_no_verdict() -> None:
    [lost] = [device for device in node_snapshot().devices if device.status is DeviceStatus.LOST]
    page = served(diagnosis_snapshot())
    of_lost = {name for name, one in page.items() if any(s.labels.get("uuid") == lost.info.uuid for s in one.samples)}
    assert names.DRIVER_ENERGY_JOULES.name in of_lost
    assert names.DIAGNOSIS_VERDICT.name not in of_lost
    assert names.DIAGNOSIS_CONFIDENCE_RATIO.name not in of_lost
    assert names.DIAGNOSIS_VERDICT.name not in served(diagnosis_snapshot(), stalled=True)


def test_the_parts_of_a_token_add_up() -> None:
    snapshot = diagnosis_snapshot()
    energy = served(snapshot)[names.ENGINE_UNIT_ENERGY_JOULES.name]
    parts = snapshot.engines["vllm-0"].diagnosis.decomposition
    assert sum(sample.value for sample in energy.samples) == pytest.approx(sum(parts.values()))
    assert {sample.labels["unit"] for sample in energy.samples} == {"token"}


def test_an_estimated_law_is_not_served_as_the_engine_s_own() -> None:
    snapshot = diagnosis_snapshot()
    engine = replace(snapshot.engines["vllm-0"], law=StepLaw(), reference=None)
    page = served(replace(snapshot, engines={"vllm-0": engine}))
    assert names.ENGINE_STEP_FIXED_JOULES.name not in page
    assert names.ENGINE_REFERENCE_UNIT_ENERGY_JOULES.name not in page
