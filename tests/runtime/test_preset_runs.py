"""The matrix: every preset, run with every kind of flag on a model of its family.

The models are made by hand and have the families' numbers of blocks, schedules and noise levels;
`benchmarks/preset_matrix.py` does the same with random weights in the releases' layouts.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines import pipeline_config, presets
from ltx_engines.bundle import SchedulerFacts, create, seal
from ltx_engines.errors import UserError
from ltx_engines.presets import PRESETS, Preset
from ltx_trt import cli, pipeline
from ltx_trt.backend import Choice
from ltx_trt.pipeline import Decoded, StepDone
from ltx_trt.request import Wishes, resolve
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages
from tests.runtime import conftest, upsampling

LEVELS = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219)
SD3 = SchedulerFacts(shifting="SD3", target_shift_terminal=0.1, sampler="Uniform")

FLAGS: dict[str, dict[str, Any]] = {
    "none": {},
    "guidance": {"guidance_scale": 2.0},
    "no stg": {"stg_scale": 0.0},
    "stg": {"stg_scale": 0.5, "rescaling_scale": 0.3},
    "steps": {"num_inference_steps": 6},
    "words": {"negative_prompt": "w9", "seed": 2**63},
    "size": {"width": 160, "height": 96, "num_frames": 17, "frame_rate": 12.0},
    "odd size": {"width": 100, "height": 70, "num_frames": 10},
    "sampler": {"sampler": "ddim", "eta": 0.5},
    "multistep": {"sampler": "dpmpp-2m"},
}

REFUSED = {
    "guidance": "guidance_scale is 2, but this checkpoint is distilled",
    "stg": "stg_scale is 0.5, but this checkpoint is distilled",
    "steps": "names the noise levels of its two passes|has not learned timestep",
}
"""On distilled models."""

Opened = Callable[[Preset], Stages]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """One bundle for each kind of model, which stays open."""
    kept: dict[tuple[int, bool, SchedulerFacts], Stages] = {}
    with ExitStack() as stack:

        def model_of(preset: Preset) -> Stages:
            layers = {"2B": 28, "13B": 48}[preset.release.size]
            early = preset.name in ("ltxv-2b-0.9", "ltxv-2b-0.9.1")
            scheduler = SD3 if early else SchedulerFacts(sampler="LinearQuadratic")
            key = layers, preset.release.distilled, scheduler
            if key not in kept:
                folder = tmp_path_factory.mktemp("bundles") / "bundle"
                write(folder, *key)
                kept[key] = stack.enter_context(open_stages(folder, Choice()))
            return kept[key]

        yield model_of


def write(folder: Path, layers: int, distilled: bool, scheduler: SchedulerFacts) -> None:
    pytest.importorskip("onnx")
    with pytest.MonkeyPatch.context() as patch, create(folder) as temporary:
        patch.setattr(conftest, "SIZES", replace(conftest.SIZES, num_layers=layers))
        conftest.write_files(temporary)
        manifest = conftest.manifest(
            model=conftest.MODEL.model_copy(update={"num_layers": layers}),
            scheduler=scheduler,
            allowed_inference_steps=LEVELS if distilled else None,
        )
        seal(temporary, manifest)
    upsampling.add(folder)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_with_every_flag_or_says_why_not(
    opened: Opened, name: str, flags: str
) -> None:
    preset, config = PRESETS[name], pipeline_config.load(presets.named(name))
    sizes = {"width": 128, "height": 64, "num_frames": 9}
    wishes = Wishes("w5 w7", **{**sizes, **FLAGS[flags]})
    stages = opened(preset)
    # Without a block to leave out, STG changes nothing: 0.9.6-distilled names none.
    inert = flags == "stg" and len(preset.steps) == 1
    if preset.release.distilled and flags in REFUSED and not inert:
        with pytest.raises(UserError, match=REFUSED[flags]) as told:
            pipeline.plan(resolve(wishes, stages.bundle, config)[0], stages.bundle.manifest)
        assert "\n" not in str(told.value)
        return
    request, _ = resolve(wishes, stages.bundle, config)
    events = list(pipeline.generate(request, stages.bundle, stages))
    steps = (5, 3) if flags == "steps" and len(preset.steps) == 2 else preset.steps
    steps = (6,) if flags == "steps" and len(preset.steps) == 1 else steps
    assert sum(isinstance(event, StepDone) for event in events) == sum(steps)
    frames = np.concatenate([event.frames for event in events if isinstance(event, Decoded)])
    wished = (wishes.num_frames, wishes.height, wishes.width)
    assert frames.shape == (*wished, 3)


@pytest.mark.parametrize(("flag", "scale"), [("guidance_scale", 3.0), ("stg_scale", 1.0)])
def test_a_distilled_preset_is_not_guided_though_the_model_lists_no_levels(
    opened: Opened, flag: str, scale: float
) -> None:
    name = "ltxv-2b-0.9.8-distilled"
    bundle = opened(PRESETS["ltxv-2b-0.9.8-distilled"]).bundle
    unlisted = bundle.manifest.model_copy(update={"allowed_inference_steps": None})
    config = pipeline_config.load(presets.named(name))
    wished: dict[str, Any] = {flag: scale}
    wishes = Wishes("w5", **wished)
    with pytest.raises(UserError, match=f"{flag} is {scale:g}, but the preset {name} is distilled"):
        resolve(wishes, replace(bundle, manifest=unlisted), config)


def test_a_preset_is_an_option_of_a_run_and_of_a_batch(
    opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "ltxv-2b-0.9.8-distilled"
    bundle = str(opened(PRESETS[name]).bundle.path)
    words = ["--bundle", bundle, "--width", "128", "--height", "64", "--num_frames", "9"]
    one = ["run", "--prompt", "w5", "-o", str(tmp_path / "a.gif"), *words]
    assert cli.main([*one, "--preset", name]) == 0
    assert "9 frames of 128 x 64, 10 steps" in capsys.readouterr().out
    assert cli.main([*one, "--pipeline_config", f"configs/{name}.yaml"]) == 0
    assert f"configs/{name}.yaml is not there, so the preset {name}" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("w5\nw7\n", encoding="utf-8")
    many = ["batch", "--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "b")]
    assert cli.main([*many, *words, "--preset", name]) == 0
    assert len([*(tmp_path / "b").glob("*.mp4")]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "ltxv-2b-0.9.8"], "unknown preset 'ltxv-2b-0.9.8'"),
        (["--preset", "ltxv-2b-0.9", "--pipeline-config", "a.yaml"], "leave one of them out"),
        (["--preset", "ltxv-13b-0.9.8-dev"], "is for 13B models, this one is 2B"),
        (["--preset", "ltxv-2b-0.9.5"], "for models that are not distilled, this one is"),
        (["--guidance-scale", "3"], "guidance_scale is 3, but this checkpoint is distilled"),
    ],
)
def test_what_does_not_go_together_costs_one_line_and_exit_code_2(
    opened: Opened,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    bundle = opened(PRESETS["ltxv-2b-0.9.8-distilled"]).bundle.path
    run = ["run", "--prompt", "w5", "-o", str(tmp_path / "a.gif"), "--bundle", str(bundle)]
    assert cli.main([*run, "--stg-scale", "0", "--guidance-scale", "1", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["presets"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [*PRESETS]
    assert cli.main(["presets", "--json"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
