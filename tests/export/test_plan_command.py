"""`ltx-export plan` from outside: which stages it counts, in which precision, and with what end."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import ltx_trt
from ltx_export import cli
from tests.export.upsamplers import write_upsampler

TINY = Path(ltx_trt.__file__).parent / "ltx_tiny"
CHECKPOINT = TINY / "ltx-tiny.safetensors"
TEXT = ("--text-encoder", str(TINY / "text_encoder"))
SMALL = ("--shape", "256x256x17", "--precision", "bf16")
ALL = ["text_encoder", "transformer", "vae_encoder", "vae_decoder"]


def planned(
    capsys: pytest.CaptureFixture[str], *options: str, checkpoint: Path = CHECKPOINT, code: int = 0
) -> dict[str, Any]:
    assert cli.main(["plan", str(checkpoint), *SMALL, "--json", *options]) == code
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def only(path: Path, *prefixes: str) -> Path:
    """The shipped checkpoint's tensors with these prefixes."""
    with safe_open(CHECKPOINT, "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys() if n.startswith(prefixes)}  # noqa: SIM118
        save_file(tensors, path, file.metadata())
    return path


def latent_channels() -> int:
    with safe_open(CHECKPOINT, "pt") as file:
        channels: int = file.get_tensor("vae.per_channel_statistics.mean-of-means").numel()
    return channels


def test_an_upsampler_is_planned_like_every_other_stage(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    upsampler = write_upsampler(tmp_path / "up.safetensors", latent_channels())
    found = planned(capsys, *TEXT, "--upsampler", str(upsampler), "--gpu", "rtx4090")
    assert list(found["stages"]) == [*ALL, "latent_upsampler"]
    row = found["stages"]["latent_upsampler"]
    assert row["flops_per_call"] > 0
    assert row["activations"] > 0
    assert row["largest_convolution"] > 0
    assert found["gpus"][0]["residency"] == "all resident"


def test_what_has_no_file_is_not_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys)
    assert list(found["stages"]) == ALL[1:]
    assert found["not_counted"] == {"text_encoder": "give --text-encoder FOLDER"}


def test_a_file_of_a_transformer_alone_is_planned_as_that(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = only(tmp_path / "unet.safetensors", "model.")
    found = planned(capsys, checkpoint=path)
    assert list(found["stages"]) == ["transformer"]
    absent = dict.fromkeys(ALL[2:], "not in unet.safetensors")
    assert found["not_counted"] == absent | {"text_encoder": "give --text-encoder FOLDER"}


def test_stages_are_chosen_as_for_an_export(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *TEXT, "--stages", "vae_decoder,text_encoder")
    assert list(found["stages"]) == ["text_encoder", "vae_decoder"]
    assert found["not_counted"] == dict.fromkeys(
        ("transformer", "vae_encoder"), "not among --stages"
    )
    assert planned(capsys, *TEXT, "--stages", "all")["not_counted"] == {}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--stages", "text_encoder"), "the stage text_encoder needs --text-encoder FOLDER"),
        (("--stages", "latent_upsampler"), "the stage latent_upsampler needs --upsampler FILE"),
        (("--stages", "vae_decodre"), "unknown stage 'vae_decodre'; did you mean 'vae_decoder'?"),
        (("--rest-precision", "int8"), "vae_encoder cannot be int8; give --rest-precision one of"),
        (("--text-tokens", "0"), "text tokens must be at least 1, not 0"),
    ],
)
def test_a_wish_that_cannot_be_planned_costs_one_line(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], wanted: str
) -> None:
    assert cli.main(["plan", str(CHECKPOINT), *SMALL, *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"ltx-export: {wanted}")
    assert said.err.count("\n") == 1


def test_a_file_without_any_stage_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = only(tmp_path / "empty.safetensors", "vae.per_channel_statistics.")
    assert cli.main(["plan", str(path)]) == 2
    assert f"{path} has no stage: none of its 2 tensors" in capsys.readouterr().err


def test_turing_can_be_yes_in_fp16_because_the_other_stages_follow(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fp16 = planned(capsys, *TEXT, "--gpu", "rtx2080ti", "--precision", "fp16")
    assert {row["stored"] for row in fp16["stages"].values()} == {"fp16"}
    assert fp16["gpus"][0]["fits"]
    options = ("--gpu", "rtx2080ti", "--precision", "fp16", "--rest-precision", "bf16")
    refused = planned(capsys, *TEXT, *options, code=3)
    assert "bf16 needs SM80" in refused["gpus"][0]["reasons"][0]


def test_a_prompts_length_and_a_timestep_for_each_token_can_be_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = planned(capsys, "--stages", "transformer")["stages"]["transformer"]
    short = planned(capsys, "--stages", "transformer", "--text-tokens", "16")
    each = planned(capsys, "--stages", "transformer", "--conditioning", "0")
    assert short["stages"]["transformer"]["flops_per_call"] < usual["flops_per_call"]
    assert each["stages"]["transformer"]["io"] > usual["io"]


def test_a_preset_of_two_passes_is_planned_at_its_second_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    upsampler = write_upsampler(tmp_path / "up.safetensors", latent_channels())
    words = (*TEXT, "--upsampler", str(upsampler), "--gpu", "rtx4090")
    plain = planned(capsys, *words)
    found = planned(capsys, *words, "--preset", "ltxv-13b-0.9.8-dev")
    assert found["shape"] == {"width": 320, "height": 320, "frames": 17}  # then cut to SMALL
    assert (found["steps"], found["first_steps"], found["branches"]) == (13, 27, 3)
    rows = [document["stages"]["latent_upsampler"] for document in (found, plain)]
    assert rows[0]["flops_per_call"] < rows[1]["flops_per_call"]  # 160x160, 256x256
    whole, each = found["gpus"][0]["run_seconds"], found["gpus"][0]["seconds"]
    once = sum(each[stage] for stage in ("text_encoder", "latent_upsampler", "vae_decoder"))
    assert whole == pytest.approx(once + (13 + 27 / 4) * each["transformer"])


def test_a_preset_says_steps_and_branches_and_is_told_before_the_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = planned(capsys, "--preset", "ltxv-2b-0.9.6-distilled")
    assert (found["steps"], found["first_steps"], found["branches"]) == (8, 0, 1)
    assert cli.main(["plan", str(CHECKPOINT), "--preset", "ltxv-2b-0.9", "--steps", "3"]) == 2
    assert "leave them out" in capsys.readouterr().err
    assert cli.main(["plan", str(CHECKPOINT), *SMALL, "--preset", "ltxv-13b-0.9.8-dev"]) == 0
    assert "13 steps of 3 branches, after 27 steps at " in capsys.readouterr().out
