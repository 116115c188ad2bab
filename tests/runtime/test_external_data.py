"""The files that a graph names, as the onnx package finds them too."""

import random
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from ltx_trt.cli import SHIPPED
from ltx_trt.session.external_data import initializers, locations


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, dims=[1], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "8"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*weights: TensorProto, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node("Op", ["a"], ["b"], **attributes)
    graph = helper.make_graph([node], "g", [], [], list(weights))
    return helper.make_model(graph)


def test_every_location_is_found_once() -> None:
    proto = model(external("a", "x"), external("b", "dir/y"), external("c", "x"))
    assert locations(proto.SerializeToString()) == {"x", "dir/y"}


def test_a_location_in_an_attribute_is_found_too() -> None:
    proto = model(external("a", "x"), value=external("hidden", "secret"))
    assert locations(proto.SerializeToString()) == {"x", "secret"}


@pytest.mark.parametrize("stage", ["transformer", "text_encoder", "vae_encoder", "vae_decoder"])
def test_the_shipped_graphs_are_read_as_onnx_reads_them(stage: str) -> None:
    data = (SHIPPED / f"{stage}.onnx").read_bytes()
    proto = onnx.ModelProto.FromString(data)
    wanted = {
        e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"
    }
    assert locations(data) == wanted
    assert wanted
    named = {t.name for t in proto.graph.initializer if t.external_data}
    assert initializers(data) == named != {t.name for t in proto.graph.initializer}


def test_what_could_hide_a_file_is_refused() -> None:
    inner = model(external("a", "x")).graph
    with pytest.raises(ValueError, match="graph of its own"):
        locations(model(body=inner).SerializeToString())
    proto = model()
    proto.functions.add(name="f")
    with pytest.raises(ValueError, match="functions"):
        locations(proto.SerializeToString())


def test_a_damaged_graph_is_refused_or_read_but_never_crashes() -> None:
    data = bytearray((SHIPPED / "text_encoder.onnx").read_bytes())
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        hurt = bytearray(data)
        for _ in range(20):
            hurt[draw.randrange(len(hurt))] = draw.randrange(256)
        try:
            locations(bytes(hurt))
        except ValueError:
            refused += 1
    assert refused > 10
    with pytest.raises(ValueError, match="end in the middle"):
        locations(bytes(data[:-5]))
