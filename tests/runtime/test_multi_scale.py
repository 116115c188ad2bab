"""Between the passes: the original's own functions are the oracle."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ltx_engines.defaults import DOWNSCALE_FACTOR
from ltx_engines.errors import UserError
from ltx_engines.shapes import first_size, wished_size
from ltx_trt import multi_scale

original = pytest.importorskip("ltx_video.pipelines.pipeline_ltx_video")

Floats = NDArray[np.float32]


def latents(*shape: int, seed: int = 0) -> Floats:
    """Of channels that differ in mean and deviation, as true latents do."""
    random = np.random.default_rng(seed)
    channels = (1, shape[1], 1, 1, 1)
    mean, deviation = random.normal(size=channels), random.uniform(0.2, 3, channels)
    return (random.normal(size=shape) * deviation + mean).astype(np.float32)


@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0])
def test_adain_is_the_originals(factor: float) -> None:
    ours, reference = latents(2, 16, 3, 4, 6), latents(2, 16, 3, 2, 3, seed=1)
    theirs = original.adain_filter_latent(
        torch.from_numpy(ours), torch.from_numpy(reference), factor
    )
    np.testing.assert_allclose(
        multi_scale.adain(ours, reference, factor), theirs.numpy(), rtol=2e-5, atol=2e-5
    )


def test_adain_gives_each_channel_the_statistics_of_the_reference() -> None:
    reference = latents(1, 8, 3, 2, 3, seed=1)
    matched = multi_scale.adain(latents(1, 8, 3, 4, 6), reference)
    for statistic in (np.mean, lambda x, axis: np.std(x, axis=axis, ddof=1)):
        np.testing.assert_allclose(
            statistic(matched, axis=(2, 3, 4)), statistic(reference, axis=(2, 3, 4)), rtol=1e-4
        )


def test_adain_gives_a_constant_channel_the_mean_of_the_reference() -> None:
    flat, reference = np.ones((1, 8, 3, 4, 6), np.float32), latents(1, 8, 3, 2, 3)
    mean = reference.mean(axis=(2, 3, 4), keepdims=True)
    np.testing.assert_allclose(
        multi_scale.adain(flat, reference), np.broadcast_to(mean, flat.shape), rtol=1e-5
    )


def test_adain_of_a_single_latent_is_refused() -> None:
    with pytest.raises(UserError, match="make the clip larger"):
        multi_scale.adain(latents(1, 8, 1, 2, 2), latents(1, 8, 1, 1, 1))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6, 1.0])
def test_tone_mapping_is_the_originals(ratio: float) -> None:
    ours = 3 * latents(1, 8, 3, 4, 6)
    theirs = original.LTXVideoPipeline.tone_map_latents(torch.from_numpy(ours), ratio)
    np.testing.assert_allclose(multi_scale.tone_map(ours, ratio), theirs.numpy(), rtol=1e-5)


def test_tone_mapping_of_nothing_changes_nothing() -> None:
    ours = latents(1, 8, 3, 4, 6)
    assert np.array_equal(multi_scale.tone_map(ours, 0), ours)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_ratio_beyond_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match="from 0 to 1"):
        multi_scale.tone_map(latents(1, 8, 3, 4, 6), ratio)


class RecordedError(Exception):
    """Carries what the first pass was asked for."""


def first_pass_of_the_original(height: int, width: int, factor: float) -> tuple[int, int]:
    def record(*args: object, **kwargs: Any) -> None:
        raise RecordedError(kwargs["height"], kwargs["width"])

    record.vae, record.vae_scale_factor = None, 32  # type: ignore[attr-defined]
    pipeline = original.LTXMultiScalePipeline(record, SimpleNamespace())
    with pytest.raises(RecordedError) as asked:
        pipeline(factor, {}, {}, output_type="pt", height=height, width=width)
    height, width = asked.value.args
    return height, width


@pytest.mark.parametrize("height", [64, 96, 352, 480, 512, 704, 1088, 2176])
@pytest.mark.parametrize("factor", [0.6666666, 2 / 3, 0.5, 0.75, 1.0])
def test_the_first_pass_has_the_originals_size(height: int, factor: float) -> None:
    width = height + 512
    wanted = first_pass_of_the_original(height, width, factor)
    assert multi_scale.first_size(height, width, factor) == wanted


def test_the_default_clip_is_made_at_448_x_800_first() -> None:
    assert multi_scale.first_size(704, 1216, DOWNSCALE_FACTOR) == (448, 800)


def test_a_clip_too_small_for_two_passes_is_refused_with_the_least_size() -> None:
    with pytest.raises(UserError, match="at least 64"):
        multi_scale.first_size(32, 704, DOWNSCALE_FACTOR)
    assert multi_scale.first_size(64, 64, DOWNSCALE_FACTOR) == (32, 32)


@pytest.mark.parametrize("factor", [0.6666666, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("first", [32, 448, 800, 1024])
def test_the_size_of_a_second_pass_tells_the_smallest_clip_that_it_is_of(
    first: int, factor: float
) -> None:
    height, width = wished_size(2 * first, 2 * first, factor)
    assert height == width
    assert first_size(height, width, factor) == (first, first)
    if height > 32 and int((height - 32) * factor) >= 32:
        assert first_size(height - 32, width, factor) < (first, first)
