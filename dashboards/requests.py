"""Requests: what a token and a request cost, for whom, how it spreads, and how much of the energy is covered."""

from dashboards import panels as p
from dashboards.board import Board, Row
from dashboards.panels import Column, Query
from dashboards.queries import RATE, SMOOTH, Scope, per, total
from jouletrace.metrics import names
from jouletrace.requests.account import Phase

NAME = "requests"
SCOPE = Scope(("model", "tenant"))
OUTPUT, INPUT, CACHED = 'direction="output"', 'direction="input"', 'direction="cached_input"'
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

ATTRIBUTED = SCOPE.rate(names.ATTRIBUTED_ENERGY_JOULES)
ALLOCATED = SCOPE.rate(names.ALLOCATED_ENERGY_JOULES)
OUTPUT_TOKENS = SCOPE.rate(names.TOKENS, OUTPUT)
ENDED = SCOPE.rate(names.REQUESTS)
STEADY_ENERGY = SCOPE.rate(names.ATTRIBUTED_ENERGY_JOULES, window=SMOOTH)
STEADY_TOKENS = SCOPE.rate(names.TOKENS, OUTPUT, window=SMOOTH)
STEADY_ENDED = SCOPE.rate(names.REQUESTS, window=SMOOTH)


def board() -> Board:
    """Return the board."""
    return Board(
        name=NAME,
        title="Requests",
        description="What tokens and requests cost in joules, by model, tenant and phase, and how sure that is.",
        scope=SCOPE,
        rows=(
            Row("Now", 5, _now()),
            Row("Joules per token", 8, _tokens()),
            Row("Joules per request", 9, _requests()),
            Row("Who used it", 9, (_tenants(),)),
            Row("Traffic and coverage", 8, _coverage()),
        ),
    )


def _now() -> tuple[p.Panel, ...]:
    energy = total(SCOPE.increase(names.ATTRIBUTED_ENERGY_JOULES))
    billed = total(SCOPE.increase(names.ALLOCATED_ENERGY_JOULES))
    tokens = total(SCOPE.increase(names.TOKENS, OUTPUT))
    return (
        p.figure(
            "J per output token",
            "Energy of requests over the output tokens of those that ended, in the time shown, without idle time (usage"
            " basis).",
            p.JOULES,
            Query(per(energy, tokens)),
            instant=True,
            decimals=0,
        ),
        p.figure(
            "Billed J per output token",
            "The same with the idle time of held GPUs spread over those who hold them (allocated basis).",
            p.JOULES,
            Query(per(billed, tokens)),
            instant=True,
            decimals=0,
        ),
        p.figure(
            "J per request",
            "Energy of requests over the number of those that ended, in the time shown.",
            p.JOULES,
            Query(per(energy, total(SCOPE.increase(names.REQUESTS)))),
            instant=True,
            decimals=1,
        ),
        p.figure(
            "Requests per second",
            "Requests that ended, however they did.",
            p.REQUESTS_PER_SECOND,
            Query(total(ENDED)),
            decimals=2,
        ),
        p.figure(
            "Output tokens per second",
            "Output tokens of the requests that ended.",
            p.TOKENS_PER_SECOND,
            Query(total(OUTPUT_TOKENS)),
            decimals=0,
        ),
        p.figure(
            "Power of requests",
            "Power that these requests use, without idle time.",
            p.WATTS,
            Query(total(ATTRIBUTED)),
            decimals=1,
        ),
    )


def _tokens() -> tuple[p.Panel, ...]:
    prefill = total(SCOPE.rate(names.ATTRIBUTED_ENERGY_JOULES, f'phase="{Phase.PREFILL}"', window=SMOOTH), "model")
    decode = total(SCOPE.rate(names.ATTRIBUTED_ENERGY_JOULES, f'phase="{Phase.DECODE}"', window=SMOOTH), "model")
    entered = total(SCOPE.rate(names.TOKENS, INPUT, window=SMOOTH), "model")
    cached = total(SCOPE.rate(names.TOKENS, CACHED, window=SMOOTH), "model")
    computed = f"({entered} - {cached})"
    return (
        p.timeline(
            "Joules per output token by model",
            "Energy of a model's requests over their output tokens, over five minutes.",
            p.JOULES,
            Query(per(total(STEADY_ENERGY, "model"), total(STEADY_TOKENS, "model")), "{{model}}"),
            width=8,
            logarithmic=True,
        ),
        p.timeline(
            "Joules per output token by tenant",
            "Energy of a tenant's requests over their output tokens, over five minutes.",
            p.JOULES,
            Query(per(total(STEADY_ENERGY, "tenant"), total(STEADY_TOKENS, "tenant")), "{{tenant}}"),
            width=8,
            logarithmic=True,
        ),
        p.timeline(
            "Joules per token by phase",
            "Prefill: joules per input token that was computed, cached ones left out. Decode: joules per output token.",
            p.JOULES,
            Query(per(prefill, computed), "prefill, {{model}}"),
            Query(per(decode, total(STEADY_TOKENS, "model")), "decode, {{model}}"),
            width=8,
            logarithmic=True,
            dashed=["^prefill"],
        ),
        p.timeline(
            "Power by phase",
            "Power of requests by the phase that used it: reading the prompt, and making the answer.",
            p.WATTS,
            Query(total(ATTRIBUTED, "phase"), "{{phase}}"),
            width=8,
            stacked=True,
        ),
        p.timeline(
            "Power by tenant",
            "Power that each tenant's requests use, without idle time.",
            p.WATTS,
            Query(f"topk(20, {total(ATTRIBUTED, 'tenant')})", "{{tenant}}"),
            width=8,
            stacked=True,
        ),
        p.timeline(
            "Tokens saved by prefix caches",
            "Part of the input tokens that a prefix cache saved from being computed.",
            p.RATIO,
            Query(
                per(
                    total(SCOPE.rate(names.TOKENS, CACHED), "model"),
                    total(SCOPE.rate(names.TOKENS, INPUT), "model"),
                ),
                "{{model}}",
            ),
            width=8,
            most=1,
        ),
    )


def _requests() -> tuple[p.Panel, ...]:
    buckets = total(SCOPE.rate(names.REQUEST_ENERGY_JOULES, suffix="_bucket", window=SMOOTH), "le")
    mean = per(
        total(SCOPE.rate(names.REQUEST_ENERGY_JOULES, suffix="_sum", window=SMOOTH), "model"),
        total(SCOPE.rate(names.REQUEST_ENERGY_JOULES, suffix="_count", window=SMOOTH), "model"),
    )
    return (
        p.heat(
            "Distribution of joules per request",
            "How many requests ended with how many joules, of all tenants of the models.",
            p.JOULES,
            Query(total(SCOPE.increase(names.REQUEST_ENERGY_JOULES, suffix="_bucket", window=RATE), "le"), "{{le}}"),
        ),
        p.timeline(
            "Percentiles of joules per request",
            "Joules that half, 90 % and 99 % of the requests stay below, of all tenants of the models, in five"
            " minutes. A dot is a request and leads to its trace.",
            p.JOULES,
            *(
                Query(f"histogram_quantile({quantile}, {buckets})", name, exemplars=name == "p99")
                for name, quantile in QUANTILES.items()
            ),
            logarithmic=True,
        ),
        p.timeline(
            "Mean joules per request by model",
            "Energy of settled requests over their number, of all tenants of the models.",
            p.JOULES,
            Query(mean, "{{model}}"),
            logarithmic=True,
        ),
        p.timeline(
            "Mean joules per request by tenant",
            "Energy of a tenant's requests over the number of those that ended.",
            p.JOULES,
            Query(per(total(STEADY_ENERGY, "tenant"), total(STEADY_ENDED, "tenant")), "{{tenant}}"),
            logarithmic=True,
        ),
    )


def _tenants() -> p.Panel:
    by = ("model", "tenant")
    energy = total(SCOPE.increase(names.ATTRIBUTED_ENERGY_JOULES), *by)
    output = total(SCOPE.increase(names.TOKENS, OUTPUT), *by)
    ended = total(SCOPE.increase(names.REQUESTS), *by)
    return p.rows(
        "Models and tenants",
        "Energy and work of each model and tenant in the time shown. Billed energy contains the idle time of GPUs that"
        " their engine held; a row without a tenant is idle time while nobody had a request.",
        {"model": "Model", "tenant": "Tenant"},
        Column("Energy", f"{energy} / 3600", p.WATT_HOURS),
        Column("Billed energy", f"{total(SCOPE.increase(names.ALLOCATED_ENERGY_JOULES), *by)} / 3600", p.WATT_HOURS),
        Column("Requests", ended, p.COUNT),
        Column("Output tokens", output, p.COUNT),
        Column("J per request", per(energy, ended), p.JOULES),
        Column("J per output token", per(energy, output), p.JOULES),
        sort="Billed energy",
    )


def _coverage() -> tuple[p.Panel, ...]:
    return (
        p.timeline(
            "Requests by how they ended",
            "Cancelled and failed requests pay for what they used.",
            p.REQUESTS_PER_SECOND,
            Query(total(ENDED, "status"), "{{status}}"),
            width=8,
            stacked=True,
            colors={"finished": p.GREEN, "cancelled": p.YELLOW, "failed": p.RED},
        ),
        p.timeline(
            "Requests in flight",
            "Requests that have begun and not ended, by engine.",
            p.COUNT,
            Query(f"topk(20, {total(SCOPE.series(names.REQUESTS_IN_FLIGHT), 'engine')})", "{{engine}}"),
            width=8,
        ),
        p.timeline(
            "Coverage by engine",
            "Part of the engine's busy energy that requests account for. Well under 1 means that records are missing.",
            p.RATIO,
            Query(
                f"min by (instance, engine) ({SCOPE.series(names.ATTRIBUTION_COVERAGE_RATIO)})",
                "{{instance}} {{engine}}",
            ),
            width=8,
            most=1,
            steps=((None, p.RED), (0.9, "transparent")),
            empty="No engine sends records",
        ),
        p.timeline(
            "Power that no request accounts for",
            "Work of other programs, engines that send no records, and records that were lost; by node.",
            p.WATTS,
            Query(f"topk(20, {total(SCOPE.rate(names.UNATTRIBUTED_ENERGY_JOULES), 'instance')})", "{{instance}}"),
            width=8,
        ),
        p.timeline(
            "Other products per second",
            "Images, frames, embeddings and whatever else is not tokens, of requests that ended.",
            p.PER_SECOND,
            Query(total(SCOPE.rate(names.UNITS_MADE), "unit"), "{{unit}}"),
            width=8,
            empty="Only tokens were made",
        ),
        p.timeline(
            "Records dropped",
            "Records that came in and were not taken, by reason; duplicate is harmless.",
            p.PER_SECOND,
            Query(total(SCOPE.rate(names.EVENTS_DROPPED), "reason"), "{{reason}}"),
            width=8,
            empty="No record was dropped",
        ),
    )
