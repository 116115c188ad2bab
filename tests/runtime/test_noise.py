"""The seed's stream is PyTorch's, bit for bit, whatever the sizes of the calls."""

import numpy as np
import pytest

from ltx_trt.noise import Noise


def words(values: np.ndarray) -> list[int]:
    return values.reshape(-1).view(np.uint32).tolist()


SIZES = [(1,), (2,), (15,), (16,), (17,), (31,), (32,), (3, 5, 7), (1, 48, 128), (0,)]


@pytest.mark.parametrize("seed", [0, 7, 171198, 2**32 + 5, 2**63])
def test_one_seed_gives_the_stream_of_torch_in_every_size_of_call(seed: int) -> None:
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("PyTorch itself draws other last bits on this processor")
    generator, noise = torch.Generator("cpu").manual_seed(seed), Noise(seed)
    for shape in [*SIZES, *reversed(SIZES)]:
        expected = torch.randn(shape, generator=generator).numpy()
        found = noise.normal(shape)
        assert found.dtype == np.float32
        assert found.shape == shape
        assert words(found) == words(expected)


def test_a_million_values_agree_with_torch() -> None:
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("PyTorch itself draws other last bits on this processor")
    expected = torch.randn(1_000_000, generator=torch.Generator("cpu").manual_seed(3)).numpy()
    assert np.array_equal(Noise(3).normal((1_000_000,)), expected)


def test_normals_are_normal() -> None:
    values = Noise(1).normal((200_000,)).astype(np.float64)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.01


def test_known_words_hold_where_torch_is_not_installed() -> None:
    # torch 2.13 on x86 with AVX2: torch.randn(n, generator=manual_seed(3))
    assert Noise(3).normal((3,)) == pytest.approx([0.80327606, 0.17483339, 0.0889781], abs=1e-7)
    assert Noise(3).normal((16,))[:4] == pytest.approx(
        [-0.07664429, 0.35988152, -0.7820168, 0.07152773], abs=1e-7
    )


def test_small_calls_keep_the_second_of_a_pair_across_large_ones() -> None:
    torch = pytest.importorskip("torch")
    generator, noise = torch.Generator("cpu").manual_seed(9), Noise(9)
    for count in (1, 64, 1, 3):
        assert noise.normal((count,)) == pytest.approx(
            torch.randn(count, generator=generator).numpy(), abs=1e-6
        )


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Noise(-1)
