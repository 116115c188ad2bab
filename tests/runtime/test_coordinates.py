"""Where tokens lie, and that tokens and latents turn into one another."""

import numpy as np
import pytest

from ltx_engines.shapes import VideoShape
from ltx_trt.coordinates import patchify, token_coordinates, unpatchify
from ltx_trt.noise import Noise


def test_a_causal_models_frames_are_the_first_of_each_group() -> None:
    shape = VideoShape(frames=25, height=64, width=96)
    found = token_coordinates(shape, 25.0, causal=True).reshape(3, *shape.latent)
    assert found[0, :, 0, 0] == pytest.approx([0, 1 / 25, 9 / 25, 17 / 25])
    assert found[1, 0, :, 0].tolist() == [0, 32]
    assert found[2, 0, 0, :].tolist() == [0, 32, 64]


def test_an_older_models_frames_stand_eight_apart() -> None:
    shape = VideoShape(frames=25, height=32, width=32)
    assert token_coordinates(shape, 1.0, causal=False)[0, 0].tolist() == [0, 8, 16, 24]


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # the original's call
@pytest.mark.parametrize("causal", [True, False])
def test_coordinates_are_the_originals(causal: bool) -> None:
    torch = pytest.importorskip("torch")
    patchifier = pytest.importorskip("ltx_video.models.transformers.symmetric_patchifier")
    encode = pytest.importorskip("ltx_video.models.autoencoders.vae_encode")
    shape = VideoShape(frames=41, height=96, width=160)
    latents = torch.zeros(1, 4, *shape.latent)
    _, corners = patchifier.SymmetricPatchifier(patch_size=1).patchify(latents=latents)
    expected = encode.latent_to_pixel_coords_from_factors(corners, (8, 32, 32), causal)
    expected = expected.to(torch.float32)
    expected[:, 0] = expected[:, 0] * (1.0 / 30)
    found = token_coordinates(shape, 30, causal=causal)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.numpy())


def test_patches_come_back_and_follow_frames_rows_columns() -> None:
    latents = Noise(1).normal((1, 4, 3, 2, 5))
    tokens = patchify(latents)
    assert tokens.shape == (1, 30, 4)
    assert np.array_equal(tokens[0, 1 * 10 + 1 * 5 + 3], latents[0, :, 1, 1, 3])
    assert np.array_equal(unpatchify(tokens, (3, 2, 5)), latents)
