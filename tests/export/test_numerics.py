"""Every graph against the PyTorch module it came from, at shapes it was not traced at."""

from collections.abc import Sequence

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from ltx_ref.ltx_video import model as ltx_video
from ltx_ref.ltx_video.transformer import StgMode
from ltx_ref.text import load_text_encoder
from tests.export.checkpoints import CAPTION_CHANNELS, LATENT_CHANNELS, LAYERS, WORDS
from tests.export.conftest import Exported, Files, export
from tests.ref.oracles import difference, normals

TOLERANCE = 3e-5
"""Of the largest value of the reference's output. AMD EPYC, onnxruntime 1.31: 6.5e-6 at most."""


def run(exported: Exported, stage: str, feeds: Sequence[Tensor]) -> Tensor:
    """The stage on ONNX Runtime, fed in the order of the manifest."""
    entry = exported.bundle.stage(stage)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = exported.bundle.file(entry.file)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    named = {t.name: f.numpy() for t, f in zip(entry.inputs, feeds, strict=True)}
    (output,) = session.run(None, named)
    assert isinstance(output, np.ndarray)
    assert output.dtype == entry.outputs[0].dtype
    return torch.from_numpy(output)


def transformer_feeds(batch: int, tokens: int, words: int, timesteps: int) -> list[Tensor]:
    """Text is masked from its third word on, in the last entry of the batch."""
    mask = torch.ones(batch, words)
    mask[-1, 2:] = 0
    seconds_rows_columns = torch.tensor([4.0, 700.0, 1200.0])[None, :, None]
    return [
        normals(batch, tokens, LATENT_CHANNELS, seed=1),
        normals(batch, 3, tokens, seed=2).abs() * seconds_rows_columns,
        normals(batch, timesteps, seed=3).sigmoid(),
        normals(batch, words, CAPTION_CHANNELS, seed=4),
        mask,
        torch.ones(LAYERS, batch),
    ]


@pytest.mark.parametrize(
    ("batch", "tokens", "words", "timesteps"),
    [(1, 1, 1, 1), (1, 35, 7, 1), (2, 35, 7, 35), (3, 24, 16, 1), (3, 13, 5, 13)],
)
def test_the_transformer_predicts_the_same_velocity(
    exported: Exported, batch: int, tokens: int, words: int, timesteps: int
) -> None:
    feeds = transformer_feeds(batch, tokens, words, timesteps)
    reference = ltx_video.load(exported.checkpoint).transformer(*feeds)
    assert difference(run(exported, "transformer", feeds), reference) < TOLERANCE


def test_one_timestep_is_the_same_as_that_timestep_for_each_token(exported: Exported) -> None:
    feeds = transformer_feeds(2, 11, 4, 1)
    each = [*feeds[:2], feeds[2].expand(2, 11).contiguous(), *feeds[3:]]
    one = run(exported, "transformer", feeds)
    assert difference(run(exported, "transformer", each), one) < TOLERANCE


def test_masked_words_do_not_matter(exported: Exported) -> None:
    feeds = transformer_feeds(2, 9, 6, 1)
    changed = [*feeds]
    changed[3] = feeds[3].clone()
    changed[3][-1, 2:] = 50.0
    same = run(exported, "transformer", feeds)
    assert difference(run(exported, "transformer", changed), same) < TOLERANCE


@pytest.fixture(scope="session", params=["attention_values", "attention_skip", "transformer_block"])
def mode_and_export(
    request: pytest.FixtureRequest,
    files: Files,
    exported: Exported,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[StgMode, Exported]:
    mode: StgMode = request.param
    if mode == "attention_values":
        return mode, exported
    out = tmp_path_factory.mktemp("stg") / mode
    return mode, export(
        files.checkpoint, files.text_encoder, out, "transformer", "--stg-mode", mode
    )


def test_skipped_layers_are_perturbed_in_the_mode_of_the_bundle(
    mode_and_export: tuple[StgMode, Exported],
) -> None:
    mode, exported = mode_and_export
    feeds = transformer_feeds(3, 10, 5, 1)
    feeds[5][0, 2] = feeds[5][1, 1] = 0
    model = ltx_video.load(exported.checkpoint).transformer
    assert exported.bundle.manifest.model.stg_mode == mode
    found = run(exported, "transformer", feeds)
    assert difference(found, model(*feeds, stg_mode=mode)) < TOLERANCE
    assert difference(found, model(*feeds[:5], torch.ones(LAYERS, 3), stg_mode=mode)) > 1e-3


@pytest.mark.parametrize(("batch", "words"), [(1, 1), (2, 9), (3, 40)])
def test_the_text_encoder_gives_the_same_embeddings(
    exported: Exported, batch: int, words: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(WORDS, (batch, words), generator=generator)
    mask = torch.ones(batch, words, dtype=torch.int64)
    mask[-1, 1 + words // 2 :] = 0
    encoder = load_text_encoder(exported.text_encoder)
    reference = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    assert difference(run(exported, "text_encoder", [ids, mask]), reference) < TOLERANCE


GRIDS = [(1, 1, 1, 1), (2, 2, 1, 3), (1, 3, 2, 1)]
"""Batch, latent frames, rows and columns."""


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("generation", ["exported_09", "exported"])
def test_the_vae_encoder_gives_the_same_latents(
    request: pytest.FixtureRequest, generation: str, grid: tuple[int, int, int, int]
) -> None:
    exported: Exported = request.getfixturevalue(generation)
    batch, frames, rows, columns = grid
    pixels = normals(batch, 3, 8 * frames - 7, 32 * rows, 32 * columns, seed=6).tanh()
    noise = normals(batch, LATENT_CHANNELS, frames, rows, columns, seed=7)
    reference = ltx_video.load(exported.checkpoint).vae.encode(pixels, noise)
    assert difference(run(exported, "vae_encoder", [pixels, noise]), reference) < TOLERANCE


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("generation", ["exported_09", "exported_091", "exported"])
def test_the_vae_decoder_gives_the_same_pixels(
    request: pytest.FixtureRequest, generation: str, grid: tuple[int, int, int, int]
) -> None:
    exported: Exported = request.getfixturevalue(generation)
    batch, frames, rows, columns = grid
    facts = exported.bundle.manifest.model
    latents = normals(batch, LATENT_CHANNELS, frames, rows, columns, seed=8)
    timestep = normals(batch, seed=9).sigmoid() if facts.timestep_conditioning else None
    noises = [
        normals(block.maps, block.scale * rows, block.scale * columns, seed=10 + index)
        for index, block in enumerate(facts.noise_blocks)
    ]
    reference = ltx_video.load(exported.checkpoint).vae.decode(latents, timestep, noises)
    feeds = [latents, *([] if timestep is None else [timestep]), *noises]
    assert difference(run(exported, "vae_decoder", feeds), reference) < TOLERANCE
    assert len(noises) == (2 if generation == "exported_091" else 0)
