"""TensorRT-RTX as a reader of graphs: it knows every operator, type and shape, without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import tensorrt_rtx as trt

from ltx_ref.checkpoint import read_header

NAMES = {
    trt.DataType.BF16: "bfloat16",
    trt.DataType.HALF: "float16",
    trt.DataType.FLOAT: "float32",
    trt.DataType.INT64: "int64",
}
Borders = dict[str, str]
"""The network's inputs and outputs, and the element types that the parser gave them."""


def parse(path: Path) -> Borders:
    """The graph in the file, with its weights where it says they are."""
    with _parser() as (network, parser):
        return _borders(network, parser, parser.parse_from_file(str(path)))


def parse_with(path: Path, weights: Path) -> Borders:
    """The graph in the file, with the weights of that name handed over from a mapped file."""
    proto = onnx.load(path, load_external_data=False)
    mapped, header = np.memmap(weights, mode="r"), read_header(weights)
    with _parser() as (network, parser):
        assert parser.load_model_proto(path.read_bytes())
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                info = header.tensors[tensor.name]
                at = mapped.ctypes.data + info.begin
                assert parser.load_initializer(tensor.name, at, info.end - info.begin)
        return _borders(network, parser, parser.parse_model_proto())


@contextmanager
def _parser() -> Iterator[tuple[trt.INetworkDefinition, trt.OnnxParser]]:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    yield network, trt.OnnxParser(network, logger)


def _borders(network: trt.INetworkDefinition, parser: trt.OnnxParser, read: bool) -> Borders:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    assert read, [f"{error.node_name()}: {error.desc()}" for error in errors]
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    return {tensor.name: NAMES[tensor.dtype] for tensor in tensors}
