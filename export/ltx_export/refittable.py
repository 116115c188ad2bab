"""Engines whose weights can be set when they are loaded: which weights, and where they are built.

Those of linear layers, which is what LoRAs are made for. Codes of eight bits are marked with their
scale, since a LoRA may want another; codes of four bits take none (`ltx_trt/session/lora_weights`).
"""

from pathlib import Path
from typing import Literal

from ltx_engines.errors import UserError
from ltx_export import card

OPTION = "refittable"
"""In the key of such engines."""


def check(engine_weights: Literal["embedded", "inputs"]) -> None:
    """
    Raises:
        UserError: such engines cannot be built here.
    """
    if engine_weights == "inputs":
        raise UserError(
            "--refittable is for engines that hold their weights; leave it out, since those of "
            "--engine-weights inputs take LoRAs anyway"
        )
    # tensorrt-rtx 1.7.1 without a GPU: graph_jit.cpp:278 CHECK(status == CUDA_SUCCESS), as soon as
    # one weight is marked, whatever its type; the flag alone builds.
    if card.at_hand() is None:
        raise UserError(
            "--refittable wants a GPU while it builds, and there is none here; build where it is, "
            "or with --engine-weights inputs, or fuse the LoRA: ltx-export lora FILE:STRENGTH "
            "--checkpoint CHECKPOINT --out FUSED"
        )


def names(graph: Path) -> tuple[str, ...]:
    """Of the weights of a graph, or of a part of it, that are to be settable."""
    import onnx

    found = {
        tensor.name: tensor
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    weights = [
        name
        for name, tensor in found.items()
        if name.endswith(".weight")
        and len(tensor.dims) == 2
        and tensor.data_type not in (onnx.TensorProto.INT4, onnx.TensorProto.FLOAT4E2M1)
    ]
    scales = [f"{name}_scale" for name in weights if f"{name}_scale" in found]
    return (*weights, *scales)
