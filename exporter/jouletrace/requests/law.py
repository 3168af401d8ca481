"""The step-energy law: what one forward pass costs, and which law an engine is split by.

`E(step) = a + c_p * prefill tokens + c_d * decoding sequences + c_kv * context tokens read`. On an H200 steps that
mix prefill and decode follow it within 2 % on average (26 mixes, two cards), and it fits 103 published sweeps of
decode batches. Where it holds, sharing `a` equally per sequence and giving every request its own marginals is the
exact Shapley value. Only ratios matter for the split of a measured step; with boundaries alone the scale matters too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec


class Provenance(StrEnum):
    """Where a law comes from; decides how far an answer that rests on it may be off."""

    CALIBRATED = "calibrated"
    """Fitted on steady phases or on steps of this engine."""
    CONFIGURED = "configured"
    """Given by the operator."""
    PRIOR = "prior"
    """A roofline estimate from the model's description, or the measured law of another model."""


class PrefillSchedule(StrEnum):
    """How an engine runs prompts beside decoding sequences."""

    EXCLUSIVE = "exclusive"
    """A prefilling request owns the GPU until its first token; decoding stands still."""
    CHUNKED = "chunked"
    """Pieces of prompts share steps with decoding sequences, first come first served."""


CHUNKED_KINDS = frozenset({"vllm", "sglang", "trtllm", "tensorrt-llm", "tgi", "dynamo", "nim"})
"""Engine kinds whose present versions chunk prefill by default (vLLM V1, SGLang, TensorRT-LLM, TGI 3).
Others (llama.cpp, Ollama, transformers, diffusion) run one prompt at a time or no prompt at all."""


class Law(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Coefficients of the step-energy law, joules, summed over the engine's devices."""

    fixed_joules: float
    """a: per step, however many take part."""
    prefill_token_joules: float
    """c_p: per freshly computed prompt token."""
    decode_sequence_joules: float
    """c_d: per decoding sequence and step."""
    kv_token_joules: float = 0.0
    """c_kv: per context token read by decoding sequences."""
    provenance: Provenance = Provenance.CONFIGURED
    error: float | None = None
    """Worst relative residual of the calibration; None when there was none."""

    def __post_init__(self) -> None:
        """Raise ValueError unless every coefficient is finite, none is negative and a step costs something."""
        for name in ("fixed_joules", "prefill_token_joules", "decode_sequence_joules", "kv_token_joules"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: {value} is not a number of joules, give 0 or more")
        if not self.decode_sequence_joules and not self.fixed_joules:
            raise ValueError("fixed_joules: is 0 beside decode_sequence_joules, so a decode step would cost nothing")

    def scaled(self, factor: float) -> "Law":
        """Return the law of an engine whose steps cost `factor` times as much, in the same proportions."""
        return msgspec.structs.replace(
            self,
            fixed_joules=self.fixed_joules * factor,
            prefill_token_joules=self.prefill_token_joules * factor,
            decode_sequence_joules=self.decode_sequence_joules * factor,
            kv_token_joules=self.kv_token_joules * factor,
        )

    @property
    def half_fixed_batch(self) -> float:
        """B* = a / c_d: the batch at which a decode step's fixed and marginal parts are equal."""
        if not self.decode_sequence_joules:
            return float("inf")
        return self.fixed_joules / self.decode_sequence_joules


GENERIC = Law(
    fixed_joules=2.48,
    prefill_token_joules=15.4e-3,
    decode_sequence_joules=40.5e-3,
    provenance=Provenance.PRIOR,
)
"""An 8-billion-parameter bf16 model on an H200 at context 1024, measured on the grid of the chunked recording.
The last resort: give the model's description or calibrate."""

EXCLUSIVE_ERROR = 0.03
STEPS_ERROR = 0.02
"""How far an answer may be off by method, as a part of its joules: the 95th percentile over the requests of the two
recordings, rounded up (`docs/accuracy.md`): named steps and exclusive prefill,"""
CALIBRATED_ERROR = 0.06
"""boundaries with a calibrated law (or the calibration's worst residual, if larger),"""
COUNTS_ERROR = 0.06
"""steps that only count (their requests' boundaries place them, as with boundaries),"""
PRIOR_ERROR = 0.5
"""and boundaries with a prior, whose coefficients may be 20-50 % off (the reference's simulation assumed as much)."""


def boundary_error(schedule: PrefillSchedule, law: Law) -> float:
    """Return the method's relative bound for energy that was split by request boundaries."""
    if schedule is PrefillSchedule.EXCLUSIVE:
        return EXCLUSIVE_ERROR
    if law.provenance is Provenance.PRIOR:
        return PRIOR_ERROR
    return max(CALIBRATED_ERROR, law.error or 0.0)


@dataclass(frozen=True, slots=True)
class LawBook:
    """Which law and which prefill schedule apply to an engine: by engine id, else by model, else the default."""

    engines: Mapping[str, Law] = field(default_factory=dict)
    models: Mapping[str, Law] = field(default_factory=dict)
    schedules: Mapping[str, PrefillSchedule] = field(default_factory=dict)
    """By engine id, where the configuration says otherwise than the engine's kind."""
    default: Law = GENERIC

    def law(self, engine_id: str, models: Sequence[str]) -> Law:
        """Return the law for an engine that serves `models`."""
        known = self.engines.get(engine_id)
        if known is not None:
            return known
        return next((self.models[model] for model in models if model in self.models), self.default)

    def schedule(self, engine_id: str, kind: str) -> PrefillSchedule:
        """Return how the engine runs prompts."""
        configured = self.schedules.get(engine_id)
        if configured is not None:
            return configured
        return PrefillSchedule.CHUNKED if kind.lower() in CHUNKED_KINDS else PrefillSchedule.EXCLUSIVE
