"""Small checkpoints with random weights, laid out and described as the released ones are."""

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, processors
from transformers import T5Config, T5EncoderModel

from ltx_ref.ltx_video.config import parse_config
from ltx_ref.ltx_video.model import LTXVideo
from tests.ref.oracles import randomize

LATENT_CHANNELS, CAPTION_CHANNELS, LAYERS, WORDS = 12, 24, 2, 48

# The layouts of the three releases with a few residual blocks, not 18 to 26: tracing takes seconds.
UP = ["compress_all", {"residual": True, "multiplier": 2}]
SHARED_BLOCKS: list[Any] = [
    ["compress_all", 1],
    ["res_x_y", 1],
    ["compress_all", 1],
    ["res_x_y", 1],
    ["compress_all", 1],
    ["res_x", {"num_layers": 1}],
]
VAES: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "0.9": {"blocks": SHARED_BLOCKS},
        "0.9.1": {
            "encoder_blocks": SHARED_BLOCKS,
            "decoder_blocks": [
                ["res_x", {"num_layers": 1, "inject_noise": False}],
                UP,
                ["res_x", {"num_layers": 2, "inject_noise": True}],
                UP,
                UP,
                ["res_x", {"num_layers": 1, "inject_noise": True}],
            ],
            "timestep_conditioning": True,
        },
        "0.9.5": {
            "encoder_blocks": [
                ["compress_space_res", {"multiplier": 2}],
                ["compress_time_res", {"multiplier": 2}],
                ["compress_all_res", {"multiplier": 2}],
                ["compress_all_res", {"multiplier": 2}],
            ],
            "decoder_blocks": [["res_x", {"num_layers": 1}], UP, UP, UP],
            "timestep_conditioning": True,
        },
    }
)


def config(generation: str) -> dict[str, Any]:
    """The metadata's `config`. A width of 40 leaves 4 channels that the rotary table skips."""
    return {
        "transformer": {
            "_class_name": "Transformer3DModel",
            "num_attention_heads": 2,
            "attention_head_dim": 20,
            "num_layers": LAYERS,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "caption_channels": CAPTION_CHANNELS,
            "cross_attention_dim": 40,
            "causal_temporal_positioning": generation == "0.9.5",
            "qk_norm": "rms_norm",
        },
        "vae": {
            "_class_name": "CausalVideoAutoencoder",
            "latent_channels": LATENT_CHANNELS,
            "encoder_base_channels": 8,
            "decoder_base_channels": 8,
            **VAES[generation],
        },
        "scheduler": {"_class_name": "RectifiedFlowScheduler", "sampler": "LinearQuadratic"},
    }


def write_checkpoint(
    path: Path,
    table: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> Path:
    tensors = checkpoint_tensors(table, dtype)
    save_file(tensors, path, {"config": json.dumps(table), **(metadata or {})})
    return path


def checkpoint_tensors(table: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """With one of the tensors that released files carry and no model reads."""
    with torch.device("meta"):
        model = LTXVideo(parse_config(table))
    randomize(model, seed=3)
    unused = {"vae.per_channel_statistics.channel": torch.arange(LATENT_CHANNELS)}
    return {name: tensor.to(dtype) for name, tensor in (model.state_dict() | unused).items()}


def write_text_encoder(
    folder: Path,
    *,
    width: int = CAPTION_CHANNELS,
    shards: int = 1,
    embedding: str = "shared.weight",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A T5 encoder of two layers and its tokenizer, as a model hub lays them out."""
    folder.mkdir(parents=True)
    settings = T5Config(
        vocab_size=WORDS,
        d_model=width,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_max_distance=16,
    )
    with torch.device("meta"):
        model = T5EncoderModel(settings)
    randomize(model, seed=4)
    tensors = {name: t.to(dtype) for name, t in model.state_dict().items()}
    table = tensors.pop("shared.weight")
    tensors["encoder.embed_tokens.weight"] = table
    tensors[embedding] = tensors.pop("encoder.embed_tokens.weight")
    (folder / "config.json").write_text(json.dumps(settings.to_dict()), encoding="utf-8")
    _write_shards(folder, tensors, shards)
    write_tokenizer(folder / "tokenizer.json")
    return folder


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for index in range(shards):
        name = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[index::shards]}
        save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    table = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table), encoding="utf-8")


def write_tokenizer(path: Path) -> Path:
    """One token for each letter, and </s> at the end."""
    letters = [(letter, -2.0) for letter in " abcdefghijklmnopqrstuvwxyz"]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(path))
    return path
