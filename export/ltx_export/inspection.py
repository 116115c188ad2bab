"""What a checkpoint is, read from its header alone."""

from collections.abc import Collection, Iterator
from math import prod
from pathlib import Path
from types import MappingProxyType

from ltx_ref.checkpoint import CheckpointError, Header, TensorInfo, read_header
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX, VAE_PREFIX, ModelConfig, read_config

PARTS = MappingProxyType(
    {
        "transformer": TRANSFORMER_PREFIX,
        "vae_encoder": f"{VAE_PREFIX}encoder.",
        "vae_decoder": f"{VAE_PREFIX}decoder.",
        "vae statistics": f"{VAE_PREFIX}per_channel_statistics.",
    }
)


def lines(path: Path, ignore: Collection[str] = ()) -> Iterator[str]:
    """A report, line by line; the parts that need a good configuration come last.

    Raises:
        CheckpointError: not a safetensors file, or its configuration is not understood.
    """
    header = read_header(path)
    yield f"{path}: {path.stat().st_size:,} bytes, {len(header.tensors):,} tensors"
    for key, value in sorted(header.metadata.items()):
        if key != "config":
            yield f"  metadata {key}: {value[:80]}"
    for name, prefix in PARTS.items():
        yield f"  {name}: {_summary(header, prefix)}"
    known = tuple(PARTS.values())
    unknown = sorted(name for name in header.tensors if not name.startswith(known))
    yield f"  tensors of no stage: {len(unknown)}" + "".join(f", {name}" for name in unknown[:5])
    try:
        config = read_config(header, ignore)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (ltx-export onnx needs the configuration)") from None
    yield from _config_lines(header, config)


def _summary(header: Header, prefix: str) -> str:
    tensors = [info for name, info in header.tensors.items() if name.startswith(prefix)]
    if not tensors:
        return "none"
    types = sorted({info.dtype for info in tensors})
    counted = ", ".join(f"{_elements(tensors, dtype):,} {dtype}" for dtype in types)
    return f"{len(tensors):,} tensors, parameters {counted}"


def _elements(tensors: list[TensorInfo], dtype: str) -> int:
    return sum(prod(info.shape) for info in tensors if info.dtype == dtype)


def _config_lines(header: Header, config: ModelConfig) -> Iterator[str]:
    transformer, vae, scheduler = config.transformer, config.vae, config.scheduler
    source = "metadata" if "config" in header.metadata else "shapes of tensors (no metadata)"
    release = "0.9.5 to 0.9.8" if config.generation == "0.9.5" else config.generation
    yield f"  family: ltx_video, VAE of {release}; configuration from its {source}"
    yield (
        f"  transformer: {transformer.num_layers} layers, {transformer.num_attention_heads} heads "
        f"of {transformer.attention_head_dim}, text of width {transformer.caption_channels}, "
        f"causal_temporal_positioning {transformer.causal_temporal_positioning}"
    )
    yield (
        f"  vae: {vae.latent_channels} latent channels, "
        f"timestep_conditioning {vae.timestep_conditioning}"
    )
    yield f"  scheduler: {scheduler.sampler}, shifting {scheduler.shifting}"
    if config.allowed_inference_steps is not None:
        yield f"  distilled for the steps {', '.join(map(str, config.allowed_inference_steps))}"
