"""Configurations of Triton's models, as its own ModelConfig messages, from the tensor tables."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ltx_engines.engine_entry import TensorEntry
from ltx_engines.errors import UserError
from ltx_engines.triton_model import ELEMENT_TYPES, INPUTS, OUTPUTS, VIDEO, Wire
from ltx_engines.triton_settings import Settings

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

Tables = tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]]
"""Inputs and outputs."""

QUEUE_SECONDS = 600
"""How long a request may wait to be begun."""

Place = Literal["cpu", "gpu"]
"""Where a model's process is counted. Without one Triton starts a process for each GPU; ours takes
the first, with engines, and ONNX Runtime's own choice without."""

FIRST_GPU = 0

WORDS = {"BYTES": "STRING"}
"""What a configuration calls a type, where requests call it otherwise."""


@dataclass(frozen=True, slots=True)
class Queue:
    """Of a model: how many requests wait at most, and how long."""

    size: int = 64
    seconds: float = QUEUE_SECONDS


def video(settings: Settings, queue: Queue, place: Place) -> "ModelConfig":
    """Of `ltx_video`. Its instance is one process: the weights are there once, requests are its
    threads. No response cache: Triton refuses one for a decoupled model, and a seed is no key."""
    config = _python(VIDEO, place)
    config.model_transaction_policy.decoupled = True
    for wire in INPUTS:
        _wired(config.input.add(), wire).optional = wire.optional
    for wire in OUTPUTS:
        _wired(config.output.add(), wire)
    for name, word in settings.parameters().items():
        config.parameters[name].string_value = word
    policy = config.dynamic_batching.default_queue_policy  # the only scheduler with a queue policy
    policy.max_queue_size = queue.size
    policy.default_timeout_microseconds = round(queue.seconds * 1e6)
    policy.allow_timeout_override = True
    return config


def python_stage(stage: str, tables: Tables, settings: Settings, place: Place) -> "ModelConfig":
    """Of a stage that our Python backend runs, in whatever batch."""
    config = _python(stage, place)
    add_tensors(config, tables)
    for name, word in settings.parameters().items():
        config.parameters[name].string_value = word
    return config


def _python(name: str, place: Place) -> "ModelConfig":
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

    config = ModelConfig(name=name, backend="python", max_batch_size=0)
    config.version_policy.specific.versions.append(1)
    if place == "gpu":
        config.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_GPU, gpus=[FIRST_GPU])
    else:
        config.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)
    return config


def on_cpu(config: "ModelConfig") -> "ModelConfig":
    """The twin for a server without a GPU: `--model-config-name=cpu`."""
    twin = type(config)()
    twin.CopyFrom(config)
    for group in twin.instance_group:
        group.kind = type(group).KIND_CPU
        del group.gpus[:]
    return twin


def text(config: "ModelConfig") -> str:
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def add_tensors(config: "ModelConfig", tables: Tables) -> None:
    """With the batch among the dims: not every tensor has it first."""
    for rows, entries in zip((config.input, config.output), tables, strict=True):
        for entry in entries:
            if entry.dtype not in ELEMENT_TYPES:
                raise UserError(
                    f"{config.name}: {entry.name} is {entry.dtype}, which Triton does not carry; "
                    f"it carries {', '.join(ELEMENT_TYPES)}"
                )
            row = rows.add(name=entry.name, data_type=data_type(ELEMENT_TYPES[entry.dtype]))
            row.dims.extend(axis if isinstance(axis, int) else -1 for axis in entry.axes)


def data_type(word: str) -> "DataType":
    """By its name in requests."""
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2.DataType.Value(f"TYPE_{WORDS.get(word, word)}")


def _wired(tensor: Any, wire: Wire) -> Any:
    tensor.name, tensor.data_type = wire.name, data_type(wire.dtype)
    tensor.dims.extend(wire.dims)
    return tensor
