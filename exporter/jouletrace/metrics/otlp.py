"""The collector of what the OTLP receiver passes on to the user's collector."""

from collections.abc import Callable, Iterable

from prometheus_client.core import Metric

from jouletrace.engines.otlp.tee import TeeCounts
from jouletrace.metrics import names
from jouletrace.metrics.collector import Scrape, family


class TeeCollector:
    """Exports of spans that were passed on, and those that were not."""

    name = "otlp"
    metrics = (
        names.OTLP_EXPORTS_FORWARDED,
        names.OTLP_EXPORTS_DROPPED,
        names.OTLP_FORWARD_BUFFER_BYTES,
    )

    def __init__(self, counts: Callable[[], TeeCounts | None]) -> None:
        self._counts = counts

    def collect(self, scrape: Scrape) -> Iterable[Metric]:
        """Return the families; without series when nothing is to be passed on."""
        forwarded, dropped, buffered = (family(metric) for metric in self.metrics)
        counts = self._counts()
        if counts is not None:
            forwarded.add_metric((), counts.forwarded)
            for reason, count in counts.dropped.items():
                dropped.add_metric((reason,), count)
            buffered.add_metric((), counts.held_bytes)
        return (forwarded, dropped, buffered)
