"""What the dashboards cost: every panel's query over 24 hours of a node with 8 GPUs, on a local Prometheus.

`python -m tests.benchmarks.dashboards [--models N] [--tenants N] [--nodes N]` makes the day's samples from the real
collectors' page (counters rise, gauges swing, state sets change), imports them with promtool, adds what the recording
rules make of them, starts Prometheus on it all and asks each query five times; the middle time counts. Prints each
board's times, the slowest queries, and what a sample takes on disk.
"""

import argparse
import contextlib
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import yaml
from dashboards.boards import files
from dashboards.queries import (
    PROCESS_CPU,
    PROCESS_MEMORY,
    PROCESS_START,
    RULE_SECONDS,
    SCRAPE_SECONDS,
    SCRAPED,
    SCRAPED_SAMPLES,
)
from prometheus_client.core import Metric

from jouletrace.diagnosis.waste import WasteCause
from tests.dashboards.asked import Asked, Shown, ask, queries, values
from tests.integration.test_prometheus import fetch, free_port, program, wait_for
from tests.node_page import full_page

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "recording"
GPUS = 8
HOURS = 24
INTERVAL_SECONDS = 30
END_S = 1_795_392_000
DAY = Shown(HOURS * 3600, INTERVAL_SECONDS)
"""A point each minute, as on panels that are 1,440 pixels wide."""
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


def write_nodes(file: Path, nodes: int) -> None:
    """Write what the rules recorded of further nodes during the day, as far as the fleet's board reads it."""
    rng = random.Random(2)
    several = {"kind": ("bare", "parked"), "cause": tuple(WasteCause)}
    seconds = range(0, HOURS * 3600, RULE_SECONDS)
    with file.open("w") as out:
        for name in sorted(set(re.findall(r"jouletrace:instance[\w:]*", files()["jouletrace-fleet.json"]))):
            out.write(f"# TYPE {name} gauge\n")
            [label] = [one for one in several if f"_{one}:" in name] or [""]
            for node in range(2, nodes + 2):
                for value in several.get(label, ("",)):
                    more = f',{label}="{value}"' if label else ""
                    head = f'{name}{{instance="node-{node}",job="jouletrace"{more}}} '
                    level = rng.uniform(1.0, 5000.0)
                    out.writelines(
                        f"{head}{level + second % 700:.1f} {END_S - HOURS * 3600 + second}\n" for second in seconds
                    )
        out.write("# EOF\n")


def blocks_from(page: Path, blocks: Path) -> None:
    """Import an OpenMetrics page and delete it."""
    create = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--quiet", "--max-block-duration=24h"]
    subprocess.run([*create, str(page), str(blocks)], check=True, stdout=subprocess.DEVNULL)
    page.unlink()


def depth(name: str, expressions: Mapping[str, str]) -> int:
    """Return how many recorded metrics stand one on the other below this one."""
    below = re.findall(r"jouletrace:[\w:]+", expressions[name])
    return 1 + max((depth(one, expressions) for one in below), default=0)


@contextlib.contextmanager
def prometheus(folder: Path, blocks: Path) -> Iterator[str]:
    """Run Prometheus on the blocks; yield its URL."""
    port, log = free_port(), folder / "prometheus.log"
    (folder / "prometheus.yml").write_text("{}\n")
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={blocks}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn", "--storage.tsdb.retention.time=100y"]
    with program(command, log) as server:
        wait_for(lambda: fetch(f"http://127.0.0.1:{port}/-/ready"), 30, server, log)
        yield f"http://127.0.0.1:{port}"


def record(folder: Path, blocks: Path) -> None:
    """Add what the recording rules would have recorded during the day.

    promtool evaluates them on a running Prometheus, which sees new blocks when it starts; so those that read recorded
    metrics come after what they read.
    """
    groups = [yaml.safe_load(file.read_text())["groups"][0] for file in sorted(RULES.glob("*.yml"))]
    expressions = {rule["record"]: rule["expr"] for group in groups for rule in group["rules"]}
    depths = {name: depth(name, expressions) for name in expressions}
    for level in sorted(set(depths.values())):
        rules = [{"record": name, "expr": expressions[name]} for name in expressions if depths[name] == level]
        file = folder / "rules.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "day", "rules": rules}]}))
        with prometheus(folder, blocks) as url:
            times = [f"--start={END_S - HOURS * 3600}", f"--end={END_S - 1}", f"--eval-interval={RULE_SECONDS}s"]
            create = ["promtool", "tsdb", "create-blocks-from", "rules", f"--url={url}", f"--output-dir={blocks}"]
            subprocess.run([*create, *times, str(file)], check=True, capture_output=True)


def measured(url: str, repeats: int) -> list[tuple[float, int, Asked]]:
    """Return every query with its middle time in seconds and its number of series, slowest first."""
    result = []
    for text in files().values():
        dashboard = json.loads(text)
        for query in queries(dashboard, values(dashboard, engine="vllm-0"), DAY):
            times = []
            for _ in range(repeats):
                before = time.perf_counter()
                found = ask(url, query, end=END_S - 1, seconds=DAY.seconds)
                times.append(time.perf_counter() - before)
            result.append((statistics.median(times), len(found), query))
    return sorted(result, key=lambda one: -one[0])


def main() -> int:
    """Return 1 when a query takes longer than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--tenants", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=0, help="further nodes of the fleet's board, as recorded")
    parser.add_argument("--repeats", type=int, default=5, help="times that each query is asked; the middle one counts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page, blocks = folder / "page.txt", folder / "tsdb"
        series, samples = write_page(page, options.models, options.tenants)
        blocks_from(page, blocks)
        size = sum(file.stat().st_size for file in blocks.rglob("*") if file.is_file())
        print(f"{series} series, {samples} samples, {size / samples:.2f} bytes a sample on disk")
        record(folder, blocks)
        if options.nodes:
            write_nodes(page, options.nodes)
            blocks_from(page, blocks)
        with prometheus(folder, blocks) as url:
            found = measured(url, options.repeats)
            count = Asked("", "", 'count({__name__=~"jouletrace:.+"})', instant=True, step_seconds=0.0)
            recorded = ask(url, count, end=END_S - 1, seconds=0.0)
    print(f"{recorded[0]['value'][1]} recorded series")
    for board in (*sorted({query.board for _, _, query in found}), "jouletrace-"):
        times = [seconds for seconds, _, query in found if query.board.startswith(board)]
        p95 = statistics.quantiles(times, n=20)[-1]
        line = f"{len(times):4d} queries: median {1e3 * statistics.median(times):.0f}, p95 {1e3 * p95:.0f},"
        print(f"{line} slowest {1e3 * times[0]:.0f} ms  {board.removeprefix('jouletrace-') or 'all boards'}")
    for seconds, count, query in found[:12]:
        print(f"{1e3 * seconds:6.0f} ms {count:5d} series  {query.board}: {query.panel}: {query.expression[:110]}")
    answered = {(query.board, query.panel) for _, count, query in found if count}
    empty = sorted({(query.board, query.panel) for _, _, query in found} - answered)
    print(f"without data: {empty}")
    return int(found[0][0] > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
