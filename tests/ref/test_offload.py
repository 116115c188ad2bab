"""A block's weights are there while it runs, and the result is that of the resident model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ltx_ref.checkpoint import CheckpointError, read_header
from ltx_ref.ltx_video import model as ltx_model
from ltx_ref.ltx_video.config import parse_config
from ltx_ref.ltx_video.model import LTXVideo
from ltx_ref.ltx_video.transformer import Block
from ltx_ref.offload import offloaded
from tests.ref.oracles import normals, randomize

D, LAYERS, TOKENS, WORDS = 40, 3, 6, 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = {
        "transformer": {
            "num_attention_heads": 2,
            "attention_head_dim": D // 2,
            "num_layers": LAYERS,
            "in_channels": 8,
            "out_channels": 8,
            "caption_channels": 12,
            "cross_attention_dim": D,
        },
        "vae": {
            "latent_channels": 8,
            "encoder_base_channels": 8,
            "decoder_base_channels": 8,
            "blocks": [["compress_all", 1], ["compress_all", 1], ["compress_all", 1]],
        },
        "scheduler": {},
    }
    with torch.device("meta"):
        model = LTXVideo(parse_config(table))
    randomize(model, seed=1)
    path = tmp_path_factory.mktemp("offload") / "small.safetensors"
    save_file(model.state_dict(), path, {"config": json.dumps(table)})
    return path


def run(model: LTXVideo, seed: int = 2) -> Tensor:
    velocity: Tensor = model.transformer(
        normals(1, TOKENS, 8, seed=seed),
        torch.rand(1, 3, TOKENS, generator=torch.Generator().manual_seed(seed)),
        torch.tensor([[0.7]]),
        normals(1, WORDS, 12, seed=seed),
        torch.ones(1, WORDS),
        torch.ones(LAYERS, 1),
    )
    return velocity


def whole(path: Path) -> LTXVideo:
    """Resident, in memory of its own: sums depend on how a mapped file's numbers are aligned."""
    model = ltx_model.load(path)
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    return model


def resident(model: LTXVideo) -> list[bool]:
    """Of each block, whether any of its weights are there."""
    blocks = model.transformer.transformer_blocks
    return [any(not tensor.is_meta for tensor in block.state_dict().values()) for block in blocks]


@pytest.fixture
def skeleton(checkpoint: Path) -> LTXVideo:
    return ltx_model.skeleton(read_header(checkpoint))


@pytest.mark.parametrize("ahead", [True, False])
def test_an_offloaded_model_computes_what_the_resident_one_does(
    checkpoint: Path, skeleton: LTXVideo, ahead: bool
) -> None:
    wanted = [run(whole(checkpoint), seed) for seed in (2, 3)]
    with offloaded(skeleton, checkpoint, ahead=ahead):
        assert all(
            torch.equal(run(skeleton, seed), w) for seed, w in zip((2, 3), wanted, strict=True)
        )


def test_one_block_is_resident_at_a_time(checkpoint: Path, skeleton: LTXVideo) -> None:
    seen: list[list[bool]] = []
    with offloaded(skeleton, checkpoint):
        for block in skeleton.transformer.transformer_blocks:
            assert isinstance(block, Block)
            block.ff.register_forward_hook(lambda *_: seen.append(resident(skeleton)))
        run(skeleton)
        assert not any(resident(skeleton))
    assert seen == [[i == j for j in range(LAYERS)] for i in range(LAYERS)]


def test_a_loaded_model_gives_its_weights_away(checkpoint: Path) -> None:
    model = whole(checkpoint)
    wanted = run(model)
    with offloaded(model, checkpoint):
        assert not any(resident(model))
        assert torch.equal(run(model), wanted)


def test_afterwards_the_transformer_has_no_weights_and_no_hooks(
    checkpoint: Path, skeleton: LTXVideo
) -> None:
    with offloaded(skeleton, checkpoint):
        run(skeleton)
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in skeleton.modules())


def test_a_block_that_fails_leaves_nothing_behind(checkpoint: Path, skeleton: LTXVideo) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    with offloaded(skeleton, checkpoint):
        block = skeleton.transformer.transformer_blocks[1]
        assert isinstance(block, Block)
        hook = block.ff.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            run(skeleton)
        assert not any(resident(skeleton))
        hook.remove()
        assert torch.equal(run(skeleton), run(whole(checkpoint)))


def test_the_vae_is_left_alone(checkpoint: Path) -> None:
    model = ltx_model.load(checkpoint)
    before = [tensor.data_ptr() for tensor in model.vae.state_dict().values()]
    with offloaded(model, checkpoint):
        pass
    assert [tensor.data_ptr() for tensor in model.vae.state_dict().values()] == before


def test_a_file_of_another_model_is_refused(
    checkpoint: Path, skeleton: LTXVideo, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    tensors = dict(ltx_model.load(checkpoint).state_dict())
    name = "model.diffusion_model.transformer_blocks.2.ff.net.2.bias"
    save_file({n: t.clone() for n, t in tensors.items() if n != name}, other)
    with pytest.raises(CheckpointError, match=f"1 missing: {name}"), offloaded(skeleton, other):
        pass


def test_a_file_that_becomes_shorter_is_said(
    checkpoint: Path, skeleton: LTXVideo, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(checkpoint.read_bytes())
    with offloaded(skeleton, copy, ahead=False):
        end = read_header(copy).tensors[f"model.diffusion_model.{NAME}"].end
        with copy.open("r+b") as file:
            file.truncate(end - 1)
        with pytest.raises(CheckpointError, match="became shorter while it was read"):
            run(skeleton)


NAME = "transformer_blocks.0.attn1.to_q.weight"


def test_a_model_without_blocks_is_a_mistake(checkpoint: Path) -> None:
    with (
        pytest.raises(ValueError, match="0 modules transformer_blocks"),
        offloaded(nn.Linear(2, 2), checkpoint),
    ):
        pass
