"""What the released checkpoints are: their sizes, metadata and tensors, known without a weight.

Layouts are read off the modules on the meta device; only the configurations are written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ltx_engines.errors import UserError
from ltx_ref.checkpoint import BITS
from ltx_ref.ltx_video.config import (
    TRANSFORMER_PREFIX,
    UNUSED,
    VAE_GENERATIONS,
    VAEConfig,
    parse_config,
)
from ltx_ref.ltx_video.upsampler_config import (
    CLASS_NAME,
    SPATIAL,
    TEMPORAL,
    UpsamplerConfig,
    parse_upsampler_config,
)

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, ...]

SHARDS = 2
"""Files of the text encoder, as in PixArt-alpha/PixArt-XL-2-1024-MS."""


class Model(StrEnum):
    small = "2b"
    large = "13b"
    t5_xxl = "t5-xxl"
    spatial = "spatial-upscaler"
    temporal = "temporal-upscaler"


class Dtype(StrEnum):
    bf16 = "bf16"
    f16 = "f16"
    f32 = "f32"
    fp8 = "fp8"


class Vae(StrEnum):
    first = "0.9"
    second = "0.9.1"
    third = "0.9.5"


TYPES = MappingProxyType({"bf16": "BF16", "f16": "F16", "f32": "F32", "fp8": "BF16"})
"""safetensors' names of the element types; fp8 files are bfloat16 but for the blocks' matrices."""

TRANSFORMERS: Mapping[Model, dict[str, int]] = MappingProxyType(
    {
        Model.small: {"num_layers": 28, "attention_head_dim": 64, "cross_attention_dim": 2048},
        Model.large: {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
    }
)
"""What differs between the two sizes (facts/ltx_video.md 1.1)."""

# ltx_video/utils/diffusers_config_mapping.py of the original, less its diffusers version.
TRANSFORMER: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "Transformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_type": "default",
        "caption_channels": 4096,
        "double_self_attention": False,
        "dropout": 0.0,
        "in_channels": 128,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "num_attention_heads": 32,
        "num_embeds_ada_norm": 1000,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "out_channels": 128,
        "upcast_attention": False,
        "use_linear_projection": False,
        "qk_norm": "rms_norm",
        "standardization_norm": "rms_norm",
        "positional_embedding_type": "rope",
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "timestep_scale_multiplier": 1000,
    }
)
VAE: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 128,
        "scaling_factor": 1.0,
        "norm_layer": "pixel_norm",
        "patch_size": 4,
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": False,
    }
)
SD3 = {"shifting": "SD3", "target_shift_terminal": 0.1, "base_resolution": None}
LINEAR_QUADRATIC = {"sampler": "LinearQuadratic"}

DISTILLED = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219)
"""Timesteps of the distilled releases (configs/ltxv-*-distilled.yaml, both passes)."""

UPSCALERS: Mapping[Model, UpsamplerConfig] = MappingProxyType(
    {Model.spatial: SPATIAL, Model.temporal: TEMPORAL}
)
T5_XXL: Mapping[str, Any] = MappingProxyType(
    {
        "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0,
        "d_ff": 10240,
        "d_kv": 64,
        "d_model": 4096,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": 24,
        "num_heads": 64,
        "num_layers": 24,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 32128,
    }
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for; `layers` and `vae` are those of the release where None."""

    model: Model
    dtype: Dtype = Dtype.bf16
    layers: int | None = None
    vae: Vae | None = None
    distilled: bool = False

    def __post_init__(self) -> None:
        video = self.model in TRANSFORMERS
        for option, given in (("--vae", self.vae), ("--distilled", self.distilled)):
            if given and not video:
                raise UserError(f"{option} is of 2b and 13b, {self.model} has none; leave it out")
        if self.dtype is Dtype.fp8 and not video:
            raise UserError(f"--dtype fp8 is of 2b and 13b; for {self.model} take bf16")
        if self.layers is not None and self.model in UPSCALERS:
            raise UserError(f"{self.model} has no layers to choose; leave out --layers")
        if self.layers is not None and self.layers < 1:
            raise UserError(f"--layers is {self.layers}, wanted 1 or more")


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class File:
    """One safetensors file. The tensors lie in the order in which they are listed."""

    name: str
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def head(self) -> bytes:
        """The length and the JSON header, padded so that the data begin at a multiple of eight."""
        table: dict[str, Any] = {"__metadata__": dict(self.metadata)}
        begin = 0
        for tensor in self.tensors:
            offsets = [begin, begin + tensor.nbytes]
            table[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": offsets,
            }
            begin += tensor.nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def video_config(wish: Wish) -> dict[str, Any]:
    """The metadata's `config` of a single-file checkpoint."""
    generation = wish.vae or Vae.third
    newest = generation is Vae.third
    sizes = TRANSFORMERS[wish.model] | ({"num_layers": wish.layers} if wish.layers else {})
    scheduler = LINEAR_QUADRATIC if newest else SD3
    config = {
        "transformer": {**TRANSFORMER, **sizes, "causal_temporal_positioning": newest},
        "vae": {**VAE, **_blocks(generation)},
        "scheduler": {
            "_class_name": "RectifiedFlowScheduler",
            "num_train_timesteps": 1000,
            **scheduler,
        },
    }
    return config | ({"allowed_inference_steps": list(DISTILLED)} if wish.distilled else {})


def _blocks(generation: Vae) -> dict[str, Any]:
    """The first release spells its one list of blocks with counts, the later ones with options."""
    vae: VAEConfig = VAE_GENERATIONS[generation.value]
    if generation is Vae.first:
        return {"blocks": [[name, o.get("num_layers", 1)] for name, o in vae.encoder_blocks]}
    return {
        "encoder_blocks": [[name, dict(options)] for name, options in vae.encoder_blocks],
        "decoder_blocks": [[name, dict(options)] for name, options in vae.decoder_blocks],
        "timestep_conditioning": vae.timestep_conditioning,
        "spatial_padding_mode": vae.spatial_padding_mode,
    }


def upscaler_config(wish: Wish) -> dict[str, Any]:
    return {"_class_name": CLASS_NAME, **asdict(UPSCALERS[wish.model])}


def t5_config(wish: Wish) -> dict[str, Any]:
    return {**T5_XXL, **({"num_layers": wish.layers} if wish.layers else {})}


def files(wish: Wish) -> tuple[File, ...]:
    """What is to be written, known from the models' modules without a single weight."""
    if wish.model is Model.t5_xxl:
        return _t5_files(wish)
    config = video_config(wish) if wish.model in TRANSFORMERS else upscaler_config(wish)
    shapes = _video_shapes(config) if wish.model in TRANSFORMERS else _upscaler_shapes(config)
    tensors = (Tensor(name, element_type(wish.dtype, name, s), s) for name, s in shapes.items())
    # As safetensors itself sorts: wide elements first, so that each tensor is aligned.
    ordered = sorted(tensors, key=lambda tensor: (-BITS[tensor.dtype], tensor.name))
    metadata = {"config": json.dumps(config), "format": "pt"}
    return (File("", tuple(ordered), metadata),)


def element_type(dtype: Dtype, name: str, shape: Shape) -> str:
    """The published fp8 files hold a plain cast of the blocks' matrices and nothing else in fp8."""
    matrix = len(shape) == 2 and name.endswith(".weight")
    if dtype is Dtype.fp8 and matrix and name.startswith(f"{TRANSFORMER_PREFIX}transformer_blocks"):
        return "F8_E4M3"
    return TYPES[dtype]


def _video_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """With the tensors that released files carry and no model reads."""
    import torch

    from ltx_ref.ltx_video.model import LTXVideo

    with torch.device("meta"):
        model = LTXVideo(parse_config(config))
    unused = dict.fromkeys(sorted(UNUSED), (config["vae"]["latent_channels"],))
    return _shapes(model) | unused


def _upscaler_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    import torch

    from ltx_ref.ltx_video.upsampler import LatentUpsampler

    with torch.device("meta"):
        return _shapes(LatentUpsampler(parse_upsampler_config(config)))


def _t5_files(wish: Wish) -> tuple[File, ...]:
    """Shards of equal size, in the model's order; the embedding is in them once."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from ltx_ref.text import EMBED

    with torch.device("meta"):
        shapes = _shapes(T5EncoderModel(T5Config.from_dict(t5_config(wish))))
    tensors = [Tensor(n, TYPES[wish.dtype], s) for n, s in shapes.items() if n != EMBED]
    total, before = sum(tensor.nbytes for tensor in tensors), 0
    shards: list[list[Tensor]] = [[] for _ in range(SHARDS)]
    for tensor in tensors:
        shards[before * SHARDS // total].append(tensor)
        before += tensor.nbytes
    return tuple(
        File(f"model-{i:05}-of-{SHARDS:05}.safetensors", tuple(shard), {"format": "pt"})
        for i, shard in enumerate(shards, 1)
    )


def _shapes(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
