"""Diagnosis: where the joules go, why a token costs what it costs, and what to do about it."""

from dashboards import panels as p
from dashboards.board import PAGES, Board, Row
from dashboards.panels import Column, Query
from dashboards.queries import Scope, per, state, total
from dashboards.words import CAUSE_ADVICE, CAUSE_COLORS, DRIVER_COLORS, PART_COLORS, VERDICT_COLORS
from jouletrace.diagnosis.causes import Cause
from jouletrace.metrics import names

NAME = "diagnosis"
ALL = Scope()
"""All engines: the board's engine does not narrow it."""
SCOPE = Scope(("engine",))
ENGINE = "{{instance}} {{engine}}"
NO_LAW = "The batch has not varied enough to tell"
NO_ENGINE = "No engine sends records"
_NOT_IDLE = 'part!="idle"'

BATCH = f"avg({SCOPE.series(names.ENGINE_BATCH_SEQUENCES)})"
FIXED = f"avg({SCOPE.series(names.ENGINE_STEP_FIXED_JOULES)})"
MARGINAL = f"avg({SCOPE.series(names.ENGINE_STEP_MARGINAL_JOULES)})"
BUSY_PER_UNIT = f"sum(avg by (part) ({SCOPE.series(names.ENGINE_UNIT_ENERGY_JOULES, _NOT_IDLE)}))"


def board() -> Board:
    """Return the board."""
    return Board(
        name=NAME,
        title="Diagnosis",
        description="Where the joules go, why a token costs what it costs, and what would make it cheaper.",
        scope=SCOPE,
        single=("engine",),
        rows=(
            Row("All engines", 8, _engines()),
            Row("All GPUs", 8, _devices()),
            Row("Engine $engine", 9, _engine()),
            Row("What the causes mean", 13, (_meaning(),)),
        ),
    )


def _engines() -> tuple[p.Panel, ...]:
    by = ("instance", "engine", "model")
    causes = [ALL.series(names.ENGINE_CAUSE, f'cause="{cause}"') for cause in Cause]
    best = per(
        f"max by ({', '.join(by)}) ({ALL.series(names.ENGINE_STEP_FIXED_JOULES)})",
        f"max by ({', '.join(by)}) ({ALL.series(names.ENGINE_STEP_MARGINAL_JOULES)})",
    )
    return (
        p.states(
            "Cause",
            "Why the joules per token of each engine are above their best; the table at the foot says what to do.",
            CAUSE_COLORS,
            Query(state(causes, "instance", "engine"), ENGINE),
            width=p.FULL_WIDTH,
            empty=NO_ENGINE,
        ),
        p.rows(
            "Engines",
            "Joules per unit (token, image, ...) over the last half minute, the batch, the batch B* at which half of a"
            " step's energy is fixed, and what ML.ENERGY measured for the model on an H100.",
            {"instance": "Node", "engine": "Engine", "model": "Model"},
            Column("J per unit", total(ALL.series(names.ENGINE_UNIT_ENERGY_JOULES), *by), p.JOULES),
            Column(
                "ML.ENERGY, H100",
                f"min by ({', '.join(by)}) ({ALL.series(names.ENGINE_REFERENCE_UNIT_ENERGY_JOULES, _H100)})",
                p.JOULES,
            ),
            Column("Batch", f"max by ({', '.join(by)}) ({ALL.series(names.ENGINE_BATCH_SEQUENCES)})", p.COUNT),
            Column("B*", best, p.COUNT),
            sort="J per unit",
        ),
    )


_H100 = 'gpu_model=~".*H100.*"'


def _devices() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "Where the joules go",
            "Power of all GPUs by physical sink, from a model fitted to measurements; unexplained is what it does not"
            " account for.",
            p.WATTS,
            Query(total(ALL.mean("instance_driver:power_watts:rate5m"), "driver"), "{{driver}}"),
            stacked=True,
            colors=DRIVER_COLORS,
        ),
        p.timeline(
            "What the joules were limited by",
            "Power of all GPUs while each verdict held.",
            p.WATTS,
            Query(total(ALL.mean("instance_verdict:power_watts:rate5m"), "verdict"), "{{verdict}}"),
            stacked=True,
            colors=VERDICT_COLORS,
        ),
    )


def _engine() -> tuple[p.Panel, ...]:
    best = f"({per(FIXED, MARGINAL)})"
    reference = SCOPE.series(names.ENGINE_REFERENCE_UNIT_ENERGY_JOULES)
    return (
        p.timeline(
            "Joules per unit by part",
            "What one token (image, ...) of the engine costs: idle time of its GPUs, the fixed part of a step, contexts"
            " read, decode, prefill. Dashed: what ML.ENERGY measured for this model and batch, on the GPU it names.",
            p.JOULES,
            Query(f"avg by (part) ({SCOPE.series(names.ENGINE_UNIT_ENERGY_JOULES)})", "{{part}}"),
            Query(f"min by (gpu_model, gpu_count) ({reference})", "ML.ENERGY on {{gpu_count}} x {{gpu_model}}"),
            stacked=True,
            colors=PART_COLORS,
            dashed_color=p.RED,
            dashed=["^ML.ENERGY"],
            empty="The engine makes nothing",
        ),
        p.scatter(
            "Batch against joules per unit",
            "Each point is a moment: what a unit cost at that batch, idle time left out; beside it what the law of a"
            " step, a/B + b, says, and the point B* = a/b where half of a step's energy is fixed.",
            (("decoding sequences (batch)", p.COUNT), ("joules per unit", p.JOULES)),
            [
                Query(BATCH, "batch"),
                Query(BUSY_PER_UNIT, "J per unit"),
                Query(f"{FIXED} / ({BATCH} > 0) + {MARGINAL}", "law"),
                Query(best, "best batch"),
                Query(f"2 * {MARGINAL}", "J at B*"),
            ],
            {
                "measured": ("batch", "J per unit", p.BLUE),
                "law a/B + b": ("batch", "law", p.ORANGE),
                "B*": ("best batch", "J at B*", p.RED),
            },
            empty=NO_ENGINE,
        ),
        p.timeline(
            "Batch and B*",
            "Mean number of sequences in a decode step, and dashed B*: below it most of a step's energy is fixed.",
            p.COUNT,
            Query(BATCH, "batch"),
            Query(best, "B*"),
            width=8,
            dashed=[r"^B\*$"],
            colors={"batch": p.BLUE, "B*": p.RED},
            empty=NO_ENGINE,
        ),
        p.timeline(
            "Law of a step",
            "Joules of a decode step however many take part (fixed, a), and of one more sequence in it (marginal, b).",
            p.JOULES,
            Query(FIXED, "fixed a"),
            Query(MARGINAL, "marginal b"),
            width=8,
            logarithmic=True,
            colors={"fixed a": p.ORANGE, "marginal b": p.GREEN},
            empty=NO_LAW,
        ),
        p.timeline(
            "Requests running and waiting",
            "Requests in the engine as it last said itself.",
            p.COUNT,
            Query(f"sum by (state) ({SCOPE.series(names.ENGINE_QUEUE_REQUESTS)})", "{{state}}"),
            width=8,
            colors={"running": p.GREEN, "waiting": p.ORANGE},
            empty="The engine does not say",
        ),
    )


def _meaning() -> p.Panel:
    lines = ["| cause | means | do |", "|---|---|---|"]
    for cause in Cause:
        means, advice = CAUSE_ADVICE[cause]
        lines.append(f"| **{cause}** | {means} | {advice} |")
    lines += [
        "",
        f"[Rules, thresholds and their sources]({PAGES}/docs/diagnosis-engines.md#causes)"
        f" · [verdicts of GPUs]({PAGES}/docs/diagnosis.md#verdicts)"
        f" · [the reference]({PAGES}/docs/diagnosis-engines.md#the-reference)"
        f" · [runbooks of the alerts]({PAGES}/deploy/runbooks)",
        "",
        "`GET /v1/diagnosis` of a node has the evidence, the advice in figures and the joules that it would save.",
    ]
    return p.words(
        "Causes and what to do",
        "What each cause means, and what makes a token cheaper then.",
        "\n".join(lines),
    )
