"""What a manifest says of an engine, and which engines of a bundle run a stage on a GPU.

That is one engine, or a chain of parts. A chain that lacks one is not used: it is of a build that
was stopped, or that is at work.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ltx_engines.cache_key import EngineKey, contents, targets
from ltx_engines.errors import UserError
from ltx_engines.file_entry import Count, Frozen
from ltx_engines.targets import Flavour
from ltx_engines.weight_inputs import SKIP

if TYPE_CHECKING:
    from ltx_engines.manifest import Manifest, StageEntry


class TensorEntry(Frozen):
    """A tensor of stages.py with the element type that this bundle's engine really has."""

    name: str
    dtype: str
    axes: tuple[Count | str, ...]


class EngineEntry(Frozen):
    """What a builder made of a stage, or of a part of it, for some GPUs.

    `file` and `layers`, the table of its kernels, are keys of Manifest.files; `counts` is the sum
    of the table (`ltx_export/layer_table.py`). `inputs` and `outputs` are this engine's own.
    `activations` are the bytes that it needs beside its weights in its largest profile.
    `counted` is the compute capability that these and the table are of. `accepted` says what of the
    table is not as it was asked for, and was built all the same (--allow-fallback).
    If its weights are inputs, `bound` has for each of them the tensor of the checkpoint, with
    `{block}` for a block's number; `blocks` are those that it computes, one after the other
    (`ltx_engines/weight_inputs.py`). The part in its key is then its place among such engines.
    """

    file: str
    layers: str
    key: EngineKey
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    activations: Annotated[int, Field(ge=0)]
    counts: dict[str, int] = Field(default_factory=dict)
    counted: Count | None = None
    accepted: tuple[str, ...] = ()
    refittable: bool = False
    weights: Literal["embedded", "inputs"] = "embedded"
    bound: dict[str, str] = Field(default_factory=dict)
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = ()


Chain = tuple[EngineEntry, ...]
"""In the order of their blocks; one entry where the stage is not split."""


def choose(
    path: Path, manifest: "Manifest", stage: str, capability: int, flavour: Flavour | None
) -> Chain:
    """Of the chains for this GPU, one for the fewest; of several, the one that was built last.

    Raises:
        UserError: there is none, it is of other graphs or weights, or a part is missing.
    """
    again = f"build it (ltx-export build-engine --gpu sm{capability})"
    ours = [engine for engine in manifest.engines if engine.key.stage == stage]
    fitting = [e for e in ours if capability in e.key.targets and flavour in (None, e.key.flavour)]
    if not fitting:
        by = f" by {flavour}" if flavour else ""
        there = "; ".join(dict.fromkeys(f"{e.key.flavour} for {_cards(e)}" for e in ours))
        raise UserError(
            f"{path} has no engine of {stage} for SM{capability}{by}, only {there or 'none'}; "
            f"{again}"
        )
    current = [engine for engine in fitting if not stale(manifest, engine)]
    if not current:
        raise UserError(f"{path}: {stale(manifest, fitting[-1])} since {stage} was built; {again}")
    found = list(chains(current))
    layers = manifest.model.num_layers
    whole = [chain for chain in found if not missing(chain, layers)]
    if not whole:
        raise UserError(f"{path}: the chain of {stage} lacks {missing(found[-1], layers)}; {again}")
    fewest = min(len(chain[0].key.targets) for chain in whole)
    return [chain for chain in whole if len(chain[0].key.targets) == fewest][-1]


def stale(manifest: "Manifest", engine: EngineEntry) -> str:
    """What changed in the bundle since the engine was built, or an empty string."""
    stage = manifest.stages[engine.key.stage]
    if engine.weights == "inputs":  # of whatever graph and file, as long as the kinds are the same
        return next(_other_kinds(manifest, stage, engine), "")
    weights = {name: manifest.files[name] for name in stage.weights}
    return "; ".join(contents(engine.key, manifest.files[stage.file].sha256, weights))


def _other_kinds(manifest: "Manifest", stage: "StageEntry", engine: EngineEntry) -> Iterator[str]:
    """What an engine that takes any weights takes or gives otherwise than the stage does now."""
    if engine.key.recipe != (now := recipe(stage)):
        yield f"the recipe was {engine.key.recipe or 'none'}, now it is {now or 'none'}"
    ours = {tensor.name: tensor for tensor in (*stage.inputs, *stage.outputs)}
    for tensor in (*engine.inputs, *engine.outputs):
        if tensor.name in ours and (was := _kind(tensor)) != (is_now := _kind(ours[tensor.name])):
            yield f"{tensor.name} was {was}, now it is {is_now}"
    halves = {"float16", "bfloat16"} - {manifest.precision}
    for tensor in engine.inputs:
        if len(halves) == 1 and tensor.name in engine.bound and tensor.dtype in halves:
            yield f"{tensor.name} was {tensor.dtype}, now it is {manifest.precision}"


def _kind(tensor: TensorEntry) -> str:
    """Its type and its fixed sizes; a piece has one row of the blocks' mask."""
    axes = tensor.axes[1:] if tensor.name == SKIP else tensor.axes
    sizes = (str(axis) if isinstance(axis, int) else "free" for axis in axes)
    return f"{tensor.dtype} [{', '.join(sizes)}]"


def recipe(stage: "StageEntry") -> str | None:
    """As a key has it: the name, and the layers of each format."""
    if stage.quantization is None:
        return None
    counts = (f"{count} {form}" for form, count in sorted(stage.quantization.layers.items()))
    return f"{stage.quantization.recipe or 'without a name'} ({', '.join(counts)})"


def chains(engines: Iterable[EngineEntry]) -> Iterator[Chain]:
    """Those that belong together, whether all are there or not; last the one that was built last,
    of which there is the last entry."""
    found: dict[str, list[EngineEntry]] = {}
    for engine in engines:
        name = f"{identity(engine.key)} {engine.weights}"
        found[name] = [*found.pop(name, []), engine]
    for parts in found.values():
        yield tuple(sorted(parts, key=lambda engine: index(engine.key)))


def identity(key: EngineKey) -> str:
    """What all parts of a chain have in common, apart from what `stale` looks at."""
    of = key.part.of if key.part else 1
    alike = key.model_copy(update={"part": None, "weights": {}})
    return f"{of} {json.dumps(alike.model_dump(mode='json'), sort_keys=True)}"


def index(key: EngineKey) -> int:
    return key.part.index if key.part else 0


def missing(chain: Chain, layers: int) -> str:
    """The parts that are not there, of a stage of so many blocks; nothing if all are."""
    parts = [engine.key.part for engine in chain if engine.key.part]
    if not parts:
        return ""
    gone = sorted(set(range(parts[0].of)) - {part.index for part in parts})
    if gone:
        return f"part {' and '.join(str(number + 1) for number in gone)} of {parts[0].of}"
    if chain[0].weights == "inputs":  # one engine may serve all blocks
        served = sorted(block for engine in chain for block in engine.blocks)
        return "" if served == [*range(layers)] else f"blocks, it is not of these {layers}"
    follow = parts[0].first == 0 and all(one.end == next_.first for one, next_ in pairwise(parts))
    if not follow:
        return "blocks between its parts"
    return "" if parts[-1].end == layers else f"blocks, it ends at {parts[-1].end} of {layers}"


def _cards(engine: EngineEntry) -> str:
    return targets(engine.key.targets)
