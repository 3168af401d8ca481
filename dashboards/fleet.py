"""Fleet: how much power, for which work, how much of it wasted, and whether the numbers can be trusted."""

from dashboards import panels as p
from dashboards.board import Board, Row, link_to
from dashboards.panels import Column, Query
from dashboards.queries import FLEET, STEP, Scope, per, total
from dashboards.words import IDLE_COLORS, VERDICT_COLORS, WASTE_COLORS

NAME = "fleet"
SCOPE = Scope(base=FLEET)
NODES = 20
"""Most nodes that are drawn one by one."""

POWER = "cluster:power_watts:rate5m"
ENERGY = total(SCOPE.recorded_increase(POWER))


def board() -> Board:
    """Return the board."""
    return Board(
        name=NAME,
        title="Fleet",
        description="All GPUs together: power, energy, tokens per joule, waste, and whether the exporters work. Reads"
        " recorded sums of clusters and nodes, and so stays quick however many GPUs there are.",
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
    wasted = total(SCOPE.recorded_increase("cluster:wasted_watts:rate5m"))
    idle = total(SCOPE.recorded_increase("cluster_kind:idle_watts:rate5m"))
    tokens = total(SCOPE.recorded_increase("cluster:output_tokens:rate5m"))
    return (
        p.figure(
            "Power",
            "Mean power of all GPUs over five minutes: the rate of their joules.",
            p.WATTS,
            Query(total(SCOPE.mean(POWER))),
            decimals=1,
        ),
        p.energy(
            "Energy",
            "Energy that the GPUs used in the time shown.",
            ENERGY,
        ),
        p.figure(
            "Output tokens per joule",
            "Throughput per watt in the time shown: output tokens per joule of everything that the GPUs used.",
            p.TOKENS_PER_JOULE,
            Query(per(tokens, ENERGY)),
            instant=True,
            decimals=2,
        ),
        p.share(
            "Idle share",
            "Part of the energy in the time shown that was used while no request ran, held by an engine or not.",
            idle,
            ENERGY,
            p.IDLE_STEPS,
        ),
        p.share(
            "Wasted share",
            "Part of the energy in the time shown that a named, fixable cause burned. A lower bound.",
            wasted,
            ENERGY,
            p.WASTED_STEPS,
        ),
        p.figure(
            "GPUs that can be read",
            "Part of the known GPUs whose newest energy sample is younger than 10 s.",
            p.RATIO,
            Query(
                per(
                    total(SCOPE.recorded("cluster:fresh_gpus:sum")),
                    total(SCOPE.recorded("cluster:gpus:sum")),
                )
            ),
            steps=((None, p.RED), (0.99, p.YELLOW), (1, p.GREEN)),
            decimals=0,
        ),
    )


def _power() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "Where the power goes",
            "Power of all GPUs by what it was used for: requests, work that no request accounts for, GPUs that are held"
            " and wait, GPUs that nobody holds. What has not been settled yet is missing at the right edge.",
            p.WATTS,
            Query(total(SCOPE.mean("cluster:attributed_watts:rate5m")), "requests"),
            Query(total(SCOPE.mean("cluster:unattributed_watts:rate5m")), "no request known"),
            Query(total(SCOPE.mean("cluster_kind:idle_watts:rate5m", 'kind="parked"')), "idle, held"),
            Query(total(SCOPE.mean("cluster_kind:idle_watts:rate5m", 'kind="bare"')), "idle, not held"),
            width=8,
            stacked=True,
            colors=IDLE_COLORS,
        ),
        p.timeline(
            "Power by GPU model",
            "Power of all GPUs by their model.",
            p.WATTS,
            Query(total(SCOPE.mean("cluster_name:power_watts:rate5m"), "name"), "{{name}}"),
            width=8,
            stacked=True,
        ),
        p.timeline(
            f"Power of the {NODES} busiest nodes",
            "Power of the nodes that draw most. The line leads to the node's GPUs.",
            p.WATTS,
            Query(f"topk({NODES}, {SCOPE.mean('instance:power_watts:rate5m')})", "{{instance}}"),
            width=8,
            link=link_to(SCOPE, "gpu", "GPUs of this node", instance="${__field.labels.instance}"),
        ),
        p.timeline(
            "GPUs by verdict",
            "How many GPUs each verdict held for, from the time that it held, not from samples of it.",
            p.COUNT,
            Query(total(SCOPE.mean("cluster_verdict:gpus:rate5m"), "verdict"), "{{verdict}}"),
            stacked=True,
            colors=VERDICT_COLORS,
        ),
        p.timeline(
            "Waste by cause",
            "Power that a named cause burned and that somebody could have saved.",
            p.WATTS,
            Query(total(SCOPE.mean("cluster_cause:wasted_watts:rate5m"), "cause"), "{{cause}}"),
            stacked=True,
            colors=WASTE_COLORS,
        ),
    )


def _cost() -> tuple[p.Panel, ...]:
    tokens = total(SCOPE.mean("cluster_model:output_tokens:rate5m"), "model")
    attributed = total(SCOPE.mean("cluster_model:attributed_watts:rate5m"), "model")
    allocated = total(SCOPE.mean("cluster_model:allocated_watts:rate5m"), "model")
    return (
        p.timeline(
            "Joules per output token by model",
            "Energy of requests over the output tokens of those that ended, without idle time, over five minutes.",
            p.JOULES,
            Query(per(attributed, tokens), "{{model}}"),
            width=8,
            logarithmic=True,
            link=link_to(SCOPE, "requests", "Requests of this model", model="${__field.labels.model}"),
        ),
        p.timeline(
            "Output tokens per joule by model",
            "Throughput per watt over five minutes, of the energy that is billed: idle time of held GPUs included.",
            p.COUNT,
            Query(per(tokens, allocated), "{{model}}"),
            width=8,
            logarithmic=True,
            link=link_to(SCOPE, "requests", "Requests of this model", model="${__field.labels.model}"),
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
    energy = total(SCOPE.recorded_increase("instance:power_watts:rate5m"), "instance")
    return p.rows(
        "Nodes",
        "One row per node; the name leads to its GPUs. Energy, idle and wasted shares are of the time shown.",
        {"instance": "Node"},
        Column("GPUs", total(SCOPE.recorded("instance:gpus:count"), "instance"), "none"),
        Column("Power", total(SCOPE.recorded("instance:power_watts:rate5m"), "instance"), p.WATTS),
        Column("Power limit", total(SCOPE.recorded("instance:power_limit_watts:sum"), "instance"), p.WATTS),
        Column("Energy", f"{energy} / 3600", p.WATT_HOURS),
        Column(
            "Idle",
            per(total(SCOPE.recorded_increase("instance:idle_watts:rate5m"), "instance"), energy),
            p.RATIO,
            p.IDLE_STEPS,
        ),
        Column(
            "Wasted",
            per(total(SCOPE.recorded_increase("instance:wasted_watts:rate5m"), "instance"), energy),
            p.RATIO,
            p.WASTED_STEPS,
        ),
        Column(
            "Oldest sample",
            f"max by (instance) ({SCOPE.recorded('instance:sample_age_seconds:max')})",
            p.SECONDS,
            ((None, p.GREEN), (10, p.YELLOW), (60, p.RED)),
        ),
        link=("Node", link_to(SCOPE, "gpu", "GPUs of this node", instance="${__data.fields.Node}")),
        sort="Power",
    )


def _extreme(function: str, rule: str) -> str:
    """Return the least (min) or the most (max) of what a rule recorded since the point before."""
    return f"{function}_over_time({SCOPE.recorded(rule)}[{STEP}])"


def _health() -> tuple[p.Panel, ...]:
    attributed = total(SCOPE.mean("cluster:attributed_watts:rate5m"))
    unattributed = total(SCOPE.mean("cluster:unattributed_watts:rate5m"))
    return (
        p.timeline(
            "Exporters that do not answer",
            "Targets that Prometheus could not scrape, and exporters that answer and cannot read their GPUs.",
            p.COUNT,
            Query(total(_extreme("max", "cluster:unscraped_exporters:sum")), "not scraped"),
            Query(total(_extreme("max", "cluster:unread_exporters:sum")), "GPUs not read"),
            width=6,
            colors={"not scraped": p.RED, "GPUs not read": p.ORANGE},
            soft_most=1,
            decimals=0,
            link=link_to(SCOPE, "exporter", "jouletrace itself"),
        ),
        p.sample_age(
            "Oldest energy sample",
            "Age of the oldest newest sample of any GPU; about one second is normal.",
            Query(f"max({_extreme('max', 'cluster:sample_age_seconds:max')})", "oldest"),
            width=6,
        ),
        p.agreement(
            "Agreement of energy sensors",
            "The GPUs that disagree most: measured energy over that of the hardware counter. Healthy within 3 % of 1.",
            Query(f"min({_extreme('min', 'cluster:energy_agreement_ratio:min')})", "lowest"),
            Query(f"max({_extreme('max', 'cluster:energy_agreement_ratio:max')})", "highest"),
            width=6,
        ),
        p.timeline(
            "Coverage",
            "Part of the busy energy that requests account for: of the least covered engine, and of all GPUs together.",
            p.RATIO,
            Query(f"min({_extreme('min', 'cluster:attribution_coverage_ratio:min')})", "lowest engine"),
            Query(per(attributed, f"{attributed} + {unattributed}"), "all GPUs"),
            width=6,
            most=1,
            empty="No engine sends records",
        ),
    )
