"""Which files a graph reads its weights from, found without the onnx package.

A bundle may leave its weights in a folder that has other files too. Before a graph is given that
folder, it must be known that it reads only the files that the manifest lists.
Source of the numbers: onnx/onnx.proto; of the encoding: protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

MODEL_GRAPH, MODEL_FUNCTIONS = 7, 25
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_SPARSE = 1, 5, 15
NODE_ATTRIBUTE = 5
ATTRIBUTE_TENSOR = 5
ATTRIBUTE_NESTED = frozenset({6, 10, 11, 22, 23})
"""Subgraphs, lists of tensors and of graphs, sparse tensors: none of our graphs has any."""
TENSOR_EXTERNAL = 13
TENSOR_NAME = 8
ENTRY_KEY, ENTRY_VALUE = 1, 2


def locations(model: bytes) -> set[str]:
    """The `location` of every tensor with external data in a serialized ModelProto.

    Raises:
        ValueError: it is no ModelProto, or it has parts that could hide one.
    """
    found: set[str] = set()
    for number, graph in _fields(memoryview(model)):
        if number == MODEL_FUNCTIONS:
            raise ValueError("the graph has functions")
        if number == MODEL_GRAPH:
            found |= set(_of_graph(graph))
    return found


def initializers(model: bytes) -> frozenset[str]:
    """The names of the weights that lie in files.

    Raises:
        ValueError: it is no ModelProto.
    """
    return frozenset(
        bytes(content).decode()
        for number, graph in _fields(memoryview(model))
        if number == MODEL_GRAPH
        for part, tensor in _fields(graph)
        if part == GRAPH_INITIALIZER and any(_of_tensor(tensor))
        for field, content in _fields(tensor)
        if field == TENSOR_NAME
    )


def _of_graph(graph: memoryview) -> Iterator[str]:
    for number, part in _fields(graph):
        if number == GRAPH_SPARSE:
            raise ValueError("the graph has sparse weights")
        if number == GRAPH_INITIALIZER:
            yield from _of_tensor(part)
        elif number == GRAPH_NODE:
            for inner, attribute in _fields(part):
                if inner == NODE_ATTRIBUTE:
                    yield from _of_attribute(attribute)


def _of_attribute(attribute: memoryview) -> Iterator[str]:
    for number, part in _fields(attribute):
        if number in ATTRIBUTE_NESTED:
            raise ValueError("a node has a graph of its own")
        if number == ATTRIBUTE_TENSOR:
            yield from _of_tensor(part)


def _of_tensor(tensor: memoryview) -> Iterator[str]:
    for number, entry in _fields(tensor):
        if number == TENSOR_EXTERNAL:
            pair = {key: bytes(value).decode() for key, value in _fields(entry)}
            if pair.get(ENTRY_KEY) == "location":
                yield pair.get(ENTRY_VALUE, "")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field; numbers have an empty content here.

    Raises:
        ValueError: the data end in the middle of a field.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind, length = tag & 7, 0
        if kind == VARINT:
            _, at = _varint(data, at)
        elif kind == BYTES:
            length, at = _varint(data, at)
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > len(data):
            raise ValueError("the data end in the middle of a field")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("the data end in the middle of a number")
