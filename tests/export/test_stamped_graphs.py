"""A graph stamped from three blocks is the one traced whole, and agrees with the reference."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ltx_engines.bundle import StageEntry
from ltx_export import cli, lower, templates, weights
from ltx_export.element_types import settle
from ltx_export.graphs import Graphs, Model, traced
from ltx_export.sources import read
from ltx_export.stage_modules import build
from ltx_export.stamp import TRACED
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX
from ltx_ref.text import EMBED, TextConfig
from ltx_trt.session import onnxruntime_session
from make_checkpoint import write_random
from make_templates import TINY
from releases import Dtype, File, Wish, files
from releases import Model as Release
from tests.export.by_hand import Array, computed, evaluated, fill
from tests.ref.oracles import difference, normals, randomize

LAYERS = TRACED + 1


def graph(stage: str, model: Model, opset: int = 20) -> ir.Model:
    return Graphs(model).graph(stage, "float32", opset)


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


def whole_trace(stage: str, model: Model) -> ir.Model:
    """Of all blocks, in float32 at opset 20; its attributes as a file has them."""
    made = templates.from_proto(templates.to_proto(traced(stage, model)))
    settle(made, "float32")
    lower.lower(made)
    return made


@pytest.fixture(scope="module")
def pair(subject: Subject) -> tuple[ir.Model, ir.Model]:
    """Stamped from three blocks, and traced whole."""
    stamped = graph(subject.stage, subject.model)
    plain = whole_trace(subject.stage, subject.model)
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
    newer = subject.filled(graph(subject.stage, subject.model, 23))
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
    entry = StageEntry(file=path.name, inputs=(), outputs=())
    return onnxruntime.InferenceSession(
        path,
        onnxruntime_session._options(onnxruntime, 2, entry),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[onnxruntime_session.FOLDING],
    )


def beside(bundle: Path, checkpoint: Path, model: Model) -> Path:
    """The graph of all blocks, traced whole, with the weights of the bundle."""
    plain = whole_trace("transformer", model)
    weights.bind(plain, weights.weights_of(read_header(checkpoint), checkpoint.name))
    path = bundle / "plain.onnx"
    path.write_bytes(ir.to_proto(plain).SerializeToString())
    return path


def reference(checkpoint: Path, model: Model) -> nn.Module:
    module = build("transformer", model)
    with safe_open(checkpoint, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """Gigabytes are not left behind for the next look."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_a_slice_of_true_width_is_the_whole_trace_and_the_reference(roomy: Path) -> None:
    """Through the command line and the shipped template."""
    checkpoint, out = roomy / "slice.safetensors", roomy / "bundle"
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
