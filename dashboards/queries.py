"""PromQL from the list of metrics: names, label matchers of the board's variables, and the few shapes that recur."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from jouletrace.metrics.names import Metric

RATE = "$__rate_interval"
"""Grafana's window for rate(): four scrape intervals or one step, whichever is longer."""
SMOOTH = "5m"
"""Window of quotients per token and per request: tokens count when a request ends, joules while it runs."""
STEP = "$__interval"
"""Grafana's time between two points."""
RANGE = "$__range"
"""All of the time that the dashboard shows."""

RECORDED = "jouletrace:"
"""Beginning of the names that the recording rules give."""

SCRAPED = Metric("up", "gauge", "Prometheus' own: 1 while a target answers its scrapes.")
SCRAPE_SECONDS = Metric("scrape_duration_seconds", "gauge", "Prometheus' own: how long a scrape took.")
SCRAPED_SAMPLES = Metric("scrape_samples_scraped", "gauge", "Prometheus' own: samples in a scrape.")
PROCESS_CPU = Metric("process_cpu_seconds_total", "counter", "CPU time of the process.")
PROCESS_MEMORY = Metric("process_resident_memory_bytes", "gauge", "Resident memory of the process.")
PROCESS_START = Metric("process_start_time_seconds", "gauge", "When the process began, since the epoch.")


NODE, FLEET = ("job", "instance"), ("cluster",)
"""What a board is narrowed by before anything else: some nodes, or whole clusters."""
_IMPLIED: Mapping[str, tuple[str, ...]] = {
    "instance": ("cluster", "job"),
    "gpu": ("cluster", "job", "instance", "uuid"),
}
"""Labels that a recorded level has besides those in its name."""
RULE_SECONDS = 60
"""Interval of the groups in deploy/prometheus/recording: what one recorded value stands for."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What a board's variables select: a metric is filtered by those of them that it has as labels."""

    variables: tuple[str, ...] = ()
    """Beside those of `base`."""
    base: tuple[str, ...] = NODE
    """`NODE` or `FLEET`."""

    def series(self, metric: Metric, *matchers: str, suffix: str = "") -> str:
        """Return a selector; `suffix` is the part of a histogram or summary, as `_bucket`."""
        return self._selected(metric.name + suffix, (*self.base, *metric.labels), matchers)

    def rate(self, metric: Metric, *matchers: str, suffix: str = "", window: str = RATE) -> str:
        """Return rate() of a counter, per second: watts where the counter is joules."""
        return f"rate({self.series(metric, *matchers, suffix=suffix)}[{window}])"

    def increase(self, metric: Metric, *matchers: str, window: str = RANGE) -> str:
        """Return increase() of a counter over the dashboard's time."""
        return f"increase({self.series(metric, *matchers)}[{window}])"

    def recorded(self, rule: str, *matchers: str) -> str:
        """Return a selector of what a rule of deploy/prometheus/recording records, as `instance:power_watts:rate5m`."""
        level = rule.partition(":")[0].split("_")
        labels = {label for one in level for label in (one, *_IMPLIED.get(one, ()))}
        return self._selected(f"{RECORDED}{rule}", labels, matchers)

    def mean(self, rule: str, *matchers: str) -> str:
        """Return the mean of what a rule recorded since the point before, so that no zoom leaves a minute out."""
        return f"avg_over_time({self.recorded(rule, *matchers)}[{STEP}])"

    def recorded_increase(self, rule: str, *matchers: str) -> str:
        """Return what a recorded rate came to over the dashboard's time: joules of watts, tokens of tokens/s."""
        return f"sum_over_time({self.recorded(rule, *matchers)}[{RANGE}]) * {RULE_SECONDS}"

    def _selected(self, name: str, labels: Container[str], matchers: Iterable[str]) -> str:
        chosen = [f'{label}=~"${label}"' for label in (*self.base, *self.variables) if label in labels]
        return f"{name}{{{','.join([*chosen, *matchers])}}}"


def total(expression: str, *by: str) -> str:
    """Return the sum, by these labels or over everything."""
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"


def per(numerator: str, denominator: str) -> str:
    """Return a quotient that is absent, and not NaN or infinite, where there is nothing to divide by."""
    return f"{numerator} / ({denominator} > 0)"


def state(series: Iterable[str], *by: str) -> str:
    """Return 1, 2, 3, ... for which of these state-set series is 1, by these labels.

    What is 0 is dropped before `or` joins the rest: a day of eight GPUs takes half of the time then.
    """
    numbered = " or ".join(f"({one} == 1) * {number}" for number, one in enumerate(series, 1))
    return f"max by ({', '.join(by)}) ({numbered})"
