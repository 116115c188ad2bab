"""The base install, built as a wheel and put into an empty environment: a runtime without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle moves right on a blue background"


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a fresh environment with the wheel and its extra [onnxruntime]."""
    folder = tmp_path_factory.mktemp("runtime")
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("ltx_trt-*.whl")
    _run(sys.executable, "-m", "venv", folder / "venv")
    bin_ = folder / "venv/bin"
    _run(bin_ / "pip", "install", "-q", f"{wheel}[onnxruntime]")
    return bin_


def _run(*command: object, code: int = 0, cwd: Path | None = None) -> tuple[str, str]:
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == code, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout, result.stderr


def test_the_runtime_environment_has_no_torch(runtime: Path) -> None:
    names = {row["name"] for row in json.loads(_run(runtime / "pip", "list", "--format=json")[0])}
    assert "onnxruntime" in names
    assert not names & {"torch", "onnx", "onnxscript", "transformers", "diffusers", "safetensors"}


def test_a_prompt_becomes_a_video_without_torch(runtime: Path, tmp_path: Path) -> None:
    command = (runtime / "ltx-trt", "run", "--prompt", PROMPT, "-o", "clip.mp4", "--json")
    out, _ = _run(*command, "--num-inference-steps", "3", cwd=tmp_path)
    report = json.loads(out)
    assert report["seed"] == 171198
    assert (tmp_path / "clip.mp4").read_bytes()[4:8] == b"ftyp"
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_the_same_seed_gives_the_same_bytes_in_another_process(
    runtime: Path, tmp_path: Path
) -> None:
    for name in ("a.mp4", "b.mp4"):
        command = (runtime / "ltx-trt", "run", "--prompt", PROMPT, "-o", name)
        _run(*command, "--num-inference-steps", "3", "--seed", "5", cwd=tmp_path)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_the_exporter_names_its_extra_when_it_is_missing(runtime: Path, tmp_path: Path) -> None:
    tiny = ROOT / "runtime/ltx_trt/ltx_tiny"
    command = (runtime / "ltx-export", "onnx", tiny / "ltx-tiny.safetensors")
    options = ("--text-encoder", tiny / "text_encoder", "--out", tmp_path / "bundle")
    _, complaint = _run(*command, *options, code=2)
    assert complaint.count("\n") == 1
    assert "ltx-trt[export]" in complaint
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="session")
def exporter(runtime: Path) -> Path:
    """Another environment, with the extra [export] too."""
    (wheel,) = runtime.parents[1].glob("ltx_trt-*.whl")
    folder = runtime.parents[1] / "exporter"
    _run(sys.executable, "-m", "venv", folder)
    _run(folder / "bin/pip", "install", "-q", f"{wheel}[onnxruntime,export]")
    return folder / "bin"


def test_a_model_with_templates_is_exported_and_played_without_torch(
    exporter: Path, tmp_path: Path
) -> None:
    names = {row["name"] for row in json.loads(_run(exporter / "pip", "list", "--format=json")[0])}
    assert not names & {"torch", "onnxscript", "transformers", "diffusers", "safetensors"}
    tiny = ROOT / "runtime/ltx_trt/ltx_tiny"
    command = (exporter / "ltx-export", "onnx", tiny / "ltx-tiny.safetensors")
    files = ("--text-encoder", tiny / "text_encoder")
    small = ("--pipeline-config", ROOT / "tools/tiny/ltx-tiny.yaml")
    _run(*command, *files, *small, "--out", tmp_path / "bundle")
    run = (exporter / "ltx-trt", "run", "--bundle", tmp_path / "bundle", "--prompt", PROMPT)
    _run(*run, "-o", "clip.mp4", "--num-inference-steps", "2", cwd=tmp_path)
    assert (tmp_path / "clip.mp4").read_bytes()[4:8] == b"ftyp"


def test_help_comes_from_the_installed_commands(runtime: Path) -> None:
    for command in ("ltx-trt", "ltx-export"):
        assert "Usage" in _run(runtime / command, "--help")[0]
