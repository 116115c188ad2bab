"""What of a step's inputs is known before the first one, in bytes as the engines read it.

Small inputs of a step lie side by side in a row, each where TensorRT takes an address, so that one
copy within the GPU brings the next step's into the place to which the engines are bound.

    timestep [branches]   coefficients [K]   skip_layer_mask [layers, branches]
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltx_engines.stages import BRANCHES, COEFFICIENTS
from ltx_trt.denoising import Denoising, Text
from ltx_trt.guidance import Branch, StepGuidance
from ltx_trt.sampler import Step
from ltx_trt.session.element_types import narrowed
from ltx_trt.session.memory import aligned

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Branches = tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """`table` [steps, bytes]; `offsets` of each tensor in a row."""

    table: Bytes
    offsets: Mapping[str, int]

    @property
    def size(self) -> int:
        return int(self.table.shape[1])


def rows(job: Denoising, types: Mapping[str, str]) -> Rows:
    """`types` are the engines' element types."""
    steps = [
        {name: _bytes(values, types[name]) for name, values in _small(job, step, guide).items()}
        for step, guide in job.steps()
    ]
    offsets, end = {}, 0
    for name in steps[0]:
        offsets[name] = end
        end += aligned(max(step[name].size for step in steps))
    table = np.zeros((len(steps), end), np.uint8)
    for row, step in zip(table, steps, strict=True):
        for name, values in step.items():
            row[offsets[name] : offsets[name] + values.size] = values
    return Rows(table, offsets)


def _small(job: Denoising, step: Step, guide: StepGuidance) -> dict[str, Floats]:
    return {
        "timestep": np.full(len(guide.branches), step.sigma, np.float32),
        "coefficients": coefficients(step, guide),
        "skip_layer_mask": guide.skip_layer_mask(job.num_layers),
    }


def coefficients(step: Step, guide: StepGuidance) -> Floats:
    """As `ltx_engines.stages` names them. A branch that is not run is the text's velocity there,
    which its scales leave as it is."""
    values = {
        "guidance_scale": guide.guidance_scale,
        "stg_scale": guide.stg_scale,
        "rescaling_scale": guide.rescaling_scale if guide.rescales else 0.0,
        "cfg_star_rescale": float(guide.cfg_star_rescale),
        "latents": step.latents,
        "velocity": step.velocity,
        "previous": step.previous,
        "noise": step.noise or 0.0,
        "sigma": step.sigma,
    }
    return np.array([values[name] for name in COEFFICIENTS], np.float32)


def prompts(job: Denoising, branches: Iterable[Branch]) -> dict[str, Floats]:
    """The transformer's prompt tensors for such a batch."""
    texts: list[Text] = [job.uncond if branch == "uncond" else job.text for branch in branches]
    return {
        "prompt_embeds": np.concatenate([text.embeds for text in texts]),
        "prompt_mask": np.concatenate([text.mask for text in texts]),
    }


def repeated(values: Floats, dtype: str) -> Any:
    """For the largest batch; a smaller one reads the beginning of it."""
    return narrowed(np.repeat(values, len(BRANCHES), axis=0), dtype)


def noises(job: Denoising) -> Iterator[Floats | None]:
    """Of each step, None where none is added; the stream of noise then is where the host's is."""
    for step, _ in job.steps():
        fresh = job.fresh(step)
        yield fresh if step.noise else None


def _bytes(values: Floats, dtype: str) -> Bytes:
    return narrowed(values, dtype).reshape(-1).view(np.uint8)
