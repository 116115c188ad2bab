"""Float64 gives way to the type of the weights: in values, constants, attributes and casts."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from ltx_engines.bundle import Precision
from ltx_engines.stages import FLOAT, Tensor
from ltx_export.element_types import ONNX_TYPES, drop_idle_casts, element_type, settle
from tests.export.by_hand import Array, parsed

PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "bfloat16")

NARROWED = """g (double[N] x) => (double[N] y)
{
    wide = Cast<to = 1>(x)
    root = Sqrt(wide)
    own = Cast<to = 11>(root)
    y = Neg(own)
}"""


def typed(text: str) -> ir.Model:
    """With the types inside that a trace has: those of the casts, and otherwise the input's."""
    graph = parsed(text)
    for node in graph.graph:
        cast = node.attributes.get("to")
        first = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
        dtype = first if cast is None else ir.DataType(cast.as_int())
        node.outputs[0].dtype = dtype or ir.DataType.DOUBLE
    return graph


def constant(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_float32_has_no_idle_casts() -> None:
    graph = typed(NARROWED)
    settle(graph, "float32")
    assert [node.op_type for node in graph.graph] == ["Sqrt", "Neg"]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_what_is_computed_in_float32_still_is_in_half_precision(precision: Precision) -> None:
    graph = typed(NARROWED)
    settle(graph, precision)
    assert [node.op_type for node in graph.graph] == ["Cast", "Sqrt", "Cast", "Neg"]
    own, full = ONNX_TYPES[precision], ir.DataType.FLOAT
    assert [node.outputs[0].dtype for node in graph.graph] == [full, full, own, own]
    assert [n.attributes["to"].as_int() for n in graph.graph if n.op_type == "Cast"] == [full, own]
    assert (graph.graph.inputs[0].dtype, graph.graph.outputs[0].dtype) == (own, own)


def test_a_cast_that_is_an_output_stays() -> None:
    graph = typed("g (float[N] x) => (float[N] y) { y = Cast<to = 1>(x) }")
    assert drop_idle_casts(graph) == 0
    assert len(graph.graph) == 1


CONSTANTS = """g (double[N] x, int64[N] n) => (double[N] y)
<double[4] some = {0.1, -3.14159, 1e-3, 65000}, double lowest = {-1.7976931348623157e308},
 float full = {0.1}, int64[1] one = {1}>
{
    first = Constant<value = double {0.1}>()
    a = Mul(x, some)
    b = Add(a, lowest)
    c = Sub(b, first)
    d = Cast<to = 11>(full)
    y = Add(c, d)
}"""


@pytest.mark.parametrize("precision", PRECISIONS)
def test_constants_are_rounded_once_to_the_type(precision: Precision) -> None:
    graph = typed(CONSTANTS)
    settle(graph, precision)
    dtype = ONNX_TYPES[precision].numpy()
    wanted = np.array([0.1, -3.14159, 1e-3, 65000]).astype(dtype)
    assert constant(graph, "some").dtype == dtype
    assert np.array_equal(constant(graph, "some"), wanted)
    attribute = graph.graph[0].attributes["value"].as_tensor()
    assert (attribute.dtype, float(attribute.numpy())) == (ONNX_TYPES[precision], dtype.type(0.1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("written", ["-1.7976931348623157e308", "-inf"])
def test_the_lowest_number_becomes_the_lowest_of_the_type(
    precision: Precision, written: str
) -> None:
    graph = typed(CONSTANTS)
    low = graph.graph.initializers["lowest"]
    low.const_value = ir.tensor(np.array(float(written)), name="lowest")
    settle(graph, precision)
    lowest = ml_dtypes.finfo(ONNX_TYPES[precision].numpy()).min  # type: ignore[no-untyped-call]
    assert constant(graph, "lowest") == lowest
    assert np.isfinite(constant(graph, "lowest").astype(np.float64))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_other_types_and_weights_without_values_are_left_alone(precision: Precision) -> None:
    graph = typed(CONSTANTS)
    weight = ir.Value(name="w", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.DOUBLE))
    graph.graph.initializers["w"] = weight
    settle(graph, precision)
    assert weight.const_value is None
    assert weight.dtype == ONNX_TYPES[precision]
    assert constant(graph, "full").dtype == np.float32
    assert constant(graph, "one").dtype == np.int64
    assert graph.graph.inputs[1].dtype == ir.DataType.INT64


def test_only_the_stages_own_tensors_follow_the_precision() -> None:
    for precision in PRECISIONS:
        assert element_type(Tensor("latents", FLOAT, ("batch",)), precision) == precision
        assert element_type(Tensor("coords", "float32", ("batch",)), precision) == "float32"
