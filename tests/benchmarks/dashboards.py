"""What the dashboards cost: every panel's query over 24 hours of a node with 8 GPUs, on a local Prometheus.

`python -m tests.benchmarks.dashboards [--models N] [--tenants N]` makes the day's samples from the real collectors'
page (counters rise, gauges swing, state sets change), imports them with promtool, starts Prometheus on them and asks
each query three times; the middle time counts. Prints the slowest, and what a sample takes on disk.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dashboards.boards import files
from dashboards.queries import (
    PROCESS_CPU,
    PROCESS_MEMORY,
    PROCESS_START,
    SCRAPE_SECONDS,
    SCRAPED,
    SCRAPED_SAMPLES,
)
from prometheus_client.core import Metric

from tests.dashboards.asked import Asked, ask, panels, queries, values
from tests.integration.test_prometheus import fetch, free_port, program, wait_for
from tests.node_page import full_page

GPUS = 8
HOURS = 24
INTERVAL_SECONDS = 30
END_S = 1_795_392_000
STEP_SECONDS = 60.0
"""What Grafana asks for over a day on a panel that is 1,440 pixels wide."""
LIMIT_SECONDS = 0.3
STATE_SECONDS = 900
Value = Callable[[int], float]


def course(family: Metric, place: int, total: int, rng: random.Random) -> Value:
    """Return a sample's value over time: second of the day to number."""
    if family.type in ("counter", "histogram", "summary"):
        rate, swing, phase = rng.uniform(0.1, 50.0), rng.uniform(0.0, 0.9), rng.uniform(0.0, 6.3)
        # The integral of a rate that swings over the day, and so never falls.
        day = 86_400 / (2 * math.pi)
        return lambda second: round(rate * (second + swing * day * (1 - math.cos(second / day + phase))), 3)
    if family.name.removeprefix("jouletrace_") in ("diagnosis_verdict", "engine_cause"):
        return lambda second: float((second // STATE_SECONDS + place // total) % total == place % total)
    if family.name.endswith("_info") or family.name in ("up", "jouletrace_up", "jouletrace_collector_success"):
        return lambda second: 1.0
    level, phase = rng.uniform(0.1, 1.0), rng.uniform(0.0, 6.3)
    return lambda second: round(level * (1 + 0.3 * math.sin(second / 700 + phase)), 4)


def histogram_course(family: Metric, rng: random.Random) -> Iterator[Value]:
    """Return the values of a histogram's samples: cumulative buckets, count and sum."""
    rates: dict[str, float] = {}
    for sample in family.samples:
        key = sample.labels["model"]
        if sample.name.endswith("_bucket"):
            rates[key] = rates.get(key, 0.0) + rng.uniform(0.0, 0.1)
        rate = rates[key] * (200.0 if sample.name.endswith("_sum") else 1.0)
        yield lambda second, rate=rate: round(rate * second, 3)  # type: ignore[misc]


def prometheus_own() -> Iterator[Metric]:
    """Return what a scrape has beside the exporter's families: Prometheus' own series and the process's."""
    for metric in (SCRAPED, SCRAPE_SECONDS, SCRAPED_SAMPLES, PROCESS_CPU, PROCESS_MEMORY, PROCESS_START):
        family = Metric(metric.name.removesuffix("_total"), "", metric.type)
        family.add_sample(metric.name, {}, 1.0)
        yield family


def write_page(file: Path, models: int, tenants: int) -> tuple[int, int]:
    """Write the day in OpenMetrics; return how many series and samples it has."""
    rng, series, samples = random.Random(1), 0, 0
    seconds = range(0, HOURS * 3600, INTERVAL_SECONDS)
    stamps = [f"{END_S - HOURS * 3600 + second}" for second in seconds]
    with file.open("w") as out:
        for family in (*full_page(GPUS, models, tenants), *prometheus_own()):
            out.write(f"# TYPE {family.name} {family.type}\n")
            states = len({v for s in family.samples for k, v in s.labels.items() if k in ("verdict", "cause")}) or 1
            histograms = histogram_course(family, rng) if family.type == "histogram" else iter(())
            for place, sample in enumerate(family.samples):
                value = next(histograms, None) or course(family, place, states, rng)
                labels = {**sample.labels, "instance": "node-1", "job": "jouletrace"}
                head = sample.name + "{" + ",".join(f"{k}={json.dumps(v)}" for k, v in labels.items()) + "} "
                out.writelines(f"{head}{value(s)} {t}\n" for s, t in zip(seconds, stamps, strict=True))
                series, samples = series + 1, samples + len(stamps)
        out.write("# EOF\n")
    return series, samples


def slowest(url: str) -> list[tuple[float, int, Asked]]:
    """Return every query with the middle of three times in seconds and its number of series, slowest first."""
    result = []
    for text in files().values():
        dashboard = json.loads(text)
        variables = values(dashboard, rate_interval="2m", time_range="24h", engine="vllm-0")
        for query in queries(dashboard, variables):
            times = []
            for _ in range(3):
                before = time.perf_counter()
                found = ask(url, query, end=END_S - 1, seconds=HOURS * 3600, step=STEP_SECONDS)
                times.append(time.perf_counter() - before)
            result.append((statistics.median(times), len(found), query))
        assert panels(dashboard)
    return sorted(result, key=lambda one: -one[0])


def main() -> int:
    """Return 1 when a query takes longer than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--tenants", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page, blocks = folder / "page.txt", folder / "tsdb"
        series, samples = write_page(page, options.models, options.tenants)
        create = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--quiet", "--max-block-duration=24h"]
        subprocess.run([*create, str(page), str(blocks)], check=True, stdout=subprocess.DEVNULL)
        page.unlink()
        size = sum(file.stat().st_size for file in blocks.rglob("*") if file.is_file())
        print(f"{series} series, {samples} samples, {size / samples:.2f} bytes a sample on disk")
        port = free_port()
        (folder / "prometheus.yml").write_text("{}\n")
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={blocks}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn", "--storage.tsdb.retention.time=100y"]
        url, log = f"http://127.0.0.1:{port}", folder / "prometheus.log"
        with program(command, log) as server:
            wait_for(lambda: fetch(f"{url}/-/ready"), 30, server, log)
            found = slowest(url)
    print(f"{len(found)} queries; median {1e3 * statistics.median(t for t, _, _ in found):.0f} ms")
    for seconds, count, query in found[:12]:
        print(f"{1e3 * seconds:6.0f} ms {count:5d} series  {query.board}: {query.panel}: {query.expression[:110]}")
    empty = sorted({f"{query.board}: {query.panel}" for _, count, query in found if not count})
    print(f"without data: {empty}")
    return int(found[0][0] > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
