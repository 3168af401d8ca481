"""The collector of who is on the GPUs, and of the pods' energy."""

from collections.abc import Callable, Iterable

from prometheus_client.core import Metric

from jouletrace.metrics import names
from jouletrace.metrics.collector import OTHER, Scrape, family
from jouletrace.workloads.service import MOST_WORKLOADS, SHORT_ID, Workload, WorkloadSnapshot

_REST = (OTHER, *("",) * (len(names.GPU_PROCESS_INFO.labels) - 3))
"""Labels of the workloads beyond `MOST_WORKLOADS`, behind those of the GPU."""


class WorkloadCollector:
    """Processes, pods and the kubelet. `workloads` returns what is known at a scrape."""

    name = "workloads"
    metrics = names.WORKLOADS

    def __init__(self, workloads: Callable[[], WorkloadSnapshot]) -> None:
        self._workloads = workloads

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the families, all from one snapshot."""
        info, count, energy, age, errors = (family(metric) for metric in self.metrics)
        found = self._workloads()
        for device in scrape.readable:
            ids = (str(device.info.gpu), device.info.uuid)
            on = found.devices.get(device.info.uuid)
            if on is None:
                continue
            count.add_metric(ids, on.process_count)
            for workload in on.workloads[:MOST_WORKLOADS]:
                info.add_metric((*ids, *_labels(workload)), 1)
            if len(on.workloads) > MOST_WORKLOADS:
                info.add_metric((*ids, *_REST), 1)
        for device in scrape.devices:
            for row, joules in found.pod_joules.get(device.info.uuid, {}).items():
                energy.add_metric((str(device.info.gpu), device.info.uuid, *row), joules)
        if found.kubelet_answer_ns is not None:
            age.add_metric((), max(0, scrape.now_ns - found.kubelet_answer_ns) / 1e9)
        for code, number in found.kubelet_errors.items():
            errors.add_metric((code,), number)
        return (info, count, energy, age, errors)


def _labels(workload: Workload) -> tuple[str, ...]:
    home = workload.home
    return (
        workload.process_name,
        workload.namespace,
        workload.pod,
        workload.container,
        home.pod_uid,
        home.container_id[:SHORT_ID],
        home.unit,
        home.slurm_job,
    )
