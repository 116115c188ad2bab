"""The commands from outside: a run, its report, and one line for everything that goes wrong."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines.bundle import Manifest
from ltx_trt import cli
from tests.runtime.conftest import write_transformer

pytest.importorskip("onnxruntime")

MakeBundle = Callable[..., Path]

HEAVY = ("torch", "numpy", "onnxruntime", "av", "PIL", "tokenizers", "yaml")


@pytest.fixture
def folder(make_bundle: MakeBundle) -> Path:
    return make_bundle()


def ltx_trt(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def run(folder: Path, output: Path, *more: object) -> int:
    return ltx_trt("run", "--bundle", folder, "--prompt", "w5 w9", "-o", output, *more)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def report(capsys: pytest.CaptureFixture[str]) -> Any:
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_a_run_writes_a_clip_and_one_line_of_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    av = pytest.importorskip("av")
    sheet = tmp_path / "sheet.png"
    assert run(folder, tmp_path / "out.mp4", "--json", "--contact-sheet", sheet) == 0
    found = report(capsys)
    assert found["output"] == str(tmp_path / "out.mp4")
    assert (found["frames"], found["height"], found["width"]) == (9, 32, 64)
    assert found["seed"] == 171198
    assert len(found["sigmas"]) == 5
    assert found["sigmas_by_pass"] == [found["sigmas"]]
    assert {"text_encoder", "transformer", "vae_decoder", "write"} <= found["seconds"].keys()
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert len(list(container.decode(video=0))) == 9
    assert sheet.stat().st_size > 0
    assert files(tmp_path) == {"bundle", "out.mp4", "sheet.png"}


def test_the_reported_hash_is_of_the_frames(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    assert run(folder, tmp_path / "frames", "--json") == 0
    paths = sorted((tmp_path / "frames").iterdir())
    frames = np.stack([np.asarray(image.open(path)) for path in paths])
    assert report(capsys)["sha256"] == hashlib.sha256(frames.tobytes()).hexdigest()


def test_equal_seeds_give_equal_files_and_others_do_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        wishes = ("--seed", seed, "--num_inference_steps", 1)
        assert run(folder, tmp_path / f"{name}.gif", *wishes) == 0
    a, b, c = ((tmp_path / f"{name}.gif").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert "a.gif: 9 frames of 64 x 32, 1 steps, seed 1" in capsys.readouterr().out


def test_the_originals_spelling_of_flags_is_understood(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wishes = ("--num_frames", 17, "--frame_rate", 12, "--negative_prompt", "w_3", "--json")
    assert run(folder, tmp_path / "o.mp4", *wishes) == 0
    assert (found := report(capsys))["frames"] == 17
    assert found["frame_rate"] == 12


def test_a_pipeline_config_decides_and_its_notes_go_to_stderr(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("num_inference_steps: 2\nstochastic_sampling: true\nprecision: bfloat16\n")
    output = tmp_path / "o.gif"
    assert run(folder, output, "--pipeline_config", config, "--json", "--width", 50) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["sampler"] == "stochastic"
    assert len(found["sigmas"]) == 3
    assert found["width"] == 50
    assert "without effect in the config: precision" in captured.err
    assert "cut out of 9 of 32 x 64" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-o", "clip.avi"), "cannot write .avi"),
        (("-o", "nowhere/clip.mp4"), "there is no folder"),
        (("-o", "o.mp4", "--width", "0"), "width must be"),
        (("-o", "o.mp4", "--height", "-64"), "height must be"),
        (("-o", "o.mp4", "--num-frames", "0"), "frames must be"),
        (("-o", "o.mp4", "--width", "many"), "--width"),
        (("-o", "o.mp4", "--width", "33", "--strict-shape"), "even width"),
        (("-o", "o.mp4", "--width", "50", "--strict-shape"), "multiple of 32"),
        (("-o", "o.mp4", "--num-frames", "10", "--strict-shape"), "8k + 1"),
        (("-o", "o.mp4", "--sampler", "dpm"), "unknown sampler"),
        (("-o", "o.mp4", "--num-inference-steps", "1001"), "from 1 to 1000"),
        (("-o", "o.mp4", "--seed", "18446744073709551616"), "seed"),
        (("-o", "o.mp4", "--frame-rate", "0"), "frame rate"),
        (("-o", "o.mp4", "--prompt", " "), "prompt is empty"),
        (("-o", "o.mp4", "--pipeline-config", "none.yaml"), "none.yaml"),
        (("-o", "o.mp4", "--bundle", "nothing"), "not a bundle"),
        (("-o", "o.mp4", "--contact-sheet", "sheet.jpg"), "contact sheet is a .png"),
        (("-o", "o.mp4", "--conditioning_media_paths", "x"), "conditioning-media-paths"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_nothing_is_written(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ltx_trt("run", "--bundle", folder, "--prompt", "w4", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ltx-trt: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert files(tmp_path) == {"bundle"}


def test_a_spoilt_bundle_is_one_line_and_nothing_is_written(
    make_bundle: MakeBundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def beyond(folder: Path) -> None:
        write_transformer(folder / "transformer.onnx", offset=4096)

    assert run(make_bundle(beyond), tmp_path / "o.mp4") == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1  # ONNX Runtime's own printing included
    assert "stage transformer: cannot load" in captured.err
    assert files(tmp_path) == {"bundle"}


def test_a_changed_file_is_found_before_anything_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "transformer.onnx").open("r+b") as file:
        file.write(b"\0")
    assert run(folder, tmp_path / "o.mp4") == 2
    assert "sha256" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing_and_exits_130(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OnnxRuntimeSession, "__call__", stop)
    assert run(folder, tmp_path / "o.mp4") == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().splitlines()[-1].startswith("ltx-trt: interrupted")
    assert files(tmp_path) == {"bundle"}


def test_without_the_shipped_bundle_the_flag_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Typer has read the default already, so the path is the same and only its folder is gone.
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    assert ltx_trt("run", "--prompt", "w4", "-o", tmp_path / "o.mp4") == 2
    assert "name one with --bundle" in capsys.readouterr().err


def test_info_shows_stages_files_and_defaults(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ltx_trt("info", folder) == 0
    out = capsys.readouterr().out
    for word in ("transformer.onnx", "latents", "tokens", "by-hand.safetensors", "sha256"):
        assert word in out
    for word in ("num_inference_steps", "LinearQuadratic", "float32", "by hand"):
        assert word in out


def test_info_as_json_is_the_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ltx_trt("info", folder, "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert Manifest.model_validate_json(out).name == "by-hand"


@pytest.mark.parametrize("arguments", [(), ("rnu",), ("info", "a", "b"), ("run", "--nope")])
def test_usage_errors_are_one_line_too(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ltx_trt(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ltx-trt: ")
    assert captured.err.count("\n") == 1


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from ltx_trt.cli import main; code = main(['run', '--help']);"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--num-inference-steps" in done.stdout
    assert done.stderr.strip() == "[]"


def test_a_whole_run_never_loads_torch(folder: Path, tmp_path: Path) -> None:
    words = ["run", "--bundle", str(folder), "--prompt", "w4", "-o", str(tmp_path / "o.gif")]
    code = (
        f"import sys; from ltx_trt.cli import main; code = main({words!r});"
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"
