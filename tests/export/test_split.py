"""A chain of block groups computes what the whole transformer does, bit for bit."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.cache_key import Part
from ltx_export import cli, split, weights
from ltx_export.block_groups import STAGE, evenly
from ltx_export.graphs import BLOCKS
from ltx_ref.quantization import Format
from tests.export import quantized_files
from tests.export.chains import KEPT, MASKED, feeds, groups, same_bits

LAYERS = 4


def exported(folder: Path, form: Format | None, opset: int = 20) -> Bundle:
    """The first blocks of ltx-tiny, int8 as ONNX Runtime computes it, or plain."""
    file = folder / "tiny.safetensors"
    dtype = torch.float32 if opset == 20 else torch.bfloat16
    quantized_files.write(file, form or (lambda _: None), dtype=dtype, blocks=LAYERS)
    arguments = ["onnx", str(file), "--stages", STAGE, "--out", str(folder / "bundle")]
    assert cli.main([*arguments, "--opset", str(opset)]) == 0
    return open_bundle(folder / "bundle", cache=folder / "cache")


@pytest.fixture(scope="module", params=[None, "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(tmp_path_factory.mktemp("split"), request.param)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """As a builder of engines reads it."""
    return exported(tmp_path_factory.mktemp("split"), "fp8", 23)


@pytest.mark.parametrize("ends", [(0, 1, LAYERS), (0, 1, 3, LAYERS)])
@pytest.mark.parametrize(("batch", "tokens", "per_token"), [(1, 40, False), (3, 12, True)])
def test_a_chain_computes_the_same_bits_wherever_it_is_cut(
    bundle: Bundle, ends: tuple[int, ...], batch: int, tokens: int, *, per_token: bool
) -> None:
    parts = [
        Part(index=index, of=len(ends) - 1, first=first, end=end)
        for index, (first, end) in enumerate(pairwise(ends))
    ]
    given = feeds(bundle.stage(STAGE), batch, tokens, per_token=per_token)
    assert same_bits(bundle, parts, given)


@pytest.mark.parametrize("opset", [20, 23])
def test_the_tables_of_the_parts_say_what_is_handed_on(
    opset: int, bundle: Bundle, fp8: Bundle
) -> None:
    chain = groups(fp8 if opset == 23 else bundle, evenly(LAYERS, LAYERS))
    first, *middle, last = chain
    stage = (fp8 if opset == 23 else bundle).stage(STAGE)
    precision = stage.outputs[0].dtype
    assert (first.inputs, last.outputs) == (stage.inputs, stage.outputs)
    shared = {tensor.name: (tensor.dtype, tensor.axes) for tensor in first.outputs}
    assert shared == {
        "hidden_states_1": (precision, ("batch", "tokens", 128)),
        "modulation": (precision, ("batch", "timesteps", 768)),
        "embedded_timestep": (precision, ("batch", "timesteps", 128)),
        "text_states": (precision, ("batch", "text", 128)),
        "rope_cos": ("float32", ("batch", "tokens", 128)),
        "rope_sin": ("float32", ("batch", "tokens", 128)),
    }
    for number, group in enumerate(middle, start=1):
        names = [tensor.name for tensor in group.inputs]
        alike = ["modulation", "text_states", "rope_cos", "rope_sin", MASKED, KEPT]
        assert names == [f"hidden_states_{number}", *alike]
        assert [tensor.name for tensor in group.outputs] == [f"hidden_states_{number + 1}"]
        assert {t.axes for t in group.inputs[1:]} == {t.axes for t in middle[0].inputs[1:]}
    assert {t.name for t in last.inputs} - {t.name for t in middle[0].inputs} == {
        "hidden_states_3",
        "embedded_timestep",
    }


def test_what_a_part_reads_was_written_before_and_nothing_has_two_names(fp8: Bundle) -> None:
    known = {tensor.name: tensor for tensor in fp8.stage(STAGE).inputs}
    for group in groups(fp8, evenly(LAYERS, 3)):
        for tensor in group.inputs:
            assert known[tensor.name] == tensor
        for tensor in group.outputs:
            assert known.setdefault(tensor.name, tensor) is tensor
        for values, table in (
            (group.model.graph.inputs, group.inputs),
            (group.model.graph.outputs, group.outputs),
        ):
            assert [value.name for value in values] == [tensor.name for tensor in table]
            assert [tuple(value.shape or ()) for value in values] == [t.axes for t in table]


def test_each_weight_is_in_one_part_as_the_bytes_of_the_file(fp8: Bundle) -> None:
    whole = ir.load(fp8.file(fp8.stage(STAGE).file))

    def places(model: ir.Model) -> dict[str, tuple[Any, ...]]:
        tensors = {
            name: model.graph.initializers[name].const_value for name in weights.names(model)
        }
        return {
            name: (t.location, t.offset, t.length)
            for name, t in tensors.items()
            if isinstance(t, ir.ExternalTensor)
        }

    chain, every = groups(fp8, evenly(LAYERS, 2)), places(whole)
    matrices: list[str] = []
    for group in chain:
        own = places(group.model)
        assert own.items() <= every.items()
        of_blocks = [n for n in own if n.startswith(BLOCKS[STAGE]) and n.endswith(".weight")]
        numbers = {int(n.removeprefix(f"{BLOCKS[STAGE]}.").split(".")[0]) for n in of_blocks}
        assert numbers == set(range(group.part.first, group.part.end))
        matrices += [name for name in own if name.endswith(".weight")]
    assert sorted(matrices) == sorted(name for name in every if name.endswith(".weight"))
    nodes = [sum(1 for _ in model.graph) for model in (whole, *(g.model for g in chain))]
    assert nodes[0] <= sum(nodes[1:]) < nodes[0] + 10  # the masks' own are there twice


def test_a_part_of_blocks_that_there_are_not_is_a_programmers_mistake(fp8: Bundle) -> None:
    with pytest.raises(ValueError, match="of 4 blocks"):
        groups(fp8, evenly(LAYERS + 1, 2))


def test_a_graph_that_reads_the_latents_in_a_later_block_cannot_be_cut(bundle: Bundle) -> None:
    entry = bundle.stage(STAGE)
    model = ir.load(bundle.file(entry.file))
    last = [node for node in model.graph if str(node.name).startswith(f"{BLOCKS[STAGE]}.3")][-1]
    last.replace_input_with(0, model.graph.inputs[0])
    with pytest.raises(AssertionError, match="latents is read behind hidden_states_2"):
        list(split.split(model, entry, evenly(LAYERS, 2)))
