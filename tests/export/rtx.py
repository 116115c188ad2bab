"""TensorRT-RTX as a reader of graphs: it knows every operator, type and shape, without a GPU."""

from pathlib import Path

import tensorrt_rtx as trt

NAMES = {
    trt.DataType.BF16: "bfloat16",
    trt.DataType.HALF: "float16",
    trt.DataType.FLOAT: "float32",
    trt.DataType.INT64: "int64",
}


def parse(path: Path) -> dict[str, str]:
    """The network's inputs and outputs, and the element types that the parser gave them."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [
        f"{parser.get_error(i).node_name()}: {parser.get_error(i).desc()}"
        for i in range(parser.num_errors)
    ]
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    return {tensor.name: NAMES[tensor.dtype] for tensor in tensors}
