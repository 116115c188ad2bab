"""What build-engine refuses of the shipped model before a builder is started, with the cure."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")

from ltx_engines.errors import UserError
from ltx_export import build_process, cli

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
CHECKPOINT = (str(TINY / "ltx-tiny.safetensors"), "--text-encoder", str(TINY / "text_encoder"))
LARGE = "3840x2176x121"

Built = Callable[..., str]


@pytest.fixture
def built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Built:
    """What a build says that ends with code 2, without a builder."""

    def asked(*_: object) -> None:
        raise UserError("the builder was asked")

    def run(*words: str) -> str:
        assert cli.main(["build-engine", *words, "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    monkeypatch.setattr(build_process, "run", asked)
    return run


@pytest.mark.parametrize(
    ("stage", "gpu", "said"),
    [
        ("transformer", "rtx4090", "give --precision bf16 (or fp16), or accept that with --allow"),
        ("text_encoder", "rtx4090", "give --precision bf16 (or fp16), or accept that with --allow"),
        ("transformer", "sm75", "give --precision fp16, or accept that with --allow-fallback"),
    ],
)
def test_float32_is_refused_before_a_graph_is_made_with_the_precisions_there_are(
    stage: str, gpu: str, said: str, built: Built, tmp_path: Path
) -> None:
    words = (*CHECKPOINT, "--stages", stage, "--gpu", gpu, "--shape", "96x96x17")
    message = built(*words)
    assert f"{stage} is float32, for which no builder has attention in one kernel; {said}" in (
        message
    )
    assert not (tmp_path / "out").exists()


def test_graphs_in_float32_are_refused_unless_a_fallback_is_accepted(built: Built) -> None:
    words = (str(TINY), "--stages", "transformer", "--gpu", "sm89", "--shape", "96x96x17")
    assert "transformer is float32, for which no attention kernel is; export it" in built(*words)
    assert "the builder was asked" in built(*words, "--allow-fallback")


@pytest.mark.parametrize("size", ["--shape", "--vae-tile"])
def test_volumes_that_a_builder_cannot_count_are_refused_with_a_tile_that_it_can(
    size: str, built: Built, caplog: pytest.LogCaptureFixture
) -> None:
    words = (str(TINY), "--stages", "vae_decoder", "--gpu", "rtx4090")
    said = built(*words, size, LARGE)
    assert "counts to 2,147,483,647; give --vae-tile " in said
    assert "--ignore-limits builds all the same" in said
    tile = re.search(r"--vae-tile (\d+x\d+x\d+)", said)
    assert tile is not None
    assert not caplog.text
    assert "the builder was asked" in built(*words, "--shape", LARGE, "--vae-tile", tile[1])
    assert not caplog.text
    assert "the builder was asked" in built(*words, size, LARGE, "--ignore-limits")
    assert "vae_decoder: a convolution of 3," in caplog.text
