"""ONNX Runtime against an engine, block by block. Another ONNX Runtime stands for the engine."""

import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

from ltx_engines import bundle
from ltx_engines.bundle import open_bundle
from ltx_export import ladder, wrong_numbers
from ltx_export.graph_following import linear_layers
from ltx_export.onnx_transformer import VELOCITY, Graph, OnnxTransformer
from ltx_export.polygraphy_engine import Link, RunnerTransformer
from ltx_export.wrong_numbers import Found, Side, Values
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video.model import skeleton
from tests.export.test_verify import doubled_in_place

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
PREFIX = "model.diffusion_model."
SIZES = {"batch": 1, "tokens": 8, "text": 16, "timesteps": 1}
PROFILE = {name: (size, size, size) for name, size in SIZES.items()}
LAYERS = linear_layers(skeleton(read_header(TINY / "ltx-tiny.safetensors")).transformer)


def finished(work: Generator[str, None, Found]) -> Found:
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: Found = end.value
            return found


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph(open_bundle(TINY))


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[str], Graph]:
    """The shipped bundle with twice as large numbers in one weight."""

    def damage(name: str) -> Graph:
        folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
        doubled_in_place(folder / "ltx-tiny.safetensors", f"{PREFIX}{name}")
        bundle.seal(folder, bundle.read(folder))
        return Graph(open_bundle(folder, cache=tmp_path / "cache"))

    return damage


def side(graph: Graph) -> Side:
    return Side(graph, wrong_numbers.by_onnxruntime(graph, wrong_numbers.inputs(graph, PROFILE)))


def test_an_engine_that_agrees_has_no_culprit(graph: Graph) -> None:
    found = finished(wrong_numbers.compare(side(graph), side(graph), LAYERS, 1e-6))
    assert found == Found(0.0, 1e-6)
    assert found.sentence() == "the engine's velocity is 0 from ONNX Runtime's, within 1e-06"


@pytest.mark.parametrize("layer", ["transformer_blocks.4.attn1.to_v", "proj_out"])
def test_a_wrong_layer_is_named(graph: Graph, damaged: Callable[[str], Graph], layer: str) -> None:
    wrong = damaged(f"{layer}.weight")
    found = finished(wrong_numbers.compare(side(wrong), side(graph), LAYERS, 0.01))
    assert found.culprit == layer
    assert found.before < 1e-4 < 0.01 < found.after
    assert f"worst is {layer}" in found.sentence()


def test_what_is_wrong_outside_the_layers_is_named_by_its_block(
    graph: Graph, damaged: Callable[[str], Graph]
) -> None:
    wrong = damaged("transformer_blocks.1.scale_shift_table")
    found = finished(wrong_numbers.compare(side(wrong), side(graph), LAYERS, 1e-4))
    assert found.culprit is not None
    assert found.culprit.startswith("transformer_blocks.1")


def test_an_error_that_marking_takes_away_is_said(graph: Graph) -> None:
    """As of a fusion: the velocity alone is wrong, with inner values beside it all is well."""
    right = side(graph)

    def run(names: Sequence[str]) -> Values:
        found = yield from right.run(names)
        if [*names] == [VELOCITY]:
            found = {VELOCITY: found[VELOCITY] * 2}
        return found

    found = finished(wrong_numbers.compare(Side(graph, run), right, LAYERS, 0.01))
    assert found.velocity == pytest.approx(1)
    assert "with inner values marked it is within bounds" in found.sentence()


def test_polygraphys_runner_gives_the_very_numbers_of_the_session(graph: Graph) -> None:
    """The path that an engine's numbers take, on the CPU: two links of a chain, one runner each."""
    from polygraphy.backend.onnxrt import OnnxrtRunner

    feeds = wrong_numbers.inputs(graph, PROFILE)
    middle = graph.block_output(2)
    first = OnnxTransformer(graph, [middle])
    last = OnnxTransformer(graph)
    with OnnxrtRunner(first.session) as one, OnnxrtRunner(last.session) as two:
        chain = RunnerTransformer([Link(one, first.dtypes), Link(two, last.dtypes)])
        mode = graph.bundle.manifest.model.stg_mode
        velocity = chain(*feeds.values(), stg_mode=mode)
        everything = chain.run(feeds)
    assert everything.keys() == {middle, VELOCITY}
    wanted = last.run(feeds)[VELOCITY]
    assert velocity.equal(wanted)
    bound = ladder.Bound(0.0, "the same program")
    pair = ladder.Pair("engine", "onnx", {"velocity": bound})  # by Comparator.compare_accuracy
    (row,) = ladder.compare(pair, {"velocity": velocity.numpy()}, {"velocity": wanted.numpy()})
    assert row.passed
    assert row.cosine == pytest.approx(1)
