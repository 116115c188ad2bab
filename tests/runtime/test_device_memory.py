"""ltx-tiny plays in as little memory as its plan says, and gives the same frames in any."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from ltx_engines.bundle import open_bundle
from ltx_engines.byte_sizes import said
from ltx_engines.errors import UserError
from ltx_trt import cli, job, sampler
from ltx_trt.backend import Backend, Choice, Memory
from ltx_trt.guidance import StepGuidance
from ltx_trt.passes import Pass
from ltx_trt.pipeline import Planned, frames_of, generate, plan
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import residency, tensorrt_adapter
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.session.driver import Address
from ltx_trt.session.needs import need, of_loop
from ltx_trt.session.residency import Need, Residency
from tests.runtime import split_engines
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu
from tests.runtime.split_engines import ACTIVATIONS, CLIP, SMALL, STREAMABLE, WEIGHTS

WISHES = Wishes(
    prompt="a red circle",
    width=CLIP.width,
    height=CLIP.height,
    num_frames=CLIP.frames,
    num_inference_steps=3,
)
Bundles = Callable[[int], Path]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """By the number of parts."""
    home = tmp_path_factory.mktemp("split")

    @cache
    def made(parts: int) -> Path:
        split_engines.make(home / str(parts), parts)
        return home / str(parts)

    return made


class Measured(FakeGpu):
    """Knows how much was in use at most, at any time."""

    peak = 0

    def allocate(self, size: int) -> Address:
        address = super().allocate(size)
        self.peak = max(self.peak, self.used)
        return address


STEPS = 120
NOISY = replace(WISHES, sampler="stochastic", num_inference_steps=STEPS)
"""Its noises alone are more than everything else beside the weights."""


def planned(stages: Stages, wishes: Wishes = WISHES) -> Planned:
    return plan(resolve(wishes, stages.bundle, None)[0], stages.bundle.manifest)


def frames(stages: Stages, wishes: Wishes = WISHES) -> np.ndarray:
    stages.prepare(planned(stages, wishes))
    return frames_of(generate(resolve(wishes, stages.bundle, None)[0], stages.bundle, stages))


@pytest.fixture(scope="module")
def wanted(bundles: Bundles) -> np.ndarray:
    with open_stages(bundles(3), Choice(Backend.onnxruntime, threads=1)) as stages:
        return frames(stages)


def on(gpu: FakeGpu, folder: Path, budget: int | None = None) -> Stages:
    def device(flavour: str) -> Device:
        return Device.of(gpu, FakeLibrary(gpu))

    return open_stages(folder, Choice(device_memory=budget), open_device=device)


def needed(folder: Path, stage: str, *beside: str) -> Need:
    bundle = open_bundle(folder)
    chains = [bundle.engines(name, 89) for name in (stage, *beside)]
    return need(bundle.manifest, chains[0], [entry for chain in chains[1:] for entry in chain])


def loop(folder: Path, wishes: Wishes) -> int:
    bundle = open_bundle(folder)
    (one,) = plan(resolve(wishes, bundle, None)[0], bundle.manifest).passes
    return of_loop(bundle.manifest, bundle.engines("transformer", 89), one)


def least(folder: Path, places: int, wishes: Wishes = WISHES) -> int:
    """The budget with which so many parts of the transformer fit."""
    row: Residency
    (row,) = residency.plan([needed(folder, "transformer", "sampler_step")], 2**40)
    return row.fixed + loop(folder, wishes) + places * WEIGHTS


def free_for(budget: int) -> int:
    """Bytes of a card of which so many are planned with."""
    free = budget + budget // (residency.ALLOWANCE - 1)
    assert residency.budget(None, free) == budget
    return free


@pytest.mark.parametrize("places", [3, 2, 1])
def test_a_card_of_just_the_planned_size_plays_the_same_clip(
    bundles: Bundles, wanted: np.ndarray, places: int
) -> None:
    budget = least(bundles(3), places)
    gpu = FakeGpu(memory=free_for(budget))
    with on(gpu, bundles(3)) as stages:
        np.testing.assert_array_equal(frames(stages), wanted)
        assert stages.watch is not None
        assert places * WEIGHTS < stages.watch.peak <= budget
    assert gpu.leaks() == []
    assert (gpu.count("sleep") > 0) == (places < 3)
    assert (gpu.count("launch") > 0) == (places == 3)
    parts = [f"transformer.part{part}" for part in range(3)]
    loaded = [name for _, name in gpu.named("load")]
    assert sorted(loaded) == ["sampler_step", "text_encoder", *parts, "vae_decoder"]


def test_the_noises_of_all_steps_are_planned_with(bundles: Bundles) -> None:
    """They are on the GPU from the first step on."""
    folder = bundles(3)
    budget = least(folder, 3, NOISY)
    assert loop(folder, NOISY) > (STEPS - 1) * 4 * CLIP.tokens * 32
    gpu = Measured()
    with on(gpu, folder, budget) as stages:
        frames(stages, NOISY)
    assert budget - loop(folder, NOISY) < gpu.peak <= budget
    assert gpu.count("sleep") == 0
    with on(FakeGpu(), folder, budget - 1) as stages:
        (note,) = stages.prepare(planned(stages, NOISY))
    assert "2 of 3 parts fit at once" in note


def test_a_longer_loop_takes_the_room_of_what_was_kept(
    bundles: Bundles, wanted: np.ndarray
) -> None:
    folder, gpu = bundles(3), Measured()
    every = ("text_encoder", "vae_decoder")
    kept = sum(sum(n.weights) + n.buffers for n in (needed(folder, stage) for stage in every))
    budget = least(folder, 3) + kept + 2**15

    def device(flavour: str) -> Device:
        return Device.of(gpu, FakeLibrary(gpu))

    choice = Choice(device_memory=budget, memory=Memory.auto)
    with open_stages(folder, choice, open_device=device) as stages:
        np.testing.assert_array_equal(frames(stages), wanted)
        assert gpu.count("close_engine") == 0
        frames(stages, NOISY)
        assert gpu.peak <= budget
        assert gpu.count("close_engine") > 5
    assert gpu.leaks() == []


def test_an_engine_that_streams_its_weights_plays_it_in_the_room_that_is_left(
    bundles: Bundles, wanted: np.ndarray
) -> None:
    scratch = STREAMABLE // 8
    budget = least(bundles(1), 0) + WEIGHTS - STREAMABLE + scratch + 1_500_000
    gpu = FakeGpu(memory=free_for(budget))
    with on(gpu, bundles(1)) as stages:
        (note,) = stages.prepare(planned(stages))
        np.testing.assert_array_equal(frames(stages), wanted)
        assert stages.watch is not None
        assert stages.watch.peak <= budget
    assert note.startswith("transformer: streams from 2.86 MiB of weights")
    assert gpu.named("set_streaming_budget")[-1][2] == 1_500_000
    assert gpu.count("launch") == 0  # streamed weights are not captured
    assert gpu.leaks() == []


def test_what_is_streamed_is_said_before_the_run(bundles: Bundles) -> None:
    for places, words in ((3, "all 3 parts are resident, "), (2, "2 of 3 parts fit at once, ")):
        with on(FakeGpu(), bundles(3), least(bundles(3), places)) as stages:
            (note,) = stages.prepare(planned(stages))
            assert words in note


def test_no_more_is_planned_with_than_is_free(bundles: Bundles) -> None:
    budget = least(bundles(3), 2)
    with on(FakeGpu(memory=free_for(budget)), bundles(3), 2**31) as stages:
        first, second = stages.prepare(planned(stages))
    assert first == f"of --device-memory 2.00 GiB, {said(budget)} can be used"
    assert "2 of 3 parts fit at once" in second


def test_what_does_not_fit_is_refused_before_anything_is_loaded(bundles: Bundles) -> None:
    gpu = FakeGpu()
    with (
        on(gpu, bundles(3), least(bundles(3), 1) - 1) as stages,
        pytest.raises(UserError, match=r"^transformer needs at least .*in more parts"),
    ):
        stages.prepare(planned(stages))
    assert gpu.count("load") == 0


def test_what_a_stage_needs_is_counted_from_its_tensors(bundles: Bundles) -> None:
    whole, chain = (needed(bundles(parts), "transformer") for parts in (1, 3))
    assert (whole.weights, chain.weights) == ((WEIGHTS,), (WEIGHTS,) * 3)
    assert whole.activations == chain.activations == ACTIVATIONS
    batch, tokens, text, width = 3, CLIP.tokens, 64, 128
    ends = batch * (tokens * (32 + 3 + 32) + 1 + text * (128 + 1) + 6)
    assert whole.buffers == 4 * ends
    hidden = [batch * tokens * width] * 2  # the states go to and fro
    shared = [batch * 6 * width, batch * width, batch * text * width, *[batch * tokens * width] * 2]
    assert chain.buffers == 4 * (ends + sum(hidden) + sum(shared))
    with_step = needed(bundles(1), "transformer", "sampler_step")
    assert with_step.buffers > whole.buffers + SMALL
    decoder = needed(bundles(1), "vae_decoder")
    assert decoder.buffers > 4 * 3 * CLIP.frames * CLIP.height * CLIP.width


def test_what_the_loop_takes_beside_its_engines_is_counted_by_step_and_by_prompt(
    bundles: Bundles,
) -> None:
    bundle = open_bundle(bundles(1))
    chain = bundle.engines("transformer", 89)

    every, without_uncond = (StepGuidance(scale, 1.0, 1.0, (1,)) for scale in (3.0, 1.0))

    def counted(second: StepGuidance = every, walk: str = "euler") -> int:
        one = Pass(CLIP, sampler.table(walk, (1.0, 0.5, 0.0)), (every, second))
        return of_loop(bundle.manifest, chain, one)

    rows = 2 * 3 * 256  # of each step the noise level, the coefficients and the mask
    assert counted() == rows
    assert counted(without_uncond) == rows + 2 * 4 * 64 * (128 + 1)
    assert counted(walk="stochastic") == rows + 4 * CLIP.tokens * 32, "the last adds none"


def test_the_report_says_how_much_it_took(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundles(3)
    budget = least(folder, 2)
    gpu = FakeGpu()
    opened = partial(open_stages, open_device=lambda _: Device.of(gpu, FakeLibrary(gpu)))
    monkeypatch.setattr(job, "open_stages", opened)
    wishes = replace(WISHES, num_inference_steps=1)
    choice = Choice(device_memory=budget)
    report = job.execute(job.Job(wishes, folder, tmp_path / "frames", choice=choice))
    assert 2 * WEIGHTS < json.loads(report.as_json())["device_memory"] <= budget


def test_a_run_without_engines_has_no_such_budget(
    bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--bundle", str(bundles(3)), "--prompt", "x", "-o", str(tmp_path / "a.gif")]
    more = ["--backend", "onnxruntime", "--device-memory"]
    assert cli.main([*words, *more, "8GiB"]) == 2
    assert "leave out --device-memory" in capsys.readouterr().err
    assert cli.main([*words, *more, "plenty"]) == 2
    assert "--device-memory plenty: not an amount of memory" in capsys.readouterr().err
