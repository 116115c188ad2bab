"""Each pass on a graph made by hand, and the runner on a pass that cheats."""

import numpy as np
import onnx_ir as ir
import pytest

from ltx_export import passes

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=FLOAT)


def constant(name: str, *numbers: int) -> ir.Value:
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    return ir.Value(
        name=name,
        shape=ir.Shape([len(numbers)]),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )


def model(nodes: list[ir.Node], inputs: list[ir.Value], constants: list[ir.Value]) -> ir.Model:
    output = nodes[-1].outputs[0]
    graph = ir.Graph(
        inputs,
        [output],
        nodes=nodes,
        initializers=constants,
        name="by_hand",
        opset_imports={"": 20},
    )
    return ir.Model(graph, ir_version=10)


def sliced() -> ir.Model:
    """Everything after the first of x, with an end of 64 bits."""
    x = value("x", "n")
    bounds = [constant("start", 1), constant("end", 2**63 - 1), constant("axis", 0)]
    node = ir.Node("", "Slice", [x, *bounds], name="cut")
    node.outputs[0].name, node.outputs[0].type = "y", FLOAT
    return model([node], [x], bounds)


def test_slices_end_within_32_bits() -> None:
    graph = sliced()
    assert passes.shorten_slices(graph) == 1
    tensor = graph.graph.initializers["end"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [2**31 - 1]
    assert passes.shorten_slices(graph) == 0


def test_a_large_number_that_is_no_bound_stays() -> None:
    x, large = value("x", "n"), constant("large", 2**40)
    node = ir.Node("", "Add", [x, large], name="add")
    node.outputs[0].name, node.outputs[0].type = "y", FLOAT
    assert passes.shorten_slices(model([node], [x], [large])) == 0


def swapped(source: str = "k") -> ir.Model:
    """The keys' transpose as the exporter writes it; sizes are those of `source`."""
    k, other, minus = value("k", 2, 3, "n", 4), value("other", 2, 3, "n", 4), constant("m", -1)
    bounds = [constant("zero", 0), constant("two", 2), constant("three", 3), constant("four", 4)]
    shape = ir.Node("", "Shape", [k if source == "k" else other])
    spans = [(0, 1), (1, 2), (2, 3)]
    heads, length, width = (
        ir.Node("", "Slice", [shape.outputs[0], bounds[a], bounds[b]]) for a, b in spans
    )
    flat = ir.Node("", "Concat", [minus, length.outputs[0], width.outputs[0]])
    flatten = ir.Node("", "Reshape", [k, flat.outputs[0]])
    perm = ir.AttrInt64s("perm", [0, 2, 1])
    swap = ir.Node("", "Transpose", [flatten.outputs[0]], [perm])
    full = ir.Node("", "Concat", [heads.outputs[0], width.outputs[0], length.outputs[0]])
    unfold = ir.Node("", "Reshape", [swap.outputs[0], full.outputs[0]])
    end = ir.Node("", "Relu", [unfold.outputs[0]])
    nodes = [shape, heads, length, width, flat, flatten, swap, full, unfold, end]
    end.outputs[0].name, end.outputs[0].type = "y", FLOAT
    return model(nodes, [k, other], [minus, *bounds])


def test_a_transpose_by_way_of_reshapes_becomes_one() -> None:
    graph = swapped()
    passes.run(graph, [passes.straighten_transposes, passes.remove_unused])
    assert [node.op_type for node in graph.graph] == ["Transpose", "Relu"]
    assert list(graph.graph[0].attributes["perm"].as_ints()) == [0, 1, 3, 2]
    assert passes.straighten_transposes(graph) == 0


def test_reshapes_to_the_sizes_of_another_tensor_stay() -> None:
    assert passes.straighten_transposes(swapped("other")) == 0


def test_equal_constants_become_one() -> None:
    x = value("x", "n")
    a, b, c = constant("a", 1), constant("b", 1), constant("c", 2)
    first = ir.Node("", "Slice", [x, a, c])
    second = ir.Node("", "Slice", [first.outputs[0], b, c])
    second.outputs[0].name, second.outputs[0].type = "y", FLOAT
    graph = model([first, second], [x], [a, b, c])
    passes.run(graph, [passes.lift_constants])
    assert set(graph.graph.initializers) == {"a", "c"}
    assert second.inputs[1] is a


def test_names_and_metadata_come_from_the_model_and_not_from_the_machine() -> None:
    graph = sliced()
    node = graph.graph[0]
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'vae', 'vae.decoder', 'slice_1']"
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/me/secret.py"
    node.doc_string = "mine"
    passes.run(graph, [passes.name_nodes, passes.name_constants, passes.strip_metadata])
    assert node.name == "vae.decoder/Slice"
    assert set(graph.graph.initializers) == {"constant_0", "constant_1", "constant_2"}
    assert not node.metadata_props
    assert not node.doc_string
    assert passes.strip_metadata(graph) == 0


def test_a_pass_that_renames_an_input_is_caught() -> None:
    def cheat(graph: ir.Model) -> int:
        graph.graph.inputs[0].name = "mine"
        return 1

    with pytest.raises(AssertionError, match="cheat changed the graph's inputs or outputs"):
        passes.run(sliced(), [cheat])
