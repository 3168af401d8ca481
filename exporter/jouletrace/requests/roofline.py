"""A step-energy law from a model's description and a GPU's data sheet, for engines nobody has calibrated.

Reading the weights once costs `a`, computing a prompt token costs `c_p`, and a decoding sequence costs its compute
and the reading of its context. Time is bytes over reachable bandwidth or operations over reachable compute; energy
is time times the power drawn at that limit. The constants are measured on an H200; on the chunked recording's model
the prior meets the calibrated coefficients within 10 %.
"""

from dataclasses import dataclass

from jouletrace.requests.law import Law, Provenance

REACHED_BANDWIDTH = 0.65
"""Part of the peak DRAM bandwidth that decode reaches: 60-67 % in 8B bf16 decode at batch 1-64 (H200, GPM)."""
REACHED_COMPUTE = 0.67
"""Part of the dense bf16 peak that a large matrix product reaches: 659 of 989 TFLOP/s (H200 recording)."""
READING_POWER = 0.69
"""Part of the power limit drawn while streaming weights: 483 of 700 W (decode at batch 1, H200 recording)."""
COMPUTING_POWER = 0.99
"""Part of the power limit drawn by prefill and matrix products: 690-694 of 700 W (H200 recording)."""
TYPICAL_CONTEXT_TOKENS = 1024
"""Context assumed for a decoding sequence when none is configured: chat prompts and answers (design traces)."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a model's `config.json` says."""

    parameters: float
    """All weights, as a count."""
    layers: int
    kv_heads: int
    head_dim: int
    active_parameters: float | None = None
    """Weights that one token passes through (mixture of experts); None: all of them."""
    weight_bytes: float = 2.0
    """Bytes per weight: 2 bf16, 1 fp8, 0.5 four bits."""
    kv_bytes: float = 2.0
    """Bytes per cached key or value element."""

    def __post_init__(self) -> None:
        """Raise ValueError when a number is not positive or more weights are active than there are."""
        for name in ("parameters", "layers", "kv_heads", "head_dim", "weight_bytes", "kv_bytes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)} is not a positive number")
        if self.active_parameters is not None and not 0 < self.active_parameters <= self.parameters:
            raise ValueError(f"active_parameters: {self.active_parameters} does not lie in (0, parameters]")

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of keys and values that one context token occupies."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes


@dataclass(frozen=True, slots=True)
class DevicePeak:
    """A GPU's data-sheet limits."""

    bytes_per_second: float
    flops_per_second: float
    """Dense bf16 tensor operations."""
    power_limit_watts: float


PEAKS: dict[str, DevicePeak] = {
    "A100": DevicePeak(2.039e12, 312e12, 400.0),
    "L40S": DevicePeak(0.864e12, 362e12, 350.0),
    "H100": DevicePeak(3.35e12, 989e12, 700.0),
    "H200": DevicePeak(4.8e12, 989e12, 700.0),
    "B200": DevicePeak(8.0e12, 2250e12, 1000.0),
}
"""NVIDIA data sheets of the SXM boards (L40S: PCIe): memory bandwidth, dense bf16, board power."""


def peak_of(name: str) -> DevicePeak | None:
    """Return the data-sheet limits of a GPU by its NVML name ("NVIDIA H200"), or None when it is not listed."""
    words = name.replace("-", " ").split()
    return next((peak for key, peak in PEAKS.items() if key in words), None)


def prior(
    model: ModelDescription,
    device: DevicePeak,
    *,
    devices: int = 1,
    context_tokens: float = TYPICAL_CONTEXT_TOKENS,
) -> Law:
    """Return the estimated law, joules summed over `devices` (tensor parallel spreads the work evenly)."""
    if devices < 1 or context_tokens < 0:
        raise ValueError("devices must be at least 1 and context_tokens not negative")
    active = model.parameters if model.active_parameters is None else model.active_parameters
    # With d devices every one reads or computes 1/d of the work while all d draw power: d cancels out.
    joules_per_byte = READING_POWER * device.power_limit_watts / (REACHED_BANDWIDTH * device.bytes_per_second)
    joules_per_flop = COMPUTING_POWER * device.power_limit_watts / (REACHED_COMPUTE * device.flops_per_second)
    token = 2.0 * active * joules_per_flop
    return Law(
        fixed_joules=active * model.weight_bytes * joules_per_byte,
        prefill_token_joules=token,
        decode_sequence_joules=token + context_tokens * model.kv_bytes_per_token * joules_per_byte,
        provenance=Provenance.PRIOR,
    )
