"""Stages that Triton's own TensorRT backend runs: their configurations, from engines' profiles."""

from typing import TYPE_CHECKING

from ltx_engines.cache_key import Profile
from ltx_engines.engine_entry import EngineEntry, TensorEntry
from ltx_engines.triton_model import ELEMENT_TYPES
from ltx_engines.triton_plans import PLAN, Plans
from ltx_export.triton import config

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

PLATFORM = "tensorrt_plan"

SLOT = "GPU_SLOT"
"""The rate limiter's resource: with `--rate-limit=execution_count`, a GPU's stages take turns."""


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
