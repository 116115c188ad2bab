"""What holds for the graph of every stage of every released model, and for the ways to get it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ltx_engines.bundle import Precision, StgMode, open_bundle
from ltx_export import cli, lower, weights
from ltx_export.element_types import settle
from ltx_export.graphs import BLOCKS, Graphs, Model, facts, traced
from ltx_export.invariants import RANDOM
from ltx_export.sources import read
from ltx_export.stage_modules import build
from ltx_export.stamp import TRACED
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX, TransformerConfig, VAEConfig
from ltx_ref.text import EMBED, TextConfig
from ltx_trt.session import onnxruntime_session
from make_checkpoint import make, write_random
from make_templates import T5_XXL, TINY, released, tiny
from releases import Dtype, File, Wish, files
from releases import Model as Release
from tests.export.by_hand import Array, computed, evaluated, fill
from tests.ref.oracles import difference, normals, randomize

STAGES = [*released(), *tiny()]
NAMES = [f"{stage}-{index}" for index, (stage, _) in enumerate(STAGES)]

RANK_LIMIT = 8
"""TensorRT's."""

BLOCK_LIMIT = 90
"""Nodes of a transformer block at opset 23."""

LAYERS = TRACED + 1


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


TRANSFORMERS = [(name, model) for name, (stage, model) in zip(NAMES, STAGES, strict=True)
                if stage == "transformer"]  # fmt: skip


@pytest.mark.parametrize("model", [m for _, m in TRANSFORMERS], ids=[n for n, _ in TRANSFORMERS])
def test_a_transformer_block_has_few_nodes_and_its_attention_knows_its_heads(model: Model) -> None:
    made = graph("transformer", model)
    heads, width = model.config.transformer.num_attention_heads, model.config.transformer.inner_dim
    for layer in range(model.config.transformer.num_layers):
        prefix = f"{BLOCKS['transformer']}.{layer}"
        block = [n for n in made.graph if str(n.name).startswith((f"{prefix}.", f"{prefix}/"))]
        assert 0 < len(block) <= BLOCK_LIMIT + 10 * (layer == 0), "the first has the shared part"
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


def tiny_weights() -> dict[str, Tensor]:
    with safe_open(TINY / "ltx-tiny.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


SMALL_T5 = TextConfig(
    vocab_size=48, d_model=128, d_kv=6, d_ff=40, num_layers=LAYERS, num_heads=4,
    relative_attention_max_distance=16, feed_forward_proj="gated-gelu",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """A stage of as many blocks as make stamping do something, and its reference."""

    stage: str
    model: Model
    module: nn.Module
    weights: Mapping[str, Array]

    def filled(self, made: ir.Model) -> ir.Model:
        return fill(made, self.weights)


@pytest.fixture(scope="module")
def transformer() -> Subject:
    """ltx-tiny's first blocks; its template is shipped."""
    model, state = tiny_model(LAYERS), tiny_weights()
    module = build("transformer", model)
    module.load_state_dict({n: state[n] for n in module.state_dict()}, assign=True)
    return Subject("transformer", model, module, {n: t.numpy() for n, t in state.items()})


@pytest.fixture(scope="module")
def text_encoder() -> Subject:
    model = replace(tiny_model(LAYERS), text=SMALL_T5)
    module = build("text_encoder", model)
    randomize(module, seed=1)
    state = {n: t.numpy() for n, t in module.state_dict().items() if n != EMBED}
    return Subject("text_encoder", model, module, state)


@pytest.fixture(scope="module", params=["transformer", "text_encoder"])
def subject(request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.getfixturevalue(request.param)
    return found


def feeds(subject: Subject, batch: int, tokens: int, words: int) -> dict[str, Tensor]:
    config = subject.model.config.transformer
    if subject.stage == "text_encoder":
        mask = torch.ones(batch, words, dtype=torch.int64)
        mask[-1, 1 + words // 2 :] = 0
        ids = torch.arange(batch * words).reshape(batch, words) % subject.model.text.vocab_size
        return {"input_ids": ids, "attention_mask": mask}
    mask = torch.ones(batch, words)
    mask[-1, 1 + words // 2 :] = 0
    skip = torch.ones(config.num_layers, batch)
    skip[-1, 0] = 0
    cells = normals(batch, 3, tokens, seed=2).abs() * torch.tensor([4.0, 700, 1200])[None, :, None]
    return {
        "latents": normals(batch, tokens, config.in_channels, seed=1),
        "coords": cells,
        "timestep": normals(batch, 1, seed=3).sigmoid(),
        "prompt_embeds": normals(batch, words, config.caption_channels, seed=4),
        "prompt_mask": mask,
        "skip_layer_mask": skip,
    }


def arrays(given: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in given.items()}


SHAPES = [(1, 1, 1), (2, 7, 5), (3, 4, 9)]


@pytest.fixture(scope="module")
def pair(subject: Subject) -> tuple[ir.Model, ir.Model]:
    """Stamped from three blocks, and traced whole."""
    stamped = graph(subject.stage, subject.model, "float32", 20)
    plain = traced(subject.stage, subject.model)
    settle(plain, "float32")
    lower.lower(plain)
    return subject.filled(stamped), subject.filled(plain)


def canonical(model: ir.Model) -> list[str]:
    """Each node in a line; a constant is what is in it."""
    own = {id(v): v for v in model.graph.initializers.values()}

    def told(value: ir.Value | None) -> str:
        if value is None or id(value) not in own or value.const_value is None:
            return str(value and value.name)
        tensor = value.const_value
        if tensor.nbytes > 1024:
            return str(value.name)
        return f"{tensor.dtype.name}{list(tensor.shape)} {tensor.numpy().tolist()}"

    lines = []
    for node in model.graph:
        attributes = sorted((a.name, str(a.value)) for a in node.attributes.values())
        outputs = [value.name for value in node.outputs]
        inputs = list(map(told, node.inputs))
        lines.append(f"{node.name}: {node.op_type} {inputs} {outputs} {attributes}")
    return sorted(lines)


def test_a_stamped_graph_has_the_nodes_of_the_whole_trace(
    pair: tuple[ir.Model, ir.Model],
) -> None:
    stamped, plain = map(canonical, pair)
    assert len(stamped) > 150
    assert stamped == plain
    large = [{n for n, v in m.graph.initializers.items() if "." in n} for m in pair]
    assert large[0] == large[1]


@pytest.mark.parametrize(("batch", "tokens", "words"), SHAPES)
def test_a_stamped_graph_computes_what_the_whole_trace_and_the_reference_do(
    subject: Subject, pair: tuple[ir.Model, ir.Model], batch: int, tokens: int, words: int
) -> None:
    given = feeds(subject, batch, tokens, words)
    stamped, plain = (computed(made, arrays(given)) for made in pair)
    assert np.array_equal(stamped, plain)
    reference = subject.module(*given.values())
    assert difference(torch.from_numpy(stamped), reference) <= 1e-4


def test_opset_23_by_onnxs_own_definition_is_opset_20_in_onnx_runtime(
    subject: Subject, pair: tuple[ir.Model, ir.Model]
) -> None:
    given = feeds(subject, 2, 7, 5)
    newer = subject.filled(graph(subject.stage, subject.model, "float32", 23))
    assert {"Attention", "RMSNormalization"} & {node.op_type for node in newer.graph}
    defined = torch.from_numpy(evaluated(newer, arrays(given)))
    found = torch.from_numpy(computed(pair[0], arrays(given)))
    assert difference(found, defined) <= 1e-4


def slice_of_2b(path: Path) -> Model:
    """The transformer alone, in float32: 1.2 GB."""
    (whole,) = files(Wish(Release.small, Dtype.f32, LAYERS))
    part = tuple(t for t in whole.tensors if t.name.startswith(TRANSFORMER_PREFIX))
    for _ in write_random(path, File("", part, whole.metadata), seed=0):
        pass
    return read(path).model()


def session(path: Path) -> onnxruntime.InferenceSession:
    """As the runtime opens it: nothing is repacked."""
    return onnxruntime.InferenceSession(
        path,
        onnxruntime_session._options(onnxruntime, 2),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[onnxruntime_session.FOLDING],
    )


def beside(bundle: Path, checkpoint: Path, model: Model) -> Path:
    """The graph of all blocks, traced whole, with the weights of the bundle."""
    plain = traced("transformer", model)
    settle(plain, "float32")
    lower.lower(plain)
    weights.bind(plain, weights.weights_of(read_header(checkpoint), checkpoint.name), "float32")
    path = bundle / "plain.onnx"
    path.write_bytes(ir.to_proto(plain).SerializeToString())
    return path


def reference(checkpoint: Path, model: Model) -> nn.Module:
    module = build("transformer", model)
    with safe_open(checkpoint, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module


def test_a_slice_of_true_width_is_the_whole_trace_and_the_reference(tmp_path: Path) -> None:
    """Through the command line and the shipped template."""
    checkpoint, out = tmp_path / "slice.safetensors", tmp_path / "bundle"
    model = slice_of_2b(checkpoint)
    assert Graphs(model).has_template("transformer")
    assert cli.main(["onnx", str(checkpoint), "--stages", "transformer", "--out", str(out)]) == 0
    stamped, plain = session(out / "transformer.onnx"), session(beside(out, checkpoint, model))
    module = reference(checkpoint, model)
    for shape in SHAPES:
        given = feeds(Subject("transformer", model, module, {}), *shape)
        (found,), (whole,) = (s.run(None, arrays(given)) for s in (stamped, plain))
        assert np.array_equal(found, whole)
        assert difference(torch.from_numpy(found), module(*given.values())) <= 1e-4
    checkpoint.unlink()
    (out / checkpoint.name).unlink()


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
