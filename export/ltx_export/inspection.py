"""What weights are, read from their headers alone: a checkpoint, a text encoder, an upscaler.

A path may be a safetensors file, the index of a sharded one (`*.safetensors.index.json`), or the
folder of a text encoder.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType

from ltx_export import convert, foreign
from ltx_ref import quantization, text
from ltx_ref.checkpoint import CheckpointError, Header, TensorInfo, read_header
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX, VAE_PREFIX, ModelConfig, read_config
from ltx_ref.ltx_video.upsampler_config import read_upsampler_config

PARTS = MappingProxyType(
    {
        "transformer": TRANSFORMER_PREFIX,
        "vae_encoder": f"{VAE_PREFIX}encoder.",
        "vae_decoder": f"{VAE_PREFIX}decoder.",
        "vae statistics": f"{VAE_PREFIX}per_channel_statistics.",
    }
)

LARGEST = 10
"""Tensors that are listed when nobody asks for all."""

INDEX = ".index.json"
T5 = (text.SHARED, "encoder.")
"""How the names in a text encoder's file begin; a checkpoint's all have a prefix before that."""
UPSAMPLER = "initial_conv.weight"
"""A tensor that only a latent upsampler's file has: its names have no prefix."""


def lines(path: Path, ignore: Collection[str] = (), tensors: int | None = LARGEST) -> Iterator[str]:
    """A report, line by line, with the largest `tensors`, or all for None.

    The parts that need a good configuration come last.

    Raises:
        CheckpointError: not a safetensors file, or its configuration is not understood.
    """
    headers = _headers(path)
    yield from _file_lines(path, headers)
    whole = _joined(path, headers)
    yield from _tensor_lines(whole, tensors)
    if path.is_dir():
        yield from _text_lines(text.encoder_folder(path), whole)
    elif any(name.startswith(T5) for name in whole.tensors):
        yield from _text_lines(text.encoder_folder(path.parent), whole)
    elif UPSAMPLER in whole.tensors:
        yield from _upsampler_lines(whole, ignore)
    else:
        yield from _checkpoint_lines(whole, ignore)


def _headers(path: Path) -> tuple[Header, ...]:
    """
    Raises:
        CheckpointError: a file is damaged, or a shard is missing.
    """
    if path.is_dir():
        if not any(_weights(path)) and not any(_weights(path / "text_encoder")):
            raise CheckpointError(
                f"{path} is neither a bundle (no manifest.json) nor a text encoder (no "
                "model.safetensors, no index of shards)"
            )
        return text.weight_headers(text.encoder_folder(path))
    if path.name.endswith(INDEX):
        return _shards(path)
    foreign.check_gguf(path)
    return (read_header(path),)


def _weights(home: Path) -> Iterator[Path]:
    """Also those that are refused."""
    yield from (file for file in home.glob("*") if file.suffix == ".bin" or _is_text(file))


def _is_text(file: Path) -> bool:
    return file.name in ("model.safetensors", f"model.safetensors{INDEX}")


def _shards(index: Path) -> tuple[Header, ...]:
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        files = sorted({str(file) for file in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} has no weight_map; download it again") from None
    for file in files:
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names {file}, which is not there; download it again")
    return tuple(read_header(index.parent / file) for file in files)


def _joined(path: Path, headers: Sequence[Header]) -> Header:
    """All shards as if they were one file."""
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    return Header(path, tensors, metadata)


def _file_lines(path: Path, headers: Sequence[Header]) -> Iterator[str]:
    size = sum(header.path.stat().st_size for header in headers)
    count = sum(len(header.tensors) for header in headers)
    files = f" in {len(headers)} files" if len(headers) > 1 else ""
    yield f"{path}: {size:,} bytes{files}, {count:,} tensors"
    for header in headers:
        if len(headers) > 1:
            yield f"  {header.path.name}: {len(header.tensors):,} tensors"
    metadata = _joined(path, headers).metadata
    for key, value in sorted(metadata.items()):
        if key not in {"config", quantization.METADATA}:
            yield f"  metadata {key}: {value[:80]}"
    kind = convert.kind(_joined(path, headers))
    yield f"  weights: {kind.name}, {kind.sentence}"


def _tensor_lines(header: Header, count: int | None) -> Iterator[str]:
    by_size = sorted(
        header.tensors.items(), key=lambda item: (item[1].begin - item[1].end, item[0])
    )
    listed = by_size[:count]
    what = "all tensors" if len(listed) == len(by_size) else f"the {len(listed)} largest tensors"
    yield f"  {what}:"
    for name, info in listed:
        yield f"    {info.end - info.begin:>13,} bytes {info.dtype} {list(info.shape)} {name}"


def _checkpoint_lines(header: Header, ignore: Collection[str]) -> Iterator[str]:
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
    kind = convert.kind(header)
    layers = quantization.layers(header) if kind.is_read else {}
    counts = Counter(layer.format for path, layer in layers.items() if path.startswith(prefix))
    formats = "".join(f", {n:,} linear layers in {form}" for form, n in counts.most_common())
    return f"{len(tensors):,} tensors, parameters {_counted(tensors)}{formats}"


def _counted(tensors: Sequence[TensorInfo]) -> str:
    """Elements by type."""
    counts: Counter[str] = Counter()
    for info in tensors:
        counts[info.dtype] += prod(info.shape)
    return ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(counts.items()))


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


def _text_lines(home: Path, header: Header) -> Iterator[str]:
    config = text.read_text_config(home)
    yield f"  text_encoder: parameters {_counted(list(header.tensors.values()))}"
    yield (
        f"  family: t5, {config.num_layers} layers, {config.num_heads} heads of {config.d_kv}, "
        f"width {config.d_model}, {config.vocab_size:,} words"
    )


def _upsampler_lines(header: Header, ignore: Collection[str]) -> Iterator[str]:
    config = read_upsampler_config(header, ignore)
    frames, rows, _ = config.stride
    doubled = " and ".join(
        what for what, factor in (("frames", frames), ("rows and columns", rows)) if factor > 1
    )
    yield f"  latent_upsampler: parameters {_counted(list(header.tensors.values()))}"
    yield (
        f"  family: ltx_video, latent upsampler that doubles {doubled}; {config.in_channels} "
        f"latent channels, {config.mid_channels} inside, "
        f"{config.num_blocks_per_stage} blocks on either side"
    )
