"""Amounts of memory are read as people write them, and nothing else is taken for one."""

import pytest

from ltx_engines import byte_sizes
from ltx_engines.errors import UserError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        (" 1.5 MiB ", 3 * 2**19),
        ("7500MB", 75 * 10**8),
        ("2 TB", 2 * 10**12),
        ("1KB", 1000),
        ("123", 123),
    ],
)
def test_units_are_powers_of_1000_or_of_1024(text: str, size: int) -> None:
    assert byte_sizes.parse(text, "--device-memory") == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "8 G", "-1GiB", "8GiBs", "1e9", "8,5GB", "80 %", "٣GB"]
)
def test_what_is_no_amount_is_refused_with_the_option(text: str) -> None:
    with pytest.raises(UserError, match=r"^--device-memory .*not an amount of memory; write"):
        byte_sizes.parse(text, "--device-memory")


@pytest.mark.parametrize("text", ["0", "0GiB", "0.4B"])
def test_nothing_is_no_amount(text: str) -> None:
    with pytest.raises(UserError, match="must be more than nothing"):
        byte_sizes.parse(text, "--device-memory")


def test_what_is_said_is_short_and_reads_back_nearly_the_same() -> None:
    assert byte_sizes.said(1000) == "1000 bytes"
    assert byte_sizes.said(6_550_000_000) == "6.10 GiB"
    for size in (2**20, 3 * 2**21, 7 * 10**9, 5 * 2**40):
        assert byte_sizes.parse(byte_sizes.said(size), "-") == pytest.approx(size, rel=0.005)
