"""LoRAs with random factors, named in each of the styles that are in use."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor

from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX

ATTENTION = "transformer_blocks.0.attn1.to_q"
MODULES = (
    ATTENTION,
    "transformer_blocks.1.attn2.to_out.0",
    "transformer_blocks.1.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2",
    "patchify_proj",
    "adaln_single.linear",
    "caption_projection.linear_1",
)
"""Of one checkpoint, a few linear layers of each kind."""

RENAMED = MappingProxyType({"patchify_proj": "proj_in", "adaln_single": "time_embed"})


def _in_diffusers(module: str) -> str:
    for ours, theirs in RENAMED.items():
        module = module.replace(ours, theirs)
    return module


Naming = Callable[[str], str]
STYLES: Mapping[str, tuple[Naming, str, str]] = MappingProxyType(
    {
        "diffusers": (lambda m: f"transformer.{_in_diffusers(m)}", "lora_A", "lora_B"),
        "diffusers, old": (lambda m: f"transformer.{_in_diffusers(m)}", "lora.down", "lora.up"),
        "PEFT": (lambda m: f"base_model.model.{_in_diffusers(m)}", "lora_A", "lora_B"),
        "ComfyUI": (lambda m: f"diffusion_model.{m}", "lora_A", "lora_B"),
        "ComfyUI, old": (lambda m: f"diffusion_model.{m}", "lora_down", "lora_up"),
        "kohya": (lambda m: f"lora_unet_{m.replace('.', '_')}", "lora_down", "lora_up"),
    }
)
"""Module name, name of A and name of B."""

Factors = Mapping[str, tuple[Tensor, Tensor]]


def factors(shapes: Mapping[str, tuple[int, ...]], rank: int = 3, seed: int = 0) -> Factors:
    """A and B for each of MODULES, as large as the weights of a checkpoint wish them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module in MODULES:
        outputs, inputs = shapes[f"{TRANSFORMER_PREFIX}{module}.weight"]
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        found[module] = down, torch.randn(outputs, rank, generator=generator)
    return found


def tensors(
    given: Factors, style: str = "ComfyUI", alpha: float | None = None
) -> dict[str, Tensor]:
    naming, down, up = STYLES[style]
    named: dict[str, Tensor] = {}
    for module, (a, b) in given.items():
        named |= {f"{naming(module)}.{down}.weight": a, f"{naming(module)}.{up}.weight": b}
        if alpha is not None:
            named[f"{naming(module)}.alpha"] = torch.tensor(alpha)
    return named


def write(path: Path, named: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    unshared = {key: tensor.clone() for key, tensor in named.items()}  # the format shares nothing
    save_file(unshared, path, metadata)
    return path
