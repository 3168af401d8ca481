"""Requests: what a token and a request cost, for whom, how it spreads, and how much of the energy is covered."""

from dashboards import panels as p
from dashboards.board import Board, Row
from dashboards.panels import Column, Query
from dashboards.queries import FLEET, Scope, per, total
from jouletrace.metrics import names
from jouletrace.requests.account import Phase

NAME = "requests"
SCOPE = Scope(("model", "tenant"), base=FLEET)
MOST = 20
"""Most tenants, engines or nodes that are drawn one by one."""
WINDOW_SECONDS = 300
"""What the recorded rates are taken over."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

PAIRS = "cluster_model_tenant"
"""Level of most of what the board reads: both of its variables narrow it."""
ATTRIBUTED = f"{PAIRS}:attributed_watts:rate5m"
ALLOCATED = f"{PAIRS}:allocated_watts:rate5m"
OUTPUT_TOKENS = f"{PAIRS}:output_tokens:rate5m"
ENDED = f"{PAIRS}:requests:rate5m"


def board() -> Board:
    """Return the board."""
    return Board(
        name=NAME,
        title="Requests",
        description="What tokens and requests cost in joules, by model, tenant and phase, and how sure that is, of"
        " whole clusters.",
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
    energy = total(SCOPE.recorded_increase(ATTRIBUTED))
    tokens = total(SCOPE.recorded_increase(OUTPUT_TOKENS))
    ended = total(SCOPE.recorded_increase(ENDED))
    return (
        p.figure(
            "J per output token",
            "Energy of requests over the output tokens of those that ended, in the time shown, without idle time (usage"
            " basis), of models that make tokens.",
            p.JOULES,
            Query(per(total(_of_tokens(SCOPE.recorded_increase(ATTRIBUTED))), tokens)),
            instant=True,
            decimals=0,
        ),
        p.figure(
            "Billed J per output token",
            "The same with the idle time of held GPUs spread over those who hold them (allocated basis).",
            p.JOULES,
            Query(per(total(_of_tokens(SCOPE.recorded_increase(ALLOCATED))), tokens)),
            instant=True,
            decimals=0,
        ),
        p.figure(
            "J per request",
            "Energy of requests over the number of those that ended, in the time shown.",
            p.JOULES,
            Query(per(energy, ended)),
            instant=True,
            decimals=1,
        ),
        p.figure(
            "Requests per second",
            "Requests that ended, however they did.",
            p.REQUESTS_PER_SECOND,
            Query(total(SCOPE.mean(ENDED))),
            decimals=2,
        ),
        p.figure(
            "Output tokens per second",
            "Output tokens of the requests that ended.",
            p.TOKENS_PER_SECOND,
            Query(total(SCOPE.mean(OUTPUT_TOKENS))),
            decimals=0,
        ),
        p.figure(
            "Power of requests",
            "Power that these requests use, without idle time.",
            p.WATTS,
            Query(total(SCOPE.mean(ATTRIBUTED))),
            decimals=1,
        ),
    )


def _tokens() -> tuple[p.Panel, ...]:
    prefill = _of_models("phase", "attributed_watts", Phase.PREFILL)
    decode = _of_models("phase", "attributed_watts", Phase.DECODE)
    entered = _of_models("direction", "tokens", "input")
    cached = _of_models("direction", "tokens", "cached_input")
    made = _of_models("direction", "tokens", "output")
    return (
        _cost(
            "Joules per output token by model",
            "Energy of a model's requests over their output tokens, over five minutes.",
            SCOPE.mean(ATTRIBUTED),
            OUTPUT_TOKENS,
            "model",
        ),
        _cost(
            "Joules per output token by tenant",
            "Energy of a tenant's requests over their output tokens, over five minutes, of models that make tokens.",
            _of_tokens(SCOPE.mean(ATTRIBUTED)),
            OUTPUT_TOKENS,
            "tenant",
        ),
        p.timeline(
            "Joules per token by phase",
            "Prefill: joules per input token that was computed, cached ones left out. Decode: joules per output token."
            " Of all tenants of the models.",
            p.JOULES,
            Query(per(prefill, f"{entered} - {cached}"), "prefill, {{model}}"),
            Query(per(decode, made), "decode, {{model}}"),
            width=8,
            logarithmic=True,
            dashed=["^prefill"],
        ),
        p.timeline(
            "Power by phase",
            "Power of requests by the phase that used it: reading the prompt, and making the answer. Of all tenants of"
            " the models.",
            p.WATTS,
            Query(total(SCOPE.mean("cluster_model_phase:attributed_watts:rate5m"), "phase"), "{{phase}}"),
            width=8,
            stacked=True,
        ),
        p.timeline(
            "Power by tenant",
            "Power that each tenant's requests use, without idle time.",
            p.WATTS,
            Query(f"topk({MOST}, {total(SCOPE.mean(ATTRIBUTED), 'tenant')})", "{{tenant}}"),
            width=8,
            stacked=True,
        ),
        p.timeline(
            "Tokens saved by prefix caches",
            "Part of the input tokens that a prefix cache saved from being computed, of all tenants of the models.",
            p.RATIO,
            Query(per(cached, entered), "{{model}}"),
            width=8,
            most=1,
        ),
    )


def _of_models(label: str, metric: str, value: str) -> str:
    """Return what the models' tenants did together, of one phase or direction."""
    return total(SCOPE.mean(f"cluster_model_{label}:{metric}:rate5m", f'{label}="{value}"'), "model")


def _of_tokens(energy: str) -> str:
    """Return the energy of models that make tokens: that of images or embeddings is not divided by tokens."""
    return f"({energy} and on (cluster, model) {SCOPE.recorded('cluster_model:output_tokens:sum')} > 0)"


def _cost(title: str, description: str, power: str, made: str, by: str) -> p.Panel:
    """Return the joules of requests over what they made, by model or tenant."""
    joules = per(total(power, by), total(SCOPE.mean(made), by))
    return p.timeline(title, description, p.JOULES, Query(joules, f"{{{{{by}}}}}"), width=8, logarithmic=True)


def _requests() -> tuple[p.Panel, ...]:
    buckets = total(SCOPE.mean("cluster_model_le:request_energy_joules_bucket:rate5m"), "le")
    # Exemplars belong to the daemon's own series. Asked for the year 1970, these cost nothing and add no value, and
    # Grafana asks for the exemplars of what stands in a query.
    exemplars = total(f"{SCOPE.series(names.REQUEST_ENERGY_JOULES, suffix='_bucket')} @ 0", "le")
    return (
        p.heat(
            "Distribution of joules per request",
            "How many requests ended with how many joules in the five minutes before, of all tenants of the models.",
            p.JOULES,
            Query(f"{buckets} * {WINDOW_SECONDS}", "{{le}}"),
        ),
        p.timeline(
            "Percentiles of joules per request",
            "Joules that half, 90 % and 99 % of the requests stay below, of all tenants of the models, in five"
            " minutes. A dot is a request and leads to its trace.",
            p.JOULES,
            *(
                Query(f"histogram_quantile({quantile}, {buckets} or {exemplars})", name, exemplars=True)
                if name == "p99"
                else Query(f"histogram_quantile({quantile}, {buckets})", name)
                for name, quantile in QUANTILES.items()
            ),
            logarithmic=True,
        ),
        _cost(
            "Mean joules per request by model",
            "Energy of a model's requests over the number of those that ended.",
            SCOPE.mean(ATTRIBUTED),
            ENDED,
            "model",
        ),
        _cost(
            "Mean joules per request by tenant",
            "Energy of a tenant's requests over the number of those that ended.",
            SCOPE.mean(ATTRIBUTED),
            ENDED,
            "tenant",
        ),
        p.timeline(
            "Mean joules per request by phase",
            "What reading the prompt and making the answer of a request cost, of all tenants of the models.",
            p.JOULES,
            Query(
                f"{total(SCOPE.mean('cluster_model_phase:attributed_watts:rate5m'), 'phase')} / on () group_left ()"
                f" ({total(SCOPE.mean('cluster_model_status:requests:rate5m'))} > 0)",
                "{{phase}}",
            ),
            width=8,
            stacked=True,
        ),
    )


def _tenants() -> p.Panel:
    by = ("model", "tenant")
    energy = total(SCOPE.recorded_increase(ATTRIBUTED), *by)
    output = total(SCOPE.recorded_increase(OUTPUT_TOKENS), *by)
    ended = total(SCOPE.recorded_increase(ENDED), *by)
    return p.rows(
        "Models and tenants",
        "Energy and work of each model and tenant in the time shown. Billed energy contains the idle time of GPUs that"
        " their engine held; a row without a tenant is idle time while nobody had a request.",
        {"model": "Model", "tenant": "Tenant"},
        Column("Energy", f"{energy} / 3600", p.WATT_HOURS),
        Column("Billed energy", f"{total(SCOPE.recorded_increase(ALLOCATED), *by)} / 3600", p.WATT_HOURS),
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
            "Cancelled and failed requests pay for what they used. Of all tenants of the models.",
            p.REQUESTS_PER_SECOND,
            Query(total(SCOPE.mean("cluster_model_status:requests:rate5m"), "status"), "{{status}}"),
            width=8,
            stacked=True,
            colors={"finished": p.GREEN, "cancelled": p.YELLOW, "failed": p.RED},
        ),
        p.timeline(
            "Requests in flight",
            "Requests that have begun and not ended, by engine.",
            p.COUNT,
            Query(f"topk({MOST}, {total(SCOPE.series(names.REQUESTS_IN_FLIGHT), 'engine')})", "{{engine}}"),
            width=8,
        ),
        p.timeline(
            "Coverage by engine",
            "Part of the engine's busy energy that requests account for; the least covered engines. Well under 1 means"
            " that records are missing.",
            p.RATIO,
            Query(
                f"bottomk({MOST}, min by (instance, engine) ({SCOPE.series(names.ATTRIBUTION_COVERAGE_RATIO)}))",
                "{{instance}} {{engine}}",
            ),
            width=8,
            most=1,
            steps=((None, p.RED), (0.8, "transparent")),
            empty="No engine sends records",
        ),
        p.timeline(
            "Power that no request accounts for",
            "Work of other programs, engines that send no records, and records that were lost; by node.",
            p.WATTS,
            Query(
                f"topk({MOST}, {SCOPE.mean('instance:unattributed_watts:rate5m')})",
                "{{instance}}",
            ),
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
