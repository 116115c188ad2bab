"""What an LTX-Video checkpoint says it is: sizes, blocks and schedule, from its own metadata.

The file's `config` metadata is JSON with the parts `transformer`, `vae` and `scheduler`. Every key
is either a size read here, or an option for which only one value is implemented, or it is refused.
A file without that metadata is recognised by its tensors.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args

from ltx_ref.checkpoint import CheckpointError, Header

Block = tuple[str, Mapping[str, Any]]
Generation = Literal["0.9", "0.9.1", "0.9.5"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

TRANSFORMER_PREFIX = "model.diffusion_model."
VAE_PREFIX = "vae."

TIME, SPACE = 8, 32
"""Pixels of one latent cell, in all releases: frames, and rows or columns."""

UNUSED = frozenset(
    f"{VAE_PREFIX}per_channel_statistics.{name}"
    for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
)
"""Tensors that released files carry and no model reads."""

Stride = tuple[int, int, int]

STRIDES: Mapping[str, Stride] = MappingProxyType(
    {
        "compress_time": (2, 1, 1),
        "compress_space": (1, 2, 2),
        "compress_all": (2, 2, 2),
    }
)


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    num_attention_heads: int = 32
    attention_head_dim: int = 64
    num_layers: int = 28
    in_channels: int = 128
    out_channels: int = 128
    caption_channels: int = 4096
    cross_attention_dim: int = 2048
    positional_embedding_theta: float = 10000.0
    positional_embedding_max_pos: tuple[float, float, float] = (20, 2048, 2048)
    timestep_scale_multiplier: float = 1000.0
    norm_eps: float = 1e-6
    causal_temporal_positioning: bool = False

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """`decoder_blocks` are in the metadata's order; the decoder applies them last to first."""

    encoder_blocks: tuple[Block, ...]
    decoder_blocks: tuple[Block, ...]
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    patch_size: int = 4
    encoder_base_channels: int = 128
    decoder_base_channels: int = 128
    timestep_conditioning: bool = False
    causal_decoder: bool = False
    spatial_padding_mode: PaddingMode = "zeros"


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Fields of the original `RectifiedFlowScheduler`."""

    num_train_timesteps: int = 1000
    shifting: str | None = None
    base_resolution: int | None = 1024
    target_shift_terminal: float | None = None
    sampler: str = "Uniform"
    shift: float | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    transformer: TransformerConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    allowed_inference_steps: tuple[float, ...] | None = None

    @property
    def generation(self) -> Generation:
        """The first release whose VAE has this layout."""
        names = {name for name, _ in self.vae.encoder_blocks}
        if any(name.endswith("_res") for name in names):
            return "0.9.5"
        return "0.9.1" if self.vae.timestep_conditioning else "0.9"


@dataclass(frozen=True, slots=True)
class NoiseBlock:
    """A decoder block that adds noise: `maps` images, at `scale` times the latent grid's sides."""

    block: int
    maps: int
    scale: int


def multiplier(block: Block) -> int:
    """How many times wider the decoder's block is at its entry than where it leaves."""
    name, options = block
    factor = options.get("multiplier", 2 if name == "res_x_y" else 1)
    return int(factor) if name == "res_x_y" or name.startswith("compress") else 1


def noise_blocks(config: VAEConfig) -> tuple[NoiseBlock, ...]:
    """The decoder blocks that add noise, in the order in which they are applied (VAE 0.9.1)."""
    found, scale = [], 1
    for index, (name, options) in enumerate(reversed(config.decoder_blocks)):
        scale *= STRIDES.get(name, (1, 1, 1))[1]
        if options.get("inject_noise"):
            found.append(NoiseBlock(index, 2 * options["num_layers"], scale))
    return tuple(found)


# Options for which one value is implemented: that of every release. Absent is fine.
TRANSFORMER_FIXED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "activation_fn": ("gelu-approximate",),
        "adaptive_norm": ("single_scale_shift",),
        "attention_bias": (True,),
        "attention_out_bias": (True,),
        "attention_type": ("default",),
        "double_self_attention": (False,),
        "dropout": (0.0,),
        "norm_elementwise_affine": (False,),
        "num_vector_embeds": (None,),
        "only_cross_attention": (False,),
        "patch_size": (1,),
        "patch_size_t": (1,),
        "positional_embedding_type": ("rope",),
        "qk_norm": ("rms_norm",),
        "standardization_norm": ("rms_norm",),
        "upcast_attention": (False,),
        "use_linear_projection": (False,),
    }
)
VAE_FIXED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "dims": (3,),
        "double_z": (True,),
        "latent_log_var": ("uniform",),
        "norm_layer": ("pixel_norm",),
        "normalize_latent_channels": (False,),
        "patch_size_t": (1, None),
        "scaling_factor": (1.0,),
        "use_quant_conv": (False,),
    }
)
CHOICES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "sampler": ("Uniform", "LinearQuadratic", "Constant"),
        "shifting": (None, "SD3", "SimpleDiffusion"),
        "spatial_padding_mode": get_args(PaddingMode),
    }
)
# Keys that change no number: names, versions, and options of layers these models do not have.
SILENT = frozenset(
    {
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
        "ckpt_path",
        "norm_num_groups",
        "num_embeds_ada_norm",
        "project_to_2d_pos",
        "use_tpu_flash_attention",
    }
)
CLASS_NAMES = MappingProxyType(
    {
        "transformer": "Transformer3DModel",
        "vae": "CausalVideoAutoencoder",
        "scheduler": "RectifiedFlowScheduler",
    }
)

_V09_BLOCKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("res_x", {"num_layers": 4}),
    ("compress_all", {}),
    ("res_x_y", {}),
    ("res_x", {"num_layers": 3}),
    ("compress_all", {}),
    ("res_x_y", {}),
    ("res_x", {"num_layers": 3}),
    ("compress_all", {}),
    ("res_x", {"num_layers": 3}),
    ("res_x", {"num_layers": 4}),
)


def _decoder_blocks(layers: tuple[int, ...], noisy: tuple[bool, ...]) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for count, noise in zip(layers, noisy, strict=True):
        if blocks:
            blocks.append(("compress_all", {"residual": True, "multiplier": 2}))
        blocks.append(("res_x", {"num_layers": count, "inject_noise": noise}))
    return tuple(blocks)


VAE_GENERATIONS: Mapping[Generation, VAEConfig] = MappingProxyType(
    {
        "0.9": VAEConfig(_V09_BLOCKS, _V09_BLOCKS),
        "0.9.1": VAEConfig(
            _V09_BLOCKS,
            _decoder_blocks((5, 6, 7, 8), (True, True, True, False)),
            timestep_conditioning=True,
        ),
        "0.9.5": VAEConfig(
            (
                ("res_x", {"num_layers": 4}),
                ("compress_space_res", {"multiplier": 2}),
                ("res_x", {"num_layers": 6}),
                ("compress_time_res", {"multiplier": 2}),
                ("res_x", {"num_layers": 6}),
                ("compress_all_res", {"multiplier": 2}),
                ("res_x", {"num_layers": 2}),
                ("compress_all_res", {"multiplier": 2}),
                ("res_x", {"num_layers": 2}),
            ),
            _decoder_blocks((5, 5, 5, 5), (False,) * 4),
            timestep_conditioning=True,
        ),
    }
)
"""The released VAEs (facts: the files' metadata; diffusers scripts/convert_ltx_to_diffusers.py)."""

SD3_SHIFT = SchedulerConfig(shifting="SD3", base_resolution=None, target_shift_terminal=0.1)
LINEAR_QUADRATIC = SchedulerConfig(sampler="LinearQuadratic")


def read_config(header: Header, ignore: Collection[str] = ()) -> ModelConfig:
    """The checkpoint's configuration, from its metadata or, without that, from its tensors.

    `ignore` names metadata keys to pass over although they are not known.

    Raises:
        CheckpointError: a key or value is not known, or nothing tells the sizes.
    """
    if "config" not in header.metadata:
        return infer_config(header)
    try:
        config = json.loads(header.metadata["config"])
    except (ValueError, RecursionError):
        raise CheckpointError(f"{header.path}: metadata 'config' is not JSON") from None
    try:
        return parse_config(config, ignore)
    except CheckpointError as error:
        raise CheckpointError(f"{header.path}: {error}") from None


def parse_config(config: Any, ignore: Collection[str] = ()) -> ModelConfig:
    """The metadata's JSON object as a ModelConfig.

    Raises:
        CheckpointError: a part is missing, or a key or value is not known.
    """
    parts = {*CLASS_NAMES, "allowed_inference_steps"}
    if not isinstance(config, dict):
        raise CheckpointError("metadata 'config' is not a JSON object")
    for part in config.keys() - parts - set(ignore):
        raise _unknown("config", part, parts)
    for part, class_name in CLASS_NAMES.items():
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"config has no {part!r} object")
        if (found := config[part].get("_class_name", class_name)) != class_name:
            raise CheckpointError(f"config: {part} is a {found}, wanted a {class_name}")
    steps = config.get("allowed_inference_steps")
    transformer = _known(config["transformer"], TransformerConfig, TRANSFORMER_FIXED, ignore)
    transformer["positional_embedding_max_pos"] = tuple(
        transformer.get("positional_embedding_max_pos", (20, 2048, 2048))
    )
    scheduler = _known(config["scheduler"], SchedulerConfig, {}, ignore)
    return ModelConfig(
        TransformerConfig(**transformer),
        _vae(config["vae"], ignore),
        SchedulerConfig(**scheduler),
        None if steps is None else tuple(float(step) for step in steps),
    )


def _known(
    table: Mapping[str, Any],
    cls: type,
    fixed: Mapping[str, tuple[Any, ...]],
    ignore: Collection[str],
) -> dict[str, Any]:
    """The entries that are fields of `cls`; anything else must be a fixed or a silent key."""
    fields: dict[str, Any] = cls.__dataclass_fields__  # type: ignore[attr-defined]
    where = next(part for part, of in _PARTS.items() if of is cls)
    for key, value in table.items():
        if key in ignore or key in SILENT:
            continue
        if key not in fields and key not in fixed:
            raise _unknown(where, key, [*fields, *fixed])
        allowed = fixed.get(key) or CHOICES.get(key)
        if allowed and value not in allowed:
            wanted = " or ".join(repr(choice) for choice in allowed)
            raise CheckpointError(f"config: {where}.{key} is {value!r}, wanted {wanted}")
        if key in fields and not _fits(value, fields[key]):
            kind = type(fields[key].default).__name__
            raise CheckpointError(f"config: {where}.{key} is {value!r}, wanted a value of {kind}")
    return {key: value for key, value in table.items() if key in fields}


def _fits(value: Any, field: Any) -> bool:
    """Whether a JSON value has the kind of the field's default; null defaults take numbers too."""
    default = field.default
    if value is None and NoneType in get_args(field.type):
        return True
    if default is None or default is MISSING:
        return value is None or not isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list) and len(value) == len(default)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


_PARTS: Mapping[str, type] = MappingProxyType(
    {"transformer": TransformerConfig, "vae": VAEConfig, "scheduler": SchedulerConfig}
)


def _unknown(where: str, key: str, known: Collection[str]) -> CheckpointError:
    hint = "".join(f"; did you mean {near!r}?" for near in get_close_matches(key, known, n=1))
    return CheckpointError(
        f"unknown key {key!r} in {where}{hint or '; pass --ignore-config-key if it is harmless'}"
    )


def _vae(table: Mapping[str, Any], ignore: Collection[str]) -> VAEConfig:
    shared = table.get("blocks")
    rest = {key: value for key, value in table.items() if key != "blocks"}
    known = _known(rest, VAEConfig, VAE_FIXED, ignore)
    for side in ("encoder_blocks", "decoder_blocks"):
        blocks = known.get(side, shared)
        if not blocks:
            raise CheckpointError(f"config: vae has neither {side!r} nor 'blocks'")
        known[side] = tuple(_block(entry) for entry in blocks)
    return VAEConfig(**known)


def _block(entry: Any) -> Block:
    """A block is `[name, layers]` or `[name, {option: value}]` in the metadata."""
    try:
        name, options = entry
    except (TypeError, ValueError):
        raise CheckpointError(f"config: vae block {entry!r} is not [name, options]") from None
    if isinstance(options, int):
        options = {"num_layers": options} if name == "res_x" else {}
    return str(name), dict(options)


def infer_config(header: Header) -> ModelConfig:
    """The configuration of a file without metadata, from the shapes of its tensors.

    Raises:
        CheckpointError: the shapes are those of no release.
    """
    shapes = header.shapes()
    try:
        inner_dim, in_channels = shapes[TRANSFORMER_PREFIX + "patchify_proj.weight"]
        out_channels = shapes[TRANSFORMER_PREFIX + "proj_out.weight"][0]
        caption_channels = shapes[TRANSFORMER_PREFIX + "caption_projection.linear_1.weight"][1]
        encoder_channels = shapes[VAE_PREFIX + "encoder.conv_out.conv.weight"][1]
    except (KeyError, ValueError, IndexError):
        raise CheckpointError(
            f"{header.path} has no 'config' metadata and no tensors of LTX-Video; "
            "wanted the original single-file checkpoint (keys model.diffusion_model.*, vae.*)"
        ) from None
    if inner_dim not in (2048, 4096):
        raise CheckpointError(
            f"{header.path} has no 'config' metadata and a width of {inner_dim}; "
            "only the released widths 2048 and 4096 can be recognised by their tensors"
        )
    layers = sum(
        name.startswith(TRANSFORMER_PREFIX + "transformer_blocks.")
        and name.endswith("attn1.to_q.weight")
        for name in shapes
    )
    generation = _generation(shapes, encoder_channels)
    return ModelConfig(
        TransformerConfig(
            attention_head_dim=inner_dim // 32,
            num_layers=layers,
            in_channels=in_channels,
            out_channels=out_channels,
            caption_channels=caption_channels,
            cross_attention_dim=inner_dim,
            causal_temporal_positioning=generation == "0.9.5",
        ),
        VAE_GENERATIONS[generation],
        LINEAR_QUADRATIC if generation == "0.9.5" else SD3_SHIFT,
    )


def _generation(shapes: Mapping[str, tuple[int, ...]], encoder_channels: int) -> Generation:
    if encoder_channels == 2048:
        return "0.9.5"
    timestep = VAE_PREFIX + "decoder.last_time_embedder.timestep_embedder.linear_1.weight"
    return "0.9.1" if timestep in shapes else "0.9"
