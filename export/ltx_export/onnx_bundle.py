"""A bundle of ONNX graphs: what is checked first, then traced, then written in one piece."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from ltx_engines import bundle, stages
from ltx_engines.bundle import Manifest, StageEntry, StgMode
from ltx_engines.errors import UserError
from ltx_export import __version__, convert, invariants, pipeline_defaults, sources, trace, weights
from ltx_export.pipeline_defaults import Pipeline
from ltx_export.sources import TEXT_FOLDER, TOKENIZER, Sources
from ltx_export.stage_modules import Model, build
from ltx_ref.checkpoint import Header
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX
from ltx_ref.text import PromptTokenizer

IR_VERSION = 10
"""Of the ONNX file format: the newest that the runtimes of 2024 read."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for."""

    checkpoint: Path
    text_encoder: Path
    out: Path
    stages: tuple[str, ...] = stages.STAGES
    pipeline_config: Path | None = None
    stg_mode: StgMode | None = None
    precision: bundle.Precision | None = None
    """None leaves the weights as they are, and every file a link to the original."""
    weights: Literal["link", "copy"] = "link"
    name: str | None = None
    overwrite: bool = False
    ignore_config_keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Checked:
    """Everything that was read, and found to fit together. Precisions are by stage."""

    found: Sources
    pipeline: Pipeline
    tokenizer: PromptTokenizer
    precisions: Mapping[str, bundle.Precision]


@dataclass(frozen=True, slots=True)
class Graph:
    """A traced stage with its weights bound, ready to be written."""

    stage: stages.Stage
    precision: bundle.Precision
    model: ir.Model

    @property
    def file(self) -> str:
        return f"{self.stage.name}.onnx"

    def entry(self) -> StageEntry:
        return StageEntry(
            file=self.file,
            inputs=bundle.tensor_entries(self.stage.inputs, self.precision),
            outputs=bundle.tensor_entries(self.stage.outputs, self.precision),
            weights=weights.files(self.model),
        )


def write(order: Order) -> Iterator[str]:
    """Make the bundle. Yields, before each piece of work, what comes next.

    The folder appears when the last piece is done. Whoever stops earlier, or whatever fails,
    leaves nothing behind.

    Raises:
        UserError, CheckpointError, OSError: something that the user can mend.
    """
    yield "reading"
    checked = check(order)
    with bundle.create(order.out, overwrite=order.overwrite) as folder:
        how = f"in {order.precision}" if checked.found.origins else order.weights
        yield f"placing weights ({how})"
        _place_files(order, checked, folder)
        graphs = []
        for stage in order.stages:
            yield f"tracing {stage}"
            graphs.append(export(stage, checked))
        yield "writing graphs"
        for graph in graphs:
            _save(graph, folder)
        yield "hashing"
        bundle.seal(folder, _manifest(order, checked, graphs))


def check(order: Order) -> Checked:
    """Everything that can be known to be wrong before the first graph is traced."""
    found = sources.read(order.checkpoint, order.text_encoder, order.ignore_config_keys)
    if order.precision is not None:
        found = found.converted(order.precision)
    pipeline = pipeline_defaults.read(order.pipeline_config, found.config, order.stg_mode)
    tokenizer = sources.tokenizer(found.text_home, found.text_config, pipeline.max_length)
    precisions = {}
    for stage in order.stages:
        module = build(stage, _model(found, pipeline.stg_mode))
        precisions[stage] = sources.precision(module.state_dict(), found.weights(stage), stage)
    _check_place(order, found)
    return Checked(found, pipeline, tokenizer, precisions)


def export(stage: str, checked: Checked) -> Graph:
    """One stage as a graph that keeps every promise of `invariants.py`."""
    found, precision = checked.found, checked.precisions[stage]
    module = build(stage, _model(found, checked.pipeline.stg_mode))
    wanted, twins = tuple(module.state_dict()), weights.twins(module)
    table = stages.ltx_video(found.sizes())[stage]
    noise = {block.block: block.scale for block in found.noise_blocks()}
    derived = {**trace.DERIVED, **trace.noise_axes(noise)}
    model = trace.trace(module, table, precision, derived)
    weights.bind(model, found.weights(stage), wanted, twins)
    model.producer_name, model.producer_version = "ltx-export", __version__
    model.ir_version = IR_VERSION
    invariants.check(model, table, precision, derived)
    return Graph(table, precision, model)


def check_graph(proto: onnx.ModelProto) -> None:
    """onnx.checker with full shape inference, on a copy that it can read.

    There, weights are inputs: the checker refuses files with more than one hard link. And bfloat16
    is float16: before opset 22 a Conv has no bfloat16 on paper, though TensorRT runs it.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the graph is wrong.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.initializer[:]
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            bare.graph.input.append(value)
        else:
            bare.graph.initializer.append(tensor)
    wide, half = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16
    for value in (*bare.graph.input, *bare.graph.output):
        if value.type.tensor_type.elem_type == wide:
            value.type.tensor_type.elem_type = half
    for tensor in bare.graph.initializer:
        tensor.data_type = half if tensor.data_type == wide else tensor.data_type
    for node in bare.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == wide:
                attribute.i = half
    onnx.checker.check_model(bare, full_check=True)


def _model(found: Sources, stg_mode: StgMode) -> Model:
    return Model(found.config, found.text_config, stg_mode)


def _save(graph: Graph, folder: Path) -> None:
    proto = ir.to_proto(graph.model)
    del proto.graph.value_info[:]  # of initializers, which say the same themselves
    check_graph(proto)
    (folder / graph.file).write_bytes(proto.SerializeToString(deterministic=True))


def _files(order: Order, found: Sources) -> Iterator[tuple[Header, str]]:
    """The files of weights as they will be in the bundle, and where."""
    yield found.checkpoint, found.checkpoint.path.name
    if "text_encoder" in order.stages:
        for header in found.text_headers:
            yield header, f"{TEXT_FOLDER}/{header.path.name}"


def _check_place(order: Order, found: Sources) -> None:
    place = Path(os.path.realpath(order.out)).parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {order.out}: {place} is not a folder one may write in")
    needed = 0
    for header, _ in _files(order, found):
        if order.weights == "copy" or found.origin(header) is not header:
            needed += max((info.end for info in header.tensors.values()), default=0)
        elif header.path.stat().st_dev != place.stat().st_dev:
            raise UserError(
                f"{header.path} is on another file system than {order.out}, where a hard link "
                "cannot reach; use --weights copy"
            )
    if needed > (free := shutil.disk_usage(place).free):
        raise UserError(f"{order.out} needs {needed:,} bytes, {place} has {free:,} left")


def _place_files(order: Order, checked: Checked, folder: Path) -> None:
    found = checked.found
    (folder / TEXT_FOLDER).mkdir()
    for header, name in _files(order, found):
        if (origin := found.origin(header)) is not header:
            convert.write(origin, header, folder / name)
        elif order.weights == "copy":
            shutil.copyfile(header.path, folder / name)
        else:
            _link(header.path, folder / name)
    shutil.copyfile(found.text_home / "config.json", folder / TEXT_FOLDER / "config.json")
    checked.tokenizer.tokenizer.save(str(folder / TOKENIZER))


def _link(source: Path, target: Path) -> None:
    """To the file behind a model hub's symbolic link."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        raise UserError(
            f"cannot hard-link {source} into the bundle ({error.strerror}); use --weights copy"
        ) from None


def _manifest(order: Order, checked: Checked, graphs: list[Graph]) -> Manifest:
    found, tokenizer = checked.found, checked.tokenizer
    config, checkpoint = found.config, found.checkpoint
    transformer = [name for name in checkpoint.tensors if name.startswith(TRANSFORMER_PREFIX)]
    return Manifest(
        family="ltx_video",
        name=order.name or order.checkpoint.stem,
        model_version=model_version(checkpoint, config.generation),
        precision=sources.precision(transformer, found.weights("transformer"), "transformer"),
        stages={graph.stage.name: graph.entry() for graph in graphs},
        checkpoint=checkpoint.path.name,
        tokenizer=bundle.TokenizerEntry(
            file=TOKENIZER,
            max_length=tokenizer.max_length,
            pad_token_id=tokenizer.pad_token_id,
        ),
        model=bundle.ModelFacts(
            latent_channels=config.vae.latent_channels,
            num_layers=config.transformer.num_layers,
            causal_temporal_positioning=config.transformer.causal_temporal_positioning,
            timestep_conditioning=config.vae.timestep_conditioning,
            stg_mode=checked.pipeline.stg_mode,
            noise_blocks=tuple(
                bundle.NoiseBlock(name=f"noise_{n.block}", maps=n.maps, scale=n.scale)
                for n in found.noise_blocks()
            ),
        ),
        scheduler=checked.pipeline.scheduler,
        allowed_inference_steps=config.allowed_inference_steps,
        defaults=checked.pipeline.defaults,
        toolchain=toolchain(),
    )


def model_version(header: Header, generation: str) -> str:
    """What the file states, else what the layout of its VAE tells: releases share one."""
    for key in ("model_version", "version"):
        if stated := header.metadata.get(key):
            return f"{stated} (stated by the file)"
    releases = "0.9.5 to 0.9.8" if generation == "0.9.5" else generation
    return f"{releases} (by the layout of its VAE)"


def toolchain() -> dict[str, str]:
    """Whatever had a hand in the graphs."""
    packages = ("onnx", "onnx-ir", "onnxscript", "torch", "transformers")
    return {
        "ltx-export": __version__,
        "opset": str(trace.OPSET),
        **{name: version(name) for name in packages},
    }
