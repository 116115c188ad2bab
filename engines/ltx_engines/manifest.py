"""What a manifest says: a model's stages, tensors and engines, and the files that hold them."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from ltx_engines.cache_key import Profile
from ltx_engines.defaults import Defaults
from ltx_engines.engine_entry import EngineEntry, TensorEntry
from ltx_engines.errors import nearest
from ltx_engines.file_entry import Count, FileEntry, Frozen
from ltx_engines.providers import Provider
from ltx_engines.shapes import SPACE, TIME
from ltx_engines.stages import FLOAT, OPTIONAL, SAMPLER_STEP, STAGES, STREAM, Tensor

FORMAT_VERSION = 3
OLDEST_VERSION = 1
"""Its manifests say nothing of engines, those of 2 nothing of a second pass; all that they say is
understood."""

Precision = Literal["float32", "float16", "bfloat16"]
QuantizedFormat = Literal["fp8", "int8", "fp8-cast", "int8-wo", "int4-wo", "nvfp4"]
StgMode = Literal["attention_values", "attention_skip", "transformer_block"]


class QuantizationEntry(Frozen):
    """How many linear layers of a stage have which format, by what recipe; None if the file does
    not say."""

    recipe: str | None = None
    layers: dict[QuantizedFormat, Count]


class StageEntry(Frozen):
    """`file` and `weights`, the files that the graph points into, are keys of Manifest.files;
    `domains` are of operators that are not ONNX's own."""

    file: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    weights: tuple[str, ...] = ()
    opset: Count | None = None
    domains: tuple[str, ...] = ()
    quantization: QuantizationEntry | None = None


class OnnxRuntimeEntry(Frozen):
    """The providers of ONNX Runtime that compute a stage's graph, and the sizes for which one that
    builds engines does so (`ltx_engines/providers.py`)."""

    providers: tuple[Provider, ...]
    profiles: tuple[Profile, ...] = ()


class TokenizerEntry(Frozen):
    file: str
    max_length: Count
    pad_token_id: Annotated[int, Field(ge=0)]


class NoiseBlock(Frozen):
    """A noise input of the VAE decoder: `maps` images, `scale` times the latent grid's size."""

    name: str
    maps: Count
    scale: Count


class ModelFacts(Frozen):
    """`stream_delay` is of a decoder that is given a clip a few latent frames at a time: by so many
    frames it is late (`ltx_ref/ltx_video/vae_stream_config.py`)."""

    latent_channels: Count
    num_layers: Count
    causal_temporal_positioning: bool
    timestep_conditioning: bool
    stg_mode: StgMode
    noise_blocks: tuple[NoiseBlock, ...] = ()
    stream_delay: Annotated[int, Field(ge=0)] = 0
    time_compression: Count = TIME
    space_compression: Count = SPACE


class SchedulerFacts(Frozen):
    """The fields of the original RectifiedFlowScheduler, with its defaults."""

    num_train_timesteps: Count = 1000
    shifting: Literal["SD3", "SimpleDiffusion"] | None = None
    base_resolution: Count | None = 32**2  # null in files that shift otherwise
    target_shift_terminal: float | None = None
    sampler: Literal["Uniform", "LinearQuadratic", "Constant"] = "Uniform"
    shift: float | None = None


class Manifest(Frozen):
    """`checkpoint`, `tokenizer.file` and the stages' files are keys of `files`.

    A key is a path inside the bundle or, for weights that stay where they are, an absolute one.
    """

    format_version: int = FORMAT_VERSION
    family: Literal["ltx_video"]
    name: str
    model_version: str
    precision: Precision
    stages: dict[str, StageEntry]
    engines: tuple[EngineEntry, ...] = ()
    onnxruntime: dict[str, OnnxRuntimeEntry] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)
    checkpoint: str
    tokenizer: TokenizerEntry | None = None
    model: ModelFacts
    scheduler: SchedulerFacts
    allowed_inference_steps: tuple[float, ...] | None = None
    defaults: Defaults = Defaults()
    toolchain: dict[str, str] = Field(default_factory=dict)


def tensor_entries(tensors: Iterable[Tensor], precision: Precision) -> tuple[TensorEntry, ...]:
    """The rows of stages.py with FLOAT made concrete."""
    return tuple(
        TensorEntry(name=t.name, dtype=precision if t.dtype == FLOAT else t.dtype, axes=t.axes)
        for t in tensors
    )


def tensors(entries: Iterable[TensorEntry]) -> tuple[Tensor, ...]:
    """Back to the rows that `stages.check_feeds` reads; the element types stay concrete."""
    return tuple(Tensor(entry.name, entry.dtype, entry.axes) for entry in entries)


def loose_end(manifest: Manifest) -> str:
    """What in the manifest points to nothing, or an empty string."""
    named = {"checkpoint": manifest.checkpoint}
    if manifest.tokenizer is not None:
        named["tokenizer.file"] = manifest.tokenizer.file
    for name, stage in manifest.stages.items():
        if name not in (known := (*STAGES, *OPTIONAL, STREAM, SAMPLER_STEP)):
            return f"unknown stage {name!r}{nearest(name, known)}"
        named[f"stages.{name}.file"] = stage.file
        named |= {f"stages.{name}.weights.{i}": file for i, file in enumerate(stage.weights)}
    for index, engine in enumerate(manifest.engines):
        if engine.key.stage not in manifest.stages:
            return f"engines.{index} is of {engine.key.stage!r}, which is not among stages"
        named |= {f"engines.{index}.{k}": getattr(engine, k) for k in ("file", "layers")}
    for name in manifest.onnxruntime:
        if name not in manifest.stages:
            return f"onnxruntime has {name!r}, which is not among stages"
    for where, file in named.items():
        if file not in manifest.files:
            return f"{where} is {file!r}, which is not among files{nearest(file, manifest.files)}"
    return _wrong_engine(manifest)


ENGINE, LAYERS = ".engine", ".layers.json"
"""How the names of an engine and of its table end."""


def _wrong_engine(manifest: Manifest) -> str:
    """What no builder writes of an engine, or an empty string."""
    seen: dict[str, str] = {}
    for index, engine in enumerate(manifest.engines):
        for field, file, end in (("file", engine.file, ENGINE), ("layers", engine.layers, LAYERS)):
            where = f"engines.{index}.{field}"
            if not file.endswith(end):
                return f"{where} is {file!r}, which does not end in {end}"
            if (other := seen.setdefault(file, where)) != where:
                return f"{where} is {file!r}, as {other} is"
        if manifest.files[engine.file].sha256 is None:  # a plan is code: nobody runs it unread
            return f"files.{engine.file} is an engine and has no sha256"
        targets = engine.key.targets
        if not targets or [*targets] != sorted(set(targets)):
            return f"engines.{index}.key.targets are {[*targets]}, wanted some, in order, each once"
    return ""
