"""LoRAs of every style change the weights as the trained adapter would; all others are refused."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltx_engines.errors import UserError
from ltx_export import cli, derive, lora_fit, quantize, recipes
from ltx_ref import lora, lora_file
from ltx_ref.checkpoint import CheckpointError, Header, read_header
from ltx_ref.lora import Wish
from ltx_ref.ltx_video import model
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX as PREFIX
from ltx_ref.ltx_video.transformer import Transformer
from tests.export import loras
from tests.export.checkpoints import (
    CAPTION_CHANNELS,
    LATENT_CHANNELS,
    LAYERS,
    config,
    write_checkpoint,
)
from tests.export.generators import finish
from tests.export.loras import ATTENTION, Factors

WEIGHT = f"{PREFIX}{ATTENTION}.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Header:
    path = tmp_path_factory.mktemp("lora") / "small.safetensors"
    return read_header(write_checkpoint(path, config("0.9.5")))


@pytest.fixture(scope="module")
def factors(checkpoint: Header) -> Factors:
    return loras.factors(checkpoint.shapes())


def fuse(source: Header, folder: Path, *wishes: Wish) -> dict[str, Tensor]:
    adapters = lora_fit.read(wishes, source)
    target = derive.planned(source, None, adapters)
    finish(derive.write(source, target, folder / "fused.safetensors", adapters))
    return load_file(folder / "fused.safetensors")


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def at_run_time(transformer: Transformer, given: Factors, scale: float) -> Iterator[None]:
    """Each linear layer adds scale * B(A(x)), as PEFT does it."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        down, up = chosen[module]
        return out + scale * (args[0] @ down.T @ up.T)

    modules = dict(transformer.named_modules())
    chosen = {modules[name]: pair for name, pair in given.items()}
    handles = [module.register_forward_hook(hook) for module in chosen]
    yield
    for handle in handles:
        handle.remove()


def velocity(transformer: Transformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens, words = 12, 5
    latents = torch.randn(2, tokens, LATENT_CHANNELS, generator=generator)
    coords = torch.rand(2, 3, tokens, generator=generator)
    prompt = torch.randn(2, words, CAPTION_CHANNELS, generator=generator)
    sigma, mask, keep = torch.full((2, 1), 0.7), torch.ones(2, words), torch.ones(LAYERS, 2)
    with torch.no_grad():
        found: Tensor = transformer(latents, coords, sigma, prompt, mask, keep)
    return found


@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_fused_weights_do_what_the_lora_does_at_run_time(
    checkpoint: Header, factors: Factors, tmp_path: Path, strength: float
) -> None:
    alpha, rank = 2.0, 3
    path = loras.write(tmp_path / "a.safetensors", loras.tensors(factors, alpha=alpha))
    reference = model.load(checkpoint.path).transformer
    before = velocity(reference)
    with at_run_time(reference, factors, strength * alpha / rank):
        wanted = velocity(reference)
    fuse(checkpoint, tmp_path, Wish(path, strength))
    found = velocity(model.load(tmp_path / "fused.safetensors").transformer)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (found - before).abs().max() > 0.05 * wanted.abs().max()


@pytest.mark.parametrize("style", sorted(loras.STYLES))
def test_all_styles_of_names_give_the_same_weights(
    checkpoint: Header, factors: Factors, tmp_path: Path, style: str
) -> None:
    plain = loras.write(tmp_path / "plain.safetensors", loras.tensors(factors, alpha=1.5))
    other = loras.write(tmp_path / "other.safetensors", loras.tensors(factors, style, 1.5))
    wanted = fuse(checkpoint, tmp_path, Wish(plain))
    assert equal(fuse(checkpoint, tmp_path, Wish(other)), wanted)
    assert not torch.equal(wanted[WEIGHT], load_file(checkpoint.path)[WEIGHT])


def test_every_weight_of_the_transformer_has_one_name_in_every_style(checkpoint: Header) -> None:
    """Otherwise two weights would be one, and a LoRA would land on the wrong one."""
    names = [name.removesuffix(".weight") for name in checkpoint.tensors]
    assert len({lora_file.flat(name) for name in names}) == len(names)


def test_every_weight_of_diffusers_model_is_found_under_its_name_there(checkpoint: Header) -> None:
    diffusers = pytest.importorskip("diffusers", reason="an oracle of the tests")
    table = config("0.9.5")["transformer"]
    sizes = {key: table[key] for key in ("num_attention_heads", "attention_head_dim", "num_layers")}
    sizes |= {key: table[key] for key in ("caption_channels", "cross_attention_dim")}
    with torch.device("meta"):
        theirs = diffusers.LTXVideoTransformer3DModel(LATENT_CHANNELS, LATENT_CHANNELS, **sizes)
    found = {lora_file.flat(f"transformer.{name}") for name in theirs.state_dict()}
    ours = {lora_file.flat(name) for name in checkpoint.tensors if name.startswith(PREFIX)}
    assert found == ours


def test_query_and_key_norms_are_found_under_diffusers_names(
    checkpoint: Header, tmp_path: Path
) -> None:
    change = torch.linspace(0, 1, 40)
    named = {"transformer.transformer_blocks.1.attn2.norm_k.diff": change}
    path = loras.write(tmp_path / "a.safetensors", named)
    name = f"{PREFIX}transformer_blocks.1.attn2.k_norm.weight"
    found = fuse(checkpoint, tmp_path, Wish(path, 2.0))[name]
    assert torch.equal(found, load_file(checkpoint.path)[name] + 2 * change)


def test_differences_are_added_to_weights_biases_and_tables(
    checkpoint: Header, tmp_path: Path
) -> None:
    before = load_file(checkpoint.path)
    table, bias = f"{PREFIX}scale_shift_table", f"{PREFIX}{ATTENTION}.bias"
    named = {
        f"diffusion_model.{ATTENTION}.diff": torch.full_like(before[WEIGHT], 0.5),
        f"diffusion_model.{ATTENTION}.diff_b": torch.full_like(before[bias], 0.25),
        "diffusion_model.scale_shift_table.diff": torch.full_like(before[table], -1.0),
    }
    found = fuse(checkpoint, tmp_path, Wish(loras.write(tmp_path / "a.safetensors", named)))
    assert torch.equal(found[WEIGHT], before[WEIGHT] + 0.5)
    assert torch.equal(found[bias], before[bias] + 0.25)
    assert torch.equal(found[table], before[table] - 1)


def test_a_weight_can_have_factors_and_a_difference(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    down, up = factors[ATTENTION]
    before = load_file(checkpoint.path)[WEIGHT]
    named = loras.tensors({ATTENTION: (down, up)})
    named[f"diffusion_model.{ATTENTION}.diff"] = torch.ones_like(before)
    found = fuse(checkpoint, tmp_path, Wish(loras.write(tmp_path / "a.safetensors", named)))
    torch.testing.assert_close(found[WEIGHT], before + up @ down + 1, rtol=1e-5, atol=1e-5)


def test_factors_of_convolutions_are_flattened(checkpoint: Header, tmp_path: Path) -> None:
    name = "vae.encoder.conv_in.conv.weight"
    outputs, *rest = checkpoint.shapes()[name]
    down, up = torch.randn(2, *rest), torch.randn(outputs, 2, 1, 1, 1)
    module = name.removesuffix(".weight")
    named = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    found = fuse(checkpoint, tmp_path, Wish(loras.write(tmp_path / "a.safetensors", named)))[name]
    change = (up.flatten(1) @ down.flatten(1)).view(outputs, *rest)
    torch.testing.assert_close(found, load_file(checkpoint.path)[name] + change)


def test_strengths_of_one_file_add_up_exactly(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    path = loras.write(tmp_path / "a.safetensors", loras.tensors(factors))
    again = tmp_path / "again.safetensors"
    again.symlink_to(path)
    once = fuse(checkpoint, tmp_path, Wish(path, 0.3 + 0.4))
    assert equal(fuse(checkpoint, tmp_path, Wish(path, 0.3), Wish(again, 0.4)), once)
    (adapter,) = lora_fit.read(lora.parse([f"{path}:0.1", f"{again}:0.2"]), checkpoint)
    assert adapter.strength == 0.3


@pytest.mark.parametrize("strengths", [(0.0,), (-0.0,), (0.3, -0.3), (0.1, 0.2, -0.3)])
def test_a_full_copy_was_written_for_a_lora_whose_strengths_cancel(
    checkpoint: Header, factors: Factors, tmp_path: Path, strengths: tuple[float, ...]
) -> None:
    path = loras.write(tmp_path / "a.safetensors", loras.tensors(factors))
    with pytest.raises(CheckpointError, match=r"a\.safetensors changes nothing: its strength is 0"):
        fuse(checkpoint, tmp_path, *(Wish(path, strength) for strength in strengths))
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_copy_was_written_for_a_lora_whose_alpha_is_0(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    named = loras.tensors(factors, alpha=0.0)
    path = loras.write(tmp_path / "a.safetensors", named)
    assert "changes nothing: strength times alpha is 0" in refused(checkpoint, path)
    named[f"diffusion_model.{ATTENTION}.alpha"] = torch.tensor(1.0)
    (adapter,) = lora_fit.read([Wish(loras.write(path, named))], checkpoint)
    assert adapter.patches[WEIGHT][0].scale == 1 / 3


def test_the_order_of_two_loras_does_not_matter_and_both_count(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    a = Wish(loras.write(tmp_path / "a.safetensors", loras.tensors(factors)), 0.8)
    other = loras.factors(checkpoint.shapes(), rank=2, seed=1)
    b = Wish(loras.write(tmp_path / "b.safetensors", loras.tensors(other, "kohya", 4.0)), -0.5)
    both = fuse(checkpoint, tmp_path, a, b)
    assert equal(both, fuse(checkpoint, tmp_path, b, a))
    (d1, u1), (d2, u2) = factors[ATTENTION], other[ATTENTION]
    wanted = load_file(checkpoint.path)[WEIGHT] + 0.8 * u1 @ d1 - 0.5 * 2 * u2 @ d2
    torch.testing.assert_close(both[WEIGHT], wanted, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_weight_is_rounded_once_at_the_end(factors: Factors, tmp_path: Path) -> None:
    source = read_header(
        write_checkpoint(tmp_path / "b.safetensors", config("0.9.5"), dtype=torch.bfloat16)
    )
    halves = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in factors.items()}
    path = loras.write(tmp_path / "a.safetensors", loras.tensors(halves))
    found, before = fuse(source, tmp_path, Wish(path, 0.37)), load_file(source.path)
    for module, (down, up) in halves.items():
        name = f"{PREFIX}{module}.weight"
        change = (up.float().numpy() * 0.37) @ down.float().numpy()
        wanted = (before[name].float() + torch.from_numpy(change)).to(torch.bfloat16)
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], wanted)


def test_with_a_precision_the_sum_is_rounded_once_and_not_twice(
    factors: Factors, tmp_path: Path
) -> None:
    source = read_header(
        write_checkpoint(tmp_path / "b.safetensors", config("0.9.5"), dtype=torch.bfloat16)
    )
    adapters = lora_fit.read([Wish(loras.write(tmp_path / "a", loras.tensors(factors)))], source)
    target = derive.planned(source, "float32", adapters)
    finish(derive.write(source, target, tmp_path / "wide.safetensors", adapters))
    down, up = factors[ATTENTION]
    wanted = load_file(source.path)[WEIGHT].float() + up @ down
    found = load_file(tmp_path / "wide.safetensors")[WEIGHT]
    assert not torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert target.path.name == "b.lora.float32.safetensors"


def test_everything_that_no_lora_names_stays_bit_by_bit(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    path = loras.write(tmp_path / "a.safetensors", loras.tensors(factors))
    found, before = fuse(checkpoint, tmp_path, Wish(path)), load_file(checkpoint.path)
    touched = {f"{PREFIX}{module}.weight" for module in factors}
    assert {name for name in before if not torch.equal(found[name], before[name])} == touched


def test_the_new_file_says_what_is_in_it(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    path = loras.write(tmp_path / "a.safetensors", loras.tensors(factors))
    fuse(checkpoint, tmp_path, Wish(path, 0.5))
    once = read_header(tmp_path / "fused.safetensors")
    (note,) = json.loads(once.metadata["ltx_trt.lora"])
    assert note["file"] == "a.safetensors"
    assert note["strength"] == 0.5
    assert len(note["sha256"]) == 64
    assert once.metadata["config"] == checkpoint.metadata["config"]
    twice = derive.planned(once, None, lora_fit.read([Wish(path, 0.25)], once))
    assert [n["strength"] for n in json.loads(twice.metadata["ltx_trt.lora"])] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"transformer.lora_alpha": 6, "transformer.r": 3}, 2.0),
        ({"transformer.lora_alpha": 6, "transformer.use_rslora": True}, 6 / 3**0.5),
        ({"transformer.lora_alpha": 3, "transformer.alpha_pattern": {"to_q": 9}}, 3.0),
        ({"transformer.alpha_pattern": {r"transformer_blocks\.1.*": 9}}, 1.0),
        ({}, 1.0),
    ],
)
def test_alpha_in_the_metadata_of_diffusers_counts(
    checkpoint: Header, factors: Factors, tmp_path: Path, settings: object, factor: float
) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    named = loras.tensors(factors, "diffusers")
    file = lora_file.read(loras.write(tmp_path / "a.safetensors", named, metadata))
    scale = file.scale(file.modules[lora_file.flat(ATTENTION)])
    assert scale == pytest.approx(factor)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bfloat16, torch.float64])
def test_alpha_may_be_of_any_type(factors: Factors, tmp_path: Path, dtype: torch.dtype) -> None:
    key = f"diffusion_model.{ATTENTION}.alpha"
    named = {**loras.tensors(factors), key: torch.tensor(6, dtype=dtype)}
    file = lora_file.read(loras.write(tmp_path / "a.safetensors", named))
    assert file.scale(file.modules[lora_file.flat(ATTENTION)]) == 2.0


def test_alpha_in_pefts_own_file_counts_and_decides_about_the_cache(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    path = loras.write(tmp_path / "adapter_model.safetensors", loras.tensors(factors, "PEFT"))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 12, "r": 3}')
    (adapter,) = lora_fit.read([Wish(path, 0.5)], checkpoint)
    (patch,) = adapter.patches[WEIGHT]
    assert patch.scale == 0.5 * 12 / 3
    assert adapter.inputs == (path, tmp_path / "adapter_config.json")


def test_alpha_beside_the_factors_goes_before_alpha_elsewhere(
    factors: Factors, tmp_path: Path
) -> None:
    metadata = {"lora_adapter_metadata": '{"transformer.lora_alpha": 300}'}
    named = loras.tensors(factors, "diffusers", alpha=6.0)
    file = lora_file.read(loras.write(tmp_path / "a.safetensors", named, metadata))
    assert {file.scale(module) for module in file.modules.values()} == {2.0}


@pytest.mark.parametrize(
    ("word", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:+.5e-1", "a.safetensors", 0.05),
        ("a:b/c.safetensors:2", "a:b/c.safetensors", 2.0),
        ("a:b/c.safetensors", "a:b/c.safetensors", 1.0),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:.5", r"C:\loras\a.safetensors", 0.5),
        ("name", "name", 1.0),
        ("name:3", "name", 3.0),
    ],
)
def test_a_strength_follows_the_last_colon(word: str, path: str, strength: float) -> None:
    assert lora.parse([word]) == (Wish(Path(path), strength),)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("a.safetensors:-0,5", r"did you mean a\.safetensors:-0\.5\?$"),
        ("a.safetensors:\N{MINUS SIGN}0.5", r"did you mean a\.safetensors:-0\.5\?$"),
        ("a.safetensors:- 0.5", r"did you mean a\.safetensors:-0\.5\?$"),
        ("a.safetensors:x", r"-0\.5$"),
        ("a.safetensors:", r"-0\.5$"),
        ("a.safetensors:--1", r"-0\.5$"),
        ("a.safetensors:nan", r"-0\.5$"),
        ("name:-inf", r"-0\.5$"),
        ("a.safetensors:1e999", r"-0\.5$"),
    ],
)
def test_a_typo_in_the_strength_is_one_line_that_shows_how(word: str, hint: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"is not a finite number; write it as in .*{hint}"
    ) as said:
        lora.parse([word])
    assert "\n" not in str(said.value)


def test_a_file_that_is_there_is_meant_whatever_its_name(tmp_path: Path) -> None:
    odd = tmp_path / "style:0.5"
    odd.write_bytes(b"")
    assert lora.parse([str(odd), f"{odd}:2"]) == (Wish(odd, 1.0), Wish(odd, 2.0))
    with pytest.raises(CheckpointError, match="'x' is not a finite number"):
        lora.parse([f"{odd}:x"])


def refused(checkpoint: Header, path: Path) -> str:
    with pytest.raises((UserError, CheckpointError)) as said:
        lora_fit.read([Wish(path)], checkpoint)
    assert "\n" not in str(said.value)
    assert str(path) in str(said.value)
    return str(said.value)


@pytest.mark.parametrize("made", ["nothing", "folder", "pickle"])
def test_what_is_no_safetensors_file_is_refused(
    checkpoint: Header, tmp_path: Path, made: str
) -> None:
    path = tmp_path / "a.safetensors"
    if made == "folder":
        path.mkdir()
    elif made == "pickle":
        torch.save({}, path)
    wanted = {"nothing": "no such file", "folder": "is a folder", "pickle": "not a safetensors"}
    assert wanted[made] in refused(checkpoint, path)


def test_a_checkpoint_is_not_a_lora(checkpoint: Header) -> None:
    assert "is not a LoRA: it has model.diffusion_model" in refused(checkpoint, checkpoint.path)


def test_modules_that_the_checkpoint_lacks_are_listed_with_the_nearest_name(
    checkpoint: Header, tmp_path: Path
) -> None:
    pair = torch.ones(2, 40), torch.ones(40, 2)
    names = [f"transformer_blocks.0.attn1.to_{letter}" for letter in "wxyz"]
    named = loras.tensors(dict.fromkeys(names, pair))
    said = refused(checkpoint, loras.write(tmp_path / "a.safetensors", named))
    assert "4 of its modules match no weight" in said
    assert f"diffusion_model.{names[0]}.lora_B.weight, " in said
    assert " and 1 more" in said
    assert "did you mean 'transformer_blocks.0.attn1.to_" in said


def test_one_wrong_module_among_good_ones_is_enough(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    extra = {"transformer_blocks.9.attn1.to_q": factors[ATTENTION]}
    named = loras.tensors({**factors, **extra})
    said = refused(checkpoint, loras.write(tmp_path / "a.safetensors", named))
    assert "1 of its modules" in said
    assert "transformer_blocks.9.attn1.to_q" in said


def test_a_lora_of_a_wider_model_is_said_to_be_one(tmp_path: Path) -> None:
    """As the 13B's on the 2B, by their true widths."""
    path = tmp_path / "2b.safetensors"
    save_file({f"{PREFIX}transformer_blocks.27.attn1.to_q.weight": torch.ones(2048, 2048)}, path)
    pair = torch.ones(2, 4096), torch.ones(4096, 2)
    named = loras.tensors({"transformer_blocks.47.attn1.to_q": pair}, "diffusers")
    said = refused(read_header(path), loras.write(tmp_path / "a.safetensors", named))
    assert "transformer.transformer_blocks.47.attn1.to_q.lora_B.weight looks made for" in said
    assert "LTX-Video 13B (width 4096, 48 blocks)" in said
    assert f"{path} is LTX-Video 2B (width 2048, 28 blocks)" in said


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("transformer_blocks.0.audio_attn1.to_q", "LTX-2"),
        ("single_transformer_blocks.0.attn.to_q", "FLUX"),
        ("blocks.0.self_attn.q", "Wan"),
        ("text_model.encoder.layers.0.mlp.fc1", "a CLIP text encoder"),
        ("down_blocks.0.attentions.0.proj", "Stable Diffusion"),
    ],
)
def test_a_lora_of_another_family_is_said_to_be_one(
    checkpoint: Header, tmp_path: Path, module: str, family: str
) -> None:
    named = loras.tensors({module: (torch.ones(2, 40), torch.ones(40, 2))})
    said = refused(checkpoint, loras.write(tmp_path / "a.safetensors", named))
    assert f"looks made for {family}, " in said
    assert "LTX-Video (width 40, 2 blocks)" in said


def test_a_factor_of_the_wrong_size_is_named(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    module = "caption_projection.linear_1"
    named = loras.tensors({**factors, module: (torch.ones(3, 7), torch.ones(40, 3))})
    said = refused(checkpoint, loras.write(tmp_path / "a.safetensors", named))
    assert f"{module}.lora_B.weight changes a weight of shape [40, 7]" in said
    assert f"is [40, {CAPTION_CHANNELS}]" in said


def test_factors_of_different_rank_are_named(checkpoint: Header, tmp_path: Path) -> None:
    named = loras.tensors({ATTENTION: (torch.ones(3, 40), torch.ones(40, 4))})
    said = refused(checkpoint, loras.write(tmp_path / "a.safetensors", named))
    assert f"{ATTENTION}.lora_A.weight has rank 3, " in said
    assert f"{ATTENTION}.lora_B.weight has rank 4" in said


@pytest.mark.parametrize("shape", [(3,), (0, 40)])
def test_factors_must_be_matrices(
    checkpoint: Header, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    named = loras.tensors({ATTENTION: (torch.ones(shape), torch.ones(40, 3))})
    said = refused(checkpoint, loras.write(tmp_path / "a.safetensors", named))
    assert f"is {list(shape)}" in said
    assert "wanted [rank, inputs]" in said


@pytest.mark.parametrize("lost", ["lora_A", "lora_B", "both"])
def test_half_a_pair_is_named(
    checkpoint: Header, factors: Factors, tmp_path: Path, lost: str
) -> None:
    named = loras.tensors(factors, alpha=1.0)
    prefix = f"diffusion_model.{ATTENTION}."
    for half in ["lora_A", "lora_B"] if lost == "both" else [lost]:
        del named[f"{prefix}{half}.weight"]
    said = refused(checkpoint, loras.write(tmp_path / "a.safetensors", named))
    kept = {"lora_A": "lora_B.weight has no down (A)", "lora_B": "lora_A.weight has no up (B)"}
    assert f"{prefix}{kept.get(lost, 'alpha has no factors')}" in said


def test_one_weight_under_two_names_is_refused(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    one = {ATTENTION: factors[ATTENTION]}
    named = loras.tensors(one, "kohya") | loras.tensors(one, "diffusers")
    said = refused(checkpoint, loras.write(tmp_path / "a.safetensors", named))
    assert "mean the same" in said


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lora_mid.weight", "LoCon"),
        ("lora_B.bias", "LoRA with biases"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused_with_the_reason(
    checkpoint: Header, factors: Factors, tmp_path: Path, ending: str, reason: str
) -> None:
    key = f"diffusion_model.{ATTENTION}.{ending}"
    named = {**loras.tensors(factors), key: torch.ones(40)}
    said = refused(checkpoint, loras.write(tmp_path / "a.safetensors", named))
    assert key in said
    assert reason in said


def test_dora_in_the_metadata_is_refused(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    metadata = {"lora_adapter_metadata": '{"transformer.use_dora": true}'}
    path = loras.write(tmp_path / "a.safetensors", loras.tensors(factors), metadata)
    assert "use_dora" in refused(checkpoint, path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 100_000, '{"lora_alpha": "x"}', '{"alpha_pattern": {"(": 1}}']
)
def test_metadata_that_make_no_sense_are_refused(
    checkpoint: Header, factors: Factors, tmp_path: Path, text: str
) -> None:
    metadata = {"lora_adapter_metadata": text}
    path = loras.write(tmp_path / "a.safetensors", loras.tensors(factors), metadata)
    assert "lora_adapter_metadata" in refused(checkpoint, path)


def test_a_quantized_lora_is_refused(checkpoint: Header, factors: Factors, tmp_path: Path) -> None:
    named = loras.tensors(factors)
    key = f"diffusion_model.{ATTENTION}.lora_A.weight"
    named[key] = named[key].to(torch.float8_e4m3fn)
    said = refused(checkpoint, loras.write(tmp_path / "a.safetensors", named))
    assert f"{key} is F8_E4M3" in said


@pytest.mark.parametrize("alpha", [torch.tensor(float("nan")), torch.ones(2)])
def test_alpha_is_one_finite_number(
    checkpoint: Header, factors: Factors, tmp_path: Path, alpha: Tensor
) -> None:
    named = {**loras.tensors(factors), f"diffusion_model.{ATTENTION}.alpha": alpha}
    said = refused(checkpoint, loras.write(tmp_path / "a.safetensors", named))
    assert "alpha must be one finite number" in said


def test_a_lora_is_fused_before_quantization_and_not_after(
    factors: Factors, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "fp8.safetensors", config("0.9.5"), dtype=torch.bfloat16)
    tensors = load_file(path)
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    source = read_header(path)
    adapters = lora_fit.read([Wish(loras.write(tmp_path / "a", loras.tensors(factors)))], source)
    with pytest.raises(UserError, match=r"to_q\.weight is F8_E4M3.*--precision bfloat16"):
        derive.planned(source, None, adapters)
    target = derive.planned(source, "bfloat16", adapters)
    finish(derive.write(source, target, tmp_path / "out", adapters))
    down, up = factors[ATTENTION]
    wanted = (tensors[WEIGHT].float() + up @ down).bfloat16()
    torch.testing.assert_close(load_file(tmp_path / "out")[WEIGHT], wanted)


def test_a_lora_does_not_fit_a_weight_that_was_cast_to_8_bits(
    factors: Factors, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "fp8.safetensors", config("0.9.5"), dtype=torch.bfloat16)
    tensors = load_file(path)
    save_file(tensors | {WEIGHT: tensors[WEIGHT].to(torch.float8_e4m3fn)}, path)
    wish = Wish(loras.write(tmp_path / "a", loras.tensors(factors)))
    *_, verdict = lora_fit.lines(wish, read_header(path))
    assert "cannot be fused" in verdict
    assert "to_q.weight is F8_E4M3" in verdict


def test_a_quantized_checkpoint_takes_no_lora_and_says_what_to_do_instead(
    factors: Factors, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "bf16.safetensors", config("0.9.5"), dtype=torch.bfloat16)
    out = tmp_path / "int8.safetensors"
    plan = quantize.plan(read_header(path), recipes.load("int8-wo"))
    for _ in quantize.write(plan, out):
        pass
    wish = Wish(loras.write(tmp_path / "a", loras.tensors(factors)))
    advice = (
        r"takes no LoRA: .* 20 to int8-wo; fuse it into the bfloat16 checkpoint with ltx-export"
    )
    with pytest.raises(UserError, match=advice):
        lora_fit.read([wish], read_header(out))
    *_, verdict = lora_fit.lines(wish, read_header(out))
    assert re.search(advice, verdict)


def test_scaled_weights_take_no_lora(factors: Factors, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "fp8.safetensors", config("0.9.5"))
    save_file(load_file(path) | {f"{WEIGHT}_scale": torch.ones(1)}, path)
    source = read_header(path)
    adapters = lora_fit.read([Wish(loras.write(tmp_path / "a", loras.tensors(factors)))], source)
    with pytest.raises(UserError, match=r"takes no LoRA: quantized .*to_q\.weight_scale"):
        derive.planned(source, None, adapters)
    *_, verdict = lora_fit.lines(Wish(tmp_path / "a"), source)
    assert "takes no LoRA: quantized" in verdict


def test_a_damaged_factor_stops_and_leaves_nothing(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    down, up = factors[ATTENTION]
    named = loras.tensors({ATTENTION: (down, torch.full_like(up, torch.nan))})
    path = loras.write(tmp_path / "a.safetensors", named)
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: what .*to_q\.lora_B\.weight adds is not"
    ):
        fuse(checkpoint, tmp_path, Wish(path))
    assert list(tmp_path.iterdir()) == [path]


def test_a_sum_too_large_for_the_type_is_named(factors: Factors, tmp_path: Path) -> None:
    source = read_header(
        write_checkpoint(tmp_path / "b.safetensors", config("0.9.5"), dtype=torch.float16)
    )
    path = loras.write(tmp_path / "a.safetensors", loras.tensors(factors))
    with pytest.raises(CheckpointError, match=r"with its LoRA reaches .*--precision float32"):
        fuse(source, tmp_path, Wish(path, 1e6))


def test_a_report_tells_what_the_file_is(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    named = loras.tensors(factors, "kohya", alpha=1.5)
    path = loras.write(tmp_path / "a.safetensors", named, {"ss_network_alpha": "1.5"})
    text = "\n".join(lora_fit.lines(Wish(path, 0.3), checkpoint))
    assert "strength: 0.3\n" in text
    assert "21 tensors (F32)" in text
    assert "names: kohya" in text
    assert "made for: LTX-Video (width 40, 2 blocks)" in text
    assert "rank: 3\n" in text
    assert "alpha: 1.5\n" in text
    assert "factor (from alpha and rank): 0.5\n" in text
    assert "    1 transformer_blocks_*_attn1_to_q\n" in text
    assert "metadata ss_network_alpha: 1.5\n" in text
    assert f"fits {checkpoint.path}: changes 7 of {len(checkpoint.tensors)} tensors" in text


def test_a_report_says_why_a_lora_does_not_fit(checkpoint: Header, tmp_path: Path) -> None:
    named = loras.tensors({ATTENTION: (torch.ones(3, 41), torch.ones(41, 3))})
    path = loras.write(tmp_path / "a.safetensors", named)
    *_, verdict = lora_fit.lines(Wish(path), checkpoint)
    assert verdict.strip().startswith("cannot be fused: ")
    assert "width 41" in verdict
    assert not any("fuse" in line or "fits" in line for line in lora_fit.lines(Wish(path)))


def test_a_list_with_a_misfit_exited_with_0(
    checkpoint: Header,
    factors: Factors,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide = loras.tensors({ATTENTION: (torch.ones(3, 41), torch.ones(41, 3))})
    bad = loras.write(tmp_path / "bad.safetensors", wide)
    good = loras.write(tmp_path / "good.safetensors", loras.tensors(factors))
    command = ["lora", "--list", "--checkpoint", str(checkpoint.path)]
    assert cli.main([*command, str(bad), f"{good}:0.3"]) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith(f"  fits {checkpoint.path}")
    assert "strength: 0.3" in printed.out
    said = f"ltx-export: {bad} cannot be fused into {checkpoint.path}; see the report"
    assert printed.err.startswith(said)
    assert printed.err.count("\n") == 1
    assert cli.main([*command, f"{good}:0"]) == 2
    assert "cannot be fused: " in capsys.readouterr().out
    assert cli.main([*command, str(good)]) == 0


STAGE = {f"{PREFIX}{module}.weight" for module in loras.MODULES[:2]}
"""As if a stage had only these weights."""


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_of_a_lora_only_what_the_kept_weights_get_is_fused(
    checkpoint: Header,
    factors: Factors,
    tmp_path: Path,
    precision: Literal["bfloat16"] | None,
) -> None:
    path = loras.write(tmp_path / "a.safetensors", loras.tensors(factors))
    adapters = lora_fit.read([Wish(path, 0.5)], checkpoint)
    whole = derive.planned(checkpoint, precision, adapters)
    part = derive.planned(checkpoint, precision, adapters, STAGE)
    for target, file in ((whole, "whole"), (part, "part")):
        finish(derive.write(checkpoint, target, tmp_path / file, adapters))
    found, wanted = load_file(tmp_path / "part"), load_file(tmp_path / "whole")
    assert equal(found, {name: wanted[name] for name in STAGE})
    assert read_header(tmp_path / "part").metadata == whole.metadata


def test_a_lora_for_other_stages_is_refused(
    checkpoint: Header, factors: Factors, tmp_path: Path
) -> None:
    path = loras.write(tmp_path / "a.safetensors", loras.tensors(factors))
    adapters = lora_fit.read([Wish(path)], checkpoint)
    vae = {name for name in checkpoint.tensors if name.startswith("vae.")}
    with pytest.raises(UserError, match=r"a\.safetensors: the stages .* read none of the 7 "):
        derive.planned(checkpoint, None, adapters, vae)


def test_weights_that_are_not_kept_may_be_quantized(factors: Factors, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "fp8.safetensors", config("0.9.5"), dtype=torch.bfloat16)
    tensors = load_file(path)
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    source = read_header(path)
    adapters = lora_fit.read([Wish(loras.write(tmp_path / "a", loras.tensors(factors)))], source)
    kept = derive.planned(source, None, adapters, STAGE - {WEIGHT})
    assert kept.tensors.keys() == STAGE - {WEIGHT}
    with pytest.raises(UserError, match=r"to_q\.weight is F8_E4M3"):
        derive.planned(source, None, adapters, STAGE)


PEAK = r"""
import re, sys
from pathlib import Path
from ltx_export import derive, lora_fit
from ltx_ref import lora
from ltx_ref.checkpoint import read_header
source = read_header(Path(sys.argv[1]))
adapters = lora_fit.read(lora.parse([sys.argv[2]]), source)
target = derive.planned(source, None, adapters)
for _ in derive.write(source, target, Path(sys.argv[3]), adapters):
    pass
assert not {"torch", "safetensors"} & set(sys.modules)
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""
"""getrusage would also count the process that started this one."""


def sparse(path: Path, shapes: Mapping[str, tuple[int, int]]) -> Path:
    """A bfloat16 file of zeros that is a hole on the disk."""
    table, total = {}, 0
    for name, (outputs, inputs) in shapes.items():
        offsets = [total, total := total + 2 * outputs * inputs]
        table[name] = {"dtype": "BF16", "shape": [outputs, inputs], "data_offsets": offsets}
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + total)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_fusing_needs_little_memory_and_no_torch(tmp_path: Path) -> None:
    """One layer of 13B, 537 MB in bfloat16; every linear layer of it has a LoRA of rank 64."""
    width, rank = 4096, 64
    shapes = {f"attn{i}.to_{x}": (width, width) for i in (1, 2) for x in ("q", "k", "v", "out.0")}
    shapes |= {"ff.net.0.proj": (4 * width, width), "ff.net.2": (width, 4 * width)}
    shapes = {f"transformer_blocks.0.{module}": shape for module, shape in shapes.items()}
    source = sparse(tmp_path / "in", {f"{PREFIX}{m}.weight": s for m, s in shapes.items()})
    given = {
        module: (torch.randn(rank, inputs).bfloat16(), torch.randn(outputs, rank).bfloat16())
        for module, (outputs, inputs) in shapes.items()
    }
    adapter = loras.write(tmp_path / "a.safetensors", loras.tensors(given))
    command = [sys.executable, "-c", PEAK, str(source), f"{adapter}:0.5", str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) <= 300e6
    with safe_open(tmp_path / "out", framework="pt") as file:
        for module in list(given)[-2:]:
            down, up = given[module]
            found = file.get_slice(f"{PREFIX}{module}.weight")[-2:].float()
            torch.testing.assert_close(
                found, 0.5 * up[-2:].float() @ down.float(), rtol=2**-7, atol=1e-4
            )
