"""The matrix with random weights: its models are the releases', and what it expects of each run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import preset_matrix
from ltx_engines.errors import UserError
from ltx_engines.presets import PRESETS, Preset
from ltx_ref.ltx_video.config import parse_config
from preset_matrix import FLAGS, Outcome, expected_steps, is_refused, metadata


@pytest.mark.parametrize("name", PRESETS)
def test_each_block_that_a_preset_names_is_in_its_model(name: str) -> None:
    preset = PRESETS[name]
    config = parse_config(metadata(preset))
    assert config.transformer.num_layers == {"2B": 28, "13B": 48}[preset.release.size]
    assert (config.allowed_inference_steps is not None) == preset.release.distilled
    assert config.transformer.causal_temporal_positioning == (config.generation == "0.9.5")


def test_the_larger_model_is_wider() -> None:
    small, large = (
        parse_config(metadata(PRESETS[name])).transformer.inner_dim
        for name in ("ltxv-2b-0.9.5", "ltxv-13b-0.9.8-dev")
    )
    assert large == 2 * small


def test_only_distilled_models_refuse_flags_and_each_of_them_some() -> None:
    refusing = {p.name for p in PRESETS.values() for flags in FLAGS if is_refused(p, flags)}
    assert refusing == {p.name for p in PRESETS.values() if p.release.distilled}
    assert not any(is_refused(preset, "none") for preset in PRESETS.values())


def test_six_steps_of_thirty_are_shared_by_two_passes() -> None:
    assert expected_steps(PRESETS["ltxv-13b-0.9.8-dev"], "steps") == 8
    assert expected_steps(PRESETS["ltxv-13b-0.9.8-dev"], "none") == 40
    assert expected_steps(PRESETS["ltxv-2b-0.9.5"], "steps") == 6


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object) -> None:
        raise UserError("not with this model")

    monkeypatch.setattr(preset_matrix, "resolve", resolve)


class Nothing:
    bundle = None


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("name", "flags", "right"),
    [
        ("ltxv-2b-0.9.8-distilled", "guidance", True),
        ("ltxv-2b-0.9.8-distilled", "none", False),
        ("ltxv-13b-0.9.8-dev", "guidance", False),
    ],
)
def test_a_refusal_is_right_where_the_matrix_says_so(name: str, flags: str, right: bool) -> None:
    stages: Any = Nothing()
    outcome = preset_matrix.attempt(PRESETS[name], flags, stages)
    assert (outcome.right, outcome.said) == (right, "not with this model")


def test_one_wrong_combination_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def outcomes(chosen: list[Preset]) -> Iterator[Outcome]:
        yield Outcome(chosen[0].name, "none", right, 0.1, 40, "" if right else "no frames")

    monkeypatch.setattr(preset_matrix, "outcomes", outcomes)
    monkeypatch.setattr(preset_matrix, "trace_once", lambda: None)  # what it changes stays
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    for right, code in ((True, 0), (False, 1)):
        words = ["preset_matrix", "--only", "ltxv-2b-0.9", "--out", str(tmp_path / "a.json")]
        monkeypatch.setattr("sys.argv", words)
        assert preset_matrix.main() == code
        assert ("no frames" in capsys.readouterr().out) != right
