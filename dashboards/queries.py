"""PromQL from the list of metrics: names, label matchers of the board's variables, and the few shapes that recur."""

from dataclasses import dataclass

from jouletrace.metrics.names import Metric

RATE = "$__rate_interval"
"""Grafana's window for rate(): four scrape intervals or one step, whichever is longer."""
SMOOTH = "5m"
"""Window of quotients per token and per request: tokens count when a request ends, joules while it runs."""
RANGE = "$__range"
"""All of the time that the dashboard shows."""

ALWAYS = ("job", "instance")
"""Labels that Prometheus adds, and variables of every board."""

SCRAPED = Metric("up", "gauge", "Prometheus' own: 1 while a target answers its scrapes.")
SCRAPE_SECONDS = Metric("scrape_duration_seconds", "gauge", "Prometheus' own: how long a scrape took.")
SCRAPED_SAMPLES = Metric("scrape_samples_scraped", "gauge", "Prometheus' own: samples in a scrape.")
PROCESS_CPU = Metric("process_cpu_seconds_total", "counter", "CPU time of the process.")
PROCESS_MEMORY = Metric("process_resident_memory_bytes", "gauge", "Resident memory of the process.")
PROCESS_START = Metric("process_start_time_seconds", "gauge", "When the process began, since the epoch.")


@dataclass(frozen=True, slots=True)
class Scope:
    """What a board's variables select: a metric is filtered by those of them that it has as labels."""

    variables: tuple[str, ...] = ()
    """Beside job and instance."""

    def series(self, metric: Metric, *matchers: str, suffix: str = "") -> str:
        """Return a selector; `suffix` is the part of a histogram or summary, as `_bucket`."""
        chosen = [f'{name}=~"${name}"' for name in ALWAYS]
        chosen += [f'{name}=~"${name}"' for name in self.variables if name in metric.labels]
        return f"{metric.name}{suffix}{{{','.join([*chosen, *matchers])}}}"

    def rate(self, metric: Metric, *matchers: str, suffix: str = "", window: str = RATE) -> str:
        """Return rate() of a counter, per second: watts where the counter is joules."""
        return f"rate({self.series(metric, *matchers, suffix=suffix)}[{window}])"

    def increase(self, metric: Metric, *matchers: str, suffix: str = "", window: str = RANGE) -> str:
        """Return increase() of a counter over the dashboard's time."""
        return f"increase({self.series(metric, *matchers, suffix=suffix)}[{window}])"


def total(expression: str, *by: str) -> str:
    """Return the sum, by these labels or over everything."""
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"


def per(numerator: str, denominator: str) -> str:
    """Return a quotient that is absent, and not NaN or infinite, where there is nothing to divide by."""
    return f"{numerator} / ({denominator} > 0)"


def state(series: dict[str, str], *by: str) -> str:
    """Return 1, 2, 3, ... for which of these state-set series is 1, by these labels."""
    numbered = " or ".join(f"{expression} * {number}" for number, expression in enumerate(series.values(), 1))
    return f"max by ({', '.join(by)}) ({numbered})"
