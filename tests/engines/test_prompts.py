"""A file of prompts: lines, comments, and files that are none."""

from pathlib import Path

import pytest

from ltx_engines import prompts
from ltx_engines.errors import UserError


def test_each_line_is_a_prompt_but_for_comments_and_blanks(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# of the tests\n  a cat \n\n a #1 fan\r\n\t\n", encoding="utf-8")
    assert prompts.read(file) == ("a cat", "a #1 fan")


@pytest.mark.parametrize("text", ["", "\n# nothing\n   \n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.txt").write_text(text)
    with pytest.raises(UserError, match=r"empty\.txt has no prompts"):
        prompts.read(tmp_path / "empty.txt")


def test_a_picture_is_not_a_file_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "clip.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match=r"clip\.png is not a text in UTF-8 \(byte 0\)"):
        prompts.read(tmp_path / "clip.png")


def test_a_missing_file_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # which the commands say in one line
        prompts.read(tmp_path / "none.txt")
