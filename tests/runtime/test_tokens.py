"""Prompts are padded and cut as the original's tokenizer does it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.errors import UserError
from ltx_trt.tokens import load_tokenizer
from tests.runtime.conftest import LENGTH


def test_a_prompt_is_padded_behind_its_end_token(bundle: Bundle) -> None:
    found = load_tokenizer(bundle)("  w5 w7\n")
    assert found.ids == (5, 7, 1, *[0] * (LENGTH - 3))
    assert found.mask == (1, 1, 1, *[0] * (LENGTH - 3))
    assert found.notes("prompt") == ()


def test_a_long_prompt_is_cut_before_its_end_token_and_this_is_said(bundle: Bundle) -> None:
    found = load_tokenizer(bundle)(" ".join(["w9"] * 20))
    assert found.ids == (*[9] * (LENGTH - 1), 1)
    assert found.mask == (1,) * LENGTH
    assert found.notes("prompt") == ("the prompt has 21 tokens, the last 9 are cut off",)


def test_an_empty_negative_prompt_is_its_end_token(bundle: Bundle) -> None:
    assert sum(load_tokenizer(bundle)("").mask) == 1


def test_a_spoilt_tokenizer_costs_one_line(make_bundle: Callable[..., Path]) -> None:
    def spoil(folder: Path) -> None:
        (folder / "text_encoder" / "tokenizer.json").write_text("{}")

    with pytest.raises(UserError, match=r"is not a tokenizer\.json") as told:
        load_tokenizer(open_bundle(make_bundle(spoil)))
    assert "\n" not in str(told.value)
