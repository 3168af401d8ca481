"""What others measured for the same model: joules per output token of the ML.ENERGY Leaderboard, on an H100.

A trend to compare with (how joules per token fall with the batch), not a target for another GPU, context or engine
version. Source, licence and citation: `mlenergy/ATTRIBUTION.md`.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

import msgspec

TASKS: Final = ("lm-arena-chat", "sourcegraph-fim", "gpqa", "image-chat", "video-chat")
"""The benchmark's language tasks, the one nearest to everyday serving first: chat, code completion, reasoning (long
answers), questions about images and videos (prompts of many thousand tokens)."""


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one number of GPUs with one task, measured at several batch sizes."""

    task: str
    model_id: str
    num_gpus: int
    weight_precision: str
    points: tuple[tuple[float, float], ...]
    """(mean running sequences, joules per output token of all GPUs together), by batch."""
    fixed_joules: float | None = None
    """a of a + b * batch joules per step; None where fewer than four batch sizes were measured."""
    sequence_joules: float | None = None
    """b."""
    mean_error: float | None = None
    """Mean relative error of that law over the points."""

    def joules_per_token(self, batch: float) -> float | None:
        """Return the joules per output token at `batch`, or None outside the measured range.

        Between two measurements it follows the a/batch + b that passes through both.
        """
        batches = [one for one, _ in self.points]
        if not batches[0] <= batch <= batches[-1]:
            return None
        after = bisect_left(batches, batch)
        if batches[after] == batch:
            equal = [joules for one, joules in self.points if one == batch]
            return sum(equal) / len(equal)
        (low, above), (high, below) = self.points[after - 1], self.points[after]
        part = (1 / batch - 1 / high) / (1 / low - 1 / high)
        return below + part * (above - below)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The same model at the same batch, measured elsewhere."""

    model_id: str
    task: str
    gpu_model: str
    """Another GPU than the live one, most likely: say so wherever this is shown."""
    num_gpus: int
    weight_precision: str
    batch: float
    """The batch asked for; the joules are interpolated between the two nearest measured ones."""
    nearest_batch: float
    """The nearest batch that was measured."""
    joules_per_token: float
    batch_low: float
    batch_high: float
    """The measured range."""
    half_fixed_batch: float | None
    """B* = a/b of the sweep."""


class _File(msgspec.Struct, frozen=True):
    source: str
    gpu_model: str
    sweeps: tuple[Sweep, ...]


class Reference:
    """Measurements by model name."""

    def __init__(self, gpu_model: str, sweeps: Sequence[Sweep]) -> None:
        """`gpu_model` marks every answer."""
        self._gpu_model = gpu_model
        self.sweeps: Final = tuple(sweeps)
        by_id: dict[str, list[Sweep]] = defaultdict(list)
        for sweep in sweeps:
            by_id[_folded(sweep.model_id)].append(sweep)
        self._by_id: Mapping[str, list[Sweep]] = by_id
        self._id_by_name = {name.rpartition("/")[2]: name for name in by_id}

    def measurement(self, model: str, batch: float, *, devices: int = 1) -> Measurement | None:
        """Return what was measured for `model`, or None when the model is unknown or `batch` outside what was measured.

        `model` is a Hugging Face id in any case, the last part of one, or a path or cache folder that ends in it; a
        quantised or fine-tuned variant is another model. Of several sweeps that hold the batch the first of TASKS is
        taken, then the one whose number of GPUs is nearest to `devices`.
        """
        known = self._sweeps(model)
        answers = [(sweep, joules) for sweep in known if (joules := sweep.joules_per_token(batch)) is not None]
        if not answers:
            return None
        sweep, joules = min(
            answers, key=lambda one: (TASKS.index(one[0].task), abs(one[0].num_gpus - devices), one[0].num_gpus)
        )
        return Measurement(
            model_id=sweep.model_id,
            task=sweep.task,
            gpu_model=self._gpu_model,
            num_gpus=sweep.num_gpus,
            weight_precision=sweep.weight_precision,
            batch=batch,
            nearest_batch=min((one for one, _ in sweep.points), key=lambda one: abs(one - batch)),
            joules_per_token=joules,
            batch_low=sweep.points[0][0],
            batch_high=sweep.points[-1][0],
            half_fixed_batch=(
                None
                if sweep.fixed_joules is None or sweep.sequence_joules is None
                else sweep.fixed_joules / sweep.sequence_joules
            ),
        )

    def _sweeps(self, model: str) -> Sequence[Sweep]:
        parts = [part for part in _folded(model).split("/") if part and part != "."]
        for part in parts:
            # The cache of huggingface_hub: models--ORG--NAME/snapshots/COMMIT.
            if part.startswith("models--"):
                return self._by_id.get(_folded(part.removeprefix("models--").replace("--", "/")), ())
        if not parts:
            return ()
        whole = "/".join(parts[-2:])
        if whole in self._by_id:
            return self._by_id[whole]
        # ORG/NAME of another organisation may be another model; a bare name or a path says nothing of one.
        if len(parts) == 2 and not model.startswith(("/", ".")):
            return ()
        return self._by_id.get(self._id_by_name.get(parts[-1], ""), ())


def _folded(model: str) -> str:
    # Meta's 3.1 models were renamed on the hub; both names are in use for the same weights.
    return model.strip().casefold().replace("meta-llama-3.1", "llama-3.1")


@cache
def shipped() -> Reference:
    """Return the reference that comes with the package (H100; 60 sweeps of 29 models, 405 measurements)."""
    file = resources.files("jouletrace") / "diagnosis" / "mlenergy" / "h100.json"
    content = msgspec.json.decode(file.read_bytes(), type=_File)
    return Reference(content.gpu_model, content.sweeps)
