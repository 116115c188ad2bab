"""Which engines of a bundle Triton's own TensorRT backend runs: whoever writes a repository and
whoever calls its models must agree."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltx_engines.engine_entry import EngineEntry
    from ltx_engines.manifest import Manifest

PLAN = "model.plan"

Plans = Mapping[str, "EngineEntry"]
"""By file name: the first is for every GPU that no other is for."""


def plans(manifest: "Manifest", stage: str) -> Plans:
    """The engines of a stage, if that backend loads them all; else none: our Python backend runs
    what TensorRT-RTX built, what is in parts, and what takes weights as inputs."""
    from ltx_engines.engine_entry import stale

    ours = [e for e in manifest.engines if e.key.stage == stage and not stale(manifest, e)]
    if not ours or any(not _loadable(engine) for engine in ours):
        return {}
    names = [PLAN, *(f"sm{engine.key.targets[0]}.plan" for engine in ours[1:])]
    return dict(zip(names, ours, strict=True))


def _loadable(engine: "EngineEntry") -> bool:
    key = engine.key
    whole = key.part is None or key.part.of == 1
    return key.flavour == "tensorrt" and whole and engine.weights == "embedded"
