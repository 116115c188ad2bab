"""What the benchmark of block groups calls met."""

from typing import Any

import numpy as np
import pytest

import split

KEY = {"part": {"index": 0, "of": 2, "first": 0, "end": 3}, "profiles": [{}]}
COUNTS = {"products in FP8": 30, "fused attentions": 6, "kernels": 90, "score kernels": 0}
PEAKS = {"RssAnon": 6, "RssFile": 4, "VmHWM": 9}


def met(counts: dict[str, int], limit: int = 10) -> bool:
    engine: dict[str, Any] = {"file": "e", "key": KEY, "counts": counts, "activations": 5}
    row = split._row(engine, {"files": {"e": {"bytes": 7}}}, PEAKS)
    found = split.judged({"parts": [row]}, limit)["met"]
    assert found.keys() == {"blocks 0 to 2"}
    return bool(found["blocks 0 to 2"])


def test_a_group_is_met_within_its_memory_and_with_the_recipes_kernels() -> None:
    assert met(COUNTS)
    assert not met(COUNTS, limit=8)


@pytest.mark.parametrize("count", ["products in FP8", "fused attentions", "score kernels"])
def test_one_kernel_that_is_not_the_recipes_is_enough_to_miss(count: str) -> None:
    assert not met(COUNTS | {count: COUNTS[count] + 1})


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32"])
def test_weights_are_numbers_of_the_wished_size_and_scales_are_positive(dtype: str) -> None:
    data = split.numbers(dtype, 4096)
    assert len(data) == 4096
    if dtype == "F8_E4M3":
        codes = np.frombuffer(data, np.uint8)
        assert not set(codes[(codes & 0x7F) == 0x7F])  # NaN
        assert len(set(codes)) > 100
    elif dtype == "BF16":
        wide = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        assert 0 < np.abs(wide).max() < 0.1
    else:
        assert set(np.frombuffer(data, np.float32)) == {split.SCALE}


def test_memory_is_read_of_what_the_kernel_says_in_kilobytes() -> None:
    status = "VmHWM:\t    2048 kB\nRssAnon:\t 1000 kB\n"
    assert [split._bytes(status, kind) for kind in split.KINDS] == [1_024_000, 0, 2_097_152]
