"""jouletrace itself: is it up, is its energy right, what does it cost, and do records arrive?"""

from dashboards import panels as p
from dashboards.board import Board, Row
from dashboards.panels import Column, Query
from dashboards.queries import (
    PROCESS_CPU,
    PROCESS_MEMORY,
    PROCESS_START,
    SCRAPE_SECONDS,
    SCRAPED,
    SCRAPED_SAMPLES,
    Scope,
    per,
    total,
)
from jouletrace.metrics import names

NAME = "exporter"
SCOPE = Scope()
MOST = 20
"""Most nodes that are drawn one by one."""


def board() -> Board:
    """Return the board."""
    return Board(
        name=NAME,
        title="jouletrace itself",
        description="Whether the exporters work, whether their energy is right, what they cost, and what they drop.",
        scope=SCOPE,
        rows=(
            Row("Is it up?", 8, _up()),
            Row("Is the energy right?", 7, _energy()),
            Row("What does it cost?", 7, _cost()),
            Row("Calls of the driver", 7, _driver()),
            Row("Records", 7, _records()),
            Row("Names of pods, and files that are read again", 7, _outside()),
            Row("Who runs what", 8, _versions()),
        ),
    )


def _worst(expression: str) -> str:
    return f"topk({MOST}, max by (instance) ({expression}))"


def _up() -> tuple[p.Panel, ...]:
    failing = f"max by (instance, collector) (1 - {SCOPE.series(names.COLLECTOR_SUCCESS)}) > 0"
    return (
        p.states(
            "Scraped, and GPUs read",
            f"Whether Prometheus reaches each exporter, and whether that can read all of its GPUs; the {MOST} worst.",
            {"not scraped": p.RED, "GPUs not read": p.ORANGE, "fine": p.GREEN},
            Query(
                f"bottomk({MOST}, min by (instance) ({SCOPE.series(SCRAPED)}) + (min by (instance)"
                f" ({SCOPE.series(names.UP)}) or 0 * min by (instance) ({SCOPE.series(SCRAPED)})))",
                "{{instance}}",
            ),
            first=0,
        ),
        p.sample_age(
            "Age of the newest energy sample",
            f"Oldest of each node, of the {MOST} oldest; about one second is normal.",
            Query(_worst(SCOPE.series(names.SAMPLE_AGE_SECONDS)), "{{instance}}"),
            width=6,
        ),
        p.states(
            "Parts of the page that are missing",
            "Collectors that failed: their metrics are missing, and the log has the cause.",
            {"failed": p.RED},
            Query(failing, "{{instance}} {{collector}}"),
            width=6,
            empty="All parts are there",
        ),
    )


def _energy() -> tuple[p.Panel, ...]:
    def counted(metric: names.Metric) -> str:
        return f"topk({MOST}, {total(SCOPE.increase(metric, window='5m'), 'instance')}) > 0"

    return (
        p.agreement(
            "Agreement of energy sensors",
            "Measured energy over that of the hardware counter, furthest apart of each node. Healthy: 0.97 to 1.03.",
            Query(
                f"bottomk({MOST}, min by (instance) ({SCOPE.series(names.ENERGY_AGREEMENT_RATIO)}))", "{{instance}} low"
            ),
            Query(_worst(SCOPE.series(names.ENERGY_AGREEMENT_RATIO)), "{{instance}} high"),
        ),
        p.timeline(
            "Gaps of the power sensor",
            "Part of the time for which the power sensor gave nothing, and energy came from the hardware counter.",
            p.RATIO,
            Query(_worst(SCOPE.rate(names.ENERGY_GAP_SECONDS)), "{{instance}}"),
            width=8,
            soft_most=0.01,
        ),
        p.timeline(
            "Rejected samples and counter resets",
            "Sensor values that cannot be true, and times that the hardware counter went backwards, in five minutes.",
            p.COUNT,
            Query(counted(names.REJECTED_SAMPLES), "{{instance}} rejected"),
            Query(counted(names.HARDWARE_ENERGY_RESETS), "{{instance}} resets"),
            width=8,
            empty="None",
        ),
    )


def _cost() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "CPU",
            "CPU of the process and, dashed, of the sampler with the driver's part in it; 1 is one core.",
            p.RATIO,
            Query(_worst(SCOPE.rate(PROCESS_CPU)), "{{instance}}"),
            Query(_worst(SCOPE.rate(names.SAMPLER_CPU_SECONDS)), "{{instance}} sampler"),
            width=6,
            dashed=["sampler$"],
            decimals=2,
        ),
        p.timeline(
            "Resident memory",
            "Memory of the process.",
            p.BYTES,
            Query(_worst(SCOPE.series(PROCESS_MEMORY)), "{{instance}}"),
            width=6,
        ),
        p.timeline(
            "Time of a scrape",
            "How long Prometheus waits for a page.",
            p.SECONDS,
            Query(_worst(SCOPE.series(SCRAPE_SECONDS)), "{{instance}}"),
            width=6,
        ),
        p.timeline(
            "Series of a scrape",
            "How many series each exporter serves.",
            p.COUNT,
            Query(_worst(SCOPE.series(SCRAPED_SAMPLES)), "{{instance}}"),
            width=6,
        ),
    )


def _driver() -> tuple[p.Panel, ...]:
    seconds = total(SCOPE.rate(names.DRIVER_CALL_SECONDS, suffix="_sum"), "call")
    calls = total(SCOPE.rate(names.DRIVER_CALL_SECONDS, suffix="_count"), "call")
    return (
        p.timeline(
            "Time per call",
            "Mean wall time of the slowest calls of the GPU driver, by function.",
            p.SECONDS,
            Query(f"topk(6, {per(seconds, calls)})", "{{call}}"),
            width=8,
        ),
        p.timeline(
            "Calls that failed",
            "Failed calls of the GPU driver, by function and return code.",
            p.PER_SECOND,
            Query(f"topk({MOST}, {total(SCOPE.rate(names.DRIVER_ERRORS), 'call', 'code')})", "{{call}} {{code}}"),
            width=8,
            empty="No call has failed",
        ),
        p.timeline(
            "Stretch of the sampler",
            "Factor by which the sampler has lengthened its intervals to stay within its CPU budget.",
            p.FACTOR,
            Query(_worst(SCOPE.series(names.SAMPLER_STRETCH_RATIO)), "{{instance}}"),
            width=8,
            decimals=2,
        ),
    )


def _records() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "Records that came in",
            "Records of engines, steps and requests, by the way they came.",
            p.PER_SECOND,
            Query(total(SCOPE.rate(names.EVENTS), "source"), "{{source}}"),
            width=8,
            stacked=True,
            empty="No record has come",
        ),
        p.timeline(
            "Records that were dropped",
            "Records that were not taken, by reason; duplicate is harmless.",
            p.PER_SECOND,
            Query(total(SCOPE.rate(names.EVENTS_DROPPED), "reason"), "{{reason}}"),
            width=8,
            empty="No record was dropped",
        ),
        p.timeline(
            "Age of the account",
            "How far the account of requests is behind; 1 to 6 s is normal, up to a minute where a feed tells of"
            " requests only once they are over.",
            p.SECONDS,
            Query(_worst(SCOPE.series(names.ACCOUNT_AGE_SECONDS)), "{{instance}}"),
            width=8,
        ),
        p.timeline(
            "Spans passed on",
            "Exports of spans that the collector behind jouletrace took, and those that were dropped by reason.",
            p.PER_SECOND,
            Query(total(SCOPE.rate(names.OTLP_EXPORTS_FORWARDED)), "forwarded"),
            Query(total(SCOPE.rate(names.OTLP_EXPORTS_DROPPED), "reason"), "{{reason}}"),
            width=8,
            empty="No collector stands behind this one",
        ),
        p.timeline(
            "Spans waiting",
            "Bytes of spans that wait for the collector behind jouletrace.",
            p.BYTES,
            Query(_worst(SCOPE.series(names.OTLP_FORWARD_BUFFER_BYTES)), "{{instance}}"),
            width=8,
            empty="No collector stands behind this one",
        ),
        p.timeline(
            "Coverage",
            "Part of the busy energy of engines that requests account for: the least covered engine of each node.",
            p.RATIO,
            Query(
                f"bottomk({MOST}, min by (instance) ({SCOPE.series(names.ATTRIBUTION_COVERAGE_RATIO)}))", "{{instance}}"
            ),
            width=8,
            most=1,
            empty="No engine sends records",
        ),
    )


def _outside() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "Age of the kubelet's last answer",
            "Time since the kubelet last said which pods hold which GPUs; up to 30 s is normal.",
            p.SECONDS,
            Query(_worst(SCOPE.series(names.KUBELET_ANSWER_AGE_SECONDS)), "{{instance}}"),
            width=8,
            empty="Not asked for: workloads.pods is off",
        ),
        p.timeline(
            "Questions that the kubelet did not answer",
            "Calls of the kubelet that failed, by the reason that it or the socket gave.",
            p.PER_SECOND,
            Query(
                f"topk({MOST}, {total(SCOPE.rate(names.KUBELET_ERRORS), 'instance', 'code')})", "{{instance}} {{code}}"
            ),
            width=8,
            empty="No call has failed",
        ),
        p.states(
            "Changed files that were refused",
            "Files of the configuration that are wrong now, by their key: what they said before stays in force, and the"
            " log has the cause.",
            {"refused": p.RED},
            Query(
                f"max by (instance, key) (1 - {SCOPE.series(names.FILE_RELOAD_SUCCESS)}) > 0", "{{instance}} {{key}}"
            ),
            width=8,
            empty="All files are in force as they are",
        ),
    )


def _versions() -> tuple[p.Panel, ...]:
    by = ("instance", "version", "python_version")
    sensors = ("instance", "gpu", "name", "driver_version", "energy_source")
    return (
        p.rows(
            "Versions",
            "Which jouletrace runs where, and since when.",
            {"instance": "Node", "version": "jouletrace", "python_version": "Python"},
            Column(
                "Running for",
                f"max by ({', '.join(by)}) ({SCOPE.series(names.BUILD_INFO)} * on (job, instance) group_left ()"
                f" (time() - {SCOPE.series(PROCESS_START)}))",
                p.SECONDS,
            ),
            width=10,
        ),
        p.rows(
            "GPUs and their energy sensor",
            "Which sensor each GPU's energy comes from, and the interval at which it gives a new value.",
            {
                "instance": "Node",
                "gpu": "GPU",
                "name": "Model",
                "driver_version": "Driver",
                "energy_source": "Sensor",
            },
            Column(
                "Interval",
                f"max by ({', '.join(sensors)}) ({SCOPE.series(names.GPU_INFO)}"
                " * on (job, instance, gpu, energy_source) group_left () label_replace("
                f'{SCOPE.series(names.SENSOR_UPDATE_INTERVAL_SECONDS)}, "energy_source", "$1", "sensor", "(.+)"))',
                p.SECONDS,
            ),
            width=14,
        ),
    )
