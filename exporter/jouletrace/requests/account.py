"""What the ledger answers: joules of a request, and the frozen account that the views read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from jouletrace.requests.records import Status, Unit


class Phase(StrEnum):
    """The part of a request's life that energy went to."""

    PREFILL = "prefill"
    DECODE = "decode"


class Method(StrEnum):
    """How a request's energy was found; the better one first."""

    STEPS = "steps"
    """Exact membership of each step."""
    STEP_COUNTS = "step_counts"
    """Steps without ids: the request's part of the curves of joules per sequence and per prefill token."""
    BOUNDARIES_EXCLUSIVE = "boundaries_exclusive"
    """Request boundaries; prefill owns the GPU."""
    BOUNDARIES_CALIBRATED = "boundaries_calibrated"
    """Request boundaries; prefill shares steps, split by a calibrated law."""
    BOUNDARIES_PRIOR = "boundaries_prior"
    """Request boundaries; prefill shares steps, split by a roofline prior."""


class Taken(StrEnum):
    """What became of a record: accepted, or why not (the reason of `events_dropped_total`)."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"
    """Its time is settled or no longer in the timeline."""
    FUTURE = "future"
    UNKNOWN_ENGINE = "unknown_engine"
    UNKNOWN_DEVICE = "unknown_device"
    OVERFLOW = "overflow"
    """A bound of the configuration is reached."""


@dataclass(frozen=True, slots=True)
class RequestEnergy:
    """What a request used, joules. `low` and `high` bound it by the sensor and the method."""

    request_id: str
    engine_id: str
    model: str
    tenant: str
    status: Status
    energy_joules: float
    low: float
    high: float
    prefill_joules: float
    decode_joules: float
    fixed_joules: float
    """Its part of what a step costs however many take part: weight streaming, static power while busy."""
    marginal_joules: float
    joules_per_output_token: float | None
    method: Method
    final: bool
    """Whether the energy up to its end is in the timeline and settled; else all of this may still change."""
    arrival_ns: int
    end_ns: int | None


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram of joules per request: cumulative counts by upper bound, as Prometheus wants them."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    """One more than bounds: the last is +Inf's."""
    total_joules: float
    exemplars: tuple[tuple[str, float, int] | None, ...]
    """Per bucket the newest (trace_id, joules, wall ns), or None."""


@dataclass(frozen=True, slots=True)
class EngineTotals:
    """What an engine has used and done since this process began; only differences of two mean something.

    All of it covers settled time, up to `settled_ns`, so that joules and work belong together.
    """

    settled_ns: int = 0
    busy_joules: float = 0.0
    """Of all its devices while its requests were active, and of work that nobody claimed."""
    unclaimed_joules: float = 0.0
    """The part of `busy_joules` for whose time no request, step or counter is known: another process, or a feed that
    does not tell. The only total that may fall: a request that is told late claims its part."""
    idle_joules: float = 0.0
    """Its part of the parked energy of the devices that it holds."""
    prefill_joules: float = 0.0
    decode_joules: float = 0.0
    fixed_joules: float = 0.0
    """The fixed part of both, as the split had it."""
    active_seconds: float = 0.0
    """Time in which it had active requests."""
    sequence_seconds: float = 0.0
    """Active requests, integrated over time."""
    step_joules: float = 0.0
    """Energy of the time that step records cover."""
    step_seconds: float = 0.0
    steps: float = 0.0
    step_prefill_tokens: float = 0.0
    step_decode_sequences: float = 0.0
    """Sum over the steps of the decoding sequences in each: their output tokens."""
    step_kv_tokens: float = 0.0
    """Sum over the steps of the KV tokens read, where the records tell; 0 where none does."""
    ended_requests: float = 0.0
    """Requests that ended and are settled; 0 of an engine that only its own counters tell of."""
    made_joules: float = 0.0
    """What `output_tokens`, `input_tokens` and `units` took, whenever that was: of requests that ended, their whole
    energy."""
    output_tokens: float = 0.0
    """Of requests that ended."""
    input_tokens: float = 0.0
    units: Mapping[Unit, float] = field(default_factory=dict)
    """Images, frames, ... of requests that ended."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """What an engine last said of its queue; each value may be missing."""

    t_ns: int = 0
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    """Part of the KV cache in use, 0 to 1."""
    max_num_seqs: int | None = None
    preemptions: float | None = None
    """Since the engine started."""


@dataclass(frozen=True, slots=True)
class LedgerSnapshot:
    """The account of the node at one moment. All joules are totals that never go down.

    For every device: attributed + pending (of its engines) + idle + unattributed = device energy, to rounding.
    """

    settled_ns: int = 0
    device_joules: Mapping[str, float] = field(default_factory=dict)
    """By uuid: the energy that has been distributed so far."""
    attributed_joules: Mapping[tuple[str, str, str, Phase], float] = field(default_factory=dict)
    """By model, tenant, engine, phase (usage basis)."""
    allocated_joules: Mapping[tuple[str, str, str], float] = field(default_factory=dict)
    """By model, tenant, engine (idle of held devices included)."""
    idle_joules: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """By uuid and kind (bare, parked)."""
    unattributed_joules: Mapping[str, float] = field(default_factory=dict)
    pending_joules: Mapping[str, float] = field(default_factory=dict)
    """By engine: used by requests whose model and tenant are not known yet."""
    request_joules: Mapping[str, Buckets] = field(default_factory=dict)
    """By model."""
    requests: Mapping[tuple[str, str, Status], int] = field(default_factory=dict)
    """Ended requests by model, tenant, status."""
    in_flight: Mapping[str, int] = field(default_factory=dict)
    """By engine."""
    tokens: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    """By model, tenant, direction (input, cached_input, output)."""
    units: Mapping[tuple[str, str, Unit], int] = field(default_factory=dict)
    coverage: Mapping[str, float] = field(default_factory=dict)
    """By engine: attributed part of its busy energy over the last minutes, 0 to 1."""
    engine_totals: Mapping[str, EngineTotals] = field(default_factory=dict)
    """By engine."""
    engine_states: Mapping[str, EngineState] = field(default_factory=dict)
    """By engine."""
    engine_devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By engine: the uuids of the devices that it owns, as far as known."""
    engine_models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By engine: the models that it serves, as it said."""
