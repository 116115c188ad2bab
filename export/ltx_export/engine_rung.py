"""The last rung: the bundle's engine on the GPU at hand, or why it is not climbed here and how."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ltx_engines.bundle import Bundle, EngineEntry, open_bundle
from ltx_engines.cache_key import targets
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_export import card, polygraphy_engine
from ltx_export.ladder import Skipped
from ltx_export.onnx_transformer import STAGE
from ltx_export.polygraphy_engine import RunnerTransformer


@dataclass(frozen=True, slots=True)
class Climbable:
    """The engine, or the chain of them, and the profile that takes the ladder's inputs."""

    bundle: Bundle
    chain: Sequence[EngineEntry]
    profile: int

    @contextmanager
    def opened(self) -> Iterator[RunnerTransformer]:
        with polygraphy_engine.opened(self.bundle, self.chain, self.profile) as model:
            yield model


def find(
    folder: Path | None, shape: VideoShape, inputs: Mapping[str, Tensor]
) -> Climbable | Skipped:
    """What climbs with these inputs of the transformer, or why nothing does."""
    word = f"{shape.width}x{shape.height}x{shape.frames}"
    if folder is None:
        return Skipped(
            "engine",
            "there is no TensorRT engine of what is exported here and thrown away; give the bundle "
            "that ltx-export build-engine made with --bundle",
        )
    bundle = open_bundle(folder)
    ours = [engine for engine in bundle.manifest.engines if engine.key.stage == STAGE]
    build_it = f"ltx-export build-engine {folder} --stages {STAGE} --shape {word}"
    if not ours:
        return Skipped(
            "engine", f"there is no TensorRT engine in {folder}; {build_it} --gpu NAME makes one"
        )
    if (here := card.at_hand()) is None:
        cards = targets(sorted({target for engine in ours for target in engine.key.targets}))
        return Skipped(
            "engine",
            f"no NVIDIA GPU is here, and the engine is for {cards}; give the same command where "
            "one is",
        )
    try:
        chain = bundle.engines(STAGE, here.capability)
    except UserError as error:
        return Skipped("engine", str(error))
    if any(engine.weights == "inputs" for engine in chain):
        return Skipped("engine", "its weights are inputs; one with weights of its own is verified")
    if reason := polygraphy_engine.missing(chain[0].key.flavour):
        return Skipped("engine", reason)
    profiles = chain[0].key.profiles
    profile = polygraphy_engine.profile_for(profiles, chain, inputs)
    if profile is None:
        branches = inputs["latents"].shape[0]
        return Skipped(
            "engine",
            f"no profile of it takes {branches} branches of {word}; {build_it} "
            f"--gpu sm{here.capability} --branches {branches}",
        )
    return Climbable(bundle, chain, profile)
