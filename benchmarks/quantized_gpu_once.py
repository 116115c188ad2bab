"""One variant of the true transformer on a GPU, in a process of its own: memory and step time.

    python benchmarks/quantized_gpu_once.py VARIANT CHECKPOINT WIDTHxHEIGHTxFRAMES STEPS

VARIANT is bf16, fp8, int8, fp8-cast or diffusers, with or without -compiled. The checkpoint gives
the configuration and, for bf16 and fp8-cast, the way of loading; its weights may be a hole, for
random ones take their place before anything is timed: a GPU computes faster on zeros. The last line
is JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltx_engines.shapes import VideoShape
from ltx_export import quantization_plan, recipes
from ltx_export.calibration import Calibration
from ltx_ref import quantization
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video import model as ltx_video
from ltx_ref.ltx_video.conditioning import LatentGrid, coordinates
from ltx_ref.quantized import QuantizedLinear, install

DEVICE = "cuda"
TEXT_TOKENS = 256
WARM_UP = 2
COMPILED = "-compiled"
"""End of the name of a variant whose model torch.compile has compiled."""
SPREAD = 0.02
"""Standard deviation of random weights."""

Step = Callable[[], Tensor]

KERNELS: set[str] = set()
"""What the quantized layers multiplied with: `fake` would be no measure of a format's speed."""


def main() -> None:
    variant, checkpoint, shape, steps = sys.argv[1:5]
    width, height, frames = map(int, shape.split("x"))
    video = VideoShape(frames, height, width)
    torch.cuda.reset_peak_memory_stats()
    name, compiled = variant.removesuffix(COMPILED), variant.endswith(COMPILED)
    if name == "diffusers":
        step = diffusers(video, compiled=compiled)
    else:
        step = ours(name, Path(checkpoint), video, compiled=compiled)
    loaded, load_peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        seconds = timed(step, int(steps))
    facts = {
        "variant": variant,
        "kernels": sorted(KERNELS),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "loaded": loaded,
        "load_peak": load_peak,
        "step_peak": torch.cuda.max_memory_allocated(),
        "peak": max(load_peak, torch.cuda.max_memory_allocated()),
        "step_s": round(median(seconds), 4),
        "step_s_each": [round(second, 4) for second in seconds],
    }
    print(json.dumps(facts))


def timed(step: Step, steps: int) -> list[float]:
    """Seconds of each step, by the GPU's own clock."""
    for _ in range(WARM_UP):
        out = step()
    if not torch.isfinite(out).all():
        raise AssertionError("the velocity is not finite")
    seconds = []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return seconds


def ours(variant: str, checkpoint: Path, video: VideoShape, *, compiled: bool = False) -> Step:
    """A step of ltx_ref, one branch, random weights."""
    if variant == "bf16":
        model = ltx_video.load(checkpoint, device=DEVICE)
    elif variant == "fp8-cast":
        model = ltx_video.load(checkpoint, device=DEVICE, cast="fp8-cast")
    else:
        model = quantized(variant, checkpoint)
    transformer, config = model.transformer, model.config.transformer
    del model.vae
    randomize(transformer)
    for module in transformer.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(lambda layer, x: KERNELS.add(layer.kernel(x[0])))
    if compiled:
        transformer.compile()
    latents, embeds = inputs(video, config.in_channels, config.caption_channels)
    grid = LatentGrid.of_video(video.frames, video.height, video.width)
    causal = config.causal_temporal_positioning
    coords = coordinates(grid, 30.0, causal=causal).expand(1, -1, -1).to(DEVICE)
    timestep = torch.full((1, 1), 0.7, device=DEVICE)
    mask = torch.ones(1, TEXT_TOKENS, device=DEVICE, dtype=torch.bfloat16)
    keep = torch.ones(config.num_layers, 1, device=DEVICE, dtype=torch.bfloat16)
    return lambda: transformer(latents, coords, timestep, embeds, mask, keep)


def quantized(recipe: str, checkpoint: Path) -> ltx_video.LTXVideo:
    """The model with the layers of the shipped recipe in its format, empty, on the GPU."""
    header = read_header(checkpoint)
    model = ltx_video.skeleton(header)
    shapes = header.shapes()
    paths = quantization_plan.linear_layers(header)
    ones = {path: np.ones(shapes[f"{path}.weight"][1], np.float32) for path in paths}
    wanted = quantization_plan.plan(header, recipes.load(recipe), Calibration(checkpoint, ones, {}))
    install(model, quantization.layers(wanted.target))
    model.model.to(torch.bfloat16).to_empty(device=DEVICE)
    return model


def randomize(model: nn.Module) -> None:
    """Floats as at the start of training; codes of any value that a format has; scales that bring
    both to the same size."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        part = name.rpartition(".")[2]
        if part == "input_scale":
            tensor.fill_(4 / 127 if tensor.numel() else 1)
        elif part == "pre_quant_scale":
            tensor.fill_(1)
        elif part == "weight_scale":
            tensor.fill_(SPREAD / 64)
        elif tensor.dtype == torch.int8:
            tensor.random_(-127, 128, generator=generator)
        elif tensor.dtype == torch.float8_e4m3fn:
            share = 64.0 if f"{name}_scale" in dict(model.named_buffers()) else SPREAD
            for rows in tensor.split(1024):
                wide = torch.empty(rows.shape, device=DEVICE)
                rows.copy_(wide.normal_(generator=generator).mul_(share).clamp_(-448, 448))
        else:
            tensor.normal_(std=SPREAD, generator=generator)


def diffusers(video: VideoShape, *, compiled: bool = False) -> Step:
    """The same step by diffusers, in bfloat16, of the 13B or the 2B model by the checkpoint."""
    from diffusers import LTXVideoTransformer3DModel

    header = read_header(Path(sys.argv[2]))
    config = ltx_video.skeleton(header).config.transformer
    with torch.device("meta"):
        made: Any = LTXVideoTransformer3DModel(  # type: ignore[no-untyped-call]
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            cross_attention_dim=config.cross_attention_dim,
            num_layers=config.num_layers,
            caption_channels=config.caption_channels,
        )
    model: nn.Module = made.to(torch.bfloat16).to_empty(device=DEVICE)
    model.eval().requires_grad_(False)
    randomize(model)
    if compiled:
        model.compile()
    latents, embeds = inputs(video, config.in_channels, config.caption_channels)
    frames, rows, columns = video.latent
    call: dict[str, Any] = {
        "hidden_states": latents,
        "encoder_hidden_states": embeds,
        "timestep": torch.full((1,), 700, device=DEVICE),
        "encoder_attention_mask": torch.ones(1, TEXT_TOKENS, device=DEVICE, dtype=torch.bfloat16),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": (8 / 30, 32, 32),
        "return_dict": False,
    }

    def step() -> Tensor:
        velocity: Tensor = model(**call)[0]
        return velocity

    return step


def inputs(video: VideoShape, channels: int, width: int) -> tuple[Tensor, Tensor]:
    """Latents and a prompt, of standard normals."""
    torch.manual_seed(0)
    kind = {"device": DEVICE, "dtype": torch.bfloat16}
    latents = torch.randn(1, video.tokens, channels, **kind)  # type: ignore[call-overload]
    embeds = torch.randn(1, TEXT_TOKENS, width, **kind)  # type: ignore[call-overload]
    return latents, embeds


if __name__ == "__main__":
    main()
