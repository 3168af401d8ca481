"""What a collector is, and how it turns parts of a snapshot into metric families."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from jouletrace.metrics import names
from jouletrace.snapshot import DeviceSnapshot, DeviceStatus, NodeSnapshot

Gauge = GaugeMetricFamily | CounterMetricFamily
"""A family with one value per label set."""

Key = TypeVar("Key")

OTHER = "other"
"""Label value that the rest is counted under when a label has reached its limit."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """One scrape: the snapshot that all collectors share, and how fresh it is."""

    snapshot: NodeSnapshot
    now_ns: int
    """Steady epoch time of the scrape."""
    stalled: bool
    """The sampler has not come back in time, so the snapshot's readings are old."""

    @property
    def devices(self) -> Sequence[DeviceSnapshot]:
        """Return all devices, lost ones too: for what jouletrace itself has counted."""
        return self.snapshot.devices

    @property
    def readable(self) -> Sequence[DeviceSnapshot]:
        """Return the devices whose readings are valid now: for gauges and for the driver's own counters."""
        if self.stalled:
            return ()
        return [device for device in self.snapshot.devices if device.status is DeviceStatus.OK]


class Collector(Protocol):
    """One subject of the page."""

    @property
    def name(self) -> str:
        """Return the value of the label `collector`."""

    @property
    def metrics(self) -> Sequence[names.Metric]:
        """Return all that `collect` may return."""

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return fresh families."""


def family(metric: names.Metric) -> Gauge:
    """Return an empty counter or gauge family."""
    make = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
    return make(metric.name, metric.help, labels=metric.labels, unit=metric.unit)


def summary_family(metric: names.Metric) -> SummaryMetricFamily:
    """Return an empty summary family."""
    return SummaryMetricFamily(metric.name, metric.help, labels=metric.labels, unit=metric.unit)


def histogram_family(metric: names.Metric) -> HistogramMetricFamily:
    """Return an empty histogram family."""
    return HistogramMetricFamily(metric.name, metric.help, labels=metric.labels, unit=metric.unit)


def empty_family(metric: names.Metric) -> Metric:
    """Return the family without samples, as `describe` needs it."""
    match metric.type:
        case "summary":
            return summary_family(metric)
        case "histogram":
            return histogram_family(metric)
        case _:
            return family(metric)


def per_device(
    metric: names.Metric,
    devices: Iterable[DeviceSnapshot],
    value: Callable[[DeviceSnapshot], float | None],
) -> Gauge:
    """Return one series per device; none where the value is `None`."""
    result = family(metric)
    for device in devices:
        number = value(device)
        if number is not None:
            result.add_metric((str(device.info.gpu), device.info.uuid), number)
    return result


def per_device_and_kind(
    metric: names.Metric,
    devices: Iterable[DeviceSnapshot],
    values: Callable[[DeviceSnapshot], Mapping[Any, float]],
) -> Gauge:
    """Return one series per device and value of the metric's last label, as far as the mapping has them."""
    result = family(metric)
    for device in devices:
        gpu, uuid, mapping = str(device.info.gpu), device.info.uuid, values(device)
        for kind in metric.values:
            if kind in mapping:
                result.add_metric((gpu, uuid, kind), mapping[kind])
    return result


def first_and_other(counts: Mapping[Key, int], limit: int) -> tuple[dict[Key, int], int]:
    """Return the first `limit` counts and the sum of the rest.

    The order is that of insertion, so a count never moves between the two and neither ever goes down.
    """
    first = dict(islice(counts.items(), limit))
    return first, sum(islice(counts.values(), limit, None))
