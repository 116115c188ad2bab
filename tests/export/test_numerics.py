"""Every graph against the PyTorch module it came from, at shapes it was not traced at."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ltx_engines.stages import OPTIONAL, STAGES, STREAM
from ltx_export.block_groups import evenly
from ltx_ref.ltx_video import model as ltx_video
from ltx_ref.ltx_video import upsampler
from ltx_ref.ltx_video.transformer import StgMode
from ltx_ref.text import load_text_encoder
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from tests.export.chains import KEPT, feeds, same_bits
from tests.export.checkpoints import (
    CAPTION_CHANNELS,
    LATENT_CHANNELS,
    LAYERS,
    WORDS,
    checkpoint_tensors,
    config,
)
from tests.export.conftest import Exported, Files, export
from tests.export.upsamplers import write_upsampler
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


def test_a_chain_of_blocks_perturbs_as_the_whole_does(
    mode_and_export: tuple[StgMode, Exported],
) -> None:
    _, exported = mode_and_export
    given = feeds(exported.bundle.stage("transformer"), 3, 10, per_token=False)
    assert (given[KEPT] == 0).sum() == 1
    assert same_bits(exported.bundle, evenly(LAYERS, 2), given)


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


@pytest.fixture(scope="module")
def with_upsampler(files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    folder = tmp_path_factory.mktemp("upsampler")
    path = write_upsampler(folder / "upsampler.safetensors", LATENT_CHANNELS)
    options = ("--upsampler", str(path))
    return path, export(files.checkpoint, files.text_encoder, folder / "bundle", "all", *options)


def test_an_upsampler_is_a_fifth_stage_with_weights_of_two_files(
    with_upsampler: tuple[Path, Exported],
) -> None:
    path, made = with_upsampler
    manifest = made.bundle.manifest
    assert set(manifest.stages) == {*STAGES, STREAM, *OPTIONAL}
    assert set(manifest.stages["latent_upsampler"].weights) == {path.name, made.checkpoint.name}
    assert (made.bundle.path / path.name).samefile(path)
    with OnnxRuntimeSession.open(made.bundle, "latent_upsampler"):
        pass


@pytest.mark.parametrize("grid", GRIDS)
def test_the_upsampler_gives_the_same_latents(
    with_upsampler: tuple[Path, Exported], grid: tuple[int, int, int, int]
) -> None:
    path, made = with_upsampler
    batch, frames, rows, columns = grid
    latents = normals(batch, LATENT_CHANNELS, frames, rows, columns, seed=12)
    statistics = ltx_video.load(made.checkpoint).vae.per_channel_statistics
    reference = upsampler.join(upsampler.load(path), statistics)(latents)
    assert reference.shape[2:] == (frames, 2 * rows, 2 * columns)
    assert difference(run(made, "latent_upsampler", [latents]), reference) < TOLERANCE


BASES = {"F32": torch.float32, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Eight:
    """A checkpoint with the blocks' matrices in 8 bits, and one with the same numbers widened."""

    checkpoint: Path
    wide: Path
    matrices: frozenset[str]


def eight_bits(folder: Path, base: torch.dtype) -> Eight:
    state = checkpoint_tensors(config("0.9.5"), base)
    blocks = "model.diffusion_model.transformer_blocks."
    matrices = frozenset(n for n, t in state.items() if n.startswith(blocks) and t.ndim == 2)
    matrices = frozenset(n for n in matrices if n.endswith(".weight"))
    small = {n: t.to(torch.float8_e4m3fn) if n in matrices else t for n, t in state.items()}
    wide = {n: t.to(torch.float32) if t.is_floating_point() else t for n, t in small.items()}
    metadata = {"config": json.dumps(config("0.9.5"))}
    paths = folder / "eight.safetensors", folder / "wide.safetensors"
    for path, tensors in zip(paths, (small, wide), strict=True):
        save_file(tensors, path, metadata)
    return Eight(*paths, matrices)


@pytest.mark.parametrize("base", BASES)
def test_plain_8_bit_weights_are_widened_by_the_graph(
    files: Files, tmp_path: Path, base: str
) -> None:
    """Without --precision: bytes and names stay, the numbers are those of the widened weights."""
    eight = eight_bits(tmp_path, BASES[base])
    made = export(eight.checkpoint, files.text_encoder, tmp_path / "bundle", "transformer")
    graph = onnx.load(made.bundle.path / "transformer.onnx", load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    stored = {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT8E4M3FN}
    assert stored == eight.matrices
    assert len(stored) == 10 * LAYERS
    assert sum(n.op_type == "DequantizeLinear" for n in graph.node) == len(stored)
    feeds = transformer_feeds(2, 11, 6, 1)
    entry = made.bundle.stage("transformer")
    typed = [f.to(getattr(torch, t.dtype)) for t, f in zip(entry.inputs, feeds, strict=True)]
    found = run(made, "transformer", typed).float()
    reference = ltx_video.load(eight.wide).transformer(*feeds)
    assert difference(found, reference) < (TOLERANCE if base == "F32" else 1e-2)
    rounded = ltx_video.load(files.checkpoint).transformer(*feeds)
    assert difference(rounded, reference) > 2e-2, "8 bits change nothing here"


def test_the_session_widens_8_bit_weights_too(files: Files, tmp_path: Path) -> None:
    eight = eight_bits(tmp_path, torch.float16)
    made = export(eight.checkpoint, files.text_encoder, tmp_path / "bundle", "transformer")
    feeds = transformer_feeds(1, 7, 3, 1)
    entry = made.bundle.stage("transformer")
    with OnnxRuntimeSession.open(made.bundle, "transformer", threads=1) as session:
        named = {t.name: f.numpy() for t, f in zip(entry.inputs, feeds, strict=True)}
        found = torch.from_numpy(session(named)["velocity"])
    assert difference(found, ltx_video.load(eight.wide).transformer(*feeds)) < 1e-2
