"""Measures of clips: identities, values on paper, and the papers' definitions in loops."""

import numpy as np
import pytest

from ltx_engines import metrics
from ltx_engines.metrics import C1, C2, PSNR_CAP, SCALE_WEIGHTS, Frames, Maps

RNG = np.random.default_rng(0)


def noise(*shape: int) -> Frames:
    return np.frombuffer(RNG.bytes(3 * int(np.prod(shape))), np.uint8).reshape(*shape, 3).copy()


def flat(level: int, *shape: int) -> Frames:
    return np.full((*shape, 3), level, np.uint8)


def spoilt(clip: Frames, strength: float) -> Frames:
    errors = np.random.default_rng(1).normal(0, strength, clip.shape)
    return np.clip(np.rint(clip + errors), 0, 255).astype(np.uint8)


def smooth(*shape: int) -> Frames:
    """A picture with room for errors, that moves."""
    frames, height, width = shape
    t, y, x = np.mgrid[:frames, :height, :width].astype(np.float64)
    waves = np.stack([np.sin(x / 5 + t), np.cos(y / 7 - t), np.sin((x + y) / 9)], axis=-1)
    found: Frames = np.rint(128 + 80 * waves).astype(np.uint8)
    return found


def test_a_clip_equals_itself_in_every_measure() -> None:
    clip = smooth(3, 48, 40)
    found = metrics.measure(clip, clip)
    assert found == metrics.Measures(psnr=PSNR_CAP, ssim=1.0, ms_ssim=1.0, flicker=0.0)


def test_no_measure_has_a_preferred_side() -> None:
    one, other = smooth(3, 48, 40), spoilt(smooth(3, 48, 40), 12)
    there, back = metrics.measure(one, other), metrics.measure(other, one)
    for name in ("psnr", "ssim", "ms_ssim", "flicker"):
        assert getattr(there, name) == pytest.approx(getattr(back, name), rel=1e-14)


def test_more_noise_is_worse_in_every_measure() -> None:
    clip = smooth(3, 64, 64)
    found = [metrics.measure(spoilt(clip, strength), clip) for strength in (2, 6, 18)]
    for name, sign in (("psnr", -1), ("ssim", -1), ("ms_ssim", -1), ("flicker", 1)):
        values = [sign * getattr(measures, name) for measures in found]
        assert values == sorted(values), name
        assert len(set(values)) == 3, name


@pytest.mark.parametrize("offset", [1, 5, 200])
def test_the_psnr_of_an_offset_is_known(offset: int) -> None:
    found = metrics.psnr(flat(offset, 2, 16, 16), flat(0, 2, 16, 16))
    assert found == pytest.approx(20 * np.log10(255 / offset), rel=1e-14)


def test_psnr_pools_the_errors_of_a_clips_frames() -> None:
    clip, reference = flat(0, 4, 16, 16), flat(0, 4, 16, 16)
    clip[0] = 10  # one frame of four: a mean squared error of 100 / 4
    assert metrics.psnr(clip, reference) == pytest.approx(10 * np.log10(255**2 / 25))


def test_one_wrong_value_is_at_the_cap_and_not_beyond() -> None:
    clip = flat(7, 2, 16, 16)
    clip[1, 3, 4, 2] = 8
    assert metrics.psnr(clip, flat(7, 2, 16, 16)) == PSNR_CAP


def luminance(x: float, y: float) -> float:
    return (2 * x * y + C1) / (x * x + y * y + C1)


@pytest.mark.parametrize("levels", [(0, 255), (100, 110), (250, 3)])
def test_flat_pictures_differ_in_luminance_only(levels: tuple[int, int]) -> None:
    """At five scales it has the weight of the coarsest."""
    x, y = levels
    found = metrics.similarity(flat(x, 1, 176, 192), flat(y, 1, 176, 192))
    assert found.ssim == pytest.approx(luminance(x, y), abs=1e-10)
    assert found.ms_ssim == pytest.approx(luminance(x, y) ** SCALE_WEIGHTS[-1], abs=1e-10)


def by_definition(x: Maps, y: Maps) -> tuple[Maps, Maps]:
    """SSIM at each place and its part without luminance, of one channel: windows one by one."""
    rows, columns = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(rows**2 + columns**2) / (2 * 1.5**2))
    weights /= weights.sum()
    whole = np.empty((x.shape[0] - 10, x.shape[1] - 10))
    structure = np.empty_like(whole)
    for row, column in np.ndindex(whole.shape):
        a, b = (image[row : row + 11, column : column + 11] for image in (x, y))
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        variance_a, variance_b = (
            (weights * (window - mean) ** 2).sum() for window, mean in ((a, mean_a), (b, mean_b))
        )
        covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
        structure[row, column] = (2 * covariance + C2) / (variance_a + variance_b + C2)
        whole[row, column] = luminance(mean_a, mean_b) * structure[row, column]
    return whole, structure


def test_ssim_is_the_papers_formula_window_by_window() -> None:
    one, other = noise(2, 17, 14), noise(2, 17, 14)
    other[:] = one // 2 + other // 2  # alike enough to have a structure in common
    means = [
        by_definition(x[..., channel].astype(float), y[..., channel].astype(float))[0].mean()
        for x, y in zip(one, other, strict=True)
        for channel in range(3)
    ]
    assert metrics.similarity(one, other).ssim == pytest.approx(np.mean(means), rel=1e-12)


def test_ms_ssim_is_the_papers_product_over_the_scales_there_is_room_for() -> None:
    one = smooth(1, 49, 46)
    other = spoilt(one, 25)
    assert metrics.scales(49, 46) == 3
    weights = np.array(SCALE_WEIGHTS[:3]) * sum(SCALE_WEIGHTS) / sum(SCALE_WEIGHTS[:3])
    products = []
    for channel in range(3):
        x, y = (clip[0, ..., channel].astype(float) for clip in (one, other))
        product = 1.0
        for level, weight in enumerate(weights):
            whole, structure = by_definition(x, y)
            product *= (whole if level == 2 else structure).mean() ** weight
            even = np.s_[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2]
            x, y = (
                (i[::2, ::2] + i[1::2, ::2] + i[::2, 1::2] + i[1::2, 1::2]) / 4
                for i in (x[even], y[even])
            )
        products.append(product)
    assert metrics.similarity(one, other).ms_ssim == pytest.approx(np.mean(products), rel=1e-12)


def test_with_room_for_one_scale_both_similarities_are_the_same() -> None:
    one = smooth(2, 21, 30)
    found = metrics.similarity(one, spoilt(one, 30))
    assert metrics.scales(21, 30) == 1
    assert found.ms_ssim == pytest.approx(found.ssim, rel=1e-3)  # the five weights sum to 1.0001


@pytest.mark.parametrize(
    ("size", "count"),
    [((10, 99), 0), ((11, 11), 1), ((22, 21), 1), ((22, 22), 2), ((128, 128), 4), ((704, 176), 5)],
)
def test_a_scale_needs_room_for_the_window(size: tuple[int, int], count: int) -> None:
    assert metrics.scales(*size) == count


def test_a_negative_picture_has_negative_similarity_and_no_power_of_it() -> None:
    board = np.indices((1, 24, 24)).sum(axis=0)[..., None] % 2 * np.ones(3)
    one = (255 * board).astype(np.uint8)
    found = metrics.similarity(one, 255 - one)
    assert found.ssim < -0.9
    assert found.ms_ssim == 0


def test_one_wrong_channel_is_a_third_of_the_loss() -> None:
    one = smooth(1, 16, 16)
    all_wrong = spoilt(one, 20)
    parts = []
    for channel in range(3):
        wrong = one.copy()
        wrong[..., channel] = all_wrong[..., channel]
        parts.append(1 - metrics.similarity(wrong, one).ssim)
    assert sum(parts) == pytest.approx(1 - metrics.similarity(all_wrong, one).ssim, rel=1e-12)


def test_a_constant_difference_does_not_flicker_and_an_alternating_one_does() -> None:
    reference = smooth(6, 16, 16)
    assert metrics.flicker(reference + np.uint8(9), reference) == 0
    alternating = reference.copy()
    alternating[::2] += np.uint8(9)
    assert metrics.flicker(alternating, reference) == 9


def test_one_late_error_flickers_twice() -> None:
    """It comes and it goes: two of four changes differ by 8."""
    reference = flat(50, 5, 16, 16)
    clip = reference.copy()
    clip[2] += 8
    assert metrics.flicker(clip, reference) == 4


def test_brighter_and_darker_places_of_one_frame_do_not_cancel() -> None:
    reference = flat(100, 2, 16, 16)
    clip = reference.copy()
    clip[1, :8] += 6
    clip[1, 8:] -= 6
    assert metrics.flicker(clip, reference) == 6


def test_a_single_frame_cannot_flicker() -> None:
    assert metrics.flicker(flat(1, 1, 16, 16), flat(90, 1, 16, 16)) == 0


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.similarity, metrics.flicker])
def test_what_is_no_pair_of_clips_is_a_programmers_mistake(
    measure: object,
) -> None:
    assert callable(measure)
    good = flat(0, 2, 16, 16)
    for bad in (flat(0, 3, 16, 16), flat(0, 2, 16, 17)):
        with pytest.raises(ValueError, match="wanted two"):
            measure(bad, good)
    for bad in (flat(0, 16, 16), flat(0, 0, 16, 16), good[..., :2]):
        with pytest.raises(ValueError, match="wanted two"):
            measure(bad, bad)
    with pytest.raises(TypeError, match="wanted uint8"):
        measure(good.astype(np.float32), good)
    with pytest.raises(ValueError, match="smaller than the window"):
        measure(flat(0, 1, 10, 16), flat(0, 1, 10, 16))


def test_frame_by_frame_comes_to_what_whole_clips_do() -> None:
    one, other = smooth(4, 48, 40), spoilt(smooth(4, 48, 40), 9)
    meter = metrics.Meter()
    rows = [meter(x, y) for x, y in zip(one, other, strict=True)]
    found = metrics.overall(rows)
    similar = metrics.similarity(one, other)
    assert found.psnr == metrics.psnr(one, other)
    assert (found.ssim, found.ms_ssim) == (similar.ssim, similar.ms_ssim)
    assert found.flicker == pytest.approx(metrics.flicker(one, other), rel=1e-14)
    assert rows[0].flicker is None
    assert rows[2].psnr == metrics.psnr(one[2:3], other[2:3])
