"""The export that a user does today: diffusers and torch.onnx.export, weights in memory.

    python benchmarks/peer_export.py transformer --out FOLDER [--layers 2]

The shortest way that works on torch 2.13: a wrapper with tensors only, torch.export first, then
torch.onnx.export of that program. Random bfloat16 weights, all different: equal ones would be
merged. The last line is JSON: the model's weights, and how many keep their name.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from graph_facts import kept

VAE_0_9_5 = MappingProxyType(
    {
        "block_out_channels": (128, 256, 512, 1024, 2048),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "decoder_block_out_channels": (256, 512, 1024),
        "layers_per_block": (4, 6, 6, 2, 2),
        "decoder_layers_per_block": (5, 5, 5, 5),
        "spatio_temporal_scaling": (True,) * 4,
        "decoder_spatio_temporal_scaling": (True,) * 3,
        "decoder_inject_noise": (False,) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "upsample_residual": (True,) * 3,
        "upsample_factor": (2,) * 3,
        "timestep_conditioning": True,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    }
)
"""AutoencoderKLLTXVideo of the 0.9.5 release (diffusers scripts/convert_ltx_to_diffusers.py)."""

BATCH = Dim("batch", max=8)


class TransformerWrapper(nn.Module):
    """Tensors only: frames, height and width as numbers would make the token count a constant."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.m = model

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor,
        video_coords: Tensor,
    ) -> Tensor:
        sample: Tensor = self.m(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            encoder_attention_mask=encoder_attention_mask,
            video_coords=video_coords,
            return_dict=False,
        )[0]
        return sample


class DecoderWrapper(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.m = decoder

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        pixels: Tensor = self.m(latents, timestep)
        return pixels


Feeds = dict[str, Tensor]
Axes = dict[str, dict[int, Any]]


def transformer(layers: int | None) -> tuple[nn.Module, Feeds, Axes]:
    from diffusers import LTXVideoTransformer3DModel

    model = filled(LTXVideoTransformer3DModel, {"num_layers": layers} if layers else {})
    tokens, text = Dim("tokens", min=16, max=65536), Dim("text", min=8, max=1024)
    feeds = {
        "hidden_states": torch.randn(2, 836, 128).bfloat16(),
        "encoder_hidden_states": torch.randn(2, 128, 4096).bfloat16(),
        "timestep": torch.full((2, 1), 500.0),
        "encoder_attention_mask": torch.ones(2, 128).bfloat16(),
        "video_coords": torch.rand(2, 3, 836) * 100,
    }
    axes = {
        "hidden_states": {0: BATCH, 1: tokens},
        "encoder_hidden_states": {0: BATCH, 1: text},
        "timestep": {0: BATCH},
        "encoder_attention_mask": {0: BATCH, 1: text},
        "video_coords": {0: BATCH, 2: tokens},
    }
    return TransformerWrapper(model), feeds, axes


def vae_decoder() -> tuple[nn.Module, Feeds, Axes]:
    """The decoder alone: the encoder, which a user would have loaded too, is never in memory."""
    from diffusers import AutoencoderKLLTXVideo

    model = filled(AutoencoderKLLTXVideo, dict(VAE_0_9_5), part="decoder")
    grid = {2: Dim("frames", max=64), 3: Dim("height", max=128), 4: Dim("width", max=128)}
    feeds = {
        "latents": torch.randn(2, 128, 5, 7, 6).bfloat16(),
        "timestep": torch.full((2,), 0.05).bfloat16(),
    }
    return DecoderWrapper(model), feeds, {"latents": {0: BATCH, **grid}, "timestep": {0: BATCH}}


def filled(kind: Any, sizes: dict[str, Any], part: str = "") -> nn.Module:
    """The model in bfloat16 and no other type on the way: half the memory of casting it."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = kind(**sizes)
    torch.set_default_dtype(torch.float32)
    wanted: nn.Module = model.get_submodule(part).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wanted.parameters():
            parameter.normal_(0, 0.02, generator=generator)
        for buffer in wanted.buffers():
            buffer.fill_(1)
    return wanted.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("transformer", "vae_decoder"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    whole = options.part == "transformer"
    wrapper, feeds, axes = transformer(options.layers) if whole else vae_decoder()
    program = torch.export.export(wrapper, (), kwargs=feeds, dynamic_shapes=axes)
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    if exported is None:
        raise AssertionError("torch.onnx.export returns a program when dynamo is on")
    options.out.mkdir(parents=True)
    path = options.out / f"{options.part}.onnx"
    exported.save(str(path), external_data=True)
    shapes = {name: tuple(t.shape) for name, t in wrapper.get_submodule("m").state_dict().items()}
    result = {"weights": len(shapes), "weights_by_name": kept(path, shapes)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
