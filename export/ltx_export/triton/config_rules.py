"""What must be true of a model's configuration by itself, also where Triton does not say so."""

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_engines import triton_settings
from ltx_engines.errors import UserError
from ltx_engines.triton_model import VIDEO

CONFIG = "config.pbtxt"

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, Triton's type, sizes."""


@dataclass(frozen=True, slots=True)
class Model:
    """A folder of the repository. `twins` are configurations for other machines, by name."""

    folder: Path
    config: Any
    twins: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def versions(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir() and path.name.isdigit()]


def table(rows: Any) -> list[Tensor]:
    types = rows and rows[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    return [
        (row.name, types[row.data_type].name.removeprefix("TYPE_"), tuple(row.dims)) for row in rows
    ]


Rule = Callable[[Model, Any], Iterator[str]]


def problems_of(model: Model) -> Iterator[str]:
    """Of each configuration by itself, and of the twins against the first."""
    for name, config in (("", model.config), *model.twins.items()):
        where = f"configs/{name}.pbtxt: " if name else ""
        for rule in RULES:
            yield from (f"{where}{problem}" for problem in rule(model, config))
        if name and _surface(config) != _surface(model.config):
            yield f"{where}tensors, batch size or parameters are not those of {CONFIG}"
    if "cpu" in model.twins:
        for group in model.twins["cpu"].instance_group:
            if group.kind != group.KIND_CPU or group.gpus:
                yield "configs/cpu.pbtxt: an instance is not KIND_CPU"


def _surface(config: Any) -> Any:
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    return table(config.input), table(config.output), config.max_batch_size, parameters


def _names(model: Model, config: Any) -> Iterator[str]:
    if config.name != model.name:
        yield f"its name is {config.name!r}, its folder's is {model.name!r}"
    for what, rows in (("input", config.input), ("output", config.output)):
        names = [row.name for row in rows]
        if not names:
            yield f"it has no {what}s"
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{what} {name} is there twice"
        for row in rows:
            if row.data_type == 0:
                yield f"{what} {row.name} has no data_type"
            if not row.dims and not row.HasField("reshape"):
                yield f"{what} {row.name} has no dims"
            if any(size == 0 or size < -1 for size in row.dims):
                yield f"{what} {row.name} has dims {list(row.dims)}; a size is from 1, or -1"


def _program(model: Model, config: Any) -> Iterator[str]:
    """What the server would load. It waits for ever for a Python model that is not there."""
    kinds = (config.backend, config.platform)
    if kinds not in (("python", ""), ("", "tensorrt_plan"), ("tensorrt", "tensorrt_plan")):
        yield f"backend {config.backend!r} with platform {config.platform!r} is none of ours"
        return
    numbers = sorted(int(path.name) for path in model.versions)
    wanted = sorted(config.version_policy.specific.versions) or numbers[-1:]
    if not wanted or set(wanted) - set(numbers):
        yield f"versions {wanted or 'none'} are wanted, there are {numbers or 'none'}"
        return
    files = [config.default_model_filename or _usual(config)]
    files += sorted(config.cc_model_filenames.values())
    for folder in (model.folder / str(number) for number in wanted):
        for name in files:
            if not (folder / name).is_file() and not config.cc_model_filenames:
                yield f"{folder.name}/{name} is missing"
            elif name.endswith(".py"):
                yield from _source(folder / name)
        for name in config.cc_model_filenames.values():
            if not (folder / name).is_file():
                yield f"{folder.name}/{name} is missing"


def _usual(config: Any) -> str:
    return "model.py" if config.backend == "python" else "model.plan"


def _source(path: Path) -> Iterator[str]:
    """A Python model without the class is accepted, and fails when it is asked."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        yield f"{path.parent.name}/{path.name} is not Python: {error.msg}, line {error.lineno}"
        return
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    if "TritonPythonModel" not in names:
        yield f"{path.parent.name}/{path.name} has no TritonPythonModel"


def _scheduling(model: Model, config: Any) -> Iterator[str]:
    most = config.max_batch_size
    if most < 0:
        yield f"max_batch_size is {most}"
    preferred = list(config.dynamic_batching.preferred_batch_size)
    if too_large := [size for size in preferred if size > most]:
        yield f"preferred_batch_size {too_large} is more than max_batch_size {most}"
    if config.response_cache.enable:
        yield "response_cache is on; clips are not answers to look up"
    if (model.name == VIDEO) != config.model_transaction_policy.decoupled:
        yield f"decoupled is {config.model_transaction_policy.decoupled}"


def _instances(model: Model, config: Any) -> Iterator[str]:
    for group in config.instance_group:
        if group.count < 0:
            yield f"an instance group has count {group.count}"
        if group.kind == group.KIND_CPU and group.gpus:
            yield "an instance group is KIND_CPU and names GPUs"
        stands_in = config is model.twins.get("cpu")
        if group.kind == group.KIND_CPU and config.platform == "tensorrt_plan" and not stands_in:
            yield "tensorrt_plan does not run on KIND_CPU"
        for profile in group.profile:
            if config.platform != "tensorrt_plan" or not profile.isdecimal():
                yield f"profile {profile!r} is not the number of a TensorRT profile"
    for graph in config.optimization.cuda.graph_spec:
        legal = range(1, config.max_batch_size + 1) if config.max_batch_size else (0,)
        if graph.batch_size not in legal:
            yield f"a CUDA graph is of batch size {graph.batch_size}, legal are {list(legal)}"
        yield from _unknown("a CUDA graph", graph.input, config)


def _warmup(_: Model, config: Any) -> Iterator[str]:
    for sample in config.model_warmup:
        if sample.batch_size < 1:
            yield f"warm-up {sample.name!r} has no batch_size, and is ignored without it"
        yield from _unknown(f"warm-up {sample.name!r}", sample.inputs, config)


def _unknown(what: str, names: Iterable[str], config: Any) -> Iterator[str]:
    if unknown := sorted(set(names) - {row.name for row in config.input}):
        yield f"{what} names {', '.join(unknown)}, which is no input"


def _parameters(_: Model, config: Any) -> Iterator[str]:
    """Of our own models; the TensorRT backend has others."""
    if config.backend != "python":
        return
    try:
        triton_settings.read({key: value.string_value for key, value in config.parameters.items()})
    except UserError as error:
        yield str(error)


RULES: tuple[Rule, ...] = (
    _names,
    _program,
    _scheduling,
    _instances,
    _warmup,
    _parameters,
)
