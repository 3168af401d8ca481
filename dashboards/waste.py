"""Waste: joules that nobody needed, who holds the GPUs that burn them, and how fast the budget burns."""

from collections.abc import Callable

from dashboards import panels as p
from dashboards.board import PAGES, Board, Row, link_to
from dashboards.panels import Column, Query
from dashboards.queries import Scope, per, total
from dashboards.words import WASTE_COLORS
from jouletrace.diagnosis.verdicts import Verdict
from jouletrace.metrics import names

NAME = "waste"
SCOPE = Scope()
MOST = 15
"""Most nodes or engines that are drawn one by one."""
BARE, PARKED = 'kind="bare"', 'kind="parked"'
UNDERUTILIZED, WITH_DEMAND = f'verdict="{Verdict.UNDERUTILIZED}"', 'cause="underutilized_with_demand"'
OWNER = ("instance", "engine", "model")
WINDOWS = ("1h", "6h", "1d", "3d")
"""Long windows of the burn-rate alerts."""

POWER, IDLE = "instance:power_watts:rate5m", "instance_kind:idle_watts:rate5m"
WASTED, BY_CAUSE = "instance:wasted_watts:rate5m", "instance_cause:wasted_watts:rate5m"
BY_VERDICT = "instance_verdict:power_watts:rate5m"
BUDGET = SCOPE.recorded("fleet:waste_budget:ratio")


def board() -> Board:
    """Return the board."""
    return Board(
        name=NAME,
        title="Waste",
        description="Joules that nobody needed: idle GPUs and who holds them, waste by cause, and the budget for it.",
        scope=SCOPE,
        rows=(
            Row("In the time shown", 5, _now()),
            Row("Idle energy and its owners", 8, _idle()),
            Row("Waste by cause", 8, _causes()),
            Row("Budget", 8, _budget()),
            Row("Which GPUs", 10, (_devices(),)),
        ),
    )


def held(function: Callable[[str], str], *by: str) -> str:
    """Return the idle part of what engines are billed for: allocated less attributed, by what `function` makes of each.

    `function`: `Scope.mean` for watts, `Scope.recorded_increase` for joules.
    """
    allocated = total(function("instance_engine_model:allocated_watts:rate5m"), *by)
    attributed = total(function("instance_engine_model:attributed_watts:rate5m"), *by)
    # An owner that never had a request has no attributed energy at all.
    return f"clamp_min({allocated} - ({attributed} or 0 * {allocated}), 0)"


def _now() -> tuple[p.Panel, ...]:
    wasted, energy = total(SCOPE.recorded_increase(WASTED)), total(SCOPE.recorded_increase(POWER))
    return (
        p.energy(
            "Idle energy, held",
            "Energy of GPUs while an engine or another process held them and no request ran.",
            total(SCOPE.recorded_increase(IDLE, PARKED)),
        ),
        p.energy(
            "Idle energy, not held",
            "Energy of GPUs that nobody held.",
            total(SCOPE.recorded_increase(IDLE, BARE)),
        ),
        p.energy(
            "Energy while underutilized",
            "Energy of GPUs that were active under half of the time, or on a small part of their SMs.",
            total(SCOPE.recorded_increase(BY_VERDICT, UNDERUTILIZED)),
        ),
        p.energy(
            "Wasted energy",
            "Energy that a named, fixable cause burned: a lower bound.",
            wasted,
        ),
        p.share(
            "Wasted share",
            "Wasted energy as a part of all energy.",
            wasted,
            energy,
            p.WASTED_STEPS,
        ),
        p.figure(
            "Budget used",
            "Wasted share over the budget that the alerts go by (jouletrace:fleet:waste_budget:ratio): above 100 % the"
            " time shown has wasted more than allowed.",
            p.RATIO,
            Query(f"{per(wasted, energy)} / scalar({BUDGET})"),
            steps=((None, p.GREEN), (0.8, p.YELLOW), (1, p.RED)),
            instant=True,
            decimals=0,
        ),
    )


def _idle() -> tuple[p.Panel, ...]:
    idle = held(SCOPE.recorded_increase, *OWNER)
    billed = total(SCOPE.recorded_increase("instance_engine_model:allocated_watts:rate5m"), *OWNER)
    return (
        p.timeline(
            "Idle power",
            "Power used while no request ran: held by a process, or by nobody.",
            p.WATTS,
            Query(total(SCOPE.mean(IDLE, PARKED)), "held (parked)"),
            Query(total(SCOPE.mean(IDLE, BARE)), "not held (bare)"),
            stacked=True,
            colors={"held (parked)": p.GREY, "not held (bare)": p.LIGHT_GREY},
        ),
        p.timeline(
            "Idle power by the engine that holds the GPUs",
            "Idle power that each engine's models are billed for: what they hold and do not use.",
            p.WATTS,
            Query(f"topk({MOST}, {held(SCOPE.mean, 'engine', 'model')})", "{{engine}} {{model}}"),
            stacked=True,
            empty="No engine is known",
        ),
        p.rows(
            "Owners of idle energy",
            "Who held GPUs without using them in the time shown.",
            {"instance": "Node", "engine": "Engine", "model": "Model"},
            Column("Idle energy", f"{idle} / 3600", p.WATT_HOURS),
            Column("Of its bill", per(idle, billed), p.RATIO, ((None, p.GREEN), (0.2, p.YELLOW), (0.5, p.RED))),
            sort="Idle energy",
        ),
    )


def _causes() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "Wasted power by cause",
            f"Power that a named cause burned and that somebody could have saved."
            f" [What counts]({PAGES}/docs/diagnosis-engines.md#waste).",
            p.WATTS,
            Query(total(SCOPE.mean(BY_CAUSE), "cause"), "{{cause}}"),
            width=8,
            stacked=True,
            colors=WASTE_COLORS,
        ),
        p.timeline(
            "Wasted power by node",
            "The nodes that waste most.",
            p.WATTS,
            Query(f"topk({MOST}, {SCOPE.mean(WASTED)})", "{{instance}}"),
            width=8,
            stacked=True,
            link=link_to(SCOPE, "gpu", "GPUs of this node", instance="${__field.labels.instance}"),
        ),
        p.timeline(
            "Underutilized: power and its wasted part",
            "Power of GPUs that were underutilized, and the part of it that was wasted because requests were waiting.",
            p.WATTS,
            Query(total(SCOPE.mean(BY_VERDICT, UNDERUTILIZED)), "underutilized"),
            Query(total(SCOPE.mean(BY_CAUSE, WITH_DEMAND)), "wasted, requests waiting"),
            width=8,
            colors={"underutilized": p.YELLOW, "wasted, requests waiting": p.RED},
        ),
    )


def _budget() -> tuple[p.Panel, ...]:
    def burn(window: str) -> str:
        return f"{SCOPE.recorded(f'cluster:waste:ratio_rate{window}')} / scalar({BUDGET})"

    return (
        p.timeline(
            "Budget burn rate",
            "How many times faster than allowed each whole cluster burns its waste budget, over the windows of the"
            " alerts. At 1 it lasts as planned.",
            p.FACTOR,
            *(Query(burn(window), f"last {window} {{{{cluster}}}}") for window in WINDOWS),
            steps=((None, "transparent"), (1, p.RED)),
            soft_most=1.1,
        ),
        p.timeline(
            "Wasted share of the energy",
            "Wasted power over all power of the chosen nodes, and dashed the budget.",
            p.RATIO,
            Query(per(total(SCOPE.mean(WASTED)), total(SCOPE.mean(POWER))), "wasted"),
            Query(BUDGET, "budget"),
            dashed=["^budget$"],
            colors={"wasted": p.ORANGE, "budget": p.RED},
        ),
    )


def _devices() -> p.Panel:
    by = ("instance", "gpu")
    energy = total(SCOPE.increase(names.GPU_ENERGY_JOULES), *by)
    return p.rows(
        "GPUs by waste",
        "One row per GPU, over the time shown; the GPU leads to its board.",
        {"instance": "Node", "gpu": "GPU"},
        Column("Wasted", f"{total(SCOPE.increase(names.WASTED_ENERGY_JOULES), *by)} / 3600", p.WATT_HOURS),
        Column("Idle, held", f"{total(SCOPE.increase(names.IDLE_ENERGY_JOULES, PARKED), *by)} / 3600", p.WATT_HOURS),
        Column("Idle, not held", f"{total(SCOPE.increase(names.IDLE_ENERGY_JOULES, BARE), *by)} / 3600", p.WATT_HOURS),
        Column(
            "Underutilized",
            f"{total(SCOPE.increase(names.DIAGNOSIS_ENERGY_JOULES, UNDERUTILIZED), *by)} / 3600",
            p.WATT_HOURS,
        ),
        Column("All energy", f"{energy} / 3600", p.WATT_HOURS),
        Column(
            "Wasted share",
            per(total(SCOPE.increase(names.WASTED_ENERGY_JOULES), *by), energy),
            p.RATIO,
            p.WASTED_STEPS,
        ),
        link=("GPU", link_to(SCOPE, "gpu", "This GPU", instance="${__data.fields.Node}", gpu="${__data.fields.GPU}")),
        sort="Wasted",
    )
