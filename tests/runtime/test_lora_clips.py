"""A clip with a LoRA is the clip of a bundle into which it was fused, whatever computes it."""

import json
import shutil
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from ltx_engines import bundle as bundles
from ltx_engines.bundle import Bundle, EngineEntry, open_bundle
from ltx_engines.cache_key import EngineKey
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_export import cli as export
from ltx_ref.checkpoint import read_header
from ltx_ref.lora import Wish
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX as PREFIX
from ltx_trt import cli
from ltx_trt.backend import Choice
from ltx_trt.pipeline import frames_of, generate, plan
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import Array, lora_weights, refit, tensorrt_adapter
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.session.lora_weights import Weight
from ltx_trt.session.needs import STREAMING
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from ltx_trt.session.opening import Opening
from ltx_trt.session.residency import Need, Residency
from tests.export import loras, quantized_files
from tests.runtime import engine_bundles
from tests.runtime.engine_bundles import Engines
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
PROMPT = "a red circle moves right on a blue background"
SIZE = ("--width", "64", "--height", "64", "--num-frames", "9", "--num-inference-steps", "2")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of linear layers, as wide as they are in ltx-tiny."""
    found = loras.factors(read_header(TINY / "ltx-tiny.safetensors").shapes())
    named = loras.tensors({name: (a, 0.3 * b) for name, (a, b) in found.items()}, "kohya")
    return loras.write(tmp_path_factory.mktemp("adapter") / "lora.safetensors", named)


def frames(out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert cli.main(["run", "--prompt", PROMPT, "-o", str(out), *SIZE, "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loras"] == [b for a, b in pairwise(options) if a == "--lora"]
    return str(report["sha256"])


def test_the_frames_are_those_of_a_bundle_into_which_it_was_fused(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wish, fused = f"{adapter}:0.8", tmp_path / "fused"
    files = [str(TINY / "ltx-tiny.safetensors"), "--text-encoder", str(TINY / "text_encoder")]
    small = ["--pipeline-config", str(Path(__file__).parents[2] / "tools/tiny/ltx-tiny.yaml")]
    assert export.main(["onnx", *files, *small, "--lora", wish, "--out", str(fused)]) == 0
    found = frames(tmp_path / "a", capsys, "--lora", wish)
    assert found == frames(tmp_path / "b", capsys, "--bundle", str(fused))
    assert found != frames(tmp_path / "c", capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.safetensors"], "nowhere.safetensors: there is no such file"),
        (["{a}:0"], "lora.safetensors changes nothing: its strength is 0"),
        (["{a}:0,8"], "did you mean"),
    ],
)
def test_a_lora_that_cannot_be_added_costs_one_line_and_no_clip(
    adapter: Path,
    tmp_path: Path,
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [option for word in words for option in ("--lora", word.format(a=adapter))]
    out = tmp_path / "a.mp4"
    assert cli.main(["run", "--prompt", PROMPT, "-o", str(out), *SIZE, *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_codes_and_scales_that_are_given_are_computed_with_as_if_they_were_in_the_file(
    adapter: Path, tmp_path: Path
) -> None:
    """int8, whose codes ONNX Runtime reads as unsigned ones where it likes to."""
    file, folder = tmp_path / "tiny.safetensors", tmp_path / "bundle"
    quantized_files.write(file, "int8", smooth=True)
    arguments = ["onnx", str(file), "--stages", "transformer", "--opset", "20"]
    assert export.main([*arguments, "--out", str(folder)]) == 0
    bundle = open_bundle(folder)
    plan = lora_weights.plan(bundle, "transformer", [Wish(adapter)])
    before = transformed(bundle, ())
    given = transformed(bundle, plan.weights())
    weights = folder / bundle.manifest.checkpoint
    header = read_header(weights)
    weights.unlink()  # it may be a link to the file above
    shutil.copy(file, weights)
    with weights.open("r+b") as target:
        for name, _, values in plan.weights():
            target.seek(header.tensors[name].begin)
            target.write(values.tobytes())
    assert given.tobytes() == transformed(bundle, ()).tobytes() != before.tobytes()


def transformed(bundle: Bundle, weights: Iterable[Weight]) -> Array:
    random = np.random.default_rng(0)
    sizes = {"batch": 1, "tokens": 8, "text": 4, "timesteps": 1}
    feeds = {
        row.name: random.random([a if isinstance(a, int) else sizes[a] for a in row.axes])
        for row in bundle.stage("transformer").inputs
    }
    with OnnxRuntimeSession.open(bundle, "transformer", threads=1, weights=weights) as session:
        return session({name: feed.astype(np.float32) for name, feed in feeds.items()})["velocity"]


def test_weights_that_come_and_go_take_no_lora(adapter: Path) -> None:
    """They would be set again in each step. Those that are uploaded anyway take it on their way."""
    bundle = open_bundle(TINY)
    plan = lora_weights.plan(bundle, "transformer", [Wish(adapter)])
    part = EngineKey(
        stage="transformer",
        graph="0" * 64,
        weights={},
        profiles=(),
        flavour="tensorrt-rtx",
        version="1",
        targets=(89,),
    )
    entry = EngineEntry(
        file="x", layers="y", key=part, inputs=(), outputs=(), activations=1, refittable=True
    )
    need = Need("transformer", (1, 1, 1))
    opening = Opening(bundle, Device.of(gpu := FakeGpu(), FakeLibrary(gpu)), plan)
    parts, whole = Residency(need, 2, True, 0, 3), Residency(need, 3, False, 0, 3, allowance=1)
    for streamed in (parts, whole):
        with pytest.raises(UserError, match=r"wants all weights of transformer .*-memory, or"):
            opening.check_lora((entry, entry, entry), streamed)
        other = entry.model_copy(update={"weights": "inputs"})
        (note,) = opening.check_lora((other, other), streamed)
        assert "is added again to the weights that are streamed, in each step" in note
    assert opening.check_lora((entry,) * 3, Residency(need, 3, False, 0, 3)) == ()


def test_a_lora_that_finds_no_room_is_refused_before_anything_is_loaded(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    shapes = read_header(folder / "ltx-tiny.safetensors").shapes()
    linear = [n for n, s in shapes.items() if n.startswith(PREFIX) and refit.is_linear(n, s)]
    size, stage = 2**22, ("transformer",)
    large = Engines((VideoShape(9, 64, 64),), stage, weights=size, refittable=tuple(linear))
    engine_bundles.add(folder, large)
    manifest = bundles.read(folder)
    (engine,) = manifest.engines
    key = engine.key.model_copy(update={"options": {STREAMING: 1}})
    streams = engine.model_copy(update={"key": key})
    bundles.update(folder, manifest.model_copy(update={"engines": (streams,)}))
    gpu, wish = FakeGpu(), Wishes(PROMPT, num_inference_steps=2, width=64, height=64, num_frames=9)

    def stages(memory: int) -> Stages:
        choice = Choice(loras=(str(adapter),), device_memory=memory)
        device = lambda flavour: Device.of(gpu, FakeLibrary(gpu, flavour))  # noqa: E731
        return open_stages(folder, choice, open_device=device)

    def prepared(memory: int) -> tuple[str, ...]:
        nonlocal gpu
        gpu = FakeGpu()
        with stages(memory) as opened:
            request, _ = resolve(wish, opened.bundle, None)
            return opened.prepare(plan(request, opened.bundle.manifest))

    with pytest.raises(UserError, match="a LoRA at run time wants all weights of transformer"):
        prepared(size)
    assert not gpu.count("load")
    assert not [note for note in prepared(2 * size) if "LoRA" in note]


def test_engines_with_a_lora_make_the_frames_of_graphs_with_it(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    shapes = read_header(folder / "ltx-tiny.safetensors").shapes()
    linear = [n for n, s in shapes.items() if n.startswith(PREFIX) and refit.is_linear(n, s)]
    clip = VideoShape(9, 64, 64)
    engine_bundles.add(folder, Engines((clip,), ("transformer",), refittable=tuple(linear)))
    gpu, wish = FakeGpu(), Wishes(PROMPT, num_inference_steps=2, width=64, height=64, num_frames=9)

    def made(choice: Choice, where: Path) -> bytes:
        device = lambda flavour: Device.of(gpu, FakeLibrary(gpu, flavour))  # noqa: E731
        with open_stages(where, choice, open_device=device) as stages:
            request, _ = resolve(wish, stages.bundle, None)
            stages.prepare(plan(request, stages.bundle.manifest))
            return frames_of(generate(request, stages.bundle, stages)).tobytes()

    choice = Choice(threads=1, loras=(f"{adapter}:0.8",))
    assert made(choice, folder) == made(choice, TINY)
    assert gpu.count("refit") == 3
    assert not open_bundle(TINY).manifest.engines
    assert gpu.leaks() == []
