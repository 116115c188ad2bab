"""Our transformer against the original's and diffusers', in float32, with the same weights."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ltx_ref.ltx_video.conditioning import LatentGrid, coordinates, patchify, unpatchify
from ltx_ref.ltx_video.config import TransformerConfig
from ltx_ref.ltx_video.transformer import StgMode, Transformer
from tests.ref.oracles import ORIGINAL_MISSING, TOLERANCE, difference, normals, randomize

TINY = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=32,  # 64: 6 does not divide it
    num_layers=3,
    in_channels=8,
    out_channels=8,
    caption_channels=24,
    cross_attention_dim=64,
)
GRID = LatentGrid(2, 2, 3)
CONFIGS = {
    "tiny": TINY,
    "width that 6 divides": TransformerConfig(2, 48, 2, 8, 8, 24, 96),
    "one head, other channels out": TransformerConfig(1, 64, 2, 8, 12, 24, 64),
    "other limits": TransformerConfig(
        2, 32, 2, 8, 8, 24, 64, 5000.0, (10, 512, 256), timestep_scale_multiplier=700.0
    ),
    "heads of the 13B model": TransformerConfig(4, 128, 2, 128, 128, 64, 512),
    "width of the 2B model": TransformerConfig(num_layers=2),
}
"""Sizes: heads, head_dim, layers, in, out, caption, cross-attention."""


def original(ours: Transformer) -> Any:
    module = pytest.importorskip(
        "ltx_video.models.transformers.transformer3d", reason=ORIGINAL_MISSING
    )
    config = ours.config
    with torch.device("meta"):
        oracle = module.Transformer3DModel(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.num_layers,
            cross_attention_dim=config.cross_attention_dim,
            caption_channels=config.caption_channels,
            activation_fn="gelu-approximate",
            attention_bias=True,
            norm_elementwise_affine=False,
            norm_eps=config.norm_eps,
            num_embeds_ada_norm=1000,
            qk_norm="rms_norm",
            standardization_norm="rms_norm",
            positional_embedding_theta=config.positional_embedding_theta,
            positional_embedding_max_pos=list(config.positional_embedding_max_pos),
            timestep_scale_multiplier=config.timestep_scale_multiplier,
            causal_temporal_positioning=config.causal_temporal_positioning,
        )
    oracle.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return oracle.eval()


def ask_original(oracle: Any, inputs: "Inputs") -> Tensor:
    answer: Tensor = oracle(
        inputs.latents,
        inputs.coords,
        encoder_hidden_states=inputs.prompt_embeds,
        timestep=inputs.timestep,
        encoder_attention_mask=inputs.prompt_mask,
        return_dict=False,
    )[0]
    return answer


# diffusers' names, from the original's (diffusers scripts/convert_ltx_to_diffusers.py).
RENAMES = {
    "patchify_proj": "proj_in",
    "adaln_single": "time_embed",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}


def diffusers(ours: Transformer) -> Any:
    module = pytest.importorskip("diffusers", reason="an oracle of the tests")
    config = ours.config
    with torch.device("meta"):
        oracle = module.LTXVideoTransformer3DModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            cross_attention_dim=config.cross_attention_dim,
            num_layers=config.num_layers,
            caption_channels=config.caption_channels,
        )
    weights = ours.state_dict()
    for theirs, names in RENAMES.items():
        weights = {key.replace(theirs, names): value for key, value in weights.items()}
    oracle.load_state_dict(weights, strict=True, assign=True)
    # Not options of the class: its limits and theta are those of the released models.
    limits, theta = config.positional_embedding_max_pos, config.positional_embedding_theta
    oracle.rope.base_num_frames, oracle.rope.base_height, oracle.rope.base_width = limits
    oracle.rope.theta = theta
    return oracle.eval()


def ask_diffusers(oracle: Any, inputs: "Inputs", multiplier: float = 1000.0) -> Tensor:
    answer: Tensor = oracle(
        hidden_states=inputs.latents,
        encoder_hidden_states=inputs.prompt_embeds,
        timestep=inputs.timestep * multiplier,
        encoder_attention_mask=inputs.prompt_mask,
        video_coords=inputs.coords,
        return_dict=False,
    )[0]
    return answer


@dataclass(frozen=True, slots=True)
class Inputs:
    latents: Tensor
    coords: Tensor
    timestep: Tensor
    prompt_embeds: Tensor
    prompt_mask: Tensor

    def ask(self, model: Transformer, keep: Tensor | None = None, **mode: StgMode) -> Tensor:
        keep = torch.ones(model.config.num_layers, len(self.latents)) if keep is None else keep
        answer: Tensor = model(
            self.latents,
            self.coords,
            self.timestep,
            self.prompt_embeds,
            self.prompt_mask,
            keep,
            **mode,
        )
        return answer


def some_inputs(
    config: TransformerConfig,
    seed: int,
    *,
    grid: LatentGrid = GRID,
    batch: int = 2,
    per_token: bool = False,
) -> Inputs:
    """The last text is half padding, the others have one padded place less each."""
    words = 8
    mask = torch.ones(batch, words)
    for row in range(batch):
        mask[row, words // 2 + batch - 1 - row :] = 0
    times = normals(batch, grid.tokens if per_token else 1, seed=seed).sigmoid()
    return Inputs(
        latents=normals(batch, grid.tokens, config.in_channels, seed=seed + 1),
        coords=coordinates(grid, 24.0, causal=True).expand(batch, -1, -1),
        timestep=times,
        prompt_embeds=normals(batch, words, config.caption_channels, seed=seed + 2),
        prompt_mask=mask,
    )


def model_of(config: TransformerConfig, seed: int) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    randomize(model, seed)
    return model.eval()


@pytest.mark.parametrize("per_token", [False, True], ids=["one sigma", "sigma per token"])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_oracles_agree_with_ours(name: str, per_token: bool) -> None:
    config = CONFIGS[name]
    ours = model_of(config, seed=len(name))
    inputs = some_inputs(config, seed=10, per_token=per_token)
    wanted = inputs.ask(ours)
    multiplier = config.timestep_scale_multiplier
    assert difference(wanted, ask_diffusers(diffusers(ours), inputs, multiplier)) <= TOLERANCE
    assert difference(wanted, ask_original(original(ours), inputs)) <= TOLERANCE


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_they_agree_on_other_clips_and_at_both_ends_of_the_noise(seed: int) -> None:
    ours = model_of(TINY, seed)
    inputs = some_inputs(TINY, seed, grid=LatentGrid(seed, 4 - seed, 2), batch=3)
    inputs = Inputs(
        inputs.latents,
        inputs.coords,
        torch.tensor([[1.0], [0.0], [1e-3]]),
        inputs.prompt_embeds,
        inputs.prompt_mask,
    )
    assert difference(inputs.ask(ours), ask_original(original(ours), inputs)) <= TOLERANCE
    assert difference(inputs.ask(ours), ask_diffusers(diffusers(ours), inputs)) <= TOLERANCE


@pytest.mark.parametrize("mode", get_args(StgMode))
def test_each_stg_mode_perturbs_what_the_original_perturbs(mode: StgMode) -> None:
    strategy = pytest.importorskip("ltx_video.utils.skip_layer_strategy", reason=ORIGINAL_MISSING)
    theirs = {
        "attention_values": strategy.SkipLayerStrategy.AttentionValues,
        "attention_skip": strategy.SkipLayerStrategy.AttentionSkip,
        "transformer_block": strategy.SkipLayerStrategy.TransformerBlock,
    }
    ours = model_of(TINY, seed=4)
    inputs = some_inputs(TINY, seed=5, batch=3)
    keep = torch.ones(TINY.num_layers, 3)
    keep[0, 2] = keep[2, 2] = keep[1, 1] = 0
    wanted = original(ours)(
        inputs.latents,
        inputs.coords,
        encoder_hidden_states=inputs.prompt_embeds,
        timestep=inputs.timestep,
        encoder_attention_mask=inputs.prompt_mask,
        skip_layer_mask=keep,
        skip_layer_strategy=theirs[mode],
        return_dict=False,
    )[0]
    perturbed, plain = inputs.ask(ours, keep, stg_mode=mode), inputs.ask(ours)
    assert difference(perturbed, wanted) <= TOLERANCE
    torch.testing.assert_close(perturbed[0], plain[0])
    assert difference(perturbed[1:], plain[1:]) > 0.01


def test_padded_text_does_not_matter() -> None:
    ours = model_of(TINY, seed=6)
    inputs = some_inputs(TINY, seed=7, batch=1)
    shouted = inputs.prompt_embeds + 100 * (1 - inputs.prompt_mask)[..., None]
    changed = Inputs(inputs.latents, inputs.coords, inputs.timestep, shouted, inputs.prompt_mask)
    assert torch.equal(inputs.ask(ours), changed.ask(ours))


# The original calls torch.meshgrid without `indexing`.
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [LatentGrid(1, 1, 1), LatentGrid(3, 2, 4), LatentGrid(2, 5, 1)])
def test_coordinates_are_the_originals(grid: LatentGrid, causal: bool) -> None:
    patchifier = pytest.importorskip(
        "ltx_video.models.transformers.symmetric_patchifier", reason=ORIGINAL_MISSING
    )
    encode = pytest.importorskip(
        "ltx_video.models.autoencoders.vae_encode", reason=ORIGINAL_MISSING
    )
    latents = normals(2, 4, grid.frames, grid.rows, grid.columns, seed=8)
    tokens, corners = patchifier.SymmetricPatchifier(1).patchify(latents)
    wanted = encode.latent_to_pixel_coords_from_factors(corners, (8, 32, 32), causal).float()
    wanted[:, 0] = wanted[:, 0] * (1.0 / 25.0)
    assert torch.equal(coordinates(grid, 25.0, causal=causal).expand(2, -1, -1), wanted)
    assert torch.equal(patchify(latents), tokens)
    assert torch.equal(unpatchify(tokens, grid), latents)


def test_the_released_sizes_have_the_released_numbers_of_parameters() -> None:
    counts: dict[str, Callable[[], TransformerConfig]] = {
        "2B": TransformerConfig,
        "13B": lambda: TransformerConfig(32, 128, 48, cross_attention_dim=4096),
    }
    found = SimpleNamespace()
    for name, config in counts.items():
        with torch.device("meta"):
            parameters = list(Transformer(config()).parameters())
        setattr(found, name, (sum(p.numel() for p in parameters), len(parameters)))
    assert vars(found) == {"2B": (1_923_385_472, 715), "13B": (13_042_569_344, 1215)}
