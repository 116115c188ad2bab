"""ltx-trt run --provider: what was chosen runs, or one line says what is missing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ltx_trt import cli

pytest.importorskip("onnxruntime")


def run(bundle: Path, out: Path, *options: str) -> int:
    usual = ("--prompt", "w5", "--width", "64", "--height", "32", "--num-frames", "9")
    steps = ("--num-inference-steps", "2", "--output", str(out / "%04d.png"))
    return cli.main(["run", "--bundle", str(bundle), *usual, *steps, *options])


@pytest.mark.parametrize("words", [(), ("--backend", "onnxruntime")])
def test_the_provider_that_is_chosen_runs(
    make_bundle: Callable[..., Path], tmp_path: Path, words: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert run(make_bundle(), out, "--provider", "cpu", *words) == 0
    assert len(list(out.glob("*.png"))) == 9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--provider", "cuda"), "pip install 'ltx-trt[onnxruntime-gpu]'"),
        (("--provider", "tensorrt-rtx"), "pip install onnxruntime-ep-nv-tensorrt-rtx"),
        (("--provider", "cpu", "--backend", "tensorrt"), "leave one of them out"),
    ],
)
def test_what_is_missing_costs_one_line(
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    options: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(make_bundle(), tmp_path, *options) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert complaint.endswith(f"{said}\n")
