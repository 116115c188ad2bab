"""What is in a bundle besides graphs, and the ways to make one."""

import os
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from ltx_engines.bundle import Defaults, open_bundle
from ltx_engines.stages import Sizes, ltx_video
from ltx_export import cli, onnx_bundle
from ltx_export.pipeline_defaults import of_model, read
from ltx_export.weights import names
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video.config import ModelConfig, parse_config
from tests.export.checkpoints import config, write_checkpoint, write_text_encoder
from tests.export.conftest import Exported, Files, export


def parsed(**extra: object) -> ModelConfig:
    return parse_config({**config("0.9.5"), **extra})


def test_the_manifest_says_what_the_checkpoint_is(exported: Exported) -> None:
    manifest = exported.bundle.manifest
    assert manifest.name == "small"
    assert manifest.model_version == "0.9.5 to 0.9.8 (by the layout of its VAE)"
    assert manifest.precision == "float32"
    assert manifest.checkpoint == "small.safetensors"
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.pad_token_id == 0
    assert manifest.tokenizer.max_length == 256
    assert manifest.model.causal_temporal_positioning
    assert manifest.scheduler.sampler == "LinearQuadratic"
    assert manifest.toolchain["torch"] == torch.__version__
    assert set(manifest.stages["text_encoder"].weights) == {
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
    }


def test_the_noises_of_a_091_decoder_are_described(exported_091: Exported) -> None:
    found = [(n.name, n.maps, n.scale) for n in exported_091.bundle.manifest.model.noise_blocks]
    assert found == [("noise_0", 2, 1), ("noise_3", 4, 4)]
    assert exported_091.bundle.manifest.model_version.startswith("0.9.1 ")


def test_a_version_that_the_file_states_is_believed(tmp_path: Path) -> None:
    stated = {"model_version": "0.9.7"}
    path = write_checkpoint(tmp_path / "a.safetensors", config("0.9.5"), metadata=stated)
    said = onnx_bundle.model_version(read_header(path), "0.9.5")
    assert said == "0.9.7 (stated by the file)"


@pytest.fixture(scope="module")
def copied(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bfloat16 text encoder in one file, under its other embedding name; its weights copied."""
    folder = tmp_path_factory.mktemp("copied")
    t5 = write_text_encoder(
        folder / "model" / "text_encoder",
        embedding="encoder.embed_tokens.weight",
        dtype=torch.bfloat16,
    )
    options = ("--weights", "copy", "--name", "mine")
    return export(files.checkpoint, t5.parent, folder / "bundle", "text_encoder", *options)


def test_weights_can_be_copied_and_then_moved(copied: Exported, files: Files) -> None:
    file = copied.bundle.path / files.checkpoint.name
    assert file.read_bytes() == files.checkpoint.read_bytes()
    assert not os.path.samefile(file, files.checkpoint)
    moved = copied.bundle.path.with_name("moved")
    shutil.copytree(copied.bundle.path, moved)
    assert open_bundle(moved, cache=moved).manifest == copied.bundle.manifest


def test_each_stage_has_the_element_type_of_its_own_weights(copied: Exported) -> None:
    assert copied.bundle.stage("text_encoder").outputs[0].dtype == "bfloat16"
    assert copied.bundle.manifest.name == "mine"


def test_the_bundles_precision_is_the_transformers_or_the_first_stages(
    copied: Exported, files: Files, tmp_path: Path
) -> None:
    half = write_text_encoder(tmp_path / "t5", dtype=torch.bfloat16)
    order = onnx_bundle.Order(files.checkpoint, tmp_path / "bundle", text_encoder=half)
    checked = onnx_bundle.check(order)
    assert checked.precisions["text_encoder"] == "bfloat16"
    assert onnx_bundle._precision(checked) == "float32"
    assert copied.bundle.manifest.precision == "bfloat16"


def test_a_bundle_gives_way_only_if_told_to(
    copied: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = onnx_bundle.Graph(
        ltx_video(Sizes(12, 12, 24, 2, 12, True))["text_encoder"],
        "bfloat16",
        ir.load(copied.bundle.path / "text_encoder.onnx"),
        ("text_encoder/model.safetensors",),
    )
    monkeypatch.setattr(onnx_bundle, "export", lambda *_: graph)
    arguments = ["onnx", str(copied.checkpoint), "--text-encoder", str(copied.text_encoder)]
    arguments += ["--out", str(copied.bundle.path), "--stages", "text_encoder"]
    assert cli.main(arguments) == 2
    assert "holds a bundle; choose another folder or pass --overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert open_bundle(copied.bundle.path, cache=copied.bundle.path.parent).manifest.name == "small"


def test_half_precision_reaches_every_table_and_weight(files: Files, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "half.safetensors", config("0.9.5"), dtype=torch.bfloat16)
    made = export(path, files.text_encoder, tmp_path / "bundle", "transformer").bundle
    entry = made.stage("transformer")
    assert [t.dtype for t in (*entry.inputs, *entry.outputs)] == [
        *("bfloat16", "float32", "float32", "bfloat16", "bfloat16", "bfloat16"),
        "bfloat16",
    ]
    assert made.manifest.precision == "bfloat16"
    model = ir.load(made.file(entry.file))
    types = {model.graph.initializers[name].dtype for name in names(model)}
    assert types == {ir.DataType.BFLOAT16}


ORIGINAL = """
pipeline_type: base
checkpoint_path: "ltxv-2b-0.9.6-distilled-04-25.safetensors"
guidance_scale: 1
stg_scale: 0
rescaling_scale: 1
num_inference_steps: 8
skip_block_list: [[], [1]]
guidance_timesteps: [1.0, 0.5]
stg_mode: "stg_t"
decode_timestep: 0.05
decode_noise_scale: 0.025
text_encoder_model_name_or_path: "PixArt-alpha/PixArt-XL-2-1024-MS"
precision: "bfloat16"
sampler: "uniform"
prompt_enhancement_words_threshold: 120
stochastic_sampling: true
"""


def test_an_original_pipeline_config_becomes_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "ltxv.yaml"
    path.write_text(ORIGINAL, encoding="utf-8")
    found = read(path, parsed(), None)
    assert found.stg_mode == "transformer_block"
    assert found.scheduler.sampler == "Uniform"
    assert found.defaults.guidance_scale == 1.0
    assert found.defaults.num_inference_steps == 8
    assert found.defaults.skip_block_list == ((), (1,))
    assert found.defaults.stochastic_sampling
    assert read(path, parsed(), "attention_skip").stg_mode == "attention_skip"


def test_without_a_pipeline_config_the_released_ones_are_the_defaults() -> None:
    table = config("0.9.5")
    table["transformer"]["num_layers"] = 28
    assert read(None, parse_config(table), None).defaults == Defaults()


def test_a_distilled_model_keeps_to_its_steps_and_wants_no_guidance() -> None:
    defaults = of_model(parsed(allowed_inference_steps=[0.5, 1.0, 0.0]))
    assert defaults["timesteps"] == [1.0, 0.5]
    assert (defaults["guidance_scale"], defaults["stg_scale"]) == (1.0, 0.0)


def test_the_perturbed_block_scales_with_a_small_model() -> None:
    assert of_model(parsed())["skip_block_list"] == [1]


def test_inspect_tells_a_checkpoint_from_its_header(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(files.checkpoint)]) == 0
    said = capsys.readouterr().out
    assert "VAE of 0.9.5 to 0.9.8; configuration from its metadata" in said
    assert "transformer: 65 tensors, parameters " in said
    assert "tensors of no stage: 0" in said


def test_inspect_refuses_what_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"pickle")
    assert cli.main(["inspect", str(path)]) == 2
    assert "is not a safetensors file" in capsys.readouterr().err
