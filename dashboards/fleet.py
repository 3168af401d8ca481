"""Fleet: how much power, for which work, how much of it wasted, and whether the numbers can be trusted."""

from dashboards import panels as p
from dashboards.board import Board, Row, link_to
from dashboards.panels import Column, Query
from dashboards.queries import SCRAPED, SMOOTH, Scope, per, total
from dashboards.words import IDLE_COLORS, VERDICT_COLORS, WASTE_COLORS
from jouletrace.metrics import names

NAME = "fleet"
SCOPE = Scope()
OUTPUT = 'direction="output"'
NODES = 20
"""Most nodes that are drawn one by one."""

POWER = total(SCOPE.rate(names.GPU_ENERGY_JOULES))
ENERGY = total(SCOPE.increase(names.GPU_ENERGY_JOULES))


def board() -> Board:
    """Return the board."""
    return Board(
        name=NAME,
        title="Fleet",
        description="All GPUs together: power, energy, tokens per joule, waste, and whether the exporters work.",
        scope=SCOPE,
        rows=(
            Row("Now", 5, _now()),
            Row("Power and energy", 8, _power()),
            Row("What a token costs", 8, _cost()),
            Row("Nodes", 7, (_nodes(),)),
            Row("Health of the exporters", 7, _health()),
        ),
    )


def _now() -> tuple[p.Panel, ...]:
    wasted = total(SCOPE.increase(names.WASTED_ENERGY_JOULES))
    idle = total(SCOPE.increase(names.IDLE_ENERGY_JOULES))
    return (
        p.figure(
            "Power",
            "Mean power of all selected GPUs over the last moments: the rate of their joules.",
            p.WATTS,
            Query(POWER),
            decimals=1,
        ),
        p.figure(
            "Energy",
            "Energy that the GPUs used in the time shown.",
            p.WATT_HOURS,
            Query(f"{ENERGY} / 3600"),
            instant=True,
            decimals=1,
        ),
        p.figure(
            "Output tokens per joule",
            "Throughput per watt in the time shown: output tokens per joule of everything that the GPUs used.",
            p.TOKENS_PER_JOULE,
            Query(per(total(SCOPE.increase(names.TOKENS, OUTPUT)), ENERGY)),
            instant=True,
            decimals=2,
        ),
        p.figure(
            "Idle share",
            "Part of the energy in the time shown that was used while no request ran, held by an engine or not.",
            p.RATIO,
            Query(per(idle, ENERGY)),
            steps=((None, p.GREEN), (0.2, p.YELLOW), (0.4, p.RED)),
            instant=True,
            decimals=1,
        ),
        p.figure(
            "Wasted share",
            "Part of the energy in the time shown that a named, fixable cause burned. A lower bound.",
            p.RATIO,
            Query(per(wasted, ENERGY)),
            steps=((None, p.GREEN), (0.05, p.YELLOW), (0.1, p.RED)),
            instant=True,
            decimals=1,
        ),
        p.figure(
            "GPUs that can be read",
            "Part of the known GPUs whose newest energy sample is younger than 10 s.",
            p.RATIO,
            Query(
                f"(count({SCOPE.series(names.SAMPLE_AGE_SECONDS)} < 10) or vector(0))"
                f" / count({SCOPE.series(names.GPU_INFO)})"
            ),
            steps=((None, p.RED), (0.99, p.YELLOW), (1, p.GREEN)),
            decimals=0,
        ),
    )


def _power() -> tuple[p.Panel, ...]:
    by_name = (
        f"{SCOPE.rate(names.GPU_ENERGY_JOULES)}"
        f" * on (job, instance, gpu, uuid) group_left (name) {SCOPE.series(names.GPU_INFO)}"
    )
    return (
        p.timeline(
            "Where the power goes",
            "Power of all GPUs by what it was used for: requests, work that no request accounts for, GPUs that are held"
            " and wait, GPUs that nobody holds. What has not been settled yet is missing at the right edge.",
            p.WATTS,
            Query(total(SCOPE.rate(names.ATTRIBUTED_ENERGY_JOULES)), "requests"),
            Query(total(SCOPE.rate(names.UNATTRIBUTED_ENERGY_JOULES)), "no request known"),
            Query(total(SCOPE.rate(names.IDLE_ENERGY_JOULES, 'kind="parked"')), "idle, held"),
            Query(total(SCOPE.rate(names.IDLE_ENERGY_JOULES, 'kind="bare"')), "idle, not held"),
            width=8,
            stacked=True,
            colors=IDLE_COLORS,
        ),
        p.timeline(
            "Power by GPU model",
            "Power of all GPUs by their model.",
            p.WATTS,
            Query(total(by_name, "name"), "{{name}}"),
            width=8,
            stacked=True,
        ),
        p.timeline(
            f"Power of the {NODES} busiest nodes",
            "Power of the nodes that draw most. The line leads to the node's GPUs.",
            p.WATTS,
            Query(f"topk({NODES}, {total(SCOPE.rate(names.GPU_ENERGY_JOULES), 'instance')})", "{{instance}}"),
            width=8,
            link=link_to("gpu", "GPUs of this node", instance="${__field.labels.instance}"),
        ),
        p.timeline(
            "GPUs by verdict",
            "How many GPUs each verdict held for, from the time that it held, not from samples of it.",
            p.COUNT,
            Query(total(SCOPE.rate(names.DIAGNOSIS_SECONDS), "verdict"), "{{verdict}}"),
            stacked=True,
            colors=VERDICT_COLORS,
        ),
        p.timeline(
            "Waste by cause",
            "Power that a named cause burned and that somebody could have saved.",
            p.WATTS,
            Query(total(SCOPE.rate(names.WASTED_ENERGY_JOULES), "cause"), "{{cause}}"),
            stacked=True,
            colors=WASTE_COLORS,
        ),
    )


def _cost() -> tuple[p.Panel, ...]:
    tokens = total(SCOPE.rate(names.TOKENS, OUTPUT, window=SMOOTH), "model")
    attributed = total(SCOPE.rate(names.ATTRIBUTED_ENERGY_JOULES, window=SMOOTH), "model")
    allocated = total(SCOPE.rate(names.ALLOCATED_ENERGY_JOULES, window=SMOOTH), "model")
    return (
        p.timeline(
            "Joules per output token by model",
            "Energy of requests over the output tokens of those that ended, without idle time, over five minutes.",
            p.JOULES,
            Query(per(attributed, tokens), "{{model}}"),
            width=8,
            logarithmic=True,
            link=link_to("requests", "Requests of this model", model="${__field.labels.model}"),
        ),
        p.timeline(
            "Output tokens per joule by model",
            "Throughput per watt over five minutes, of the energy that is billed: idle time of held GPUs included.",
            p.COUNT,
            Query(per(tokens, allocated), "{{model}}"),
            width=8,
            logarithmic=True,
            link=link_to("requests", "Requests of this model", model="${__field.labels.model}"),
        ),
        p.timeline(
            "Output tokens per second by model",
            "Throughput over five minutes, by the requests that ended.",
            p.TOKENS_PER_SECOND,
            Query(tokens, "{{model}}"),
            width=8,
            stacked=True,
        ),
    )


def _nodes() -> p.Panel:
    return p.rows(
        "Nodes",
        "One row per node; the name leads to its GPUs. Energy, idle and wasted shares are of the time shown.",
        {"instance": "Node"},
        Column("GPUs", f"count by (instance) ({SCOPE.series(names.GPU_INFO)})", "none"),
        Column("Power", total(SCOPE.rate(names.GPU_ENERGY_JOULES), "instance"), p.WATTS),
        Column("Power limit", total(SCOPE.series(names.GPU_POWER_LIMIT_WATTS), "instance"), p.WATTS),
        Column("Energy", f"{total(SCOPE.increase(names.GPU_ENERGY_JOULES), 'instance')} / 3600", p.WATT_HOURS),
        Column(
            "Idle",
            per(
                total(SCOPE.increase(names.IDLE_ENERGY_JOULES), "instance"),
                total(SCOPE.increase(names.GPU_ENERGY_JOULES), "instance"),
            ),
            p.RATIO,
            ((None, p.GREEN), (0.2, p.YELLOW), (0.4, p.RED)),
        ),
        Column(
            "Wasted",
            per(
                total(SCOPE.increase(names.WASTED_ENERGY_JOULES), "instance"),
                total(SCOPE.increase(names.GPU_ENERGY_JOULES), "instance"),
            ),
            p.RATIO,
            ((None, p.GREEN), (0.05, p.YELLOW), (0.1, p.RED)),
        ),
        Column(
            "Oldest sample",
            f"max by (instance) ({SCOPE.series(names.SAMPLE_AGE_SECONDS)})",
            p.SECONDS,
            ((None, p.GREEN), (10, p.YELLOW), (60, p.RED)),
        ),
        link=("Node", link_to("gpu", "GPUs of this node", instance="${__data.fields.Node}")),
        sort="Power",
    )


def _health() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "Exporters that do not answer",
            "Targets that Prometheus could not scrape, and exporters that answer and cannot read their GPUs.",
            p.COUNT,
            Query(f"count({SCOPE.series(SCRAPED)} == 0) or vector(0)", "not scraped"),
            Query(f"count({SCOPE.series(names.UP)} == 0) or vector(0)", "GPUs not read"),
            width=6,
            colors={"not scraped": p.RED, "GPUs not read": p.ORANGE},
            soft_most=1,
            decimals=0,
            link=link_to("exporter", "jouletrace itself"),
        ),
        p.timeline(
            "Oldest energy sample",
            "Age of the oldest newest sample of any GPU; about one second is normal.",
            p.SECONDS,
            Query(f"max({SCOPE.series(names.SAMPLE_AGE_SECONDS)})", "oldest"),
            width=6,
            steps=((None, "transparent"), (10, p.RED)),
        ),
        p.timeline(
            "Agreement of energy sensors",
            "The GPUs that disagree most: measured energy over that of the hardware counter. Healthy within 3 % of 1.",
            p.RATIO,
            Query(f"min({SCOPE.series(names.ENERGY_AGREEMENT_RATIO)})", "lowest"),
            Query(f"max({SCOPE.series(names.ENERGY_AGREEMENT_RATIO)})", "highest"),
            width=6,
            least=None,
            steps=((None, p.RED), (0.97, "transparent"), (1.03, p.RED)),
            decimals=1,
        ),
        p.timeline(
            "Coverage",
            "Part of the busy energy of engines that requests account for: the least covered engine, and the mean.",
            p.RATIO,
            Query(f"min({SCOPE.series(names.ATTRIBUTION_COVERAGE_RATIO)})", "lowest"),
            Query(f"avg({SCOPE.series(names.ATTRIBUTION_COVERAGE_RATIO)})", "mean"),
            width=6,
            most=1,
            empty="No engine sends records",
        ),
    )
