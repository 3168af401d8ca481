from dataclasses import replace

from prometheus_client.core import Metric
from tests.snapshots import NOW_NS, full_device, node_snapshot, workload_snapshot

from jouletrace.metrics import names
from jouletrace.metrics.collector import Scrape
from jouletrace.metrics.workloads import WorkloadCollector
from jouletrace.workloads.service import DeviceWorkloads, Workload, WorkloadSnapshot

GPU = full_device(0).info.uuid


def families(snapshot: WorkloadSnapshot, *, stalled: bool = False) -> dict[str, Metric]:
    scrape = Scrape(node_snapshot(), NOW_NS, stalled=stalled)
    collected = WorkloadCollector(lambda: snapshot).collect(scrape)
    return {sample.name: family for family in collected for sample in family.samples}


def test_everything_is_served_under_its_labels() -> None:
    found = families(workload_snapshot())
    assert found.keys() == {metric.name for metric in names.WORKLOADS}
    info = [sample.labels for sample in found["jouletrace_gpu_process_info"].samples]
    assert info[0] == {
        "gpu": "0",
        "uuid": GPU,
        "process_name": "VLLM::EngineCor",
        "namespace": "team-a",
        "pod": "llm-0",
        "container": "vllm",
        "pod_uid": "6513270e-269e-4d37-b2a7-4de452e6b438",
        "container_id": "123b1612dd27",
        "unit": "",
        "slurm_job": "",
    }
    assert [labels["pod"] for labels in info] == ["llm-0", "", ""]
    [age] = found["jouletrace_kubelet_answer_age_seconds"].samples
    assert age.value == 12


def test_who_is_on_a_lost_gpu_is_not_known_but_its_energy_stays() -> None:
    for found, gpus in ((families(workload_snapshot()), ["0"]), (families(workload_snapshot(), stalled=True), [])):
        counts = found.get("jouletrace_gpu_processes")
        assert [sample.labels["gpu"] for sample in (counts.samples if counts else ())] == gpus
        energy = found["jouletrace_pod_energy_joules_total"].samples
        assert [(sample.labels["gpu"], sample.labels["pod"], sample.value) for sample in energy] == [
            ("0", "", 23_456.5),
            ("0", "llm-0", 100_000.25),
            ("1", "llm-0", 5000.5),
        ]


def test_many_workloads_are_sixty_four_and_the_rest() -> None:
    crowd = DeviceWorkloads(1000, tuple(Workload(f"worker-{number}") for number in range(1000)))
    found = families(replace(workload_snapshot(), devices={GPU: crowd}))
    listed = [sample.labels["process_name"] for sample in found["jouletrace_gpu_process_info"].samples]
    assert listed == [*(f"worker-{number}" for number in range(64)), "other"]
    assert [sample.value for sample in found["jouletrace_gpu_processes"].samples] == [1000]


def test_nothing_is_served_of_what_is_switched_off() -> None:
    assert families(WorkloadSnapshot()) == {}
