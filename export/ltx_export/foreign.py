"""Quantized files of other programs: recognised by their names, explained, and not read."""

from dataclasses import dataclass
from pathlib import Path

from ltx_engines.errors import UserError
from ltx_ref.checkpoint import Header

GGUF = b"GGUF"
"""How llama.cpp's files begin; weights of video models are published in them too."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`ends` are how the names of some of its tensors end, or a key of the metadata is `metadata`.
    Without them its numbers cannot be understood."""

    what: str
    ends: tuple[str, ...] = ()
    metadata: str | None = None


# The first that fits is said: what is particular comes before what many have.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "TurboDiffusion's int8: blocks of 128 x 128 weights share a scale, and activations are "
        "quantized in such blocks at run time, for which ONNX has no operator",
        (".int8_weight",),
    ),
    Layout(
        "bitsandbytes' codes, which are looked up in a table",
        (".absmax", ".quant_map", ".SCB", ".bitsandbytes__nf4", ".bitsandbytes__fp4"),
    ),
    Layout(
        "GPTQ's or AWQ's codes, with zero points, eight in a word",
        (".qweight", ".qzeros", ".g_idx"),
    ),
    Layout(
        "ComfyUI's scaled fp8: a weight is its number times one scale for the tensor",
        (".scale_weight", ".scale_input", "scaled_fp8", ".comfy_quant"),
    ),
    Layout("DeepSeek's fp8: blocks of 128 x 128 weights share a scale", ("_scale_inv",)),
    Layout("q8_kernels' int8: weights rotated by Hadamard matrices before rounding", (".scales",)),
    Layout(
        "scaled fp8 as of LTX-2 or ModelOpt, and not laid out as ltx-export quantize does it",
        (".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale"),
    ),
    Layout("LTX-2's or ComfyUI's scaled fp8", metadata="_quantization_metadata"),
    Layout("a format of Hugging Face's, named in that entry", metadata="quantization_config"),
)


def sentence(header: Header) -> str | None:
    """What a file of another program is, and by what it is known; None if it is none."""
    for layout in LAYOUTS:
        sign = next((name for name in header.tensors if name.endswith(layout.ends)), None)
        if sign is None and layout.metadata in header.metadata:
            sign = f"metadata {layout.metadata}"
        if sign is not None:
            return f"quantized weights with scales ({sign}), {layout.what}"
    return None


def check_gguf(path: Path) -> None:
    """
    Raises:
        UserError: the file is llama.cpp's, whatever its name.
    """
    with path.open("rb") as file:
        if file.read(len(GGUF)) == GGUF:
            raise UserError(
                f"{path} is a GGUF file, whose blocks of codes only llama.cpp's kernels read; "
                "take the original .safetensors"
            )
