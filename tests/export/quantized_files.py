"""Quantized checkpoints of ltx-tiny's blocks, with ranges that are made up, and their formulas."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ltx_ref import codes
from ltx_ref.checkpoint import read_header
from ltx_ref.quantization import CALIBRATED, Format

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny/ltx-tiny.safetensors"
BLOCKS = "model.diffusion_model.transformer_blocks."

Choose = Callable[[str], Format | None]
Array = NDArray[Any]


def write(
    path: Path,
    choose: Choose | Format,
    *,
    dtype: torch.dtype = torch.float32,
    smooth: bool = False,
    source: Path = TINY,
    amax: Mapping[str, float] | float = 6.0,
    blocks: int | None = None,
) -> Path:
    """The checkpoint in this type, but for the blocks' linear layers that are chosen; or its first
    blocks."""
    tensors: dict[str, Tensor] = {}
    with safe_open(source, "pt") as file:
        metadata = _shortened(file.metadata(), blocks)
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if blocks is not None and _block(name) >= blocks:
                continue
            layer, tensor = name.removesuffix(".weight"), file.get_tensor(name)
            form = _chosen(choose, layer) if is_linear(name, tuple(tensor.shape)) else None
            if form is None:
                tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            else:
                limit = amax if isinstance(amax, float) else amax[layer]
                parts = encoded(tensor.float().numpy(), form, limit, smooth=smooth)
                tensors |= {f"{layer}.{part}": as_tensor(array) for part, array in parts.items()}
    save_file(tensors, path, metadata)
    return path


def _shortened(metadata: dict[str, str], blocks: int | None) -> dict[str, str]:
    config = json.loads(metadata["config"])
    if blocks is not None:
        config["transformer"]["num_layers"] = blocks
    return metadata | {"config": json.dumps(config)}


def _block(name: str) -> int:
    return int(name.removeprefix(BLOCKS).partition(".")[0]) if name.startswith(BLOCKS) else -1


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith(BLOCKS) and name.endswith(".weight") and len(shape) == 2


def _chosen(choose: Choose | Format, layer: str) -> Format | None:
    return choose if isinstance(choose, str) else choose(layer)


def encoded(weight: Array, form: Format, amax: float, *, smooth: bool = False) -> dict[str, Array]:
    """The parts of a layer whose activations reach `amax`."""
    reached = np.full(weight.shape[1], amax, np.float32)
    pre = (2.0 ** (np.arange(weight.shape[1]) % 3 - 1)).astype(np.float32) if smooth else None
    return codes.layer(weight, form, input_amax=reached if form in CALIBRATED else None, pre=pre)


def as_tensor(array: Array) -> Tensor:
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(np.array(array).view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.array(array))


def read(path: Path) -> dict[str, Array]:
    """Every tensor of a file; scales and weights as numbers, codes of four bits packed."""
    header, found = read_header(path), {}
    data = np.memmap(path, mode="r")
    kinds = {"F32": np.float32, "I8": np.int8, "U8": np.uint8, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    for name, info in header.tensors.items():
        if info.dtype in kinds:
            piece = np.array(data[info.begin : info.end])
            found[name] = piece.view(kinds[info.dtype]).reshape(info.shape)
    return found


def weight_of(parts: Mapping[str, Array], form: Format) -> NDArray[np.float64]:
    """What the codes of a layer stand for, in float64; smoothing is left in."""
    weight = parts["weight"]
    if form == "fp8-cast":
        return weight.astype(np.float64)
    scale = parts["weight_scale"].astype(np.float64)
    if form in ("fp8", "int8", "int8-wo"):
        return weight.astype(np.float64) * scale[:, None]
    kind = ml_dtypes.int4 if form == "int4-wo" else ml_dtypes.float4_e2m1fn
    halves = np.stack([weight & 0xF, weight >> 4], axis=-1).reshape(len(weight), -1)
    numbers = halves.astype(np.uint8).view(kind).astype(np.float64)
    if form == "int4-wo":
        numbers = np.where(halves > 7, halves.astype(np.float64) - 16, halves)
    blocks = numbers.reshape(len(weight), scale.shape[1], -1) * scale[..., None]
    second = float(parts["weight_scale_2"]) if form == "nvfp4" else 1.0
    wide: NDArray[np.float64] = blocks.reshape(len(weight), -1) * second
    return wide


def input_of(x: Array, parts: Mapping[str, Array], form: Format) -> NDArray[np.float64]:
    """What the codes of activations stand for. The division is in float32, as it is everywhere."""
    if form not in ("fp8", "int8"):
        return x.astype(np.float64)
    scale = parts["input_scale"]
    shares = x.astype(np.float32) * parts.get("pre_quant_scale", np.float32(1)) / scale
    if form == "int8":
        rounded = np.clip(np.rint(shares), -128, 127).astype(np.float64)
    else:
        rounded = np.clip(shares, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return rounded * float(scale)


def parts_of(tensors: Mapping[str, Array], layer: str) -> dict[str, Array]:
    prefix = f"{layer}."
    names = {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}
    return {name: array for name, array in names.items() if "." not in name and name != "bias"}
