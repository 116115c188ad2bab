"""A bundle becomes a repository: whole or not at all, its configurations from the tensor tables."""

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from ltx_engines import bundle as bundles
from ltx_engines import triton_settings
from ltx_engines.bundle import open_bundle
from ltx_engines.defaults import Pass
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.stages import STREAM
from ltx_engines.triton_model import INPUTS, OUTPUTS
from ltx_engines.triton_settings import Settings
from ltx_export import cli
from ltx_export.triton import repository
from ltx_trt.cli import SHIPPED
from tests.runtime import engine_bundles, streams, upsampling
from tests.runtime.conftest import MODEL
from tests.runtime.engine_bundles import Engines

STAGES = ("text_encoder", "transformer", "vae_decoder")


def config(repo: Path, model: str, name: str = "config.pbtxt") -> Any:
    return text_format.Parse((repo / model / name).read_text(encoding="utf-8"), ModelConfig())


def write(out: Path, bundle: Path = SHIPPED, overwrite: bool = False, **settings: Any) -> Path:
    repository.write(bundle, out, repository.Order(Settings(**settings), overwrite=overwrite))
    return out


def with_engines(folder: Path, **changes: Any) -> Path:
    shutil.copytree(SHIPPED, folder)
    clips = (VideoShape(25, 128, 128), VideoShape(9, 64, 96))
    wished = {"flavour": "tensorrt", "version": "10.14.1", "targets": (89, 120), **changes}
    engine_bundles.add(folder, Engines(clips, **wished))
    return folder


def test_the_video_model_has_the_tensors_and_the_settings(tmp_path: Path) -> None:
    repo = write(tmp_path / "repo", at_once=3, batch_delay=0.25, threads=2)
    found = config(repo, "ltx_video")
    told = {row.name: (list(row.dims), row.optional) for row in found.input}
    assert told == {wire.name: (list(wire.dims), wire.optional) for wire in INPUTS}
    assert [row.name for row in found.output] == [wire.name for wire in OUTPUTS]
    assert found.model_transaction_policy.decoupled
    assert not found.response_cache.enable, "a seed is no key"
    words = {name: entry.string_value for name, entry in found.parameters.items()}
    wanted = Settings(at_once=3, batch_delay=0.25, threads=2)
    assert triton_settings.read(words) == wanted


def test_a_repository_holds_one_whole_bundle_as_links(tmp_path: Path) -> None:
    repo = write(tmp_path / "repo")
    inside = open_bundle(repo / repository.BUNDLE)
    assert inside.manifest == open_bundle(SHIPPED).manifest
    weights = inside.file(inside.manifest.checkpoint)
    assert weights.samefile(SHIPPED / inside.manifest.checkpoint)
    assert [entry.name for entry in repo.iterdir() if entry.is_dir()] == ["ltx_video"]


def test_a_model_of_two_passes_has_its_upsampler_too(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(SHIPPED, folder)
    upsampling.add(folder)
    manifest = bundles.read(folder)
    defaults = manifest.defaults.model_copy(update={"second": Pass(timesteps=(0.9, 0.4))})
    bundles.update(folder, manifest.model_copy(update={"defaults": defaults}))
    repo = write(tmp_path / "repo", folder, layout="stages")
    (latents,) = config(repo, "latent_upsampler").input
    assert latents.name == "latents"


@pytest.mark.parametrize("layout", ["single", "stages"])
def test_each_model_has_a_twin_for_a_server_without_a_gpu(tmp_path: Path, layout: str) -> None:
    repo = write(tmp_path / "repo", layout=layout)
    models = [entry.name for entry in repo.iterdir() if entry.is_dir()]
    assert set(models) == {"ltx_video", *(STAGES if layout == "stages" else ())}
    for model in models:
        ours, twin = config(repo, model), config(repo, model, "configs/cpu.pbtxt")
        assert [group.kind for group in twin.instance_group] == [ModelInstanceGroup.KIND_CPU]
        for one in (ours, twin):
            one.ClearField("instance_group")
        assert ours == twin
        assert (repo / model / "1/model.py").is_file()


@pytest.mark.parametrize(("layout", "gpus"), [("single", [0]), ("stages", [])])
def test_a_model_with_engines_is_one_process_on_the_first_gpu(
    tmp_path: Path, layout: str, gpus: list[int]
) -> None:
    """Without a kind there would be one on each GPU; calling stages needs none."""
    bundle = with_engines(tmp_path / "bundle", flavour="tensorrt-rtx", version="1.7.1.116")
    repo = write(tmp_path / "repo", bundle, layout=layout)
    (group,) = config(repo, "ltx_video").instance_group
    assert (list(group.gpus), group.count) == (gpus, 1)
    wanted = ModelInstanceGroup.KIND_GPU if gpus else ModelInstanceGroup.KIND_CPU
    assert group.kind == wanted
    if layout == "stages":
        assert list(config(repo, "transformer").instance_group[0].gpus) == [0]


def test_a_stage_has_the_tensors_of_the_bundle_in_both_directions(tmp_path: Path) -> None:
    repo = write(tmp_path / "repo", layout="stages")
    entry = open_bundle(SHIPPED).stage("transformer")
    found = config(repo, "transformer")
    rows = [(row.name, list(row.dims)) for row in (*found.input, *found.output)]
    wanted = [
        (tensor.name, [axis if isinstance(axis, int) else -1 for axis in tensor.axes])
        for tensor in (*entry.inputs, *entry.outputs)
    ]
    assert rows == wanted
    place = repo / "transformer/1" / found.parameters["bundle"].string_value
    assert place.resolve() == (repo / repository.BUNDLE).resolve()


def test_tensorrt_engines_are_plans_with_a_profile_a_graph_and_a_warm_up_for_each_size(
    tmp_path: Path,
) -> None:
    bundle = with_engines(tmp_path / "bundle")
    repo = write(tmp_path / "repo", bundle, layout="stages")
    found = config(repo, "transformer")
    assert (found.platform, found.backend) == ("tensorrt_plan", "tensorrt")
    assert dict(found.cc_model_filenames) == {"8.9": "model.plan", "12.0": "model.plan"}
    (group,) = found.instance_group
    assert (group.kind, list(group.profile)) == (ModelInstanceGroup.KIND_GPU, ["0", "1"])
    graphs = [list(spec.input["latents"].dim) for spec in found.optimization.cuda.graph_spec]
    assert graphs == [[3, 64, 32], [3, 12, 32]]
    for sample, dims in zip(found.model_warmup, graphs, strict=True):
        assert sample.batch_size == 1, "without it Triton leaves the sample out"
        assert list(sample.inputs["latents"].dims) == dims
        assert sample.inputs.keys() == {row.name for row in found.input}
    name = next(e.file for e in bundles.read(bundle).engines if e.key.stage == "transformer")
    assert (repo / "transformer/1/model.plan").samefile(bundle / name)
    assert not (repo / "transformer/1/model.py").exists()


@pytest.mark.parametrize(
    "change",
    [{"flavour": "tensorrt-rtx", "version": "1.7.1.116"}, {"stages": ("text_encoder",)}],
)
def test_what_tritons_own_backend_does_not_load_is_run_by_ours(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    repo = write(tmp_path / "repo", with_engines(tmp_path / "bundle", **change), layout="stages")
    assert config(repo, "transformer").backend == "python"
    assert (repo / "transformer/1/model.py").is_file()


def test_a_failure_on_the_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(repository, "_seal", broken)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "repo")
    assert list(tmp_path.iterdir()) == []


def test_only_a_repository_gives_way_and_only_if_so_wished(tmp_path: Path) -> None:
    repo = write(tmp_path / "repo")
    with pytest.raises(UserError, match="--overwrite"):
        write(repo)
    write(repo, overwrite=True, layout="stages")
    assert (repo / "transformer").is_dir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="neither empty nor a repository"):
        write(tmp_path / "mine", overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "repo"]


def test_the_command_writes_what_its_check_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "repo")
    words = ["--out", out, "--layout", "stages", "--at-once", "2"]
    assert cli.main(["triton", str(SHIPPED), *words]) == 0
    assert "ltx_video, text_encoder, transformer, vae_decoder" in capsys.readouterr().out
    assert cli.main(["triton", "--check", out]) == 0
    assert cli.main(["triton", str(SHIPPED)]) == 2
    assert "--out REPO" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"at_onse": "2"}, "did you mean 'at_once'?"),
        ({"at_once": "two"}, "at_once of the model is 'two', not a number"),
        ({"at_once": "0"}, "at_once must be at least 1"),
        ({"batch_delay": "9"}, "batch_delay must be from 0 to 1 second"),
        ({"layout": "both"}, "layout must be one of single, stages"),
    ],
)
def test_a_parameter_that_is_not_ours_is_refused(words: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        triton_settings.read(words)
    assert said in str(caught.value)


def streamed(folder: Path, *stages: str) -> Path:
    """Engines of RTX, of these stages, in a bundle whose decoder has a graph that goes on."""
    shutil.copytree(SHIPPED, folder)
    streams.add(folder)
    manifest = bundles.read(folder)
    noises = {"noise_blocks": MODEL.noise_blocks}  # as the graph made by hand has them
    model = manifest.model.model_copy(update=noises)
    bundles.update(folder, manifest.model_copy(update={"model": model}))
    engine_bundles.add(folder, Engines((VideoShape(25, 128, 128),), stages))
    return folder


def test_a_graph_of_a_decoder_that_goes_on_is_no_model(tmp_path: Path) -> None:
    folder = streamed(tmp_path / "bundle")
    repo = write(tmp_path / "repo", folder, layout="stages")
    models = {entry.name for entry in repo.iterdir() if entry.is_dir()}
    assert models == {"ltx_video", *STAGES}
    plain = write(tmp_path / "plain", layout="stages")
    for model in models:
        assert config(repo, model) == config(plain, model)


def test_a_decoder_that_keeps_a_clip_is_no_model_of_its_own(tmp_path: Path) -> None:
    folder = streamed(tmp_path / "bundle", "text_encoder", "transformer", STREAM)
    said = rf"of the decoder there is only {STREAM}; choose --layout single, or build the other"
    with pytest.raises(UserError, match=said) as told:
        write(tmp_path / "repo", folder, layout="stages")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "repo").exists()
    repo = write(tmp_path / "repo", folder)
    assert [entry.name for entry in repo.iterdir() if entry.is_dir()] == ["ltx_video"]


def test_on_onnx_runtime_a_decoder_is_its_graph_whatever_is_built(tmp_path: Path) -> None:
    folder = streamed(tmp_path / "bundle", "text_encoder", "transformer", STREAM)
    repo = write(tmp_path / "repo", folder, layout="stages", backend="onnxruntime")
    assert {entry.name for entry in repo.iterdir() if entry.is_dir()} == {"ltx_video", *STAGES}


def test_of_two_decoders_the_one_for_whole_clips_is_the_model(tmp_path: Path) -> None:
    folder = streamed(tmp_path / "bundle", *STAGES, STREAM)
    repo = write(tmp_path / "repo", folder, layout="stages")
    assert {entry.name for entry in repo.iterdir() if entry.is_dir()} == {"ltx_video", *STAGES}
