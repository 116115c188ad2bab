"""Whether a model repository would be served, without a server: schema, versions, hashes, tensors.

The server itself says some of this only in its log, some of it never: a model without a file hangs
it, and what a Python model answers is not held against its configuration.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_engines import hashes
from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.engine_entry import TensorEntry
from ltx_engines.errors import UserError
from ltx_engines.triton_model import ELEMENT_TYPES, INPUTS, OUTPUTS, VIDEO, Wire
from ltx_export import __version__
from ltx_export.triton import inventory, plan_rules
from ltx_export.triton.config_rules import CONFIG, Model, Tensor, problems_of, table
from ltx_export.triton.inventory import AGAIN, INVENTORY, Inventory

SHOWN = 3
"""Problems in the one line of an error."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What is in a repository."""

    repository: Path
    inventory: Inventory
    models: tuple[Model, ...]

    def lines(self) -> tuple[str, ...]:
        twins = sorted({name for model in self.models for name in model.twins})
        count = f"{len(self.models)} model{'s' if len(self.models) > 1 else ''}"
        return (
            *(f"{model.name}: {_kind(model.config)}" for model in self.models),
            f"{self.repository}: layout {self.inventory.layout}, {count}, "
            f"{len(self.inventory.files)} files as they were written"
            + (f", configurations for {', '.join(twins)}" if twins else ""),
        )


def check(repository: Path) -> Checked:
    """
    Raises:
        UserError: something is wrong in it; the first of it, in one line.
    """
    checked, problems = look(repository)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(f"{repository}: {'; '.join(problems[:SHOWN])}{more}; {AGAIN}")
    return checked


def look(repository: Path) -> tuple[Checked, list[str]]:
    """What is there, and all that is wrong.

    Raises:
        UserError: it is no repository.
    """
    found = inventory.read(repository)
    place = inventory.bundle_folder(repository, found)
    problems = list(_files(repository, found))
    models, unread = _models(repository)
    problems += unread
    bundle = None
    try:
        bundle = None if place is None else open_bundle(place)
    except UserError as error:
        problems.append(str(error))
    problems += _versions(repository, found, bundle)
    problems += _layout(found, models)
    for model in models:
        problems += (f"{model.name}: {problem}" for problem in problems_of(model))
        if bundle is not None:
            problems += (f"{model.name}: {problem}" for problem in _tensors(model, bundle))
            problems += (f"{model.name}: {problem}" for problem in _place(model, bundle))
    return Checked(repository, found, models), problems


def _files(repository: Path, found: Inventory) -> Iterator[str]:
    here = set(inventory.files(repository, found.bundle))
    yield from (f"{name} is missing" for name in sorted(found.files.keys() - here))
    yield from (f"{name} is not in {INVENTORY}" for name in sorted(here - found.files.keys()))
    for name in sorted(here & found.files.keys()):
        wanted, path = found.files[name], repository / name
        if path.stat().st_size != wanted.bytes or hashes.sha256(path) != wanted.sha256:
            yield f"{name} has changed since it was written"


def _models(repository: Path) -> tuple[tuple[Model, ...], list[str]]:
    """Every folder at the top, and what of it cannot be read."""
    models, problems = [], []
    for folder in sorted(path for path in repository.iterdir() if path.is_dir()):
        if not (folder / CONFIG).is_file():
            problems.append(f"{folder.name}/ has no {CONFIG}; the server takes it for a model")
            continue
        texts = {"": folder / CONFIG, **{p.stem: p for p in folder.glob("configs/*.pbtxt")}}
        read: dict[str, Any] = {}
        for name, path in sorted(texts.items()):
            try:
                read[name] = parse(path)
            except UserError as error:
                problems.append(str(error))
        if "" in read:
            models.append(Model(folder, read.pop(""), read))
    if not models and not problems:
        problems.append("it has no models")
    return tuple(models), problems


def parse(path: Path) -> Any:
    """A ModelConfig.

    Raises:
        UserError: Triton's own schema refuses it, or the schema is not installed.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError as error:
        raise UserError(
            f"ltx-export triton needs tritonclient ({error}); pip install 'ltx-trt[triton]'"
        ) from None
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        where = f"{path.parent.name}/{path.name}"
        raise UserError(f"{where} is no model configuration: {error}") from None


def _versions(repository: Path, found: Inventory, bundle: Bundle | None) -> Iterator[str]:
    if found.ltx_trt != __version__:
        yield f"it was written by ltx-export {found.ltx_trt}, this is {__version__}"
    if bundle is None:
        return
    plans = inventory.plan_versions(repository, bundle.manifest)
    if plans != ({found.tensorrt} if found.tensorrt else set()):
        built = ", ".join(sorted(plans)) or "none"
        yield f"{INVENTORY} says plans of TensorRT {found.tensorrt}, the bundle's are {built}"


def _layout(found: Inventory, models: Iterable[Model]) -> Iterator[str]:
    names = {model.name for model in models}
    if VIDEO not in names:
        yield f"the model {VIDEO} is missing"
    if found.layout == "single" and (more := sorted(names - {VIDEO})):
        yield f"layout single has no other models, here are {', '.join(more)}"
    if found.layout == "stages":
        for stage in ("text_encoder", "transformer", "vae_decoder"):
            if not any(name == stage or name.startswith(f"{stage}_") for name in names):
                yield f"the model {stage} is missing"


def _tensors(model: Model, bundle: Bundle) -> Iterator[str]:
    """Against the tables: the wire's for clips, the bundle's for a stage."""
    config = model.config
    if model.name == VIDEO:
        yield from _agree("input", table(config.input), [_wire(wire) for wire in INPUTS])
        yield from _agree("output", table(config.output), [_wire(wire) for wire in OUTPUTS])
        for row, wire in zip(config.input, INPUTS, strict=False):
            if row.name == wire.name and row.optional != wire.optional:
                yield f"input {row.name} is optional: {row.optional}, wanted {wire.optional}"
        return
    tables = _entries(model, bundle)
    if isinstance(tables, str):
        yield tables
        return
    for what, rows, entries in zip(
        ("input", "output"), (config.input, config.output), tables, strict=True
    ):
        yield from _agree(what, table(rows), [_entry(entry, config) for entry in entries])


Tables = tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]]


def _entries(model: Model, bundle: Bundle) -> Tables | str:
    """The tensors of an engine if it has one, else of the stage by its name; or what is wrong."""
    manifest = bundle.manifest
    plans = [plan for version in model.versions for plan in sorted(version.glob("*.plan"))]
    if not plans:
        if (stage := manifest.stages.get(model.name)) is None:
            known = ", ".join(sorted(manifest.stages))
            return f"the bundle has no stage {model.name}, only {known}"
        return stage.inputs, stage.outputs
    engines = plan_rules.engines(plans, manifest)
    if problem := plan_rules.problem(model, engines):
        return problem
    first = next(engine for engine in engines.values() if engine is not None)
    return first.inputs, first.outputs


def _agree(what: str, found: list[Tensor], wanted: list[Tensor]) -> Iterator[str]:
    have, want = ({name: (kind, dims) for name, kind, dims in rows} for rows in (found, wanted))
    yield from (f"{what} {name} is missing" for name in want if name not in have)
    yield from (f"{what} {name} is unknown" for name in have if name not in want)
    for name in (name for name in want if name in have):
        for word, here, there in zip(("data_type", "dims"), have[name], want[name], strict=True):
            if here != there:
                yield f"{what} {name} has {word} {here}, wanted {there}"


def _wire(wire: Wire) -> Tensor:
    return wire.name, "STRING" if wire.dtype == "BYTES" else wire.dtype, wire.dims


def _entry(entry: TensorEntry, config: Any) -> Tensor:
    """With max_batch_size the first axis is Triton's own and not said."""
    axes = entry.axes[1:] if config.max_batch_size else entry.axes
    dims = tuple(axis if isinstance(axis, int) else -1 for axis in axes)
    return entry.name, ELEMENT_TYPES.get(entry.dtype, f"none for {entry.dtype}"), dims


def _place(model: Model, bundle: Bundle) -> Iterator[str]:
    """Each model finds the one bundle of the inventory."""
    if (said := model.config.parameters.get("bundle")) is None:
        return
    for version in model.versions:
        if (version / said.string_value).resolve() != bundle.path.resolve():
            yield f"its bundle is {said.string_value!r}, which is not the one of {INVENTORY}"


def _kind(config: Any) -> str:
    kind = config.platform or f"{config.backend} backend"
    instances = sum(group.count or 1 for group in config.instance_group) or 1
    return f"{kind}, {instances} instance{'s' if instances > 1 else ''}"
