"""Codes and scales against formulas in float64, and against ModelOpt where it has the same."""

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from ltx_export import clipping
from ltx_ref import codes
from ltx_ref.quantization import CALIBRATED, FORMATS, INT4_BLOCK, NVFP4_BLOCK, Format

N, K = 24, 256
STEPS: dict[Format, float] = {"int8": 127, "int8-wo": 127, "int4-wo": 7}


def weight(seed: int = 0) -> codes.Rows:
    """Rows of very different size, a row of zeros, a block of zeros, a block of small numbers."""
    source = np.random.default_rng(seed)
    rows = source.standard_normal((N, K)) * np.exp(source.standard_normal((N, 1)) * 3)
    rows[3], rows[4, :128], rows[5, :16] = 0, 0, rows[5, :16] * 1e-6
    return rows.astype(np.float32)


def amax(seed: int = 1) -> codes.Vector:
    return np.abs(np.random.default_rng(seed).standard_normal(K)).astype(np.float32) * 5


def decoded(parts: dict[str, Any], form: Format) -> codes.Rows:
    coded = codes.Coded(parts["weight"], parts.get("weight_scale"))
    return codes.decode(coded, form, float(parts.get("weight_scale_2", 1)))


def is_bfloat16(numbers: Any) -> bool:
    return np.array_equal(numbers, np.asarray(numbers).astype(codes.BF16).astype(np.float32))


def test_a_scale_is_the_next_bfloat16_number_and_never_less() -> None:
    given = np.exp(np.random.default_rng(0).uniform(-60, 60, 10_000)).astype(np.float32)
    for largest in (448.0, 127.0, 7.0, 2688.0):
        scales = codes.scale(given, largest).astype(np.float64)
        exact = given.astype(np.float64) / largest
        assert is_bfloat16(scales)
        assert (scales >= exact).all()
        below = (codes.scale(given, largest).view(np.uint32) - 0x10000).view(np.float32)
        assert (below < exact).all()


def test_a_scale_that_is_a_bfloat16_number_already_stays() -> None:
    assert codes.scale(448.0 * 0.375, 448.0) == np.float32(0.375)
    assert codes.scale(np.zeros(2, np.float32), 448.0).min() > 0


@pytest.mark.parametrize("form", ["fp8", "int8", "int8-wo"])
def test_codes_are_the_nearest_multiples_of_their_rows_scale(form: Format) -> None:
    rows, parts = weight(), codes.layer(weight(), form, input_amax=amax())
    largest = 448 if form == "fp8" else 127
    assert is_bfloat16(parts["weight_scale"])
    shares = rows.astype(np.float64) / parts["weight_scale"].astype(np.float64)[:, None]
    assert abs(shares).max() <= largest
    if form == "fp8":
        wanted = torch.from_numpy(shares).float().to(torch.float8_e4m3fn).float().numpy()
    else:
        wanted = np.rint(shares)
    differ = parts["weight"].astype(np.float64) != wanted  # float32's quotient may be a tie
    assert differ.mean() < 1e-3
    assert np.abs(parts["weight"].astype(np.float64) - wanted)[differ].sum() <= differ.sum() * 32


def test_no_number_is_further_off_than_half_a_step() -> None:
    rows = weight()
    for form, largest in STEPS.items():
        parts = codes.layer(rows, form, input_amax=amax())
        block = INT4_BLOCK if form == "int4-wo" else K
        blocks = rows.reshape(N, -1, block)
        step = np.abs(blocks).max(axis=2, keepdims=True) / largest * (1 + 2**-7)  # rounded up
        error = np.abs(decoded(parts, form).reshape(blocks.shape) - blocks)
        assert (error <= step / 2 * (1 + 1e-6)).all(), form


def test_a_cast_alone_is_torchs_cast_and_clamps_where_torch_has_not_a_number() -> None:
    rows = np.concatenate([weight() * 100, [[1e9] * K]]).astype(np.float32)
    found = codes.layer(rows, "fp8-cast")
    clamped = torch.from_numpy(rows).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert found.keys() == {"weight"}
    assert np.array_equal(found["weight"].view(np.uint8), clamped.view(torch.uint8).numpy())
    assert np.isfinite(found["weight"].astype(np.float32)).all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_of_zeros_has_codes_of_zeros_and_a_scale_above_zero(form: Format) -> None:
    parts = codes.layer(np.zeros((4, K), np.float32), form, input_amax=amax())
    assert not decoded(parts, form).any()
    assert all(parts[name].astype(np.float32).min() > 0 for name in parts if name != "weight")


@pytest.mark.parametrize("form", FORMATS)
def test_pieces_of_a_layer_have_the_codes_of_the_whole(form: Format) -> None:
    rows = weight()
    whole = codes.layer(rows, form, input_amax=amax())
    largest = np.abs(rows).max() if form == "nvfp4" else None
    pieces = [codes.encode(rows[i : i + 7], form, largest) for i in range(0, N, 7)]
    assert np.array_equal(np.concatenate([p.weight for p in pieces]), whole["weight"])
    if "weight_scale" in whole:
        scales = np.concatenate([p.weight_scale for p in pieces if p.weight_scale is not None])
        assert np.array_equal(scales, whole["weight_scale"])


def test_two_codes_of_four_bits_share_a_byte_the_first_in_its_lower_half() -> None:
    rows = np.zeros((1, INT4_BLOCK), np.float32)
    rows[0, :4] = 7, -7, -1, 3
    assert codes.layer(rows, "int4-wo")["weight"][0, :2].tolist() == [0x97, 0x3F]
    rows[0, :4] = 6, -6, -0.5, 3  # the scale is one: 448 of weight_scale_2
    assert codes.layer(rows, "nvfp4", input_amax=amax())["weight"][0, :2].tolist() == [0xF7, 0x59]


def test_a_format_with_quantized_activations_wants_their_range() -> None:
    for form in FORMATS:
        if form in CALIBRATED:
            with pytest.raises(ValueError, match="wants the range of the activations"):
                codes.layer(weight(), form)
        else:
            assert "input_scale" not in codes.layer(weight(), form)


@pytest.mark.parametrize(("form", "largest"), codes.INPUT_MAX.items())
def test_the_input_scale_keeps_the_largest_activation(form: Format, largest: float) -> None:
    scale = codes.layer(weight(), form, input_amax=amax())["input_scale"]
    assert scale.shape == ()
    assert scale.dtype == np.float32
    assert amax().max() / largest <= scale <= amax().max() / largest * (1 + 2**-7)


def test_smoothing_changes_no_product_and_narrows_the_activations() -> None:
    inputs = np.random.default_rng(2).standard_normal((50, K)).astype(np.float32)
    inputs[:, 7] *= 100
    reached = np.abs(inputs).max(axis=0)
    pre = codes.smoothing(reached, np.abs(weight()).max(axis=0), 0.5)
    parts = codes.layer(weight(), "int8", input_amax=reached, pre=pre)
    assert is_bfloat16(pre)
    wanted = inputs.astype(np.float64) @ weight().T
    found = (inputs.astype(np.float64) * pre) @ codes.smoothed(weight(), pre).astype(np.float64).T
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert parts["input_scale"] >= np.abs(inputs * pre).max() / 127
    spread = reached.max() / np.median(reached)
    assert (reached * pre).max() / np.median(reached * pre) < spread / 5


def test_smoothing_ends_at_modelopts_bounds() -> None:
    """1e-4 and 1e4, to the nearest bfloat16 number."""
    reached = np.array([1e-12, 1e-6, 1.0, 1e6, 1e30], np.float32)
    pre = codes.smoothing(reached, np.array([1.0, 1e4, 1.0, 1e-4, 1.0], np.float32), 0.5)
    assert pre.tolist() == pytest.approx([1, 1e4, 1, 1e-4, 1e-4], rel=2**-8)
    assert is_bfloat16(pre)


def test_channels_without_activations_are_not_smoothed() -> None:
    reached = amax()
    reached[[2, 5]] = 0, 1e-12
    pre = codes.smoothing(reached, np.abs(weight()).max(axis=0), 0.5)
    assert pre[2] == pre[5] == 1
    assert (codes.smoothing(reached, np.zeros(K, np.float32), 0.5) > 0).all()


@pytest.fixture(scope="module")
def modelopt() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as found
    return found


def test_smoothing_is_modelopts(modelopt: Any) -> None:
    rows = weight()
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.from_numpy(rows.copy())  # smoothed in place
    inputs = torch.randn(64, K, generator=torch.Generator().manual_seed(0))
    inputs[:, 7] *= 100
    config = {**modelopt.INT8_SMOOTHQUANT_CFG, "algorithm": {"method": "smoothquant", "alpha": 0.5}}
    model: Any = torch.nn.Sequential(linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelopt.quantize(model, config, lambda m: m(inputs))
    theirs = model[0].input_quantizer.pre_quant_scale.numpy().reshape(-1)
    reached = inputs.abs().amax(dim=0).numpy()
    pre = codes.smoothing(reached, np.abs(rows).max(axis=0), 0.5)
    assert np.abs(pre / theirs - 1).max() <= 2**-8  # ours is rounded to bfloat16
    step = float(model[0].input_quantizer.amax) / 127
    assert step * (1 - 2**-8) <= codes.input_scale(reached, "int8", pre) <= step * (1 + 2**-6)


def test_the_largest_weight_of_each_row_is_modelopts(modelopt: Any) -> None:
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.from_numpy(weight())
    model: Any = torch.nn.Sequential(linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelopt.quantize(model, modelopt.INT8_DEFAULT_CFG, lambda m: m(torch.ones(1, K)))
    theirs = model[0].weight_quantizer.amax.numpy().reshape(-1)
    found = codes.layer(weight(), "int8-wo")["weight_scale"]
    assert np.array_equal(found, codes.scale(theirs, 127.0))


def test_nvfp4_codes_and_scales_are_modelopts(modelopt: Any) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    parts = codes.layer(weight(), "nvfp4", input_amax=amax())
    second = torch.tensor(parts["weight_scale_2"])  # ours, which is rounded to bfloat16
    packed, first, _ = NVFP4QTensor.quantize(torch.from_numpy(weight()), NVFP4_BLOCK, None, second)
    exact = float(NVFP4QTensor.get_weights_scaling_factor_2(torch.from_numpy(weight())))
    assert exact <= float(second) <= exact * (1 + 2**-7)
    assert np.array_equal(parts["weight_scale"].view(np.uint8), first.view(torch.uint8).numpy())
    theirs = codes.Coded(
        packed._quantized_data.numpy(), first.float().numpy().astype(ml_dtypes.float8_e4m3fn)
    )
    assert np.array_equal(decoded(parts, "nvfp4"), codes.decode(theirs, "nvfp4", float(second)))


@pytest.mark.parametrize("form", ["fp8", "int8-wo"])
def test_the_chosen_clip_is_never_worse_than_none_and_better_for_wide_rows(form: Format) -> None:
    rows = np.random.default_rng(0).standard_normal((4, 16_384)).astype(np.float32)
    rows[3] = 0
    clip = clipping.best(rows, form)
    assert ((clip > 0) | (np.abs(rows).max(axis=1) == 0)).all()

    def errors(parts: dict[str, Any]) -> Any:
        return ((decoded(parts, form).astype(np.float64) - rows) ** 2).sum(axis=1)

    plain = errors(codes.layer(rows, form, input_amax=amax()))
    clipped = errors(codes.layer(rows, form, input_amax=amax(), clip=clip))
    assert (clipped <= plain * (1 + 1e-6)).all()
    assert (clipped < plain * 0.999).any()


@pytest.mark.parametrize("form", ["fp8", "int8-wo"])
def test_a_clip_is_the_best_of_all_that_are_tried(form: Format) -> None:
    """Each row alone, by its squared error in float64."""
    rows = np.random.default_rng(3).standard_t(3, (5, 512)).astype(np.float32)
    shares = np.arange(clipping.LEAST, 1 + clipping.STEP / 2, clipping.STEP)
    assert len(shares) == 16
    errors = []
    for share in shares:
        clip = (np.abs(rows).max(axis=1) * share).astype(np.float32)
        parts = codes.layer(rows, form, input_amax=amax(), clip=clip)
        errors.append(((decoded(parts, form).astype(np.float64) - rows) ** 2).sum(axis=1))
    best = shares[np.argmin(errors, axis=0)]
    found = clipping.best(rows, form) / np.abs(rows).max(axis=1)
    assert found == pytest.approx(best, rel=1e-5)
    assert best.min() < 1


def test_a_missing_modelopt_is_said_with_the_extra_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clipping, "find_spec", lambda _: None)
    with pytest.raises(Exception, match=r"needs torch, modelopt; pip install 'ltx-trt\[quantize\]"):
        clipping.best(weight(), "fp8")


EVERY: dict[Format, codes.Rows] = {
    "fp8": np.delete(np.arange(256), [127, 255]).astype(np.uint8).view(codes.E4M3),
    "int8": np.arange(-127, 128).astype(np.int8),
}


def noise(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 1 << 20, shape, np.uint32)


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_what_is_a_code_already_stays_whatever_the_noise(form: Format) -> None:
    exact = np.tile(EVERY[form].astype(np.float32), (50, 1))
    for bits in (noise(exact.shape), np.full_like(exact, 0xFFFFF, np.uint32)):
        assert np.array_equal(codes.dithered(exact, form, bits).astype(np.float32), exact)


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_dithering_takes_one_of_the_two_codes_around_and_is_right_on_average(form: Format) -> None:
    known = np.unique(EVERY[form].astype(np.float32))
    inside = known[:-1] + np.linspace(0.03, 0.97, len(known) - 1, dtype=np.float32) * np.diff(known)
    shares = np.tile(inside, (4000, 1))
    found = codes.dithered(shares, form, noise(shares.shape)).astype(np.float32)
    assert ((found == known[:-1]) | (found == known[1:])).all()
    step = np.diff(known)
    error = (found.astype(np.float64).mean(axis=0) - inside) / step
    assert np.abs(error).max() < 5 * 0.5 / 4000**0.5


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_dithering_does_not_leave_the_range(form: Format) -> None:
    beyond = np.array([[1e4, -1e4, np.nextafter(np.float32(448), np.float32(500))]], np.float32)
    largest = {"fp8": 448, "int8": 127}[form]
    found = codes.dithered(beyond, form, noise(beyond.shape)).astype(np.float32)
    assert (np.abs(found) == largest).all()
