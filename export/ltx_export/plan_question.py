"""What a plan is asked: clips, precisions, GPUs, and what they mean for the weights of a stage."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType

from ltx_engines import pipeline_config, presets
from ltx_engines.bundle import Defaults
from ltx_engines.bundle import Precision as FloatType
from ltx_engines.errors import UserError, nearest
from ltx_engines.shapes import VideoShape, parse
from ltx_engines.targets import PRECISIONS, Precision
from ltx_export import pass_shapes
from ltx_export.engine_profiles import check_stream
from ltx_ref.checkpoint import TensorInfo
from ltx_ref.ltx_video.config import ModelConfig
from ltx_ref.quantization import CALIBRATED, Format, Layer
from ltx_ref.text import MAX_LENGTH

FLOATS: Mapping[Precision, FloatType] = MappingProxyType(
    {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
)
OWN: Mapping[str, Precision] = MappingProxyType(
    {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "I8": "int8"}
)
"""Element types of safetensors."""
FLOATING = frozenset({"F32", "F16", "BF16"})

STORED_AS: Mapping[Format, Precision] = MappingProxyType(
    {
        **{"fp8": "fp8", "fp8-cast": "fp8", "int8": "int8", "int8-wo": "int8"},
        **{"int4-wo": "int4", "nvfp4": "nvfp4"},
    }
)
NO_LAYERS: Mapping[str, Layer] = MappingProxyType({})

log = logging.getLogger(__name__)

MOST_BRANCHES = 3
"""The prompt's, and one each for CFG and STG."""


@dataclass(frozen=True, slots=True)
class Question:
    """What the user asked. Shapes are `WxHxF` or `WxHxF..WxHxF`; the largest one counts.

    `precision` is the transformer's; None takes its weights as they are. `rest_precision` is the
    other stages', see `rest`. `branches` are the transformer's passes of one step: the prompt's,
    and one each for CFG and STG. `conditioning` plans for given images, so many of them after
    frame 0: a timestep for each token, and the tokens of these images. `first_steps` are those of a
    pass before, at half the sides, with a latent upsampler between the two. `vae_stream` frames are
    what a decoder is given at a time that goes on where it was.
    """

    shapes: tuple[str, ...] = ("1216x704x121",)
    precision: str | None = None
    rest_precision: str | None = None
    gpus: tuple[str, ...] = ()
    steps: int = 40
    branches: int = MOST_BRANCHES
    text_tokens: int = MAX_LENGTH
    conditioning: int | None = None
    first_steps: int = 0
    vae_stream: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "branches", "text_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"{name.replace('_', ' ')} must be at least 1, not {value}")
        if self.branches > MOST_BRANCHES:
            raise UserError(f"branches must be at most {MOST_BRANCHES}, not {self.branches}")
        if self.vae_stream is not None:
            check_stream(self.vae_stream)

    @property
    def rest(self) -> Precision:
        """Of the other stages: their own option, else the transformer's float type, else bf16.

        Raises:
            UserError: a precision is unknown.
        """
        if self.rest_precision is not None:
            return precision(self.rest_precision)
        wanted = "bf16" if self.precision is None else precision(self.precision)
        return wanted if wanted in FLOATS else "bf16"


@dataclass(frozen=True, slots=True)
class Coded:
    """A weight that is quantized in the file; `bytes` are with its scales."""

    stored: Precision
    computed: Precision
    bytes: int


@dataclass(frozen=True, slots=True)
class Number:
    """How the weights of a stage are stored, and in what its products are computed.

    `coded` are the weights that are quantized in the file already, by name; the other members
    say what most of them are.
    """

    stored: Precision
    computed: Precision
    base: Precision
    coded: Mapping[str, Coded] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        return self.stored not in FLOATS

    @property
    def types(self) -> tuple[Precision, ...]:
        """All in which weights are stored beside `base`, each once."""
        return tuple(dict.fromkeys((self.stored, *(c.stored for c in self.coded.values()))))


def precision(word: str) -> Precision:
    """`fp8`, `bf16`, ..., and the long names of the float types.

    Raises:
        UserError: it is none of them.
    """
    known: dict[str, Precision] = {short: short for short in PRECISIONS}
    known |= {long: short for short, long in FLOATS.items()}
    if word not in known:
        raise UserError(
            f"unknown precision {word!r}{nearest(word, known)}; known are {', '.join(PRECISIONS)}"
        )
    return known[word]


def largest(words: Sequence[str]) -> VideoShape:
    """The clip with most tokens, of shapes and of ranges of shapes.

    Raises:
        UserError: one is not a shape, or not one that the model can make.
    """
    ends = [end for word in words for end in word.split("..")]
    return max((parse(end) for end in ends), key=lambda shape: shape.tokens)


def number(
    stage: str,
    question: Question,
    tensors: Mapping[str, TensorInfo],
    layers: Mapping[str, Layer] = NO_LAYERS,
) -> Number:
    """What the question makes of a stage's weights; `layers` are quantized in the file, by the
    names of their weights.

    Raises:
        UserError: its precision is unknown, or not one for this stage or this file.
    """
    word = question.precision if stage == "transformer" else question.rest
    if layers and word is None:
        return _as_filed(tensors, layers)
    if own := {layer.format for layer in layers.values()} - {"fp8-cast"}:
        raise UserError(
            f"the {stage} is quantized already ({', '.join(sorted(own))}); leave out --precision, "
            "or plan the bfloat16 checkpoint"
        )
    stored = own_precision(stage, tensors) if word is None else precision(word)
    if stage != "transformer" and stored not in FLOATS:
        known = ", ".join(FLOATS)
        raise UserError(f"{stage} cannot be {stored}; give --rest-precision one of {known}")
    base = stored if stored in FLOATS else "bf16"
    # Small weights without scales of activations are made large again before they are multiplied.
    alone = word is None or stored == "int4"
    return Number(stored, base if alone else stored, base)


def _as_filed(tensors: Mapping[str, TensorInfo], layers: Mapping[str, Layer]) -> Number:
    floats = {name: info for name, info in tensors.items() if info.dtype in FLOATING}
    base = own_precision("", floats) if floats else "bf16"
    coded = {name: _coded(layer, base) for name, layer in layers.items()}
    sizes: dict[Coded, int] = {}
    for name, found in coded.items():
        kind = replace(found, bytes=0)
        sizes[kind] = sizes.get(kind, 0) + prod(layers[name].shape)
    most = max(sizes, key=lambda kind: sizes[kind])
    return Number(most.stored, most.computed, base, coded)


def _coded(layer: Layer, base: Precision) -> Coded:
    stored = STORED_AS[layer.format]
    parts = (layer.weight, *(info for _, info in layer.parts()))
    size = sum(info.end - info.begin for info in parts)
    return Coded(stored, stored if layer.format in CALIBRATED else base, size)


def own_precision(stage: str, tensors: Mapping[str, TensorInfo]) -> Precision:
    """That of most of the weights' elements."""
    counts: dict[str, int] = {}
    for info in tensors.values():
        counts[info.dtype] = counts.get(info.dtype, 0) + prod(info.shape)
    most = max(counts, key=lambda dtype: counts[dtype])
    if most not in OWN:
        raise UserError(f"the weights of {stage} are {most}; say their --precision")
    return OWN[most]


def float_type(
    stage: str,
    question: Question,
    tensors: Mapping[str, TensorInfo],
    layers: Mapping[str, Layer] = NO_LAYERS,
) -> FloatType:
    """The element type that a stage's graph must have for this question."""
    return FLOATS[number(stage, question, tensors, layers).base]


def by_preset(question: Question, name: str, config: ModelConfig) -> Question:
    """The question for a run by a preset: its steps, its branches, and its larger pass.

    Raises:
        UserError: there is no such preset, or it is for another model.
    """
    preset = presets.find(name)
    told = pipeline_config.load(presets.named(name))
    distilled, layers = config.allowed_inference_steps is not None, config.transformer.num_layers
    for note in presets.fit(preset.release, told.title(), layers, distilled=distilled):
        log.warning("%s", note)
    defaults = pipeline_config.over(Defaults(), told)
    branches = max(wanted.branches() for wanted in defaults.passes)
    *first, steps = preset.steps
    shapes = question.shapes
    if first:
        shapes = pass_shapes.of_passes(shapes, defaults.downscale_factor, [pass_shapes.SECOND])
    return replace(question, shapes=shapes, steps=steps, branches=branches, first_steps=sum(first))


def usual(config: ModelConfig) -> tuple[int, int]:
    """Steps and branches when nobody says otherwise: a distilled model needs no guidance."""
    if config.allowed_inference_steps is not None:
        return len(config.allowed_inference_steps), 1
    return Defaults().num_inference_steps, MOST_BRANCHES
