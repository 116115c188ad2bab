"""Stages that Triton's own TensorRT backend runs: configurations from the profiles of the engines.

Only what that backend can load: one engine for a stage, built by TensorRT, its weights inside.
Everything else is run by our Python backend.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ltx_engines.cache_key import Profile
from ltx_engines.engine_entry import EngineEntry, TensorEntry, stale
from ltx_engines.manifest import Manifest
from ltx_engines.triton_model import ELEMENT_TYPES
from ltx_export.triton import config

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

PLATFORM = "tensorrt_plan"
PLAN = "model.plan"

SLOT = "GPU_SLOT"
"""The rate limiter's resource: with `--rate-limit=execution_count`, stages of one GPU take turns."""

Plans = Mapping[str, EngineEntry]
"""By file name: the first is for every GPU that no other is for."""


def plans(manifest: Manifest, stage: str) -> dict[str, EngineEntry]:
    """The engines of a stage that Triton's backend loads; none if there are others beside them."""
    ours = [e for e in manifest.engines if e.key.stage == stage and not stale(manifest, e)]
    if not ours or any(not _loadable(engine) for engine in ours):
        return {}
    names = [PLAN, *(f"sm{engine.key.targets[0]}.plan" for engine in ours[1:])]
    return dict(zip(names, ours, strict=True))


def config_of(stage: str, plans: Plans) -> "ModelConfig":
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

    made = ModelConfig(name=stage, platform=PLATFORM, backend="tensorrt", max_batch_size=0)
    made.default_model_filename = PLAN
    made.version_policy.specific.versions.append(1)
    first = plans[PLAN]
    config.add_tensors(made, (first.inputs, first.outputs))
    for name, engine in plans.items():
        for capability in engine.key.targets:
            made.cc_model_filenames[f"{capability // 10}.{capability % 10}"] = name
    group = made.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_GPU)
    group.profile.extend(str(index) for index in range(len(first.key.profiles)))
    group.rate_limiter.resources.add(name=SLOT, count=1)
    made.optimization.cuda.graphs = True
    for number, profile in enumerate(first.key.profiles):
        _graph(made, first, profile)
        _warm_up(made, first, profile, number)
    return made


def _loadable(engine: EngineEntry) -> bool:
    key = engine.key
    whole = key.part is None or key.part.of == 1
    return key.flavour == "tensorrt" and whole and engine.weights == "embedded"


def _graph(made: "ModelConfig", engine: EngineEntry, profile: Profile) -> None:
    """Captured when the model is loaded, for the size that the profile is for."""
    spec = made.optimization.cuda.graph_spec.add(batch_size=0)
    for tensor in engine.inputs:
        spec.input[tensor.name].dim.extend(_usual(tensor, profile))


def _warm_up(made: "ModelConfig", engine: EngineEntry, profile: Profile, number: int) -> None:
    """A batch size of 1 means that there is one sample; without it Triton leaves it out."""
    sample = made.model_warmup.add(name=f"profile {number}", batch_size=1)
    for tensor in engine.inputs:
        row = sample.inputs[tensor.name]
        row.data_type = config.data_type(ELEMENT_TYPES[tensor.dtype])
        row.dims.extend(_usual(tensor, profile))
        row.zero_data = True


def _usual(tensor: TensorEntry, profile: Profile) -> list[int]:
    return [axis if isinstance(axis, int) else profile[axis][1] for axis in tensor.axes]
