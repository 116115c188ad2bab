"""Made checkpoints have the released sizes and layouts, and are read as the released ones are."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import make_checkpoint
from ltx_engines.errors import UserError
from ltx_ref import text
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video import model, upsampler
from ltx_ref.ltx_video.config import (
    LINEAR_QUADRATIC,
    SD3_SHIFT,
    TRANSFORMER_PREFIX,
    VAE_GENERATIONS,
    infer_config,
    read_config,
)
from ltx_ref.ltx_video.upsampler_config import SPATIAL, TEMPORAL, UpsamplerConfig
from make_checkpoint import main, make, numbers, write_random
from releases import DISTILLED, TRANSFORMERS, Dtype, File, Model, Tensor, Vae, Wish, files


def tensors(wish: Wish, prefix: str = "") -> list[Tensor]:
    every = chain.from_iterable(file.tensors for file in files(wish))
    return [tensor for tensor in every if tensor.name.startswith(prefix)]


def parameters(found: list[Tensor]) -> int:
    return sum(prod(tensor.shape) for tensor in found)


@pytest.mark.parametrize(
    ("wish", "prefix", "count", "total"),
    [
        (Wish(Model.small), TRANSFORMER_PREFIX, 715, 1_923_385_472),
        (Wish(Model.large), TRANSFORMER_PREFIX, 1215, 13_042_569_344),
        (Wish(Model.small, vae=Vae.first), "vae.decoder.", 94, 238_789_296),
        (Wish(Model.small, vae=Vae.second), "vae.decoder.", 198, 754_572_081),
        (Wish(Model.large), "vae.encoder.", 92, 694_098_881),
        (Wish(Model.large), "vae.decoder.", 132, 552_814_641),
        (Wish(Model.large), "vae.per_channel_statistics.", 5, 5 * 128),
        (Wish(Model.spatial), "", 72, 126_250_624),
        (Wish(Model.temporal), "", 72, 130_968_192),
        (Wish(Model.t5_xxl), "", 219, 4_762_310_656),
    ],
)
def test_a_part_has_the_released_tensors(wish: Wish, prefix: str, count: int, total: int) -> None:
    found = tensors(wish, prefix)
    assert (len(found), parameters(found)) == (count, total)


@pytest.mark.parametrize("size", list(TRANSFORMERS))
def test_fp8_files_hold_the_blocks_matrices_in_fp8_and_the_rest_in_bfloat16(size: Model) -> None:
    found = tensors(Wish(size, Dtype.fp8))
    quantized = [tensor for tensor in found if tensor.dtype == "F8_E4M3"]
    wanted = {Model.small: 1_879_048_192, Model.large: 12_884_901_888}[size]
    assert parameters(quantized) == wanted
    assert {tensor.dtype for tensor in found} == {"F8_E4M3", "BF16"}
    assert not any("scale" in tensor.name for tensor in quantized)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_every_tensor_begins_at_a_multiple_of_its_element(dtype: Dtype, tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    make_checkpoint.write_sparse(path, files(Wish(Model.small, dtype, layers=1))[0])
    width = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
    header = read_header(path)
    assert all(info.begin % width[info.dtype] == 0 for info in header.tensors.values())


@pytest.mark.parametrize("vae", list(Vae))
def test_the_metadata_says_what_the_tensors_say(vae: Vae, tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    assert main(["--model=2b", "--sparse", "--layers=3", f"--vae={vae}", f"--out={path}"]) == 0
    header = read_header(path)
    config = read_config(header)
    inferred = infer_config(header)
    assert (config.transformer, config.vae) == (inferred.transformer, inferred.vae)
    assert config.vae == VAE_GENERATIONS[vae.value]
    assert config.transformer.num_layers == 3
    wanted = LINEAR_QUADRATIC if vae is Vae.third else SD3_SHIFT
    assert config.scheduler == replace(wanted, base_resolution=config.scheduler.base_resolution)


def test_only_distilled_files_allow_certain_steps_alone(tmp_path: Path) -> None:
    for name, options in (("dev", []), ("distilled", ["--distilled"])):
        assert main(["--model=13b", "--sparse", f"--out={tmp_path / name}", *options]) == 0
    dev, distilled = (read_config(read_header(tmp_path / name)) for name in ("dev", "distilled"))
    assert dev.allowed_inference_steps is None
    assert distilled.allowed_inference_steps == DISTILLED


def test_a_sparse_file_is_as_long_as_a_full_one_and_takes_no_disk(tmp_path: Path) -> None:
    path = tmp_path / "13b.safetensors"
    assert main(["--model=13b", "--sparse", f"--out={path}"]) == 0
    assert path.stat().st_size > 2 * 13_042_569_344
    assert path.stat().st_blocks * 512 < 1 << 20
    assert path.stat().st_size == max(t.end for t in read_header(path).tensors.values())


def test_the_reference_loads_a_sparse_file_strictly(tmp_path: Path) -> None:
    path = tmp_path / "2b.safetensors"
    assert main(["--model=2b", "--sparse", "--layers=1", f"--out={path}"]) == 0
    loaded = model.load(path)
    assert len(loaded.transformer.transformer_blocks) == 1
    assert not any(parameter.any() for parameter in loaded.transformer.parameters())


@pytest.mark.parametrize(
    ("name", "config"), [("spatial", SPATIAL), ("temporal", TEMPORAL)], ids=["spatial", "temporal"]
)
def test_the_reference_loads_an_upscaler(
    name: str, config: UpsamplerConfig, tmp_path: Path
) -> None:
    path = tmp_path / name
    assert main([f"--model={name}-upscaler", "--sparse", f"--out={path}"]) == 0
    assert upsampler.load(path).config == config


def test_the_text_encoder_is_a_folder_as_on_a_model_hub(tmp_path: Path) -> None:
    home = tmp_path / "t5"
    assert main(["--model=t5-xxl", "--sparse", "--layers=2", f"--out={home}"]) == 0
    assert len(text.weight_headers(home)) == 2
    encoder = text.load_text_encoder(home)
    assert (encoder.config.d_model, encoder.config.num_layers) == (4096, 2)
    ids, mask = text.load_tokenizer(home)(["a cat"])
    assert mask.sum() == 7, "a space before the first word, five letters, and the end"
    assert ids.max() < encoder.config.vocab_size
    assert 2 not in ids, "no letter is unknown"


def test_the_two_shards_are_about_equal() -> None:
    first, second = files(Wish(Model.t5_xxl))
    assert abs(first.nbytes - second.nbytes) < 0.05 * first.nbytes


SMALL = File(
    "",
    (
        Tensor("a.weight", "F32", (300, 40)),
        Tensor("b.weight", "BF16", (300, 40)),
        Tensor("c.weight", "F16", (40,)),
        Tensor("vae.decoder.timestep_scale_multiplier", "BF16", ()),
        Tensor("d.weight", "F8_E4M3", (30, 40)),
    ),
    {"config": "{}"},
)


def read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def test_what_is_written_is_what_was_drawn_rounded_to_nearest(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    assert sum(write_random(path, SMALL, seed=5)) == SMALL.nbytes
    found = read(path)
    assert found.keys() == {tensor.name for tensor in SMALL.tensors}
    for tensor in SMALL.tensors:
        drawn = torch.from_numpy(np.concatenate(list(numbers(tensor, 5)))).reshape(tensor.shape)
        wanted = drawn.to(found[tensor.name].dtype)
        assert torch.equal(found[tensor.name].float(), wanted.float()), tensor.name
    assert found["vae.decoder.timestep_scale_multiplier"] == 1000


def drawn(name: str, seed: int = 0, shape: tuple[int, ...] = (256, 512)) -> np.ndarray:
    return np.concatenate(list(numbers(Tensor(name, "F32", shape), seed))).reshape(shape)


def test_numbers_depend_on_the_name_and_the_seed_alone() -> None:
    assert np.array_equal(drawn("a.weight"), drawn("a.weight"))
    assert not np.array_equal(drawn("a.weight"), drawn("b.weight"))
    assert not np.array_equal(drawn("a.weight"), drawn("a.weight", seed=1))


def test_numbers_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn("a.weight")
    monkeypatch.setattr(make_checkpoint, "CHUNK", 1000)
    assert np.array_equal(drawn("a.weight"), whole)


def test_a_layer_keeps_the_size_of_what_passes() -> None:
    inputs = np.random.default_rng(0).standard_normal((64, 512))
    outputs = inputs @ drawn("a.weight").T
    assert outputs.std() == pytest.approx(1, abs=0.05)
    assert drawn("norm.weight", shape=(512,)).mean() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(end: type[BaseException], tmp_path: Path) -> None:
    steps = make(Wish(Model.t5_xxl, layers=1), tmp_path / "t5", seed=0)
    done, total = next(steps)
    assert 0 < done < total
    assert list(tmp_path.iterdir()), "nothing was begun"
    with pytest.raises(end):
        steps.throw(end)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 28,\d+,\d+,\d+ bytes, .* has 1,000; try --sparse"):
        next(make(Wish(Model.large), tmp_path / "13b", seed=0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model=t5-xxl", "--vae=0.9"], "--vae is of 2b and 13b"),
        (["--model=spatial-upscaler", "--distilled"], "--distilled is of 2b and 13b"),
        (["--model=t5-xxl", "--dtype=fp8"], "take bf16"),
        (["--model=temporal-upscaler", "--layers=2"], "leave out --layers"),
        (["--model=2b", "--layers=0"], "--layers is 0, wanted 1 or more"),
        (["--model=2b", "--sparse", "--seed=1"], "--seed has no effect"),
        (["--model=3b"], "Invalid value for '--model'"),
    ],
)
def test_what_cannot_be_costs_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, f"--out={tmp_path / 'it'}"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"mine")
    assert main(["--model=2b", "--sparse", f"--out={path}"]) == 2
    assert path.read_bytes() == b"mine"
