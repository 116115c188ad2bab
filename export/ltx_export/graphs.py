"""The graph of a stage, for any model: from a shipped template in a second, else traced with torch.

Either way its weights are initializers with the checkpoint's names and no values yet.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir

from ltx_engines.bundle import Precision, StgMode
from ltx_engines.errors import UserError
from ltx_engines.stages import STREAM, Kept, NoiseInput, Sizes, Stage, Upsampling, ltx_video
from ltx_export import element_types, lower, stamp, templates
from ltx_export.axes import DERIVED, Derived, noise_axes
from ltx_ref.ltx_video.config import Block, ModelConfig, TransformerConfig, VAEConfig, noise_blocks
from ltx_ref.ltx_video.upsampler_config import UpsamplerConfig
from ltx_ref.ltx_video.vae_stream_config import states
from ltx_ref.text import EMBED, SHARED, TextConfig

OPSETS = (20, 23)
"""20 for ONNX Runtime's CPU, 23 for TensorRT: Attention and RMSNormalization are operators."""

BLOCKS: Mapping[str, str] = MappingProxyType(
    {
        "text_encoder": "encoder.block",
        "transformer": "model.diffusion_model.transformer_blocks",
    }
)
"""Where a stage has identical blocks in a row."""

TRACING = ("onnxscript", "torch", "transformers")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """What the stages are built from."""

    config: ModelConfig
    text: TextConfig = field(default_factory=TextConfig)
    stg_mode: StgMode = "attention_values"
    upsampler: UpsamplerConfig | None = None

    def layers(self, stage: str) -> int:
        """How many identical blocks the stage has; 0 if it has none in a row."""
        layers = {"transformer": self.config.transformer.num_layers}
        return (layers | {"text_encoder": self.text.num_layers}).get(stage, 0)

    def with_layers(self, layers: int) -> "Model":
        transformer = replace(self.config.transformer, num_layers=layers)
        config = replace(self.config, transformer=transformer)
        return replace(self, config=config, text=replace(self.text, num_layers=layers))

    def table(self, stage: str) -> Stage:
        """The stage's tensors."""
        transformer, vae, upsampler = self.config.transformer, self.config.vae, self.upsampler
        sizes = Sizes(
            transformer.in_channels,
            transformer.out_channels,
            transformer.caption_channels,
            transformer.num_layers,
            vae.latent_channels,
            vae.timestep_conditioning,
            tuple(NoiseInput(block.block, block.maps) for block in noise_blocks(vae)),
            tuple(Kept(state.channels, state.scale) for state in states(vae)),
            None
            if upsampler is None
            else Upsampling(upsampler.spatial_upsample, upsampler.temporal_upsample),
        )
        return ltx_video(sizes)[stage]

    def derived(self) -> dict[str, Derived]:
        """The axes that follow others."""
        noise = {block.block: block.scale for block in noise_blocks(self.config.vae)}
        return {**DERIVED, **noise_axes(noise)}


class Graphs:
    """The stages of one model; what was traced is traced once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._traced: dict[str, onnx.ModelProto] = {}

    def graph(self, stage: str, precision: Precision, opset: int) -> ir.Model:
        """The stage as a graph without weights, named, typed and shaped as the stage table says."""
        model = templates.from_proto(self._template(stage))
        element_types.settle(model, precision)
        if opset == lower.OPSET:
            lower.lower(model)
        if self._is_stamped(stage):
            stamp.stamp(model, BLOCKS[stage], self.model.layers(stage))
        table = self.model.table(stage)
        for tensor, value in zip(table.inputs, model.graph.inputs, strict=True):
            value.shape = ir.Shape(tensor.axes)  # the number of blocks is one of them
        return model

    def weights(self, stage: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the stage's weights, without tracing."""
        proto = self._traced.get(stage) or templates.find(stage, self.facts(stage))
        if proto is None:
            return self._module_weights(stage)
        found = {
            tensor.name: tuple(tensor.dims)
            for tensor in proto.graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        }
        last = f"{BLOCKS.get(stage)}.{stamp.TRACED - 1}."
        block = {name: shape for name, shape in found.items() if name.startswith(last)}
        for layer in range(stamp.TRACED, self.model.layers(stage)):
            prefix = f"{BLOCKS[stage]}.{layer}."
            found |= {prefix + name.removeprefix(last): s for name, s in block.items()}
        return found

    def has_template(self, stage: str) -> bool:
        return templates.find(stage, self.facts(stage)) is not None

    def _template(self, stage: str) -> onnx.ModelProto:
        if stage not in self._traced:
            shipped = templates.find(stage, self.facts(stage))
            self._traced[stage] = self._trace(stage) if shipped is None else shipped
        return self._traced[stage]

    def _trace(self, stage: str) -> onnx.ModelProto:
        _check_torch(stage)
        log.info("%s: no template for this configuration, tracing the reference", stage)
        return templates.to_proto(traced(stage, self.smallest(stage)))

    def facts(self, stage: str) -> dict[str, Any]:
        return facts(stage, self.model) | (
            {} if self._is_stamped(stage) else {"num_layers": self.model.layers(stage)}
        )

    def _is_stamped(self, stage: str) -> bool:
        return self.model.layers(stage) >= stamp.TRACED

    def smallest(self, stage: str) -> Model:
        return self.model.with_layers(stamp.TRACED) if self._is_stamped(stage) else self.model

    def _module_weights(self, stage: str) -> dict[str, tuple[int, ...]]:
        _check_torch(stage)
        from ltx_export.stage_modules import build

        state = build(stage, self.model).state_dict()
        return {name: tuple(t.shape) for name, t in state.items() if name != EMBED}


def traced(stage: str, model: Model) -> ir.Model:
    """The reference as a graph, by torch."""
    from ltx_export.stage_modules import build
    from ltx_export.trace import trace

    graph = trace(build(stage, model), model.table(stage), model.derived())
    twin = graph.graph.initializers.get(EMBED)
    if twin is not None and stage == "text_encoder":
        twin.name = SHARED
    return graph


def facts(stage: str, model: Model) -> dict[str, Any]:
    """All that decides the graph of a stage, but for the number of its identical blocks."""
    transformer, vae = model.config.transformer, model.config.vae
    if stage == "text_encoder":
        return _table(model.text, {"num_layers"})
    if stage == "transformer":
        unread = {"num_layers", "causal_temporal_positioning"}
        return _table(transformer, unread) | {"stg_mode": model.stg_mode}
    decoder = {"decoder_blocks", "out_channels", "decoder_base_channels"}
    decoder |= {"timestep_conditioning", "causal_decoder"}
    encoder = {"encoder_blocks", "in_channels", "encoder_base_channels"}
    if stage == "vae_encoder":
        return _table(vae, decoder)
    if stage in ("vae_decoder", STREAM):
        return _table(vae, encoder)
    if stage == "latent_upsampler" and model.upsampler is not None:
        return _table(model.upsampler, set())
    raise ValueError(f"no stage {stage!r}")


def _table(
    config: TextConfig | TransformerConfig | VAEConfig | UpsamplerConfig, without: set[str]
) -> dict[str, Any]:
    """A configuration as JSON, the same for values that mean the same."""
    table = {}
    for entry in fields(config):
        value = asdict(config)[entry.name]
        if entry.name.endswith("_blocks"):
            value = [_block(block) for block in value]
        elif isinstance(value, tuple):
            value = [float(number) for number in value]
        elif isinstance(entry.default, float):
            value = float(value)
        table[entry.name] = value
    return {name: value for name, value in table.items() if name not in without}


def _block(block: Block) -> list[Any]:
    """An option that is off is as good as none."""
    name, options = block
    return [name, {key: value for key, value in sorted(options.items()) if value}]


def _check_torch(stage: str) -> None:
    if missing := [package for package in TRACING if find_spec(package) is None]:
        raise UserError(
            f"this {stage} is none of the released ones, whose graphs are shipped; to trace it, "
            f"{', '.join(missing)} must be installed: pip install 'ltx-trt[trace]'"
        )
