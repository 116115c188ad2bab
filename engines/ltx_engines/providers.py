"""ONNX Runtime's providers by name, and which graphs each of them computes.

    cpu            float32 and float16 at opset 20 or 21; int8 as unsigned codes
    cuda           the same floats, with attention in one node where build-engine made the graph;
                   of quantized weights those that are widened before a product
    tensorrt-rtx   builds an engine of the graph when a session opens: what build-engine takes,
                   also ONNX Runtime's own attention (in one kernel: TensorRT-RTX 1.7.1, 2026-11)

Source of CUDA's gaps: ONNX Runtime's list of kernels and its issues 25740, 27873, 28476, 28768: no
bfloat16 for Conv and for some of the rest, no product of fp8 codes, none of int8 codes.
"""

from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from ltx_engines.manifest import StageEntry

Provider = Literal["cpu", "cuda", "tensorrt-rtx"]

PROVIDERS: tuple[Provider, ...] = get_args(Provider)

NAMES = MappingProxyType(
    {
        "cpu": "CPUExecutionProvider",
        "cuda": "CUDAExecutionProvider",
        "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    }
)
"""What ONNX Runtime calls them."""

NEWEST = 21
"""The last opset without Attention, which no kernel of ours computes with a mask of the text
(onnxruntime 1.31: `inconsistent q_sequence_length`)."""

BUILDERS = 23
"""The opset whose quantized graphs a builder takes."""

ATTENDS = frozenset({"text_encoder", "transformer"})
"""Stages that have attention with a mask."""

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

NOT_ON_CUDA = frozenset({"fp8", "fp8-cast", "int8", "nvfp4"})


def refusal(provider: Provider, stage: str, entry: "StageEntry") -> str | None:
    """Why it cannot compute the stage, and what to do; None if it can."""
    formats = () if entry.quantization is None else tuple(entry.quantization.layers)
    floats = {tensor.dtype for tensor in (*entry.inputs, *entry.outputs)}
    if provider == "tensorrt-rtx":
        return _builder(stage, entry, formats)
    if provider == "cpu" and MICROSOFT in entry.domains and "float16" in floats:
        return (
            f"stage {stage} is float16 with ONNX Runtime's own attention, which its CPU has in "
            "float32 alone; export it again: ltx-export onnx --precision float32"
        )
    if "bfloat16" in floats:
        return (
            f"stage {stage} is bfloat16, for which ONNX Runtime's {provider} provider lacks "
            "kernels; export it again: ltx-export onnx --precision float16, or float32"
        )
    if stage in ATTENDS and (entry.opset or NEWEST) > NEWEST:
        return (
            f"stage {stage} is at opset {entry.opset}, whose Attention ONNX Runtime's {provider} "
            "provider does not compute with a mask of the text; export it again: ltx-export onnx "
            "--opset 20"
        )
    if provider == "cuda" and (found := sorted(NOT_ON_CUDA & set(formats))):
        return (
            f"stage {stage} is {', '.join(found)}, whose products ONNX Runtime has not for CUDA; "
            "take the checkpoint that is not quantized, with --precision float16, or int8-wo"
        )
    if "nvfp4" in formats:
        return (
            f"stage {stage} is nvfp4, which only TensorRT computes, on SM120; quantize to int8 for "
            "ONNX Runtime: ltx-export quantize --recipe int8"
        )
    return None


def _builder(stage: str, entry: "StageEntry", formats: tuple[str, ...]) -> str | None:
    outputs = {tensor.dtype for tensor in entry.outputs}
    if formats and (entry.opset or BUILDERS) < BUILDERS:
        return (
            f"stage {stage} is quantized for ONNX Runtime's CPU (opset {entry.opset}); export it "
            f"again for TensorRT-RTX: ltx-export onnx --opset {BUILDERS}"
        )
    if stage in ATTENDS and (entry.opset or NEWEST) > NEWEST and "float32" in outputs:
        return (
            f"stage {stage} is float32, for which TensorRT-RTX has no attention kernel; export it "
            "again: ltx-export onnx --opset 20, or --precision bfloat16"
        )
    return None


def possible(stage: str, entry: "StageEntry") -> tuple[Provider, ...]:
    """Those that compute the stage."""
    return tuple(p for p in PROVIDERS if refusal(p, stage, entry) is None)
