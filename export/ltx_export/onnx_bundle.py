"""A bundle of ONNX graphs: what is checked first, then made, then written in one piece."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir as ir
from platformdirs import user_cache_dir

from ltx_engines import bundle, file_lock, hashes, stages
from ltx_engines.bundle import Hashing, Manifest, StageEntry
from ltx_engines.errors import UserError
from ltx_export import (
    __version__,
    derive,
    invariants,
    lora_fit,
    lower,
    onnxruntime_graph,
    pipeline_defaults,
    quantized_stage,
    sources,
    weight_cache,
    weights,
)
from ltx_export.graphs import Graphs
from ltx_export.onnx_order import Opset as Opset
from ltx_export.onnx_order import Order as Order
from ltx_export.onnx_order import check_apart
from ltx_export.pipeline_defaults import Pipeline
from ltx_export.sources import TEXT_FOLDER, TOKENIZER, Derived, Sources
from ltx_ref import lora
from ltx_ref.checkpoint import Header
from ltx_ref.ltx_video import vae_stream_config
from ltx_ref.ltx_video.config import noise_blocks
from ltx_ref.text import PromptTokenizer

IR_VERSION = 10
"""Of the ONNX file format: the newest that the runtimes of 2024 read."""

OPSET = {"float32": 20, "float16": 20, "bfloat16": 23}
"""Unless the user chooses: ONNX Runtime's CPU has no bfloat16, TensorRT wants it."""
BUILDERS_OPSET = {**OPSET, "float16": 23}
"""For float32 no builder has a kernel of attention."""


@dataclass(frozen=True, slots=True)
class Checked:
    """Everything that was read, and found to fit together. Precisions are by stage."""

    found: Sources
    stages: tuple[str, ...]
    pipeline: Pipeline
    tokenizer: PromptTokenizer | None
    precisions: Mapping[str, bundle.Precision]
    graphs: Graphs
    opset: Opset | None = None
    opsets: Mapping[str, int] = field(default_factory=lambda: OPSET)
    fuses: bool = False
    """Attention becomes ONNX Runtime's operator."""

    def opset_of(self, stage: str) -> int:
        return self.opset or self.opsets[self.precisions[stage]]


@dataclass(frozen=True, slots=True)
class Graph:
    """A stage with its weights bound, ready to be written."""

    stage: stages.Stage
    precision: bundle.Precision
    model: ir.Model
    files: tuple[str, ...]
    """Where its weights are."""
    quantization: bundle.QuantizationEntry | None = None

    @property
    def file(self) -> str:
        return f"{self.stage.name}.onnx"

    @property
    def opset(self) -> int:
        return self.model.graph.opset_imports[""]

    def entry(self) -> StageEntry:
        return StageEntry(
            file=self.file,
            inputs=bundle.tensor_entries(self.stage.inputs, self.precision),
            outputs=bundle.tensor_entries(self.stage.outputs, self.precision),
            weights=self.files,
            opset=self.opset,
            domains=tuple(sorted(name for name in self.model.graph.opset_imports if name)),
            quantization=self.quantization,
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
    out, overwrite = order.out, order.overwrite
    with file_lock.building(out), bundle.create(out, overwrite=overwrite) as folder:
        graphs = []
        for stage in checked.stages:
            how = "" if checked.graphs.has_template(stage) else " (tracing the reference)"
            yield f"graph of {stage}{how}"
            graphs.append(export(stage, checked))
        for graph in graphs:
            _save(graph, folder)
        known: dict[str, str] = {}
        yield from _place_files(order, checked, folder, known)
        yield "sealing"
        files = {file for graph in graphs for file in graph.files}
        bundle.seal(
            folder,
            _manifest(order, checked, graphs),
            elsewhere={file for file in files if Path(file).is_absolute()}
            | _elsewhere(checked.found),
            hashing=Hashing(known, order.hash_everything),
        )
    for key, sha256 in known.items():  # written a moment ago: nobody need read them again
        hashes.remember(order.out / key, sha256, Path(user_cache_dir("ltx-trt")))


def check(order: Order) -> Checked:
    """Everything that can be known to be wrong before the first graph is made."""
    found = sources.read(
        order.checkpoint, order.text_encoder, order.upsampler, order.ignore_config_keys
    )
    chosen = order.stages or (
        *stages.STAGES,
        stages.STREAM,
        *(stages.OPTIONAL if order.upsampler else ()),
    )
    _check_options(order, chosen)
    pipeline = pipeline_defaults.read(order.pipeline_config, found.config, order.stg_mode, chosen)
    graphs = Graphs(found.model(pipeline.stg_mode))
    sources.check_fit(found, chosen, graphs)
    adapters = lora_fit.read(lora.parse(order.loras), found.checkpoint) if order.loras else ()
    if order.precision is not None or adapters:
        read = frozenset(name for stage in chosen for name in graphs.weights(stage))
        found = found.derived(Derived(order.precision, adapters, read))
    if order.weights == "refer":
        found = found.staying()
        _check_folders(found, chosen)
    words = None if found.text is None else sources.tokenizer(found.text, pipeline.max_length)
    precisions = {stage: sources.precision(found, stage, graphs.weights(stage)) for stage in chosen}
    _check_opset(order, precisions)
    _check_names(found, chosen)
    _check_place(order, found, chosen)
    opsets = BUILDERS_OPSET if order.reader == "builder" else OPSET
    fuses = order.reader == "onnxruntime-gpu"
    return Checked(found, chosen, pipeline, words, precisions, graphs, order.opset, opsets, fuses)


def export(stage: str, checked: Checked) -> Graph:
    """One stage as a graph that keeps every promise of `invariants.py`."""
    found, precision, opset = checked.found, checked.precisions[stage], checked.opset_of(stage)
    table, derived = checked.graphs.model.table(stage), checked.graphs.model.derived()
    model = checked.graphs.graph(stage, precision, opset)
    quantized = quantized_stage.apply(model, stage, found, checked.graphs.weights(stage))
    if checked.fuses and opset == lower.OPSET:
        onnxruntime_graph.fuse_attention(model, onnxruntime_graph.FLOATS)
    files = weights.bind(model, found.weights(stage))
    if lost := weights.missing(checked.graphs.weights(stage), model):
        raise AssertionError(f"{stage}: {lost[0]} is not a weight of the graph")
    model.producer_name, model.producer_version = "ltx-export", __version__
    model.ir_version = IR_VERSION
    invariants.check(model, table, precision, derived)
    return Graph(table, precision, model, files, quantized)


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


def _save(graph: Graph, folder: Path) -> None:
    proto = ir.to_proto(graph.model)
    del proto.graph.value_info[:]  # of initializers, which say the same themselves
    check_graph(proto)
    (folder / graph.file).write_bytes(proto.SerializeToString(deterministic=True))


def _check_options(order: Order, chosen: tuple[str, ...]) -> None:
    if order.upsampler is not None and "latent_upsampler" not in chosen:
        raise UserError(
            "--upsampler has no effect without the stage latent_upsampler; add it to --stages"
        )
    if order.name is not None and not order.name.strip():
        raise UserError("--name is empty; leave it out for the file's own name")


def _check_names(found: Sources, chosen: tuple[str, ...]) -> None:
    """No two files of the bundle have one name, and each name is one that a manifest may have."""
    taken = {bundle.MANIFEST: "the manifest", f"{TEXT_FOLDER}/config.json": "a configuration"}
    taken |= {TOKENIZER: "the tokenizer", **{f"{s}.onnx": f"the graph of {s}" for s in chosen}}
    for header in _files(found, chosen):
        key = found.key(header)
        if not key.isprintable() or "\\" in key:
            raise UserError(f"{header.path}: a file of that name cannot be in a bundle; rename it")
        if taken.setdefault(key, str(header.path)) != str(header.path):
            raise UserError(
                f"{header.path} and {taken[key]} would both be {key} in the bundle; rename one"
            )


def _files(found: Sources, chosen: tuple[str, ...]) -> Iterator[Header]:
    """The files of weights; the checkpoint's always, for it is the bundle's."""
    yield found.checkpoint
    for stage in chosen:
        for header in found.headers(stage):
            if header is not found.checkpoint:
                yield header


def _elsewhere(found: Sources) -> set[str]:
    """The checkpoint, if it stays where it is, even when no stage of it was asked for."""
    key = found.key(found.checkpoint)
    return {key} if Path(key).is_absolute() else set()


def _check_opset(order: Order, precisions: Mapping[str, bundle.Precision]) -> None:
    for stage, precision in precisions.items():
        if order.opset == 20 and precision == "bfloat16" and stage in CONVOLVES:
            raise UserError(
                f"opset 20 has no bfloat16 convolution, which the stage {stage} needs; "
                "choose --opset 23, or --precision float32"
            )


def _check_folders(found: Sources, chosen: tuple[str, ...]) -> None:
    """A runtime maps the weights of a stage from one folder."""
    for stage in chosen:
        keys = [found.key(header) for header in found.headers(stage)]
        if len({os.path.dirname(key) for key in keys}) > 1:
            raise UserError(
                f"the stage {stage} has weights in {' and '.join(keys)}, which --weights refer "
                "wants in one folder; use --weights link or copy"
            )


CONVOLVES = frozenset({"vae_encoder", "vae_decoder", stages.STREAM, "latent_upsampler"})


def _check_place(order: Order, found: Sources, chosen: tuple[str, ...]) -> None:
    place = Path(os.path.realpath(order.out)).parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {order.out}: {place} is not a folder one may write in")
    _check_survives(order, found, chosen)
    needed = 0
    for header in _files(found, chosen):
        if order.weights == "copy" or header.path in found.derivations:
            needed += derive.size(header)
        elif order.weights == "link" and header.path.stat().st_dev != place.stat().st_dev:
            raise UserError(
                f"{header.path} is on another file system than {order.out}, where a hard link "
                "cannot reach; use --weights copy, or --weights refer to leave it there"
            )
    if needed > (free := shutil.disk_usage(place).free):
        raise UserError(f"{order.out} needs {needed:,} bytes, {place} has {free:,} left")


def _check_survives(order: Order, found: Sources, chosen: tuple[str, ...]) -> None:
    """What lies in the folder that is replaced is gone, but for what is put where it was."""
    place = Path(os.path.realpath(order.out))
    kept = [found.key(h) for h in _files(found, chosen) if h.path not in found.derivations]
    names = (*(key for key in kept if not os.path.isabs(key)), f"{TEXT_FOLDER}/config.json")
    check_apart(order.out, order.read_by(), {place / name for name in names})


def _place_files(
    order: Order, checked: Checked, folder: Path, known: dict[str, str]
) -> Iterator[str]:
    """Put everything but the graphs where the manifest says; `known` gets the hashes on the way."""
    found = checked.found
    if found.text is not None:
        (folder / TEXT_FOLDER).mkdir()
        shutil.copyfile(found.text.home / "config.json", folder / TEXT_FOLDER / "config.json")
    if checked.tokenizer is not None:
        checked.tokenizer.tokenizer.save(str(folder / TOKENIZER))
    for header in _files(found, checked.stages):
        key = found.key(header)
        if (wanted := found.derivations.get(header.path)) is not None:
            work = weight_cache.place(wanted, folder / key)
            known[key] = yield from derive.percents(work, f"writing {header.path.name}")
        elif order.weights == "copy":
            yield f"copying {header.path.name}"
            shutil.copyfile(header.path, folder / key)
        elif order.weights == "link":
            _link(header.path, folder / key)


def _link(source: Path, target: Path) -> None:
    """To the file behind a model hub's symbolic link."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        raise UserError(
            f"cannot hard-link {source} into the bundle ({error.strerror}); use --weights copy"
        ) from None


def _manifest(order: Order, checked: Checked, graphs: list[Graph]) -> Manifest:
    found, config = checked.found, checked.found.config
    return Manifest(
        family="ltx_video",
        name=order.name or order.checkpoint.stem,
        model_version=model_version(found.checkpoint, config.generation),
        precision=_precision(checked),
        stages={graph.stage.name: graph.entry() for graph in graphs},
        checkpoint=found.key(found.checkpoint),
        tokenizer=_tokenizer(checked.tokenizer),
        model=bundle.ModelFacts(
            latent_channels=config.vae.latent_channels,
            num_layers=config.transformer.num_layers,
            causal_temporal_positioning=config.transformer.causal_temporal_positioning,
            timestep_conditioning=config.vae.timestep_conditioning,
            stg_mode=checked.pipeline.stg_mode,
            noise_blocks=tuple(
                bundle.NoiseBlock(name=f"noise_{n.block}", maps=n.maps, scale=n.scale)
                for n in noise_blocks(config.vae)
            ),
            stream_delay=vae_stream_config.delay(config.vae),
        ),
        scheduler=checked.pipeline.scheduler,
        allowed_inference_steps=config.allowed_inference_steps,
        defaults=checked.pipeline.defaults,
        toolchain=toolchain(checked, graphs),
    )


def _tokenizer(words: PromptTokenizer | None) -> bundle.TokenizerEntry | None:
    if words is None:
        return None
    return bundle.TokenizerEntry(
        file=TOKENIZER, max_length=words.max_length, pad_token_id=words.pad_token_id
    )


def _precision(checked: Checked) -> bundle.Precision:
    """The transformer's, or if it was not asked for, that of the first stage."""
    return checked.precisions.get("transformer", checked.precisions[checked.stages[0]])


def model_version(header: Header, generation: str) -> str:
    """What the file states, else what the layout of its VAE tells: releases share one."""
    for key in ("model_version", "version"):
        if stated := header.metadata.get(key):
            return f"{stated} (stated by the file)"
    releases = "0.9.5 to 0.9.8" if generation == "0.9.5" else generation
    return f"{releases} (by the layout of its VAE)"


def toolchain(checked: Checked, graphs: Sequence[Graph]) -> dict[str, str]:
    """Whatever had a hand in the graphs."""
    opsets = sorted({graph.opset for graph in graphs})
    shipped = all(map(checked.graphs.has_template, checked.stages))
    tracing = () if shipped else ("onnxscript", "torch", "transformers")
    found = {"ltx-export": __version__, "opset": ", ".join(map(str, opsets))}
    for name in ("onnx", "onnx-ir", *tracing):
        found[name] = version(name)
    return found
