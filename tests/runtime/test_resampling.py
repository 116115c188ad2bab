"""Resizing against torch, and the laws of any resizing."""

import numpy as np
import pytest

from ltx_trt.resampling import resize

torch = pytest.importorskip("torch")

PASSES = ((448, 800), (704, 1216))


@pytest.mark.parametrize(
    ("old", "new"),
    [((40, 56), (64, 96)), ((70, 33), (32, 64)), ((64, 64), (64, 97)), ((1, 1), (5, 7)), PASSES],
)
def test_sizes_change_as_in_torch(old: tuple[int, int], new: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).standard_normal((1, 3, 2, *old), dtype=np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(pixels[0]), size=new, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(resize(pixels, *new)[0], wanted.numpy(), atol=2e-6)


def test_the_same_size_is_the_same_array() -> None:
    pixels = np.zeros((1, 3, 1, 32, 64), np.float32)
    assert resize(pixels, 32, 64) is pixels


def test_one_colour_stays_that_colour() -> None:
    grey = np.full((1, 3, 1, 21, 34), 0.3, np.float32)
    np.testing.assert_allclose(resize(grey, 50, 20), 0.3, rtol=1e-6)
