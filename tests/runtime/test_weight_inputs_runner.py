"""ltx-tiny's transformer by engines without weights is the whole one, and bit for bit the same in
whatever room its blocks are given."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx_ir", reason="the pieces are cut by the exporter")
pytest.importorskip("onnxruntime")

import onnx_ir as ir

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.cache_key import EngineKey
from ltx_engines.engine_entry import EngineEntry, TensorEntry
from ltx_engines.errors import UserError
from ltx_export import weight_inputs
from ltx_trt.session.checkpoint_weights import CheckpointWeights
from ltx_trt.session.driver import Address, Bytes, DeviceError
from ltx_trt.session.memory import Arena
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from ltx_trt.session.residency import Rotation
from ltx_trt.session.weight_inputs_runner import Loading, WeightInputsRunner, needs
from ltx_trt.session.weight_uploads import Patch
from tests.runtime.fake_engines import FakeLibrary, Plan
from tests.runtime.fake_gpu import FakeGpu

Floats = NDArray[np.float32]
TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
BATCH, TOKENS, TEXT = 2, 12, 8
SIZES = {"batch": (1, 2, 3), "tokens": (TOKENS,) * 3, "timesteps": (1, 1, 1), "text": (TEXT,) * 3}


@dataclass(frozen=True, slots=True)
class Model:
    """The bundle, its pieces as entries and plans, what goes into the whole and what comes out."""

    bundle: Bundle
    pieces: tuple[tuple[EngineEntry, Path], ...]
    feeds: Mapping[str, NDArray[Any]]
    velocity: Floats

    @property
    def layers(self) -> int:
        return self.bundle.manifest.model.num_layers

    def source(self) -> CheckpointWeights:
        stage = self.bundle.stage("transformer")
        return CheckpointWeights(self.bundle.file(name) for name in stage.weights)


def entry(piece: weight_inputs.Piece) -> EngineEntry:
    graph = piece.model.graph
    inputs, outputs = (
        tuple(
            TensorEntry(
                name=str(value.name),
                dtype="float32",
                axes=tuple(a if isinstance(a, int) else str(a.value) for a in value.shape or ()),
            )
            for value in values
        )
        for values in (graph.inputs, graph.outputs)
    )
    key = EngineKey(
        stage="transformer",
        graph="0" * 64,
        weights={},
        profiles=(SIZES,),
        flavour="tensorrt-rtx",
        version="1.7.1.116",
        targets=(89,),
    )
    return EngineEntry(
        file=f"{piece.name}.engine",
        layers=f"{piece.name}.layers.json",
        key=key,
        inputs=inputs,
        outputs=outputs,
        activations=0,
        weights="inputs",
        bound=dict(piece.weights),
        blocks=piece.blocks,
    )


def plan(described: EngineEntry, graph: Path) -> Plan:
    def end(tensor: TensorEntry, index: int) -> tuple[int, ...]:
        return tuple(a if isinstance(a, int) else SIZES[a][index] for a in tensor.axes)

    limits = {t.name: (end(t, 0), end(t, 1), end(t, 2)) for t in described.inputs}
    return Plan(graph.stem, str(graph), (limits,))


def made_up(bundle: Bundle) -> dict[str, NDArray[Any]]:
    dice, sizes = np.random.default_rng(3), {"batch": BATCH, "tokens": TOKENS, "text": TEXT}
    feeds = {}
    for tensor in bundle.stage("transformer").inputs:
        shape = tuple(a if isinstance(a, int) else sizes.get(a, 1) for a in tensor.axes)
        feeds[tensor.name] = dice.uniform(0.1, 1, shape).astype(np.float32)
    feeds["prompt_mask"] = np.ones((BATCH, TEXT), np.float32)
    feeds["prompt_mask"][1, 3:] = 0
    feeds["skip_layer_mask"] = np.ones_like(feeds["skip_layer_mask"])
    feeds["skip_layer_mask"][2, 1] = 0  # its row is that block's alone
    return feeds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder, bundle = tmp_path_factory.mktemp("pieces"), open_bundle(TINY)
    whole = ir.load(bundle.file(bundle.stage("transformer").file))
    pieces = []
    for piece in weight_inputs.cut(whole):
        ir.save(piece.model, graph := folder / f"{piece.name}.onnx")
        described = entry(piece)
        pieces.append((described, plan(described, graph).write(folder / described.file)))
    feeds = made_up(bundle)
    with OnnxRuntimeSession.open(bundle, "transformer", threads=1) as session:
        velocity = session(feeds)["velocity"]
    return Model(bundle, tuple(pieces), feeds, velocity)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = FakeGpu()
    yield gpu
    assert gpu.leaks() == []


class Bench:
    """A device with what goes into the transformer and what comes out."""

    def __init__(self, gpu: FakeGpu, model: Model) -> None:
        self.gpu, self.model, self.library = gpu, model, FakeLibrary(gpu)
        self.stream = gpu.stream()
        self.arena = Arena(gpu, self.stream)
        self.addresses: dict[str, Address] = {}

    def runner(self, places: int, patch: Patch | None = None) -> WeightInputsRunner:
        layers = self.model.layers
        rotation = Rotation(layers, places, 1 < places < layers)
        engines = [(self.library.load(plan), described) for described, plan in self.model.pieces]
        loading = Loading(self.model.source(), rotation, patch)
        return WeightInputsRunner(self.gpu, self.arena, engines, loading)

    def bind(self, runner: WeightInputsRunner) -> None:
        for name, feed in self.model.feeds.items():
            self.addresses[name] = self.gpu.allocate(feed.nbytes)
            self.gpu.upload(self.addresses[name], feed, self.stream)
        self.addresses["velocity"] = self.gpu.allocate(self.model.velocity.nbytes)
        runner.bind({name: feed.shape for name, feed in self.model.feeds.items()}, self.addresses)

    def step(self, runner: WeightInputsRunner) -> Floats:
        runner.enqueue(self.stream)
        return self.read()

    def read(self) -> Floats:
        found = np.zeros_like(self.model.velocity)
        self.gpu.download(found, self.addresses["velocity"], self.stream)
        self.gpu.synchronize(self.stream)
        self.gpu.fill(self.addresses["velocity"], 0, found.nbytes, self.stream)
        return found

    def close(self) -> None:
        for address in self.addresses.values():
            self.gpu.free(address)
        self.arena.close()
        self.gpu.close_stream(self.stream)


@pytest.fixture
def bench(gpu: FakeGpu, model: Model) -> Iterator[Bench]:
    with closing(Bench(gpu, model)) as bench:
        yield bench


BOUND = 1e-6
"""Relative error in L2: its products are summed in another order than the whole graph's."""


def resident(model: Model) -> Floats:
    """What it gives when all weights stay."""
    gpu = FakeGpu()
    with closing(Bench(gpu, model)) as bench, closing(bench.runner(6)) as runner:
        bench.bind(runner)
        return bench.step(runner)


def test_it_is_the_whole_transformer(model: Model) -> None:
    error = np.linalg.norm(resident(model) - model.velocity)
    assert error <= BOUND * np.linalg.norm(model.velocity)


@pytest.mark.parametrize("places", [6, 5, 3, 2, 1])
def test_in_any_room_it_gives_the_same(bench: Bench, places: int) -> None:
    """The fake GPU computes late: what overwrote weights too early would be seen."""
    wanted = resident(bench.model)
    with closing(bench.runner(places)) as runner:
        bench.bind(runner)
        for _ in range(2):
            np.testing.assert_array_equal(bench.step(runner), wanted)
        assert runner.capturable == (places == 6)


def test_no_graph_can_hold_what_one_of_its_engines_does_not_bear(bench: Bench) -> None:
    engines = [bench.library.load(plan) for _, plan in bench.model.pieces]
    engines[1].plan = replace(engines[1].plan, capturable=False)
    pairs = [(e, described) for e, (described, _) in zip(engines, bench.model.pieces, strict=True)]
    layers = bench.model.layers
    loading = Loading(bench.model.source(), Rotation(layers, layers, overlaps=False))
    with closing(WeightInputsRunner(bench.gpu, bench.arena, pairs, loading)) as runner:
        bench.bind(runner)
        bench.step(runner)
        assert not runner.capturable


def test_what_is_at_work_is_waited_for_before_it_is_bound_anew(bench: Bench, gpu: FakeGpu) -> None:
    """The buffers between the pieces may move."""
    shapes = {name: feed.shape for name, feed in bench.model.feeds.items()}
    with closing(bench.runner(6)) as runner:
        bench.bind(runner)
        runner.enqueue(bench.stream)
        start = len(gpu.calls)
        runner.bind(shapes, bench.addresses)
        names = [call for call in gpu.calls[start:] if call[0] != "memory"]
    assert names[0] == ("synchronize", bench.stream)


def test_after_the_last_pass_no_weights_come(bench: Bench, gpu: FakeGpu) -> None:
    """The first block's come again when there is another one, while the last block runs."""
    with closing(bench.runner(2)) as runner:
        bench.bind(runner)
        before = gpu.count("upload")
        runner.enqueue(bench.stream)
        assert gpu.count("upload") - before == 4
        start = len(gpu.calls)
        runner.enqueue(bench.stream)
        names = [call[:2] if call[0] == "enqueue" else call[0] for call in gpu.calls[start:]]
    assert names.index("upload") < names.index(("enqueue", "block"))
    assert "synchronize" not in names


def test_its_tensors_are_those_of_the_stage(bench: Bench) -> None:
    stage = bench.model.bundle.stage("transformer")
    with closing(bench.runner(6)) as runner:
        found = {t.name: (t.shape, t.is_input) for t in runner.tensors.values()}
    shapes = {
        t.name: tuple(a if isinstance(a, int) else -1 for a in t.axes)
        for t in (*stage.inputs, *stage.outputs)
    }
    assert found == {name: (shape, name != "velocity") for name, shape in shapes.items()}


def test_weights_that_fit_are_uploaded_once_and_a_graph_holds_the_step(bench: Bench) -> None:
    with closing(bench.runner(6)) as runner:
        bench.bind(runner)
        wanted = bench.step(runner)
        uploads = bench.gpu.count("upload")
        bench.gpu.begin_capture(bench.stream)
        runner.enqueue(bench.stream)
        graph = bench.gpu.end_capture(bench.stream)
        bench.gpu.launch(graph, bench.stream)
        np.testing.assert_array_equal(bench.read(), wanted)
        bench.gpu.close_graph(graph)
        assert bench.gpu.count("upload") == uploads


def test_the_next_block_comes_while_one_runs(bench: Bench) -> None:
    """Its copy is enqueued behind a block that is at work, from pinned memory, on another stream;
    the host waits for no block."""
    with closing(bench.runner(2)) as runner:
        bench.bind(runner)
        bench.step(runner)
        start = len(bench.gpu.calls)
        runner.enqueue(bench.stream)
        calls = bench.gpu.calls[start:]
    what = [call for call in calls if call[0] in ("enqueue", "upload")]
    names = [call[1] if call[0] == "enqueue" else "upload" for call in what]
    assert names[0] == "prologue"
    assert names[-1] == "epilogue"
    assert names.count("block") == 6
    assert names.count("upload") >= 5
    assert all(
        "upload" in names[i - 2 : i] for i in range(3, len(names) - 1) if names[i] == "block"
    )
    assert all(call[4] for call in what if call[0] == "upload")
    assert {call[3] for call in what if call[0] == "upload"} != {bench.stream}
    assert not [call for call in calls if call[0] == "synchronize"]


def test_what_is_needed_of_the_card_is_known_before_anything_is_loaded(
    bench: Bench, gpu: FakeGpu
) -> None:
    blocks, stay = needs(described for described, _ in bench.model.pieces)
    assert len(set(blocks)) == 1
    with closing(bench.runner(3)):
        sizes = [size for _, size in gpu.named("allocate")]
    assert sizes.count(blocks[0]) == 3
    assert sum(sizes) == 3 * blocks[0] + stay


def twice(name: str, stored: Bytes) -> Bytes:
    """The last layer gives twice as much."""
    if "proj_out." not in name:
        return stored
    doubled: Bytes = (2 * stored.view(np.float32)).view(np.uint8)
    return doubled


@pytest.mark.parametrize("places", [6, 2])
def test_a_patch_is_uploaded_in_the_place_of_the_checkpoints_bytes(
    bench: Bench, places: int
) -> None:
    with closing(bench.runner(places, twice)) as runner:
        bench.bind(runner)
        doubled = bench.step(runner)
        runner.reload(None)
        plain = bench.step(runner)
    np.testing.assert_array_equal(plain, resident(bench.model))
    np.testing.assert_allclose(doubled, 2 * plain, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_width_is_refused(bench: Bench, gpu: FakeGpu) -> None:
    described, plan = bench.model.pieces[-1]
    wide = [
        t.model_copy(update={"axes": (999, *t.axes[1:])}) if t.name.endswith("proj_out.bias") else t
        for t in described.inputs
    ]
    other = described.model_copy(update={"inputs": tuple(wide)})
    loading = Loading(bench.model.source(), Rotation(6, 6, False))
    with pytest.raises(
        UserError, match=r"proj_out\.bias is float32 \[32\], the engine takes .*999"
    ):
        WeightInputsRunner(gpu, bench.arena, [(bench.library.load(plan), other)], loading)


def test_a_clip_that_no_profile_takes_is_refused(bench: Bench) -> None:
    shapes = {name: feed.shape for name, feed in bench.model.feeds.items()}
    shapes |= {"latents": (BATCH, 99, 32), "coords": (BATCH, 3, 99)}
    with closing(bench.runner(6)) as runner:
        bench.bind(runner)
        with pytest.raises(UserError, match=r"no profile of prologue\.engine takes tokens 99"):
            runner.bind(shapes, bench.addresses)


@pytest.mark.parametrize("after", range(0, 12, 3))
def test_a_card_that_is_too_small_gives_back_what_it_gave(
    bench: Bench, gpu: FakeGpu, after: int
) -> None:
    gpu.fail(
        "allocate" if after < 6 else "event", DeviceError("CUDA_ERROR_OUT_OF_MEMORY"), after=after
    )
    with pytest.raises((UserError, DeviceError), match=r"no room for the weights|OUT_OF_MEMORY"):
        bench.runner(6)
