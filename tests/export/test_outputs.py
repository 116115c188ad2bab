"""A file that will be written is looked at before the work."""

import os
from pathlib import Path

import pytest

from ltx_engines.errors import UserError
from ltx_export import outputs, sensitivity_report


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    return {"the checkpoint": tmp_path / "a.safetensors", "the text encoder": folder}


def test_a_new_file_in_a_folder_is_fine(tmp_path: Path, inputs: dict[str, Path]) -> None:
    outputs.check(tmp_path / "new.json", inputs, overwrite=False)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_no_name_of_an_input_is_replaced(
    tmp_path: Path, inputs: dict[str, Path], link: object
) -> None:
    assert callable(link)
    link(inputs["the checkpoint"], tmp_path / "other.json")
    for name in ("a.safetensors", "other.json"):
        with pytest.raises(UserError, match="is the checkpoint itself"):
            outputs.check(tmp_path / name, inputs, overwrite=True)


def test_nothing_is_written_into_an_input_folder(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="is in the text encoder"):
        outputs.check(tmp_path / "text_encoder/config.json", inputs, overwrite=True)


def test_folders_and_missing_folders_are_said(tmp_path: Path, inputs: dict[str, Path]) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        outputs.check(tmp_path / "folder", inputs, overwrite=True)
    with pytest.raises(UserError, match=r"--plot .* there is no folder"):
        outputs.check(tmp_path / "no/x.png", inputs, overwrite=True, option="--plot")


def test_a_device_is_not_replaced(inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="is a device"):
        outputs.check(Path(os.devnull), inputs, overwrite=True)


def test_what_is_there_is_kept_unless_told(tmp_path: Path, inputs: dict[str, Path]) -> None:
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(UserError, match="--overwrite, or choose another --out"):
        outputs.check(tmp_path / "old.json", inputs, overwrite=False)
    outputs.check(tmp_path / "old.json", inputs, overwrite=True)


def test_a_sensitivity_report_is_no_input_and_its_files_are_two(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match="is the checkpoint itself"):
        sensitivity_report.check(inputs["the checkpoint"], None, inputs, overwrite=True)
    same = tmp_path / "x.png"
    with pytest.raises(UserError, match=r"--plot .* is --out itself"):
        sensitivity_report.check(same, same, inputs, overwrite=True)
