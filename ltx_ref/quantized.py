"""A linear layer that computes with codes and scales, bit for bit those of a quantized file.

K inputs, N outputs, M rows of activations. Everywhere the codes are multiplied as float32 numbers
("fake quantization"); on a GPU that can, fp8 and int8 codes are multiplied as such. How layers lie
in a file, and what the codes mean, says `ltx_ref.quantization`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx_ref.checkpoint import CheckpointError
from ltx_ref.quantization import CALIBRATED, INT4_BLOCK, NVFP4_BLOCK, PARTS, Format, Layer

Kernel = Literal["weight only", "fake", "scaled_mm by row", "scaled_mm", "int_mm"]
Capability = tuple[int, int]
Cast = Literal["fp8-cast"]
"""Formats that need nothing but the weight itself."""

BLOCKS = "transformer_blocks"
"""The module of a model whose linear layers are those that may be quantized."""

E4M3_MAX, E2M1_MAX, INT8_MAX = 448.0, 6.0, 127.0

SMALLEST = 2.0**-100
"""A unit of zeros, as the quantizer has it: anything above 0."""

NO_NVFP4 = (
    "there is no kernel for them in torch here, so float32 products are made; speed is not measured"
)

ROWS = 4096
"""Activations multiplied at a time: float32 and int32 twins of them are in memory meanwhile."""

INT_MM_ROWS = 32
"""torch._int_mm wants more than 16."""

log = logging.getLogger(__name__)


class QuantizedLinear(nn.Module):
    """In the place of an nn.Linear. Its buffers are named as the file's parts."""

    weight: Tensor
    weight_scale: Tensor | None
    weight_scale_2: Tensor | None
    input_scale: Tensor | None
    pre_quant_scale: Tensor | None

    def __init__(
        self,
        form: Format,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        smoothed: bool = False,
    ) -> None:
        super().__init__()
        self.form, self.in_features, self.out_features = form, in_features, out_features
        parts = _empty(form, out_features, in_features)
        if smoothed:
            parts["pre_quant_scale"] = torch.ones(in_features)
        self.register_buffer("weight", parts.pop("weight"))
        for name in PARTS:
            self.register_buffer(name, parts.get(name))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def of(
        cls, form: Format, parts: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> "QuantizedLinear":
        """The layer with these parts of a file, which it shares."""
        rows, columns = parts["weight"].shape
        inputs = columns * (2 if parts["weight"].dtype == torch.uint8 else 1)
        with torch.device("meta"):
            layer = cls(
                form,
                inputs,
                rows,
                bias=bias is not None,
                smoothed=parts.get("pre_quant_scale") is not None,
            )
        tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
        layer.load_state_dict(tensors | ({} if bias is None else {"bias": bias}), assign=True)
        return layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the element type of x."""
        chosen = self.kernel(x)
        if chosen == "weight only":
            weight = dequantized(self, x.dtype)
            return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        rows = x.reshape(-1, self.in_features)
        out = x.new_empty(len(rows), self.out_features)
        for piece, target in zip(rows.split(ROWS), out.split(ROWS), strict=True):
            target.copy_(PRODUCTS[chosen](self, piece))
        return out.view(*x.shape[:-1], self.out_features)

    def kernel(self, x: Tensor) -> Kernel:
        """What multiplies for this input; that a GPU has to do without its units is said once."""
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
        chosen, reason = choose(
            self.form, x.dtype, (self.out_features, self.in_features), capability
        )
        if reason is not None:
            _warn(f"{self.form} layers of {self.in_features} to {self.out_features}: {reason}")
        return chosen

    def extra_repr(self) -> str:
        return (
            f"{self.form}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, smoothed={self.pre_quant_scale is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Codes and scales go where the module goes, but `to(dtype)` is not for them."""
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


def choose(
    form: Format, dtype: torch.dtype, shape: tuple[int, int], capability: Capability | None
) -> tuple[Kernel, str | None]:
    """What multiplies [M, K] activations of this type by a weight [N, K]; `capability` is None on
    a CPU. And why a GPU's own unit for the format is not it, where that is so."""
    if form not in CALIBRATED:
        return "weight only", None
    if capability is None:
        return "fake", None
    if form == "nvfp4":
        return "fake", NO_NVFP4
    if form == "int8":
        if capability < (7, 5):
            return "fake", _refusal("torch._int_mm", "compute capability 7.5", capability)
        if any(size % 8 for size in shape):
            return "fake", "torch._int_mm wants multiples of 8, so float32 products are made"
        return "int_mm", None
    if capability < (8, 9):
        return "fake", _refusal("torch._scaled_mm", "compute capability 8.9", capability)
    if any(size % 16 for size in shape):
        return "fake", "torch._scaled_mm wants multiples of 16, so float32 products are made"
    # Scales of rows: bfloat16 out only, and not on sm120 (pytorch/pytorch#192707, torch 2.10).
    by_row = dtype == torch.bfloat16 and capability < (10, 0)
    return ("scaled_mm by row" if by_row else "scaled_mm"), None


def _refusal(what: str, wanted: str, capability: Capability) -> str:
    found = ".".join(map(str, capability))
    return f"{what} wants {wanted}, this GPU has {found}, so float32 products are made"


@cache
def _warn(line: str) -> None:
    """Once for each kind of layer, and not at every step."""
    log.warning("%s", line)


def activation_codes(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """[M, K] -> float8_e4m3fn or int8 [M, K].

    Smoothing is in x's own type, as in the ONNX graph; the division is in float32.
    """
    shares = _smoothed(layer, x).float() / _known(layer.input_scale)
    if layer.form == "int8":
        return shares.round_().clamp_(-128, 127).to(torch.int8)
    return shares.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def fake(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """Float32 products of codes; scales and bias come after the sum. [M, K] -> float32 [M, N]."""
    if layer.form == "nvfp4":
        return _plus(
            F.linear(nvfp4_activations(layer, x), dequantized(layer, torch.float32)), layer
        )
    products = F.linear(activation_codes(layer, x).float(), layer.weight.float())
    return _plus(products.mul_(output_scale(layer)), layer)


def int_mm(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """Integer products, of at least INT_MM_ROWS rows: those that are missing are zeros."""
    codes = activation_codes(layer, x)
    padded = F.pad(codes, (0, 0, 0, max(0, INT_MM_ROWS - len(codes))))
    products = torch._int_mm(padded, layer.weight.t())[: len(codes)]
    return _plus(products.float().mul_(output_scale(layer)), layer)


def scaled_mm(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """Products of fp8 codes, float32 out; the scales of the outputs come after it."""
    one = x.new_ones((), dtype=torch.float32)
    products = torch._scaled_mm(
        activation_codes(layer, x),
        layer.weight.t(),
        scale_a=one,
        scale_b=one,
        out_dtype=torch.float32,
    )
    return _plus(products.mul_(output_scale(layer)), layer)


def scaled_mm_by_row(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """Products of fp8 codes with scales and bias in the kernel, bfloat16 out."""
    codes = activation_codes(layer, x)
    return torch._scaled_mm(
        codes,
        layer.weight.t(),
        scale_a=_known(layer.input_scale).repeat(len(codes), 1),
        scale_b=_known(layer.weight_scale)[None],
        bias=None if layer.bias is None else layer.bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
    )


PRODUCTS: Mapping[Kernel, Callable[[QuantizedLinear, Tensor], Tensor]] = {
    "fake": fake,
    "int_mm": int_mm,
    "scaled_mm": scaled_mm,
    "scaled_mm by row": scaled_mm_by_row,
}


def output_scale(layer: QuantizedLinear) -> Tensor:
    """Of each output's sum of products of codes: float32 [N]."""
    return _known(layer.input_scale) * _known(layer.weight_scale)


def dequantized(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """The weight's values [N, K]: products in float32, rounded once."""
    if layer.form == "fp8-cast":
        return layer.weight.to(dtype)
    scale = _known(layer.weight_scale)
    if layer.form == "int4-wo":
        values = _in_blocks(_signed(unpacked(layer.weight)), INT4_BLOCK) * scale[..., None]
        return values.flatten(1).to(dtype)
    if layer.form == "nvfp4":
        units = scale.float() * _known(layer.weight_scale_2)
        values = _in_blocks(e2m1_values(unpacked(layer.weight)), NVFP4_BLOCK) * units[..., None]
        return values.flatten(1).to(dtype)
    return (layer.weight.float() * scale[:, None]).to(dtype)


def nvfp4_activations(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """What is left of float activations: e2m1 codes, a scale for each block of 16; float32."""
    unit = _known(layer.input_scale)
    blocks = _in_blocks(_smoothed(layer, x).float(), NVFP4_BLOCK)
    shares = blocks.abs().amax(dim=-1, keepdim=True) / E2M1_MAX / unit
    scales = shares.clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * unit
    return (to_e2m1(blocks / scales.clamp(min=SMALLEST)) * scales).flatten(1)


def to_e2m1(numbers: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign; ties to the even code."""
    size = numbers.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, numbers)


def unpacked(packed: Tensor) -> Tensor:
    """[N, K/2] bytes -> [N, K] codes of four bits, the lower half of a byte first."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)


def e2m1_values(codes: Tensor) -> Tensor:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=codes.device)
    return torch.cat([values, -values])[codes.int()]


def _signed(codes: Tensor) -> Tensor:
    """Two's complement of four bits, in float32."""
    return ((codes ^ 8).to(torch.int8) - 8).float()


def _in_blocks(numbers: Tensor, size: int) -> Tensor:
    blocks: Tensor = numbers.unflatten(1, (-1, size))
    return blocks


def _smoothed(layer: QuantizedLinear, x: Tensor) -> Tensor:
    return x if layer.pre_quant_scale is None else x * layer.pre_quant_scale.to(x.dtype)


def _plus(sums: Tensor, layer: QuantizedLinear) -> Tensor:
    return sums if layer.bias is None else sums.add_(layer.bias)


def _known(part: Tensor | None) -> Tensor:
    if part is None:
        raise AssertionError("a layer without a part that its format has")
    return part


def _empty(form: Format, n: int, k: int) -> dict[str, Tensor]:
    """The parts of a layer of that format, of the file's types and shapes."""
    e4m3, i8, u8 = torch.float8_e4m3fn, torch.int8, torch.uint8
    one, row = torch.ones(()), torch.ones(n)
    block = INT4_BLOCK if form == "int4-wo" else NVFP4_BLOCK
    if form in {"int4-wo", "nvfp4"} and k % block:
        raise ValueError(f"{form} wants inputs in blocks of {block}, not {k}")
    match form:
        case "fp8-cast":
            return {"weight": torch.zeros(n, k, dtype=e4m3)}
        case "fp8":
            weight = torch.zeros(n, k, dtype=e4m3)
            return {"weight": weight, "weight_scale": row, "input_scale": one}
        case "int8-wo":
            return {"weight": torch.zeros(n, k, dtype=i8), "weight_scale": row}
        case "int8":
            weight = torch.zeros(n, k, dtype=i8)
            return {"weight": weight, "weight_scale": row, "input_scale": one}
        case "int4-wo":
            weight = torch.zeros(n, k // 2, dtype=u8)
            return {"weight": weight, "weight_scale": torch.ones(n, k // block)}
        case "nvfp4":
            weight, blocks = torch.zeros(n, k // 2, dtype=u8), torch.ones(n, k // block).to(e4m3)
            scales = {"weight_scale": blocks, "weight_scale_2": one, "input_scale": one.clone()}
            return {"weight": weight, **scales}


def cast_weight(weight: Tensor, form: Cast, name: str) -> Tensor:
    """The codes of some rows of a float weight of this name, where they are.

    Raises:
        CheckpointError: the format ends before the largest of them, or one is not a number.
    """
    if form != "fp8-cast":
        raise ValueError(f"{form} is no cast")
    if weight.numel() and not weight.is_meta:
        low, high = (float(end) for end in weight.aminmax())  # and no abs(): a copy of the rows
        if not -E4M3_MAX <= low <= high <= E4M3_MAX:
            raise CheckpointError(
                f"{name} reaches {low if -low > high else high:g}, {form} ends at {E4M3_MAX:g}; "
                "quantize it to fp8, or load it without a cast"
            )
    return weight.to(torch.float8_e4m3fn)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that may be quantized, by path: the linear ones of the transformer's blocks."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and BLOCKS in path.split("."):
            yield path, module


def install(model: nn.Module, layers: Mapping[str, Layer], prefix: str = "") -> None:
    """Put quantized layers in the place of linear ones, empty and where those are. `prefix` is
    what the file's paths have before the model's.

    Raises:
        CheckpointError: the model has no linear layer of that shape there; nothing was changed.
    """
    modules = dict(model.named_modules())
    places = {path: _linear(modules, layer, prefix) for path, layer in layers.items()}
    for path, (parent, name, linear) in places.items():
        rows, columns = layers[path].shape
        with linear.weight.device:
            quantized = QuantizedLinear(
                layers[path].format,
                columns,
                rows,
                bias=linear.bias is not None,
                smoothed=layers[path].pre_quant_scale is not None,
            )
        quantized.train(linear.training).requires_grad_(linear.weight.requires_grad)
        parent.register_module(name, quantized)


def _linear(
    modules: Mapping[str, nn.Module], layer: Layer, prefix: str
) -> tuple[nn.Module, str, nn.Linear]:
    """The parent, the name in it, and the layer, of a model's modules by path."""
    path = layer.path.removeprefix(prefix)
    linear = modules.get(path)
    if not layer.path.startswith(prefix) or not isinstance(linear, nn.Linear):
        raise CheckpointError(
            f"{layer.path} is quantized to {layer.format}, and is no linear layer of this model; "
            "quantize the bfloat16 checkpoint again"
        )
    if linear.weight.shape != layer.shape:
        raise CheckpointError(
            f"{layer.path} is {list(layer.shape)}, wanted {list(linear.weight.shape)}; "
            "quantize the bfloat16 checkpoint again"
        )
    parent, _, name = path.rpartition(".")
    return modules[parent], name, linear
