"""Pictures prepared as the original prepares them, bit by bit, and what cannot be prepared.

The original's `inference.py` runs as it is. Two packages that only it needs are stood in for: the
two functions of torchvision are written with torch, as torchvision writes them.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ltx_engines.errors import UserError
from ltx_trt import preprocessing
from ltx_trt.preprocessing import Picture

torch = pytest.importorskip("torch")
image = pytest.importorskip("PIL.Image")


def to_tensor(picture: Any) -> Any:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)


def gaussian_blur(tensor: Any, kernel_size: int, sigma: float) -> Any:
    half = (kernel_size - 1) / 2
    line = torch.exp(-0.5 * (torch.linspace(-half, half, kernel_size) / sigma).pow(2))
    line = line / line.sum()
    square = torch.mm(line[:, None], line[None]).expand(3, 1, kernel_size, kernel_size)
    around = torch.nn.functional.pad(tensor[None], [kernel_size // 2] * 4, mode="reflect")
    return torch.nn.functional.conv2d(around, square, groups=3)[0]


@pytest.fixture(scope="module")
def original() -> Iterator[ModuleType]:
    pytest.importorskip("ltx_video.pipelines.pipeline_ltx_video")
    functional = ModuleType("torchvision.transforms.functional")
    functional.to_tensor, functional.gaussian_blur = to_tensor, gaussian_blur  # type: ignore[attr-defined]
    names = ("torchvision", "torchvision.transforms", "imageio")
    stubs = {name: ModuleType(name) for name in names} | {functional.__name__: functional}
    stubs["torchvision"].transforms = stubs["torchvision.transforms"]  # type: ignore[attr-defined]
    stubs["torchvision.transforms"].functional = functional  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        yield pytest.importorskip("ltx_video.inference")


def drawn(rows: int, columns: int, seed: int = 0) -> Picture:
    """Waves and noise: neither flat nor only noise, which x264 would blur away."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:rows, :columns]
    waves = np.stack([128 + 100 * np.sin(x / 9), 128 + 90 * np.cos(y / 7 + x / 20), 2.0 * y], -1)
    return np.clip(waves + rng.normal(0, 4, waves.shape), 0, 255).astype(np.uint8)


SIZES = [
    ((90, 130), (64, 96)),
    ((64, 64), (64, 64)),
    ((37, 300), (128, 128)),
    ((130, 70), (50, 70)),
    ((301, 513), (160, 256)),
]


@pytest.mark.parametrize(("found", "wished"), SIZES)
def test_a_picture_is_prepared_as_the_original_does(
    original: ModuleType, tmp_path: Path, found: tuple[int, int], wished: tuple[int, int]
) -> None:
    image.fromarray(drawn(*found)).save(tmp_path / "a.png")
    height, width = wished
    padding = original.calculate_padding(height, width, height + -height % 32, width + -width % 32)
    load = (str(tmp_path / "a.png"), height, width, 9, padding)
    held = original.load_media_file(*load, just_crop=True)
    begun = original.load_media_file(*load)
    np.testing.assert_array_equal(preprocessing.prepare(drawn(*found), *wished), held[0, :, 0])
    ours = preprocessing.prepare_resized(drawn(*found), *wished)
    np.testing.assert_array_equal(ours, begun[0, :, 0])


def test_odd_sizes_are_padded_to_what_the_model_makes() -> None:
    pixels = preprocessing.prepare_resized(drawn(80, 80), 33, 65)
    assert pixels.shape == (3, 64, 96)
    assert (pixels[:, 0] == 0).all()
    assert (pixels[:, 32] != 0).any()


def test_the_middle_is_what_is_kept() -> None:
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, 40:80] = 255
    assert preprocessing.prepare(picture, 64, 64).min() > 0.9


def test_a_picture_of_a_few_pixels_is_refused() -> None:
    with pytest.raises(UserError, match="300 x 20 pixels are too few for a clip of 64 x 128"):
        preprocessing.prepare(drawn(20, 300), 128, 64)
