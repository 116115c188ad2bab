"""What the stages of a bundle take of a card, by its manifest: before anything is loaded."""

from collections.abc import Iterable, Sequence
from math import prod

from ltx_engines.bundle import EngineEntry, Manifest
from ltx_engines.engine_entry import Chain
from ltx_engines.stages import BRANCHES, COEFFICIENTS
from ltx_trt.passes import Pass
from ltx_trt.session import sizes
from ltx_trt.session.chain_runner import slots
from ltx_trt.session.element_types import stored
from ltx_trt.session.memory import aligned
from ltx_trt.session.residency import Need

WIDEST = 4
"""Bytes of a float32."""

STREAMING = "weight streaming"
"""What the builder was told (`EngineKey.options`) for an engine that fetches weights itself."""


def need(
    manifest: Manifest, chain: Sequence[EngineEntry], beside: Iterable[EngineEntry] = ()
) -> Need:
    """`beside` are small engines that are open at the same time. An engine takes on the card what
    its file takes on disk; all else is for the largest profile."""
    weights = [manifest.files[entry.file].bytes for entry in chain]
    beside = tuple(beside)
    small = sum(manifest.files[entry.file].bytes for entry in beside)
    return Need(
        chain[0].key.stage,
        tuple(weights),
        activations=max(entry.activations for entry in (*chain, *beside)),
        buffers=small
        + sum(map(_chain_buffers, ([entry] for entry in beside)))
        + _chain_buffers(chain),
        streams=len(chain) == 1 and bool(chain[0].key.options.get(STREAMING)),
    )


def of_loop(manifest: Manifest, transformer: Chain, one: Pass) -> int:
    """What the loop over the steps has on the card beside the buffers of its two engines (`need`):
    a row and a noise for each step, and the prompts of each set of branches but one."""
    model, clip = manifest.model, sizes.of_clip(one.shape, manifest)
    tensors = {tensor.name: tensor for entry in transformer for tensor in entry.inputs}
    prompt = sum(
        prod(clip[axis] if isinstance(axis, str) else axis for axis in tensors[name].axes[1:])
        * stored(tensors[name].dtype).itemsize
        for name in ("prompt_embeds", "prompt_mask")
    )
    small = (len(BRANCHES), len(COEFFICIENTS), model.num_layers * len(BRANCHES))
    row = sum(aligned(WIDEST * number) for number in small)
    noise = WIDEST * clip["tokens"] * model.latent_channels
    prompts = max(0, one.prompts - max(one.batches)) * prompt
    rows, noises = len(one.batches) * row, one.noises * noise
    return sum(aligned(size) for size in (rows, noises, prompts) if size)


def _chain_buffers(chain: Sequence[EngineEntry]) -> int:
    """What the parts share a buffer for counts once."""
    places = slots(chain)
    found: dict[str, int] = {}
    for entry in chain:
        found |= {places.get(name, name): size for name, size in _buffers(entry).items()}
    return sum(found.values())


def _buffers(entry: EngineEntry) -> dict[str, int]:
    """Bytes of each tensor in the largest profile."""
    most = _largest(entry)
    inputs = {
        tensor.name: tuple(axis if isinstance(axis, int) else most[axis] for axis in tensor.axes)
        for tensor in entry.inputs
    }
    shapes = inputs | sizes.outputs(entry, inputs)
    return {
        tensor.name: prod(shapes[tensor.name]) * stored(tensor.dtype).itemsize
        for tensor in (*entry.inputs, *entry.outputs)
    }


def _largest(entry: EngineEntry) -> dict[str, int]:
    found: dict[str, int] = {}
    for profile in entry.key.profiles:
        for axis, (_, _, most) in profile.items():
            found[axis] = max(most, found.get(axis, 0))
    return found
