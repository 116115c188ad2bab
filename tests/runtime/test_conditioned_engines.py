"""Clips with given images, from given videos and in two passes, on engines: the frames of ONNX
Runtime, and one line where an engine was not built for them."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from ltx_engines import bundle as bundles
from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.targets import Flavour
from ltx_trt.backend import Backend, Choice
from ltx_trt.cli import SHIPPED
from ltx_trt.conditioning import Item
from ltx_trt.long_video import Chunks
from ltx_trt.pipeline import frames_of, generate, plan
from ltx_trt.request import Request, SecondPass, Wishes, resolve
from ltx_trt.schedule import Steps
from ltx_trt.session import tensorrt_adapter
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from tests.runtime import engine_bundles, split_engines, upsampling
from tests.runtime.engine_bundles import STAGES, Engines
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

CLIP, LARGER = VideoShape(17, 64, 64), VideoShape(17, 128, 128)
EVERY = (*STAGES, "vae_encoder", "sampler_step")
Change = Callable[[Request], Request]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ltx-tiny with a sampler's step and an upsampler, without engines."""
    from ltx_export import step_graph

    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    shutil.copytree(SHIPPED, folder)
    step_graph.add(open_bundle(folder))
    upsampling.add(folder)
    return folder


Make = Callable[[Engines], Path]


@pytest.fixture
def make(source: Path, tmp_path: Path) -> Make:
    def made(engines: Engines) -> Path:
        folder = tmp_path / "bundle"
        shutil.copytree(source, folder)
        engine_bundles.add(folder, engines)
        return folder

    return made


class Machine:
    def __init__(self) -> None:
        self.gpu = FakeGpu()

    def __call__(self, flavour: Flavour) -> Device:
        return Device.of(self.gpu, FakeLibrary(self.gpu, flavour))

    def frames(self, folder: Path, choice: Choice, change: Change) -> Iterator[np.ndarray]:
        with open_stages(folder, choice, open_device=self) as stages:
            wishes = Wishes(
                "a red ball moves right",
                width=CLIP.width,
                height=CLIP.height,
                num_frames=CLIP.frames,
                num_inference_steps=3,
            )
            request = change(resolve(wishes, stages.bundle, None)[0])
            self.notes = stages.prepare(plan(request, stages.bundle.manifest))
            yield frames_of(generate(request, stages.bundle, stages))


ENGINES, GRAPHS = Choice(cuda_graphs=False), Choice(Backend.onnxruntime, threads=1)


def pixels(frames: int, shape: VideoShape = CLIP) -> np.ndarray:
    random = np.random.default_rng(frames)
    size = (1, 3, frames, shape.height, shape.width)
    return random.uniform(-1, 1, size).astype(np.float32)


def conditioned(request: Request) -> Request:
    return replace(request, conditioning=(Item(pixels(1)), Item(pixels(9), 8, 0.6)))


def from_a_video(request: Request) -> Request:
    return replace(request, input_video=pixels(17), steps=Steps(4, skip_initial=2))


def in_two_passes(request: Request) -> Request:
    second = SecondPass(Steps(4, skip_initial=2), request.guidance, downscale_factor=0.5)
    return replace(request, width=128, height=128, second=second)


def both(request: Request) -> Request:
    return conditioned(in_two_passes(request))


@pytest.mark.parametrize(
    ("change", "clips", "looped"),
    [
        (conditioned, (CLIP,), 0),
        (from_a_video, (CLIP,), 2),
        (in_two_passes, (CLIP, LARGER), 5),
        (both, (CLIP, LARGER), 0),
    ],
)
def test_engines_make_the_frames_of_onnx_runtime(
    make: Make, change: Change, clips: tuple[VideoShape, ...], looped: int
) -> None:
    """Steps stay on the GPU where all tokens have one noise level."""
    folder, machine = make(Engines(clips, (*EVERY, "latent_upsampler"), conditioning=2)), Machine()
    ((found,), (wanted,)) = (
        [*machine.frames(folder, choice, change)] for choice in (ENGINES, GRAPHS)
    )
    difference = np.abs(found.astype(int) - wanted.astype(int))
    assert difference.max() <= 1, "truncation hides what is below a level, or shows it"
    steps = [call for call in machine.gpu.calls if call[:2] == ("enqueue", "sampler_step")]
    assert len(steps) == looped
    assert machine.gpu.leaks() == []


def test_a_clip_longer_than_any_engine_is_made_in_chunks(make: Make) -> None:
    """Of the engines' own length, each held to the one before, and decoded in tiles."""

    def longer(request: Request) -> Request:
        return replace(request, num_frames=41, chunks=Chunks(CLIP.frames))

    folder, machine = make(Engines((CLIP,), EVERY, conditioning=0)), Machine()
    ((found,), (wanted,)) = (
        [*machine.frames(folder, replace(choice, vae_tile=CLIP), longer)]
        for choice in (ENGINES, GRAPHS)
    )
    assert found.shape == (41, 64, 64, 3)
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    assert machine.gpu.leaks() == []


def test_each_part_of_a_chain_takes_a_timestep_for_each_token(tmp_path: Path) -> None:
    folder, machine = tmp_path / "bundle", Machine()
    split_engines.make(folder, 3, conditioning=1)
    frames, height, width = (getattr(split_engines.CLIP, n) for n in ("frames", "height", "width"))

    def change(request: Request) -> Request:
        request = replace(request, num_frames=frames, height=height, width=width)
        return replace(request, conditioning=(Item(pixels(1)), Item(pixels(1), 5, 0.6)))

    (found,) = machine.frames(folder, ENGINES, change)
    (wanted,) = machine.frames(folder, GRAPHS, change)
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    parts = [c for c in machine.gpu.calls if c[:2] == ("enqueue", "transformer.part2")]
    assert len(parts) == 3
    assert machine.gpu.leaks() == []


def refusal(folder: Path, change: Change) -> str:
    machine = Machine()
    with pytest.raises(UserError) as caught:
        list(machine.frames(folder, ENGINES, change))
    assert machine.gpu.count("load") == 0
    assert machine.gpu.leaks() == []
    return str(caught.value)


def test_an_engine_for_clips_without_images_is_refused_with_the_option(make: Make) -> None:
    folder = make(Engines((CLIP,)))
    said = refusal(folder, lambda request: replace(request, conditioning=(Item(pixels(1)),)))
    assert said == (
        "no engine of transformer takes 64x64x17 with 2 branches: the nearest takes timesteps 1, "
        "not 12 (it was built for 64x64x17); make such a clip, or build it: ltx-export "
        f"build-engine {folder} --gpu sm89 --shape 64x64x17 --conditioning 0"
    )


def test_too_many_keyframes_are_refused_with_the_option(make: Make) -> None:
    folder = make(Engines((CLIP,), EVERY, conditioning=1))
    said = refusal(folder, conditioned)
    assert "no engine of transformer takes 64x64x17 with 2 branches" in said
    assert "tokens 12 to 16, not 20" in said
    assert said.endswith("--shape 64x64x17 --conditioning 2")


def test_both_passes_are_looked_at_before_anything_is_loaded(make: Make) -> None:
    folder = make(Engines((LARGER,), EVERY))
    said = refusal(folder, in_two_passes)
    assert "no engine of transformer takes 64x64x17 with" in said
    assert said.endswith("--shape 64x64x17 --shape 128x128x17")


def test_stages_without_an_engine_are_named_if_the_clip_needs_them(make: Make) -> None:
    machine, folder = Machine(), make(Engines((CLIP, LARGER), STAGES, conditioning=2))
    list(machine.frames(folder, ENGINES, both))
    assert [note.partition(" has no engine")[0] for note in machine.notes][:2] == [
        "vae_encoder",
        "latent_upsampler",
    ]


def test_an_upsampler_is_of_the_bundle_or_two_passes_are_refused(make: Make) -> None:
    folder = make(Engines((CLIP, LARGER), EVERY))
    manifest = bundles.read(folder)
    stages = {n: s for n, s in manifest.stages.items() if n != "latent_upsampler"}
    bundles.update(folder, manifest.model_copy(update={"stages": stages}))
    assert "export it with ltx-export onnx --upsampler FILE" in refusal(folder, in_two_passes)
