"""Whatever is wrong with the input costs one line and exit code 2, and nothing is written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ltx_export import cli, onnx_bundle
from ltx_ref.checkpoint import read_header
from tests.export.checkpoints import (
    checkpoint_tensors,
    config,
    write_checkpoint,
    write_text_encoder,
)
from tests.export.conftest import Files
from tests.export.loras import factors, tensors, write
from tests.export.upsamplers import write_upsampler


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "bundle"


def refusal(capsys: pytest.CaptureFixture[str], files: Files, out: Path, *options: str) -> str:
    """What is said, after a look that nothing else happened."""
    before = sorted(out.parent.rglob("*"))
    arguments = [str(files.checkpoint), "--text-encoder", str(files.text_encoder)]
    assert cli.main(["onnx", *arguments, "--out", str(out), *options]) == 2
    assert sorted(out.parent.rglob("*")) == before
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("ltx-export: ")]
    assert len(lines) == 1
    assert printed.err.splitlines()[-1] == lines[0]
    return lines[0].removeprefix("ltx-export: ")


def with_checkpoint(files: Files, path: Path) -> Files:
    return Files(path, files.text_encoder)


def test_a_truncated_checkpoint(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.safetensors"
    short.write_bytes(files.checkpoint.read_bytes()[:-8])
    assert "is truncated" in refusal(capsys, with_checkpoint(files, short), out)


def test_a_missing_checkpoint(capsys: pytest.CaptureFixture[str], files: Files, out: Path) -> None:
    absent = with_checkpoint(files, out.parent / "none.safetensors")
    assert refusal(capsys, absent, out).endswith("none.safetensors: No such file or directory")


QUERY = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[QUERY]


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[QUERY] = torch.zeros(4, 4)


def surplus(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.diffusion_model.lora_a"] = torch.zeros(4)


def mix(tensors: dict[str, torch.Tensor]) -> None:
    tensors[QUERY] = tensors[QUERY].half()


def quantize(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if name.startswith("model."):
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, f"1 missing: {QUERY}"),
        (reshape, f"1 of wrong shape: {QUERY} is [4, 4], wanted [40, 40]"),
        (surplus, "1 unexpected: model.diffusion_model.lora_a"),
        (mix, f"several element types (64 F32, 1 F16; {QUERY} is F16)"),
        (quantize, "the weights of the transformer are F8_E4M3"),
    ],
)
def test_weights_that_do_not_fit(
    capsys: pytest.CaptureFixture[str],
    files: Files,
    out: Path,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    said: str,
) -> None:
    tensors = checkpoint_tensors(config("0.9.5"), torch.float32)
    change(tensors)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, {"config": json.dumps(config("0.9.5"))})
    assert said in refusal(capsys, with_checkpoint(files, path), out)


def test_an_unknown_config_key_and_the_way_past_it(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path
) -> None:
    table = config("0.9.5")
    table["transformer"]["num_layer"] = 2
    wrong = with_checkpoint(
        files, write_checkpoint(tmp_path / "odd.safetensors", table_known(table))
    )
    rewrite_config(wrong.checkpoint, table)
    said = refusal(capsys, wrong, out)
    assert "unknown key 'num_layer' in transformer" in said
    assert "did you mean 'num_layers'?" in said
    order = onnx_bundle.Order(
        wrong.checkpoint, out, text_encoder=wrong.text_encoder, ignore_config_keys=("num_layer",)
    )
    assert onnx_bundle.check(order).precisions["transformer"] == "float32"


def table_known(table: dict[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in table["transformer"].items() if key != "num_layer"}
    return {**table, "transformer": known}


def rewrite_config(path: Path, table: dict[str, Any]) -> None:
    tensors = checkpoint_tensors(table_known(table), torch.float32)
    save_file(tensors, path, {"config": json.dumps(table)})


def test_a_text_encoder_of_another_width(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path
) -> None:
    wide = Files(files.checkpoint, write_text_encoder(tmp_path / "wide", width=32))
    assert "has width 32, the checkpoint reads text of width 24" in refusal(capsys, wide, out)


def test_a_text_encoder_without_tokenizer(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path
) -> None:
    folder = write_text_encoder(tmp_path / "home" / "t5")
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json or spiece.model" in refusal(
        capsys, Files(files.checkpoint, folder), out
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("guidence_scale: 3", "unknown key guidence_scale; did you mean 'guidance_scale'?"),
        ("skip_block_list: [19]", "names block 19, this model has 0 to 1"),
        ("guidance_scale: much", "guidance_scale should"),
        ("pipeline_type: multi-scale", "first_pass is missing"),
        ("stg_mode: residual", "changes nothing in these models"),
        ("stg_mode: values", "unknown stg_mode 'values'"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_pipeline_config_that_does_not_fit(
    capsys: pytest.CaptureFixture[str],
    files: Files,
    out: Path,
    tmp_path: Path,
    text: str,
    said: str,
) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text, encoding="utf-8")
    assert said in refusal(capsys, files, out, "--pipeline-config", str(path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stages", "vae_encoder,transfomer"], "did you mean 'transformer'?"),
        (["--weights", "move"], "'move' is not one of"),
        (["--stg-mode", "residual"], "'residual' is not one of"),
        (["--opset", "21"], "--opset 21 is not one of 20, 23"),
        (["--precision", "fp8"], "'fp8' is not one of"),
        (["--stages", "latent_upsampler"], "the stage latent_upsampler needs --upsampler FILE"),
    ],
)
def test_options_that_are_not_known(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, options: list[str], said: str
) -> None:
    assert said in refusal(capsys, files, out, *options)


def test_a_stage_that_wants_a_file_that_was_not_given(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path
) -> None:
    assert cli.main(["onnx", str(files.checkpoint), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ltx-export: the stage text_encoder needs --text-encoder FOLDER; ")
    assert said.count("\n") == 1
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("stage", ["transformer", "vae_encoder", "vae_decoder"])
def test_a_stage_that_the_checkpoint_lacks(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path, stage: str
) -> None:
    prefix = {"transformer": "model.", "vae_encoder": "vae.encoder", "vae_decoder": "vae.decoder"}
    tensors = checkpoint_tensors(config("0.9.5"), torch.float32)
    path = tmp_path / "part.safetensors"
    kept = {name: t for name, t in tensors.items() if not name.startswith(prefix[stage])}
    save_file(kept, path, {"config": json.dumps(config("0.9.5"))})
    said = refusal(capsys, with_checkpoint(files, path), out, "--stages", stage)
    assert said.startswith(f"{path} has no {stage}: none of its ")
    assert said.endswith("choose other stages with --stages")


def test_an_index_that_names_a_missing_file(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path
) -> None:
    folder = write_text_encoder(tmp_path / "t5", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    said = refusal(capsys, Files(files.checkpoint, folder), out)
    index = folder / "model.safetensors.index.json"
    shard = "model-00002-of-00002.safetensors"
    assert said == f"{index} names {shard}, which is not there; download it again"


def test_an_upsampler_of_other_latents(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path
) -> None:
    path = write_upsampler(tmp_path / "upsampler.safetensors", channels=16)
    assert "16" in refusal(capsys, files, out, "--upsampler", str(path))
    assert "no 'config' metadata" in refusal(
        capsys, files, out, "--upsampler", str(files.text_encoder / SHARD)
    )


@pytest.mark.parametrize(
    "options", [(), ("--precision", "bfloat16")], ids=["all stay", "converted"]
)
def test_references_to_two_folders(
    capsys: pytest.CaptureFixture[str],
    files: Files,
    out: Path,
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    """An upsampler wants the checkpoint's statistics too; a runtime maps from one folder."""
    dtype = torch.bfloat16 if options else torch.float32
    path = write_upsampler(tmp_path / "upsampler.safetensors", 12, dtype)
    said = refusal(capsys, files, out, "--upsampler", str(path), "--weights", "refer", *options)
    assert said.startswith("the stage latent_upsampler has weights in ")
    assert said.endswith("wants in one folder; use --weights link or copy")
    assert str(path) in said


SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("stage", ["vae_decoder", "vae_encoder"])
def test_bfloat16_convolutions_at_opset_20(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path, stage: str
) -> None:
    path = write_checkpoint(tmp_path / "half.safetensors", config("0.9.5"), dtype=torch.bfloat16)
    half = with_checkpoint(files, path)
    said = refusal(capsys, half, out, "--stages", stage, "--opset", "20")
    assert said == (
        f"opset 20 has no bfloat16 convolution, which the stage {stage} needs; "
        "choose --opset 23, or --precision float32"
    )


@pytest.mark.parametrize(
    "scale", ["model.diffusion_model.transformer_blocks.0.attn1.to_q.weight_scale", "scaled_fp8"]
)
def test_8_bit_weights_with_scales(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path, scale: str
) -> None:
    tensors = checkpoint_tensors(config("0.9.5"), torch.float32)
    tensors[QUERY] = tensors[QUERY].to(torch.float8_e4m3fn)
    tensors[scale] = torch.ones(())
    path = tmp_path / "scaled.safetensors"
    save_file(tensors, path, {"config": json.dumps(config("0.9.5"))})
    said = refusal(capsys, with_checkpoint(files, path), out, "--ignore-config-key", "x")
    assert scale in said


def lora_of(files: Files, path: Path) -> Path:
    return write(path, tensors(factors(read_header(files.checkpoint).shapes())))


def test_a_lora_for_another_model(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path
) -> None:
    wide = config("0.9.5")
    wide["transformer"] |= {"attention_head_dim": 24, "cross_attention_dim": 48}
    other = with_checkpoint(files, write_checkpoint(tmp_path / "wide.safetensors", wide))
    path = lora_of(other, tmp_path / "other.safetensors")
    said = refusal(capsys, files, out, "--lora", f"{path}:0.5", "--stages", "transformer")
    assert said.startswith(f"{path}: ")
    assert "take a LoRA that was trained on this model" in said


@pytest.mark.parametrize("strength", ["-0,5", "--0.5", "0.5x", "nan"])
def test_a_strength_with_a_typo(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path, strength: str
) -> None:
    path = lora_of(files, tmp_path / "lora.safetensors")
    wish = f"{path}:{strength}"
    said = refusal(capsys, files, out, "--lora", wish)
    assert said.startswith(f"--lora {wish}: the strength '{strength}' is not a finite number")
    target = out.parent / "fused.safetensors"
    arguments = ["lora", wish, "--checkpoint", str(files.checkpoint), "--out", str(target)]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith(f"ltx-export: --lora {wish}: the strength")
    assert not list(out.parent.iterdir())


def test_a_place_where_nothing_can_be_written(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path
) -> None:
    (out.parent / "file").write_text("", encoding="utf-8")
    assert "is not a folder" in refusal(capsys, files, out.parent / "file" / "bundle")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path
) -> None:
    out.parent.chmod(0o500)
    assert "one may write in" in refusal(capsys, files, out)


def test_a_folder_that_is_no_bundle(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path
) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("", encoding="utf-8")
    assert "neither empty nor a bundle" in refusal(capsys, files, out, "--overwrite")


def test_a_hard_link_to_another_file_system(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path
) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == out.parent.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    path = write_checkpoint(elsewhere / f"{os.getpid()}.safetensors", config("0.9.5"))
    try:
        assert "use --weights copy" in refusal(capsys, with_checkpoint(files, path), out)
    finally:
        path.unlink()


def test_a_hard_link_that_the_system_refuses(
    capsys: pytest.CaptureFixture[str],
    files: Files,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    said = refusal(capsys, files, out, "--stages", "text_encoder")
    assert "(Operation not permitted); use --weights copy" in said


def test_ctrl_c_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    files: Files,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_bundle, "export", interrupt)
    arguments = [str(files.checkpoint), "--text-encoder", str(files.text_encoder)]
    assert cli.main(["onnx", *arguments, "--out", str(out)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(out.parent.iterdir())


def test_two_files_of_one_name_are_told_apart_before_one_overwrites_the_other(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    path = write_upsampler(tmp_path / "other" / files.checkpoint.name, 12)
    for how in ("copy", "link"):
        said = refusal(capsys, files, out, "--upsampler", str(path), "--weights", how)
        assert f"would both be {files.checkpoint.name} in the bundle; rename one" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("transformer.onnx", "the graph of transformer would both be transformer.onnx"),
        ("manifest.json", "the manifest would both be manifest.json"),
        ("a\\b.safetensors", "a file of that name cannot be in a bundle; rename it"),
    ],
)
def test_a_checkpoint_with_the_name_of_another_file_of_the_bundle(
    capsys: pytest.CaptureFixture[str],
    files: Files,
    out: Path,
    tmp_path: Path,
    name: str,
    said: str,
) -> None:
    os.link(files.checkpoint, tmp_path / name)
    assert said in refusal(capsys, with_checkpoint(files, tmp_path / name), out)


def test_a_bundle_does_not_replace_the_files_that_it_refers_to(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path
) -> None:
    made = ("onnx", str(files.checkpoint), "--stages", "transformer", "--out", str(out))
    assert cli.main([*made, "--weights", "copy"]) == 0
    capsys.readouterr()
    inside = with_checkpoint(files, out / files.checkpoint.name)
    said = refusal(capsys, inside, out, "--weights", "refer", "--overwrite")
    assert "lies in" in said
    assert "which is replaced" in said
    assert inside.checkpoint.is_file()


def test_an_upscaler_without_its_stage_and_in_the_checkpoints_place(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path
) -> None:
    path = write_upsampler(tmp_path / "upsampler.safetensors", 12)
    said = refusal(capsys, files, out, "--upsampler", str(path), "--stages", "transformer")
    assert "--upsampler has no effect" in said
    said = refusal(capsys, with_checkpoint(files, path), out)
    assert said.endswith("upsampler.safetensors is a latent upscaler; give it with --upsampler")


def test_words_that_say_nothing(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, tmp_path: Path
) -> None:
    assert "--name is empty" in refusal(capsys, files, out, "--name", "")
    assert "all means each" in refusal(capsys, files, out, "--stages", "all,transformer")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}", encoding="utf-8")
    assert "is an index of shards" in refusal(capsys, with_checkpoint(files, index), out)
