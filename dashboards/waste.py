"""Waste: joules that nobody needed, who holds the GPUs that burn them, and how fast the budget burns."""

from dashboards import panels as p
from dashboards.board import PAGES, Board, Choice, Row, link_to
from dashboards.panels import Column, Query
from dashboards.queries import Scope, per, total
from dashboards.words import WASTE_COLORS
from jouletrace.diagnosis.verdicts import Verdict
from jouletrace.metrics import names

NAME = "waste"
SCOPE = Scope(("gpu",))
BARE, PARKED = 'kind="bare"', 'kind="parked"'
OWNER = ("instance", "engine", "model")
WINDOWS = ("1h", "6h", "1d", "3d")
"""Long windows of the usual burn-rate alerts."""
BUDGET = Choice("budget", "Waste budget", {"2 %": "0.02", "5 %": "0.05", "10 %": "0.1", "20 %": "0.2"}, "10 %")

ENERGY = total(SCOPE.increase(names.GPU_ENERGY_JOULES))


def board() -> Board:
    """Return the board."""
    return Board(
        name=NAME,
        title="Waste",
        description="Joules that nobody needed: idle GPUs and who holds them, waste by cause, and the budget for it.",
        scope=SCOPE,
        choices=(BUDGET,),
        rows=(
            Row("In the time shown", 5, _now()),
            Row("Idle energy and its owners", 8, _idle()),
            Row("Waste by cause", 8, _causes()),
            Row("Budget", 8, _budget()),
            Row("Which GPUs", 10, (_devices(),)),
        ),
    )


def held(function: str, *by: str) -> str:
    """Return the idle part of what engines are billed for: allocated less attributed energy."""
    window = _window(function)
    allocated = f"{function}({SCOPE.series(names.ALLOCATED_ENERGY_JOULES)}[{window}])"
    attributed = f"{function}({SCOPE.series(names.ATTRIBUTED_ENERGY_JOULES)}[{window}])"
    whole = total(allocated, *by)
    # An owner that never had a request has no attributed energy at all.
    return f"clamp_min({whole} - ({total(attributed, *by)} or 0 * {whole}), 0)"


def _window(function: str) -> str:
    """Return the window that a function of counters is taken over on a board."""
    return {"rate": "$__rate_interval", "increase": "$__range"}[function]


def _now() -> tuple[p.Panel, ...]:
    wasted = total(SCOPE.increase(names.WASTED_ENERGY_JOULES))
    return (
        p.figure(
            "Idle energy, held",
            "Energy of GPUs while an engine or another process held them and no request ran.",
            p.WATT_HOURS,
            Query(f"{total(SCOPE.increase(names.IDLE_ENERGY_JOULES, PARKED))} / 3600"),
            instant=True,
            decimals=1,
        ),
        p.figure(
            "Idle energy, not held",
            "Energy of GPUs that nobody held.",
            p.WATT_HOURS,
            Query(f"{total(SCOPE.increase(names.IDLE_ENERGY_JOULES, BARE))} / 3600"),
            instant=True,
            decimals=1,
        ),
        p.figure(
            "Energy while underutilized",
            "Energy of GPUs that were active under half of the time, or on a small part of their SMs.",
            p.WATT_HOURS,
            Query(f"{total(SCOPE.increase(names.DIAGNOSIS_ENERGY_JOULES, _UNDERUTILIZED))} / 3600"),
            instant=True,
            decimals=1,
        ),
        p.figure(
            "Wasted energy",
            "Energy that a named, fixable cause burned: a lower bound.",
            p.WATT_HOURS,
            Query(f"{wasted} / 3600"),
            instant=True,
            decimals=1,
        ),
        p.figure(
            "Wasted share",
            "Wasted energy as a part of all energy.",
            p.RATIO,
            Query(per(wasted, ENERGY)),
            steps=((None, p.GREEN), (0.05, p.YELLOW), (0.1, p.RED)),
            instant=True,
            decimals=1,
        ),
        p.figure(
            "Budget used",
            "Wasted share over the chosen budget: above 100 % the time shown has wasted more than allowed.",
            p.RATIO,
            Query(f"{per(wasted, ENERGY)} / $budget"),
            steps=((None, p.GREEN), (0.8, p.YELLOW), (1, p.RED)),
            instant=True,
            decimals=0,
        ),
    )


_UNDERUTILIZED = f'verdict="{Verdict.UNDERUTILIZED}"'


def _idle() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "Idle power",
            "Power used while no request ran: held by a process, or by nobody.",
            p.WATTS,
            Query(total(SCOPE.rate(names.IDLE_ENERGY_JOULES, PARKED)), "held (parked)"),
            Query(total(SCOPE.rate(names.IDLE_ENERGY_JOULES, BARE)), "not held (bare)"),
            stacked=True,
            colors={"held (parked)": p.GREY, "not held (bare)": p.LIGHT_GREY},
        ),
        p.timeline(
            "Idle power by the engine that holds the GPUs",
            "Idle power that each engine's models are billed for: what they hold and do not use.",
            p.WATTS,
            Query(f"topk(15, {held('rate', 'engine', 'model')})", "{{engine}} {{model}}"),
            stacked=True,
            empty="No engine is known",
        ),
        p.rows(
            "Owners of idle energy",
            "Who held GPUs without using them in the time shown.",
            {"instance": "Node", "engine": "Engine", "model": "Model"},
            Column("Idle energy", f"{held('increase', *OWNER)} / 3600", p.WATT_HOURS),
            Column(
                "Of its bill",
                f"{held('increase', *OWNER)} / ({total(SCOPE.increase(names.ALLOCATED_ENERGY_JOULES), *OWNER)} > 0)",
                p.RATIO,
                ((None, p.GREEN), (0.2, p.YELLOW), (0.5, p.RED)),
            ),
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
            Query(total(SCOPE.rate(names.WASTED_ENERGY_JOULES), "cause"), "{{cause}}"),
            width=8,
            stacked=True,
            colors=WASTE_COLORS,
        ),
        p.timeline(
            "Wasted power by node",
            "The nodes that waste most.",
            p.WATTS,
            Query(f"topk(15, {total(SCOPE.rate(names.WASTED_ENERGY_JOULES), 'instance')})", "{{instance}}"),
            width=8,
            stacked=True,
            link=link_to("gpu", "GPUs of this node", instance="${__field.labels.instance}"),
        ),
        p.timeline(
            "Underutilized: power and its wasted part",
            "Power of GPUs that were underutilized, and the part of it that was wasted because requests were waiting.",
            p.WATTS,
            Query(total(SCOPE.rate(names.DIAGNOSIS_ENERGY_JOULES, _UNDERUTILIZED)), "underutilized"),
            Query(total(SCOPE.rate(names.WASTED_ENERGY_JOULES, _WITH_DEMAND)), "wasted, requests waiting"),
            width=8,
            colors={"underutilized": p.YELLOW, "wasted, requests waiting": p.RED},
        ),
    )


_WITH_DEMAND = 'cause="underutilized_with_demand"'


def _budget() -> tuple[p.Panel, ...]:
    def burn(window: str) -> str:
        wasted = total(SCOPE.rate(names.WASTED_ENERGY_JOULES, window=window))
        return f"{per(wasted, total(SCOPE.rate(names.GPU_ENERGY_JOULES, window=window)))} / $budget"

    return (
        p.timeline(
            "Budget burn rate",
            "How many times faster than allowed the waste budget burns, over several windows. At 1 it lasts as planned."
            ".",
            p.FACTOR,
            *(Query(burn(window), f"last {window}") for window in WINDOWS),
            steps=((None, "transparent"), (1, p.RED)),
            soft_most=1.1,
        ),
        p.timeline(
            "Wasted share of the energy",
            "Wasted power over all power, moment by moment, and dashed the budget.",
            p.RATIO,
            Query(
                per(total(SCOPE.rate(names.WASTED_ENERGY_JOULES)), total(SCOPE.rate(names.GPU_ENERGY_JOULES))), "wasted"
            ),
            Query("vector($budget)", "budget"),
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
            f"{total(SCOPE.increase(names.DIAGNOSIS_ENERGY_JOULES, _UNDERUTILIZED), *by)} / 3600",
            p.WATT_HOURS,
        ),
        Column("All energy", f"{energy} / 3600", p.WATT_HOURS),
        Column(
            "Wasted share",
            per(total(SCOPE.increase(names.WASTED_ENERGY_JOULES), *by), energy),
            p.RATIO,
            ((None, p.GREEN), (0.05, p.YELLOW), (0.1, p.RED)),
        ),
        link=("GPU", link_to("gpu", "This GPU", instance="${__data.fields.Node}", gpu="${__data.fields.GPU}")),
        sort="Wasted",
    )
