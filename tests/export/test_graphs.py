"""What holds for the graph of every stage of every released model, and for the ways to get it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import onnx_ir as ir
import pytest

from ltx_engines.bundle import Precision, StgMode, open_bundle
from ltx_export import cli, invariants, lower, weights
from ltx_export.element_types import ONNX_TYPES
from ltx_export.graphs import BLOCKS, Graphs, Model, facts
from ltx_export.invariants import RANDOM
from ltx_export.sources import read
from ltx_export.stage_modules import build
from ltx_export.weights import Weight
from ltx_ref.checkpoint import TensorInfo, read_header
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX, TransformerConfig, VAEConfig
from ltx_ref.text import EMBED
from make_checkpoint import make
from make_templates import T5_XXL, TINY, released, tiny
from releases import Model as Release
from releases import Wish
from tests.export.by_hand import Array

STAGES = [(stage, Graphs(model).smallest(stage)) for stage, model in (*released(), *tiny())]
"""With as many blocks as were traced; the others are copies of the last."""

NAMES = [f"{stage}-{index}" for index, (stage, _) in enumerate(STAGES)]

RANK_LIMIT = 8
"""TensorRT's."""

BLOCK_LIMIT = 90
"""Nodes of a transformer block at opset 23."""


def graph(stage: str, model: Model, precision: Precision = "bfloat16", opset: int = 23) -> ir.Model:
    return Graphs(model).graph(stage, precision, opset)


def constants(model: ir.Model) -> dict[str, Array]:
    values = model.graph.initializers.items()
    return {name: v.const_value.numpy() for name, v in values if v.const_value is not None}


@pytest.mark.parametrize(("stage", "model"), STAGES, ids=NAMES)
def test_no_graph_scatters_draws_branches_or_has_an_operator_of_many_axes(
    stage: str, model: Model
) -> None:
    for opset in (20, 23):
        made = graph(stage, model, "float32", opset)
        assert len(made.graph) > 50
        numbers = constants(made)
        for node in made.graph:
            forbidden = {"ScatterND", "ScatterElements", "If", "Loop", "Scan", *RANDOM}
            assert node.op_type not in forbidden, node.name
            assert not node.domain, node.name
            if node.op_type == "Transpose":
                assert len(node.attributes["perm"].as_ints()) <= RANK_LIMIT, node.name
            if node.op_type == "Reshape" and node.inputs[1] is not None:
                assert len(numbers.get(str(node.inputs[1].name), ())) <= RANK_LIMIT, node.name


@pytest.mark.parametrize(("stage", "model"), STAGES, ids=NAMES)
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_no_graph_has_float64_anywhere(stage: str, model: Model, precision: Precision) -> None:
    made = graph(stage, model, precision)
    double = ir.DataType.DOUBLE
    values = [*made.graph.inputs, *made.graph.initializers.values()]
    for node in made.graph:
        values += node.outputs
        for attribute in node.attributes.values():
            assert attribute.name != "to" or attribute.as_int() != double, node.name
            tensor = attribute.type == ir.AttributeType.TENSOR
            assert not tensor or attribute.as_tensor().dtype != double, node.name
    assert not [value.name for value in values if value.dtype == double]


@pytest.mark.parametrize(("stage", "model"), STAGES, ids=NAMES)
def test_every_graph_keeps_every_promise(stage: str, model: Model) -> None:
    """Among them that no size of an axis was baked in."""
    types = {ir.DataType.BFLOAT16: "BF16", ir.DataType.FLOAT: "F32"}
    wishes: tuple[tuple[Precision, int], ...] = (("bfloat16", 23), ("float32", 20))
    for precision, opset in wishes:
        made = graph(stage, model, precision, opset)
        dtype = types[ONNX_TYPES[precision]]
        shapes = Graphs(model).weights(stage)
        given = {n: Weight("a", TensorInfo(dtype, shape, 0, 0)) for n, shape in shapes.items()}
        weights.bind(made, given)
        assert not weights.missing(shapes, made)
        invariants.check(made, model.table(stage), precision, model.derived())


@pytest.mark.parametrize(("stage", "model"), STAGES, ids=NAMES)
def test_every_root_of_a_norm_has_a_positive_epsilon_under_it(stage: str, model: Model) -> None:
    made = graph(stage, model, "float32", 20)
    numbers, norms = constants(made), 0
    for node in made.graph:
        if "epsilon" in node.attributes:
            norms += 1
            assert node.attributes["epsilon"].as_float() > 0, node.name
        if node.op_type != "Sqrt" or node.inputs[0] is None:
            continue
        total = node.inputs[0].producer()
        assert total is not None
        assert total.op_type == "Add", f"{node.name}: an epsilon was lost"
        added = [numbers[str(v.name)] for v in total.inputs if v and v.name in numbers]
        assert len(added) == 1
        assert (added[0] > 0).all()
        norms += 1
    assert norms > 3


TRANSFORMERS = [model for stage, model in (*released(), *tiny()) if stage == "transformer"]


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_a_transformer_block_has_few_nodes_and_its_attention_knows_its_heads(model: Model) -> None:
    made = graph("transformer", model)
    heads, width = model.config.transformer.num_attention_heads, model.config.transformer.inner_dim
    for layer in range(model.config.transformer.num_layers):
        prefix = f"{BLOCKS['transformer']}.{layer}"
        block = [n for n in made.graph if str(n.name).startswith((f"{prefix}.", f"{prefix}/"))]
        assert 0 < len(block) <= BLOCK_LIMIT, layer
        attentions = [node for node in block if node.op_type == "Attention"]
        assert len(attentions) == 2
        assert sum(node.op_type == "RMSNormalization" for node in block) == 6
        for node in attentions:
            assert node.attributes["q_num_heads"].as_int() == heads
            assert node.attributes["kv_num_heads"].as_int() == heads
            scale = (width // heads) ** -0.5
            assert node.attributes["scale"].as_float() == pytest.approx(scale)


def test_opset_20_has_none_of_the_newer_operators() -> None:
    for stage, model in STAGES:
        made = graph(stage, model, "float32", 20)
        assert not {node.op_type for node in made.graph} & set(lower.NEWER)
        assert made.graph.opset_imports == {"": 20}


@dataclass(frozen=True, slots=True)
class Sparse:
    release: Release
    weights: int


@pytest.mark.parametrize(
    "sparse", [Sparse(Release.small, 715), Sparse(Release.large, 1215)], ids=["2B", "13B"]
)
def test_every_weight_of_a_released_transformer_keeps_its_name_and_its_bytes(
    sparse: Sparse, tmp_path: Path
) -> None:
    checkpoint, out = tmp_path / "whole.safetensors", tmp_path / "bundle"
    list(make(Wish(sparse.release), checkpoint, None))
    before = os.stat(checkpoint)
    assert cli.main(["onnx", str(checkpoint), "--stages", "transformer", "--out", str(out)]) == 0
    header = read_header(checkpoint)
    wanted = {name for name in header.tensors if name.startswith(TRANSFORMER_PREFIX)}
    made = ir.load(out / "transformer.onnx")
    assert weights.names(made) == wanted
    assert len(wanted) == sparse.weights
    for name in wanted:
        tensor, info = made.graph.initializers[name].const_value, header.tensors[name]
        assert isinstance(tensor, ir.ExternalTensor)
        assert (tensor.offset, tensor.length) == (info.begin, info.end - info.begin)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, ir.DataType.BFLOAT16)
    after = os.stat(out / checkpoint.name)
    assert (after.st_ino, after.st_size, after.st_blocks) == (
        *(before.st_ino, before.st_size),
        before.st_blocks,
    ), "a hard link to a file that is still a hole"
    assert open_bundle(out, cache=tmp_path).manifest.files[checkpoint.name].sha256 is None


def tiny_model(layers: int) -> Model:
    return read(TINY / "ltx-tiny.safetensors", TINY / "text_encoder").model().with_layers(layers)


def test_the_names_of_the_weights_are_known_without_tracing() -> None:
    for stage, model in tiny():
        wanted = {n: tuple(t.shape) for n, t in build(stage, model).state_dict().items()}
        wanted.pop(EMBED, None)
        assert Graphs(model).weights(stage) == wanted
    two, thirteen = (model for stage, model in released() if stage == "transformer"
                     and model.stg_mode == "attention_skip")  # fmt: skip
    assert len(Graphs(two).weights("transformer")) == 715
    assert len(Graphs(thirteen).weights("transformer")) == 1215


def another(value: Any) -> Any:
    """Something that the same field could be."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return (*value, ("res_x", {"num_layers": 1}))
    return tuple(2 * n for n in value) if isinstance(value, tuple) else value * 2


def told_apart(config: Any, unread: Sequence[str], of: Any) -> None:
    before = of(config)
    for field in fields(config):
        after = of(replace(config, **{field.name: another(getattr(config, field.name))}))
        assert (after == before) == (field.name in unread), field.name


def test_whatever_decides_a_graph_is_among_its_facts() -> None:
    _, base = next(released())

    def transformer(config: TransformerConfig) -> dict[str, Any]:
        whole = replace(base.config, transformer=config)
        return facts("transformer", replace(base, config=whole))

    def decoder(config: VAEConfig) -> dict[str, Any]:
        return facts("vae_decoder", replace(base, config=replace(base.config, vae=config)))

    def encoder(config: VAEConfig) -> dict[str, Any]:
        return facts("vae_encoder", replace(base, config=replace(base.config, vae=config)))

    unread = ("num_layers", "causal_temporal_positioning")
    told_apart(base.config.transformer, unread, transformer)
    vae = base.config.vae
    told_apart(vae, ("encoder_blocks", "in_channels", "encoder_base_channels"), decoder)
    of_decoder = ("decoder_blocks", "out_channels", "decoder_base_channels")
    told_apart(vae, (*of_decoder, "timestep_conditioning", "causal_decoder"), encoder)
    told_apart(T5_XXL, ("num_layers",), lambda t: facts("text_encoder", replace(base, text=t)))
    for mode in get_args(StgMode):
        assert facts("transformer", replace(base, stg_mode=mode))["stg_mode"] == mode


def test_facts_do_not_know_how_a_number_was_written() -> None:
    _, base = next(released())
    config = base.config.transformer
    for same in (
        replace(config, positional_embedding_theta=10000),
        replace(config, positional_embedding_max_pos=(20.0, 2048.0, 2048.0)),
    ):
        changed = replace(base, config=replace(base.config, transformer=same))
        assert facts("transformer", changed) == facts("transformer", base)


def test_few_blocks_are_not_stamped_and_have_facts_of_their_own() -> None:
    two, three, four = (Graphs(tiny_model(layers)) for layers in (2, 3, 4))
    assert three.facts("transformer") == four.facts("transformer")
    assert two.facts("transformer") == three.facts("transformer") | {"num_layers": 2}
    assert not two.has_template("transformer")
    assert three.has_template("transformer")
