"""A graph stamped from three blocks is the graph of all blocks."""

import re
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from ltx_export.stamp import TRACED, stamp
from tests.export.by_hand import Array, evaluated, fill, parsed, text_of

WIDTH = 4


def block(layer: int) -> str:
    """h = h + w h * mask[layer] + shared; the first block owns what all share."""
    own, before = f"blocks.{layer}", f"h{layer - 1}" if layer else "x"
    shared = '["blocks.0/Relu"] shared = Relu(x)\n' if layer == 0 else ""
    return f"""{shared}
    ["{own}/Gather"] "{own}/Gather:0" = Gather<axis = 0>(mask, "number_{layer}")
    ["{own}.ff/MatMul"] "{own}.ff/MatMul:0" = MatMul({before}, "{own}.ff.weight")
    ["{own}.ff/Pow"] "{own}.ff/Pow:0" = Pow("{own}.ff/MatMul:0", two)
    ["{own}/Mul"] "{own}/Mul:0" = Mul("{own}.ff/Pow:0", "{own}/Gather:0")
    ["{own}/Add"] "{own}/Add:0" = Add("{own}/Mul:0", shared)
    ["{own}/Add_1"] h{layer} = Add("{own}/Add:0", {before})
    """


def chain(layers: int, change: Callable[[str], str] = str) -> ir.Model:
    """As a trace leaves it. `two` is a constant of all blocks and the number of the third."""
    numbers = "".join(f', int64 "number_{i}" = {{{i}}}' for i in range(layers))
    weights = "".join(f', float[{WIDTH},{WIDTH}] "blocks.{i}.ff.weight"' for i in range(layers))
    text = f"""g (float[B,{WIDTH}] x, float[L,B,1] mask) => (float[B,{WIDTH}] y)
    <int64 two = {{2}}{numbers}{weights}>
    {{
        {"".join(map(block, range(layers)))}
        ["tail/Neg"] y = Neg(h{layers - 1})
    }}"""
    names = [f"blocks.{i}.ff.weight" for i in range(layers)]
    model = parsed(change(text), weights=names)
    for node in model.graph:
        for value in node.outputs:
            if str(value.name).startswith("h"):
                value.name = f"{node.name}:0"
    return model


def feeds(layers: int) -> dict[str, Array]:
    generator = np.random.default_rng(1)
    x, mask = generator.normal(size=(2, WIDTH)), generator.normal(size=(layers, 2, 1))
    return {"x": x.astype(np.float32), "mask": mask.astype(np.float32)}


def with_weights(model: ir.Model, layers: int) -> ir.Model:
    generator = np.random.default_rng(2)
    names = [f"blocks.{i}.ff.weight" for i in range(layers)]
    return fill(model, {name: 0.5 * generator.normal(size=(WIDTH, WIDTH)) for name in names})


@pytest.mark.parametrize("layers", [3, 4, 5, 8])
def test_a_stamped_chain_computes_what_the_long_chain_does(layers: int) -> None:
    model = chain(TRACED)
    assert stamp(model, "blocks", layers) == 6 * (layers - TRACED)
    found = evaluated(with_weights(model, layers), feeds(layers))
    wanted = evaluated(with_weights(chain(layers), layers), feeds(layers))
    assert np.array_equal(found, wanted)


def test_a_stamped_chain_has_the_nodes_and_weights_of_the_long_chain() -> None:
    model = chain(TRACED)
    stamp(model, "blocks", 6)
    long = chain(6)
    found, wanted = text_of(model), text_of(long)
    names = {f"number_{i}": f"layer_{i}_INT64_0" for i in range(TRACED, 6)}
    renamed = [
        (name, op, [names.get(str(i), i) for i in inputs], *rest)
        for name, op, inputs, *rest in wanted
    ]
    assert found == renamed
    weights = {name for name in model.graph.initializers if name.endswith("weight")}
    assert weights == {f"blocks.{i}.ff.weight" for i in range(6)}
    stamped = model.graph.initializers["blocks.5.ff.weight"]
    assert stamped.const_value is None
    assert stamped.shape == ir.Shape([WIDTH, WIDTH])


def test_nodes_stand_in_the_order_in_which_they_can_be_computed() -> None:
    model = chain(TRACED)
    stamp(model, "blocks", 7)
    known = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        assert known.issuperset(node.inputs), node.name
        known.update(node.outputs)


def test_a_block_counts_where_it_counts_and_nowhere_else() -> None:
    model = chain(TRACED)
    stamp(model, "blocks", 5)
    by_name = {node.name: node for node in model.graph}
    exponent = by_name["blocks.4.ff/Pow"].inputs[1]
    assert exponent is model.graph.initializers["two"], "2 is not the third block's number here"
    number = by_name["blocks.4/Gather"].inputs[1]
    assert number is not None
    assert number.const_value is not None
    assert number.const_value.numpy() == 4


def test_counts_of_other_shapes_and_types_are_counted_too() -> None:
    def shaped(text: str) -> str:
        return re.sub(r'int64 ("number_\d" = )', r"int32[1] \1", text)

    model = chain(TRACED, shaped)
    stamp(model, "blocks", 4)
    number = model.graph.initializers["layer_3_INT32_1"].const_value
    assert number is not None
    assert (number.numpy().tolist(), number.dtype) == ([3], ir.DataType.INT32)


def test_fewer_blocks_than_were_traced_are_a_programmers_mistake() -> None:
    with pytest.raises(ValueError, match="2 blocks, but 3 were traced"):
        stamp(chain(TRACED), "blocks", 2)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"blocks.2/Mul:0" = Mul', '"blocks.2/Mul:0" = Div', "second and the third block differ"),
        (
            '"blocks.2/Gather:0" = Gather<axis = 0>',
            '"blocks.2/Gather:0" = Gather<axis = -3>',
            "second and the third block differ",
        ),
        ('["blocks.2/Mul"]', '["tail/Mul"]', "second and the third block differ"),
        ('"number_2" = {2}', '"number_2" = {7}', r"blocks.2/Gather: input 1 differs"),
        (
            'MatMul(h1, "blocks.2.ff.weight")',
            'MatMul(h1, "blocks.0.ff.weight")',
            r"blocks.2.ff/MatMul: input 1 differs",
        ),
        ('"blocks.2/Add:0", h1)', '"blocks.2/Add:0", x)', r"blocks.2/Add_1: input 1 differs"),
        (
            '"blocks.2/Add:0", h1)',
            '"blocks.2/Add:0", "blocks.1/Mul:0")',
            r"blocks.2/Add_1: input 1 differs",
        ),
        ("= Neg(h2)", '= Add(h2, "blocks.1/Mul:0")', "blocks.1/Mul:0 is read behind the blocks"),
        ("=> (float[B,4] y)", "=> (float[B,4] y, float[B,4] h1)", "read behind the blocks"),
    ],
)
def test_blocks_that_differ_are_not_stamped(old: str, new: str, said: str) -> None:
    def changed(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    with pytest.raises(AssertionError, match=said):
        stamp(chain(TRACED, changed), "blocks", 5)


def test_a_block_that_reads_two_blocks_back_is_not_stamped() -> None:
    def changed(text: str) -> str:
        for layer, old, new in ((1, "h0", "x"), (2, "h1", "h0")):
            was = f'"blocks.{layer}/Add:0", '
            text = text.replace(was + f"{old})", was + f"{new})")
        return text

    with pytest.raises(AssertionError, match=r"blocks.2/Add_1: input 1 differs"):
        stamp(chain(TRACED, changed), "blocks", 5)


def test_names_that_only_begin_alike_are_not_of_the_block() -> None:
    model = chain(TRACED, lambda text: text.replace('["tail/Neg"]', '["blocks.20/Neg"]'))
    stamp(model, "blocks", 4)
    assert [n.name for n in model.graph if "Neg" in str(n.name)] == ["blocks.20/Neg"]
