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
from tests.export.checkpoints import (
    checkpoint_tensors,
    config,
    write_checkpoint,
    write_text_encoder,
)
from tests.export.conftest import Files


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
        ("pipeline_type: multi-scale", "need a latent_upsampler stage"),
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
    ],
)
def test_options_that_are_not_known(
    capsys: pytest.CaptureFixture[str], files: Files, out: Path, options: list[str], said: str
) -> None:
    assert said in refusal(capsys, files, out, *options)


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
