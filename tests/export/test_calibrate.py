"""Ranges are those of real runs, whoever watches them, however often one begins again."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltx_engines import presets, prompts
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_export import activation_ranges, calibrate, calibration, cli
from ltx_export.calibrate import Order, opened, run
from ltx_export.calibration import Ranges
from ltx_ref.checkpoint import CheckpointError, read_header
from ltx_ref.ltx_video.pipeline import Step
from ltx_ref.quantized import linears
from tests.export.checkpoints import CAPTION_CHANNELS, LAYERS, write_text_encoder
from tests.export.conftest import Files
from tiny import captions

ROOT = Path(__file__).resolve().parents[2]

SHAPES = (VideoShape(1, 32, 64), VideoShape(9, 32, 32))
PROMPTS = ("a red ball", "nothing")
STEPS = 3
ATTENTIONS = ("attn1", "attn2")
LINEARS = 10 * LAYERS


@pytest.fixture
def order(files: Files, tmp_path: Path) -> Order:
    return order_in(tmp_path, files)


def order_in(folder: Path, files: Files) -> Order:
    """Four runs of three steps, with CFG and STG."""
    prompts = folder / "prompts.txt"
    prompts.write_text("# two\n" + "\n".join(PROMPTS))
    return Order(
        files.checkpoint,
        files.text_encoder,
        prompts,
        folder / "small.calibration.safetensors",
        shapes=SHAPES,
        steps=STEPS,
        seed=5,
        device="cpu",
    )


def ranges(order: Order) -> Ranges:
    return calibration.read(order.out, read_header(order.checkpoint)).ranges


def same(one: Ranges, other: Ranges) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[p], other[p]) for p in one)


@pytest.fixture(scope="module")
def whole(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Ranges:
    """The ranges of the order when nothing is in its way."""
    return calibrated(order_in(tmp_path_factory.mktemp("whole"), files))


@pytest.fixture(scope="module")
def offloaded(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Ranges:
    """The same with one block in memory."""
    wish = order_in(tmp_path_factory.mktemp("offloaded"), files)
    return calibrated(replace(wish, offload_blocks=True))


def calibrated(order: Order) -> Ranges:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each test has it
    for _ in run(order):
        pass
    torch.set_num_threads(threads)
    return ranges(order)


def test_every_linear_layer_of_the_blocks_has_a_range(whole: Ranges) -> None:
    paths = {path.partition("transformer_blocks.")[2] for path in whole}
    names = {f"{a}.{n}" for a in ATTENTIONS for n in ("to_q", "to_k", "to_v", "to_out.0")}
    names |= {"ff.net.0.proj", "ff.net.2"}
    assert paths == {f"{block}.{name}" for block in range(LAYERS) for name in names}
    assert all(np.isfinite(amax).all() and amax.max() > 0 for amax in whole.values())


def test_layers_that_read_one_tensor_have_one_range(whole: Ranges) -> None:
    block = "model.diffusion_model.transformer_blocks.1."
    for group in (("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")):
        first, *others = (whole[block + name] for name in group)
        assert all(np.array_equal(first, other) for other in others)
    assert not np.array_equal(whole[block + "attn1.to_q"], whole[block + "attn2.to_q"])


def hooked(order: Order) -> dict[str, Tensor]:
    """Of each layer the largest absolute inputs by hooks of our own, without ModelOpt."""
    found: dict[str, Tensor] = {}

    def see(path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        amax = inputs[0].abs().amax(dim=(0, 1))
        found[path] = torch.maximum(found[path], amax) if path in found else amax

    with opened(order) as session:
        for path, layer in linears(session.model):
            layer.register_forward_pre_hook(partial(see, path))
        for clip in session.plan.runs:
            for _ in session.steps(clip):
                pass
    return found


def test_modelopt_and_hooks_of_our_own_see_the_same(order: Order, whole: Ranges) -> None:
    assert same(whole, {path: amax.numpy() for path, amax in hooked(order).items()})


def test_being_watched_changes_nothing(order: Order) -> None:
    def latents(watch: bool) -> Tensor:
        with opened(order) as session:
            if watch:
                with activation_ranges.watched(session.model):
                    *_, last = session.steps(session.plan.runs[0])
            else:
                *_, last = session.steps(session.plan.runs[0])
        return last.latents

    assert torch.equal(latents(watch=True), latents(watch=False))


def test_all_branches_are_seen(order: Order) -> None:
    batches: set[int] = set()
    with opened(order) as session:
        layer = session.model.transformer.patchify_proj
        layer.register_forward_pre_hook(lambda _, inputs: batches.add(len(inputs[0])))
        for _ in session.steps(session.plan.runs[0]):
            pass
    assert batches == {3}  # negative prompt, prompt, perturbed


def test_of_two_passes_the_first_is_followed_and_that_is_said(
    order: Order, caplog: pytest.LogCaptureFixture
) -> None:
    order = replace(order, pipeline_config=presets.named("ltxv-13b-0.9.8-distilled"), steps=None)
    plan = calibrate.check(order)
    assert {clip.steps for clip in plan.runs} == {7}
    said = "makes two passes: the steps and the guidance of the first one are followed"
    assert caplog.text.count(said) == 1
    caplog.clear()
    calibrate.check(replace(order, pipeline_config=presets.named("ltxv-2b-0.9.6-distilled")))
    assert "two passes" not in caplog.text


def test_a_pipelines_configuration_decides_about_guidance(order: Order, tmp_path: Path) -> None:
    yaml = tmp_path / "plain.yaml"
    yaml.write_text("guidance_scale: 1\nstg_scale: 0\nnum_inference_steps: 4\nwidth: 96\n")
    plan = calibrate.check(replace(order, pipeline_config=yaml, steps=None, shapes=()))
    assert {clip.steps for clip in plan.runs} == {4}
    assert {clip.shape.width for clip in plan.runs} == {96}
    assert not plan.runs[0].request.guidance.at(0.5).uses_cfg
    assert not plan.runs[0].request.guidance.at(0.5).uses_stg


def test_runs_are_prompts_times_shapes_and_a_prompt_keeps_its_seed(order: Order) -> None:
    plan = calibrate.check(order)
    assert [(clip.prompt, clip.seed) for clip in plan.runs] == [
        *zip(PROMPTS, (5, 6), strict=True)
    ] * 2
    assert [clip.shape for clip in plan.runs] == [SHAPES[0]] * 2 + [SHAPES[1]] * 2
    assert [c.prompt for c in calibrate.check(replace(order, first=1)).runs] == [PROMPTS[0]] * 2


def test_the_facts_say_on_what_the_ranges_were_seen(order: Order) -> None:
    lines = list(run(replace(order, first=1)))
    facts = calibration.load(order.out).facts
    assert facts["prompts"] == [PROMPTS[0]]
    assert facts["seeds"] == [5]
    assert facts["shapes"] == ["64x32x1", "32x32x9"]
    assert [len(sigmas) for sigmas in facts["sigmas"].values()] == [STEPS + 1] * 2
    assert facts["sigmas"]["64x32x1"][0] == 1.0
    assert facts["guidance"]["guidance_scale"] == 3.0
    assert facts["stg_mode"] == "attention_values"
    assert facts["checkpoint"]["sha256"]
    assert facts["versions"]["torch"].startswith("2.")
    assert facts["versions"]["nvidia-modelopt"].startswith("0.47")
    assert (facts["dtype"], facts["runs"], facts["done"]) == ("F32", 2, 2)
    assert lines[0] == "reading"
    assert [line for line in lines if line.startswith("calibrating")][-1] == "calibrating: 83 %"


def test_offloaded_ranges_are_the_resident_ones(offloaded: Ranges, whole: Ranges) -> None:
    assert offloaded.keys() == whole.keys()
    for path in whole:
        np.testing.assert_allclose(offloaded[path], whole[path], rtol=1e-4)


def stopped(order: Order, after: int) -> None:
    """Close the generator after so many steps, as Ctrl-C does."""
    lines = run(order)
    seen = 0
    for line in lines:
        seen += line.startswith("calibrating")
        if seen > after:
            break
    lines.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["whole", "offloaded"])
def test_an_interrupted_calibration_ends_with_the_same_bits(
    order: Order, kind: str, request: pytest.FixtureRequest
) -> None:
    order = replace(order, offload_blocks=kind == "offloaded")
    for after, done in ((4, 1), (5, 2)):
        stopped(order, after)
        assert calibration.load(order.out).facts["done"] == done
    again = list(run(order))
    assert sum(line.startswith("calibrating") for line in again) == 2 * STEPS
    assert same(ranges(order), request.getfixturevalue(kind))


def files_beside(order: Order) -> set[str]:
    return {path.name for path in order.out.parent.iterdir()}


def test_a_run_that_is_broken_off_inside_leaves_no_trace(order: Order) -> None:
    stopped(order, 2)
    assert not order.out.exists()
    stopped(order, 4)
    before = order.out.read_bytes()
    stopped(order, 1)
    assert order.out.read_bytes() == before
    assert files_beside(order) == {"prompts.txt", order.out.name}


KILLED = """
import sys
from pathlib import Path
import torch
from ltx_engines.shapes import VideoShape
from ltx_export.calibrate import Order, run
torch.set_num_threads(1)
checkpoint, encoder, prompts, out, *shapes = sys.argv[1:]
shapes = tuple(VideoShape(*map(int, word.split("x"))) for word in shapes)
order = Order(*map(Path, (checkpoint, encoder, prompts, out)), shapes=shapes, steps=3, seed=5,
              device="cpu")
for count, line in enumerate(run(order)):
    print(line, flush=True)
"""


def test_a_killed_calibration_goes_on_in_another_process(order: Order, whole: Ranges) -> None:
    words = [f"{s.frames}x{s.height}x{s.width}" for s in SHAPES]
    paths = (order.checkpoint, order.text_encoder, order.prompts, order.out)
    command = [sys.executable, "-c", KILLED, *map(str, paths), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        while not order.out.exists():
            assert child.stdout.readline()  # it is still at work
        os.kill(child.pid, signal.SIGKILL)
    for _ in run(order):
        pass
    assert same(ranges(order), whole)
    assert files_beside(order) == {"prompts.txt", order.out.name}


def test_a_finished_calibration_is_not_made_again(order: Order) -> None:
    order = replace(order, first=1, steps=1)
    list(run(order))
    written = order.out.stat().st_mtime_ns
    assert list(run(order)) == ["reading"]
    assert order.out.stat().st_mtime_ns == written
    assert len(list(run(replace(order, overwrite=True)))) > 1


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"seed": 6}, "seeds"),
        ({"steps": 4}, "sigmas"),
        ({"negative_prompt": "dull"}, "negative_prompt"),
        ({"stg_mode": "attention_skip"}, "stg_mode"),
        ({"offload_blocks": True}, "offload_blocks"),
    ],
)
def test_another_order_does_not_go_on_with_it(
    order: Order, changed: dict[str, object], key: str
) -> None:
    stopped(order, 4)
    other = replace(order, **changed)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"was begun with other {key}: .*give --overwrite") as said:
        list(run(other))
    assert "\n" not in str(said.value)
    next(line for line in run(replace(other, overwrite=True)) if line.startswith("calib"))


def test_another_checkpoint_does_not_go_on_with_it(order: Order, tmp_path: Path) -> None:
    stopped(order, 4)
    other = tmp_path / "other.safetensors"
    other.write_bytes(order.checkpoint.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="was begun with other checkpoint"):
        list(run(replace(order, checkpoint=other)))


def changed(order: Order, change: Callable[[dict[str, Tensor]], None]) -> Order:
    tensors = load_file(order.checkpoint)
    change(tensors)
    path = order.prompts.with_name("changed.safetensors")
    save_file(tensors, path, dict(read_header(order.checkpoint).metadata))
    return replace(order, checkpoint=path)


LAYER = "model.diffusion_model.transformer_blocks.1.ff.net.2"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_stops_with_layer_prompt_and_step(
    order: Order, number: float
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[LAYER.replace("net.2", "net.0.proj.bias")][3] = number

    where = "step 1 of 3 of 'a red ball' at 64x32x1"
    pattern = rf"{where}: NaN or infinity in the input of {LAYER}, from something before it; "
    with pytest.raises(UserError, match=pattern) as said:
        list(run(changed(order, spoil)))
    assert str(said.value).endswith(
        "the weights, or the text encoder's, are damaged: download them again"
    )
    assert not order.out.exists()


def test_a_number_that_is_none_behind_the_last_layer_is_found(order: Order) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight"][0, 0] = torch.nan

    pattern = "step 1 of 1 of 'a red ball' at 64x32x1: NaN or infinity in the latents"
    with pytest.raises(UserError, match=pattern):
        list(run(changed(replace(order, steps=1), spoil)))
    assert not order.out.exists()


def test_of_float16_it_is_said_that_it_may_be_too_narrow(order: Order) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].half()
        tensors["model.diffusion_model.proj_out.bias"][0] = torch.inf

    with pytest.raises(UserError, match="float16 is too narrow, so take a wider checkpoint, or"):
        list(run(changed(order, spoil)))


def test_a_later_step_is_named_too(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = calibrate.Session.steps

    def spoiled(self: calibrate.Session, clip: calibrate.Run) -> Iterator[Step]:
        for step in steps(self, clip):
            yield step
            if clip is self.plan.runs[1]:
                self.model.transformer.patchify_proj.bias[0] = torch.nan

    monkeypatch.setattr(calibrate.Session, "steps", spoiled)
    with pytest.raises(UserError, match=r"step 2 of 3 of 'nothing' at 64x32x1: NaN or infinity in"):
        list(run(changed(order, lambda _: None)))
    assert calibration.load(order.out).facts["done"] == 1


def test_a_layer_that_only_sees_zeros_stops_it(order: Order) -> None:
    def silence(tensors: dict[str, Tensor]) -> None:
        for name in ("net.0.proj.weight", "net.0.proj.bias"):
            tensors[LAYER.replace("net.2", name)].zero_()

    with pytest.raises(UserError, match=f"{LAYER} has only ever seen zeros"):
        list(run(changed(order, silence)))
    assert calibration.load(order.out).facts["done"] == 3


def test_a_layer_that_is_never_reached_stops_it(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ltx_ref.ltx_video.transformer import FeedForward

    monkeypatch.setattr(FeedForward, "forward", lambda _, x: x)
    path = LAYER.replace("1.ff.net.2", "0.ff.net.0.proj")
    with pytest.raises(UserError, match=f"{path} has not been reached by any run"):
        list(run(order))


def test_a_quantized_checkpoint_is_refused(order: Order) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.float8_e4m3fn)

    with pytest.raises(UserError, match=rf"is quantized already \({LAYER} is fp8-cast\)"):
        list(run(changed(order, cast)))


def test_a_file_without_all_of_the_model_is_refused(order: Order) -> None:
    def lose(tensors: dict[str, Tensor]) -> None:
        del tensors["model.diffusion_model.proj_out.weight"]

    with pytest.raises(CheckpointError, match=r"1 missing: .*proj_out.weight"):
        list(run(changed(order, lose)))


def test_an_encoder_of_another_width_is_refused(order: Order, tmp_path: Path) -> None:
    other = write_text_encoder(tmp_path / "wide", width=CAPTION_CHANNELS * 2)
    with pytest.raises(UserError, match=r"has embeddings of width 48, .* wants 24"):
        list(run(replace(order, text_encoder=other)))


def test_named_noise_levels_are_not_counted_anew(order: Order, tmp_path: Path) -> None:
    yaml = tmp_path / "levels.yaml"
    yaml.write_text("timesteps: [1.0, 0.7, 0.4]\n")
    levels = replace(order, pipeline_config=yaml)
    with pytest.raises(UserError, match="--steps 3: this model's 3 noise levels are given by name"):
        calibrate.check(levels)
    plan = calibrate.check(replace(levels, steps=None))
    assert plan.runs[0].request.timesteps == pytest.approx((1.0, 0.7, 0.4))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device": "cuda"}, "--device cuda: torch sees no CUDA GPU here; try cpu"),
        ({"device": "gpu"}, "--device 'gpu' is none of cpu, cuda and cuda:N; choose one of them"),
        ({"device": "meta"}, "--device 'meta' is none of cpu, cuda and cuda:N"),
        ({"device": "cuda:-1"}, "--device 'cuda:-1' is none of cpu, cuda and cuda:N"),
        ({"out": Path("/nowhere/at/all")}, "/nowhere/at is no folder"),
        ({"out": Path("/proc/x.safetensors")}, "cannot write /proc/x.safetensors: "),
        ({"out": ROOT}, "is a folder; give a file's name"),
        ({"seed": 99999999999999999999}, "--seed 99999999999999999999: the seeds of 2 prompts are"),
        ({"seed": 2**63 - 1}, f"from 0 to {2**63 - 1}; choose a smaller one"),
        ({"seed": -1}, "--seed -1: the seeds of 2 prompts"),
        ({"first": 3}, "--first 3: .*prompts.txt has 2 prompts; give fewer"),
        ({"first": 0}, "--first 0: "),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    order: Order, changed: dict[str, object], said: str
) -> None:
    if changed.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=said):
        list(run(replace(order, **changed)))  # type: ignore[arg-type]


def test_the_last_seed_is_known_to_torch(order: Order) -> None:
    last = replace(order, seed=2**63 - len(PROMPTS))
    assert calibrate.check(last).runs[-1].seed == 2**63 - 1
    with opened(replace(last, first=1, steps=1, shapes=SHAPES[:1])) as session:
        assert len(list(session.steps(session.plan.runs[0]))) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_something_else_is_never_overwritten(
    order: Order, files: Files, tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "precious.safetensors"
    out.write_bytes(files.checkpoint.read_bytes())
    with pytest.raises(UserError, match="is no calibration"):
        list(run(replace(order, out=out, overwrite=overwrite)))
    assert out.read_bytes() == files.checkpoint.read_bytes()


def test_a_damaged_calibration_is_replaced_when_that_is_wished(order: Order) -> None:
    order = replace(order, first=1, steps=1)
    list(run(order))
    whole = order.out.read_bytes()
    for damaged in (b"", whole[:-1], whole[:9], whole.replace(b'\\"runs\\"', b'\\"nuns\\"')):
        order.out.write_bytes(damaged)
        with pytest.raises(UserError, match=r"; calibrate again with --overwrite$"):
            list(run(order))
        assert order.out.read_bytes() == damaged
        list(run(replace(order, overwrite=True)))
        assert order.out.read_bytes() == whole


def test_what_is_not_named_as_one_is_not_replaced(order: Order, tmp_path: Path) -> None:
    out = tmp_path / "diary.txt"
    out.write_text("dear diary")
    with pytest.raises(UserError, match=r"no calibration, and not named \.safetensors"):
        list(run(replace(order, out=out, overwrite=True)))
    assert out.read_text() == "dear diary"


def with_ranges(order: Order, change: Callable[[dict[str, NDArray[np.float32]]], None]) -> None:
    """What is there of the calibration, changed."""
    found = calibration.load(order.out)
    numbers = {path: amax.copy() for path, amax in found.ranges.items()}
    change(numbers)
    calibration.write(replace(found, ranges=numbers))


@pytest.mark.parametrize("done", [1, 2])
@pytest.mark.parametrize("number", [np.nan, -1.0])
def test_what_is_gone_on_with_is_sound(order: Order, done: int, number: float) -> None:
    def spoil(numbers: dict[str, NDArray[np.float32]]) -> None:
        numbers[LAYER][3] = number

    order = replace(order, first=1, steps=1)
    stopped(order, done)
    with_ranges(order, spoil)
    lines = run(order)
    assert next(lines) == "reading"
    with pytest.raises(UserError, match=f"{LAYER} has a range that is no finite number from 0; "):
        next(lines)


def test_a_finished_calibration_of_nothing_but_zeros_is_not_blessed(order: Order) -> None:
    order = replace(order, first=1, steps=1)
    list(run(order))
    with_ranges(order, lambda numbers: numbers[LAYER].fill(0))
    with pytest.raises(UserError, match=f"{LAYER} has only ever seen zeros"):
        list(run(order))


def test_what_is_gone_on_with_has_the_models_layers(order: Order) -> None:
    def lose(numbers: dict[str, NDArray[np.float32]]) -> None:
        del numbers[LAYER]

    def shorten(numbers: dict[str, NDArray[np.float32]]) -> None:
        numbers[LAYER] = numbers[LAYER][1:]

    def add(numbers: dict[str, NDArray[np.float32]]) -> None:
        numbers["extra"] = numbers[LAYER]

    order = replace(order, first=1, steps=1)
    for change, problem in (
        (lose, f"has no ranges of {LAYER}, wanted 160"),
        (shorten, f"has 159 ranges of {LAYER}, wanted 160"),
        (add, "has 160 ranges of extra, wanted none"),
    ):
        order.out.unlink(missing_ok=True)
        stopped(order, 1)
        with_ranges(order, change)
        lines = run(order)
        assert next(lines) == "reading"
        with pytest.raises(UserError, match=problem):
            next(lines)


def test_of_two_differences_the_first_fact_is_named(order: Order) -> None:
    stopped(order, 4)
    other = replace(order, seed=6, steps=4, negative_prompt="dull", stg_mode="attention_skip")
    with pytest.raises(UserError, match=r"other seeds: \[5, 6\], now \[6, 7\]; give"):
        list(run(other))


def test_two_do_not_calibrate_to_one_file(order: Order) -> None:
    lines = run(order)
    assert next(lines) == "reading"
    assert next(lines) == "encoding prompts"
    for overwrite in (False, True):
        with pytest.raises(UserError, match="another ltx-export calibrate is at work on") as said:
            list(run(replace(order, overwrite=overwrite)))
        assert "\n" not in str(said.value)
    lines.close()  # type: ignore[attr-defined]
    assert files_beside(order) == {"prompts.txt"}
    next(line for line in run(order) if line.startswith("calib"))


def test_files_of_other_programs_are_explained(order: Order, tmp_path: Path) -> None:
    def int8(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.int8_weight"] = torch.zeros(2, 2, dtype=torch.int8)

    def scaled(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.float8_e4m3fn)
        tensors[f"{LAYER}.weight_scale"] = torch.ones(())

    gguf = tmp_path / "ltxv.gguf"
    gguf.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(UserError, match="is a GGUF file"):
        list(run(replace(order, checkpoint=gguf)))
    for change, problem in ((int8, "TurboDiffusion's int8"), (scaled, "scaled fp8")):
        with pytest.raises(UserError, match=f"cannot be calibrated: .*{problem}") as said:
            list(run(changed(order, change)))
        assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("yaml", "problem"),
    [
        ("guidance_scale: [3, 1]\n", "guidance_scale is a list, which needs guidance_timesteps"),
        ("timesteps: [0.5, 0.7]\n", "timesteps must fall"),
        ("num_inference_steps: 3\nskip_final_inference_steps: 3\n", "cannot skip 0 initial and 3"),
    ],
)
def test_a_configuration_that_contradicts_itself_costs_one_line(
    order: Order, tmp_path: Path, yaml: str, problem: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml)
    with pytest.raises(UserError, match=problem) as said:
        calibrate.check(replace(order, pipeline_config=path, steps=None))
    assert "\n" not in str(said.value)


def command(order: Order, *more: str) -> int:
    words = ["calibrate", order.checkpoint, "--text-encoder", order.text_encoder]
    words += ["--prompts", order.prompts, "--out", order.out, "--steps", str(STEPS), *more]
    return cli.main([str(word) for word in words])


def test_the_command_writes_the_ranges_and_says_how_many(
    order: Order, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = ("--shape", "64x32x1", "--shape", "32x32x9")
    assert command(order, *shapes, "--first", "1", "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert f"ranges of {LINEARS} layers, seen in 2 runs, in" in said
    assert len(ranges(order)) == LINEARS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shape", "64x32"), "shape '64x32' is not WIDTHxHEIGHTxFRAMES"),
        (("--shape", "64x32x1..64x64x1"), "is a range; give each of its shapes"),
        (("--shape", "60x32x1"), "width must be a multiple of 32, not 60"),
    ],
)
def test_a_wrong_option_costs_one_line(
    order: Order, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(order, *words) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert len(complaint.splitlines()) == 1


def test_tinys_prompts_are_captions_and_none_twice() -> None:
    found = prompts.read(ROOT / "tools/tiny/prompts.txt")
    assert len(set(found)) == len(found) == 32
    assert {word for line in found for word in captions.split(line)} <= set(captions.words())
