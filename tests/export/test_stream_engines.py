"""build-engine --vae-stream: an engine of the decoder that is given a few frames at a time."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")

from ltx_engines import bundle
from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.errors import UserError
from ltx_engines.stages import STREAM
from ltx_export import (
    build_process,
    cli,
    engine_bundle,
    engine_profiles,
    engine_source,
    engine_stages,
    engine_volumes,
)
from ltx_export.engine_order import Order
from ltx_export.engine_profiles import Buckets
from ltx_export.sources import read
from ltx_ref.ltx_video.vae_stream_config import delay
from ltx_trt.session import needs
from tests.export import stand_in_builder
from tests.export.conftest import Exported

SHIPPED = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
CHECKPOINT = str(SHIPPED / "ltx-tiny.safetensors")
DECODER = "vae_decoder"
REST = ("text_encoder", "transformer", "vae_encoder")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From a checkpoint, for two cards."""
    out = tmp_path_factory.mktemp("stream") / "bundle"
    words = ["--stages", STREAM, "--vae-stream", "16", "--precision", "bf16", "--out", str(out)]
    sizes = ["--shape", "96x64x25", "--shape", "96x64x41", "--gpu", "sm89", "--gpu", "sm120"]
    assert cli.main(["build-engine", CHECKPOINT, *words, *sizes]) == 0
    return out


def test_an_engine_takes_so_many_frames_of_clips_of_any_length(engines: Path) -> None:
    (engine,) = bundle.read(engines).engines
    (profile,) = engine.key.profiles
    assert engine.key.stage == STREAM
    assert engine.key.targets == (89, 120)
    assert profile["latent_frames"] == (2, 2, 2), "16 frames, whatever --shape says of them"
    assert profile["batch"] == (1, 1, 1)
    assert (profile["latent_height"], profile["latent_height_x8"]) == ((2,) * 3, (16,) * 3)
    assert profile["latent_width_x4"] == (12,) * 3


def test_what_is_kept_goes_in_and_comes_out_in_the_engines_own_type(engines: Path) -> None:
    manifest = bundle.read(engines)
    (engine,) = manifest.engines
    past = {t.name: t for t in engine.inputs if t.name.startswith("past_")}
    following = {t.name: t for t in engine.outputs if t.name.startswith("next_")}
    assert len(past) == len(following) == 13
    for name, tensor in past.items():
        twin = following[name.replace("past_", "next_")]
        assert (tensor.dtype, tensor.axes) == ("bfloat16", twin.axes) == (twin.dtype, tensor.axes)
    kept = sum(2 * size for name, size in needs._buffers(engine).items() if name in past)
    assert kept < needs.need(manifest, [engine]).buffers


def test_it_is_not_built_again(engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build-engine", str(engines), "--gpu", "sm89", "--gpu", "sm120"]
    assert cli.main([*words, "--vae-stream", "16", "--shape", "96x64x9"]) == 0
    assert f"up to date ({STREAM})" in capsys.readouterr().out, "lengths of clips are no reason"
    checked = engine_bundle.check(engines, order(vae_stream=24, shapes=("96x64x9",)))
    (work,) = checked.work
    assert work.sentence() == f"{STREAM}: profile 0 has latent_frames 2, now it is 3"


def order(**changes: Any) -> Order:
    usual: dict[str, Any] = {
        "gpus": ("sm89", "sm120"),
        "shapes": ("64x64x9",),
        "backend": "tensorrt-rtx",
    }
    return Order(**usual | changes)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, (*REST, DECODER)),
        ({"vae_stream": 16}, (*REST, STREAM)),
        ({"vae_stream": 16, "stages": (DECODER,)}, (DECODER, STREAM)),
        ({"vae_stream": 16, "stages": (STREAM,)}, (STREAM,)),
        ({"vae_stream": 16, "stages": (DECODER, STREAM)}, (DECODER, STREAM)),
        ({"stages": (DECODER,)}, (DECODER,)),
    ],
)
def test_the_weights_are_on_the_disk_once_unless_both_decoders_are_named(
    with_stream: Bundle, changes: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    found = engine_stages.of(with_stream, order(**changes))
    assert sorted(found) == sorted(wanted)


@pytest.fixture(scope="session")
def with_stream(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("with_stream") / "bundle"
    words = ["onnx", str(exported.checkpoint), "--text-encoder", str(exported.text_encoder)]
    stages = ",".join((*REST, DECODER, STREAM))
    assert cli.main([*words, "--out", str(out), "--stages", stages]) == 0
    return open_bundle(out)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no stage": ({"stages": ("transformer",), "vae_stream": 16}, "--vae-stream is for the VAE's"),
    "no frames": ({"stages": (STREAM,)}, "give --vae-stream 16, or leave the stage out"),
    "tiles of no VAE": (
        {"stages": ("transformer",), "vae_tile": "64x64x9"},
        "--vae-tile is for the VAE, which is not among the stages",
    ),
    "tiles": (
        {"stages": (STREAM,), "vae_stream": 16, "vae_tile": "64x64x9"},
        "takes whole rows and columns; leave it out, or name vae_encoder or vae_decoder too",
    ),
}


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "onnxruntime"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_order_alone_shows_is_said_before_a_graph_is_made(
    case: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("graphs were made")

    monkeypatch.setattr(engine_source, "prepare", never)
    changes, said = REFUSED[case]
    words = ["--stages", ",".join(changes["stages"]), "--backend", backend]
    words += [] if backend == "onnxruntime" else ["--gpu", "sm89"]
    for option in ("vae_stream", "vae_tile"):
        words += [f"--{option.replace('_', '-')}={changes[option]}"] if option in changes else []
    assert cli.main(["build-engine", CHECKPOINT, "--out", "nowhere", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("stages", "wanted"),
    [
        (None, None),
        (("transformer",), ("transformer",)),
        ((DECODER,), (DECODER, STREAM)),
        ((STREAM,), (STREAM,)),
    ],
)
def test_the_graph_goes_with_the_decoders(
    stages: tuple[str, ...] | None, wanted: tuple[str, ...] | None
) -> None:
    assert engine_stages.graphs(order(stages=stages, vae_stream=16)) == wanted


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_costs_one_line(with_stream: Bundle, case: str) -> None:
    changes, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as told:
        engine_bundle.check(with_stream.path, order(**changes))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("frames", "said"), [("12", "multiple of 8, not 12; try 16"), ("0", "not 0; try 8")]
)
def test_frames_come_in_groups_of_eight(
    frames: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("build-engine", "plan"):
        words = [command, CHECKPOINT, "--vae-stream", frames, "--gpu", "sm89"]
        words += ["--out", "nowhere"] if command == "build-engine" else []
        assert cli.main(words) == 2
        told = capsys.readouterr().err
        assert said in told
        assert len(told.splitlines()) == 1
    assert not Path("nowhere").exists()


def test_a_bundle_without_the_graph_is_to_be_exported_again(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert cli.main(["onnx", CHECKPOINT, "--out", str(out), "--stages", DECODER]) == 0
    with pytest.raises(UserError, match=f"has no stage {STREAM}; export it again"):
        engine_bundle.check(out, order(vae_stream=16))


def test_tiles_are_then_the_encoders(with_stream: Bundle) -> None:
    stages = ("vae_encoder", STREAM)
    checked = engine_bundle.check(
        with_stream.path, order(stages=stages, vae_stream=16, vae_tile="64x96x9")
    )
    sizes = {w.key.stage: w.key.profiles[0]["latent_height"][2] for w in checked.work}
    assert sizes == {"vae_encoder": 3, STREAM: 2}


def test_two_passes_are_decoded_in_the_second_ones_size(with_stream: Bundle) -> None:
    buckets = Buckets(("96x96x9",), 1, 12, vae_stream=16, passes=2)
    both = [
        engine_profiles.profiles(stage, with_stream.manifest, buckets)
        for stage in (DECODER, STREAM)
    ]
    (whole,), (stream,) = both
    assert stream["latent_height"] == whole["latent_height"]
    assert (whole["latent_frames"], stream["latent_frames"]) == ((2,) * 3, (2,) * 3)


def test_too_many_frames_for_a_convolution_to_count_are_fewer(
    with_stream: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = order(stages=(STREAM,), vae_stream=64)
    (work,) = engine_bundle.check(with_stream.path, wanted).work
    graph = ir.load(with_stream.file(with_stream.stage(STREAM).file))
    most = engine_volumes._elements(graph, work.key.profiles[0])
    monkeypatch.setattr(engine_volumes, "INT32_MAX", most // 2)
    with pytest.raises(UserError, match=r"give --vae-stream (8|16|24|32);") as told:
        engine_volumes.check(with_stream, [work.key], wanted)
    assert STREAM in str(told.value)


def test_a_checkpoints_bundle_has_both_graphs_and_later_builds_find_them(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    words = ["build-engine", CHECKPOINT, "--gpu", "sm89", "--precision", "bf16"]
    words += ["--out", str(out), "--shape", "64x64x9", "--stages"]
    assert cli.main([*words, DECODER]) == 0
    assert set(bundle.read(out).stages) == {DECODER}
    assert cli.main([*words, DECODER, "--vae-stream", "8"]) == 0
    manifest = bundle.read(out)
    assert set(manifest.stages) == {DECODER, STREAM}
    assert [engine.key.stage for engine in manifest.engines] == [DECODER, STREAM]


@pytest.mark.parametrize("stages", [(DECODER, STREAM), (STREAM, DECODER)])
def test_a_decoder_takes_the_place_of_the_other_one_that_nothing_runs_any_more(
    with_stream: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stages: tuple[str, str],
) -> None:
    monkeypatch.setattr(build_process, "run", stand_in_builder.run)
    out = Path(shutil.copytree(with_stream.path, tmp_path / "bundle"))
    old, new = stages
    build(out, old)
    build(out, new)
    assert [engine.key.stage for engine in bundle.read(out).engines] == [old, new]
    manifest = bundle.read(out)
    stale = [
        e.model_copy(update={"key": e.key.model_copy(update={"graph": "0" * 64})})
        for e in manifest.engines
        if e.key.stage == old
    ]
    bundle.update(out, manifest.model_copy(update={"engines": tuple(stale)}))
    build(out, new)
    assert [engine.key.stage for engine in bundle.read(out).engines] == [new]
    assert not list(out.glob(f"{old}.sm*"))
    assert "is deleted: the graph" in caplog.text


def build(out: Path, stage: str) -> None:
    words = ["--stages", stage, "--gpu", "sm89", "--shape", "64x64x9"]
    words += ["--vae-stream", "8"] if stage == STREAM else []
    assert cli.main(["build-engine", str(out), *words]) == 0


def test_the_decoder_alone_can_be_exported(tmp_path: Path) -> None:
    """Its weights are no other stage's, though another stage has the same."""
    for stage in (DECODER, STREAM):
        out = tmp_path / stage
        assert cli.main(["onnx", CHECKPOINT, "--out", str(out), "--stages", stage]) == 0
        assert set(bundle.read(out).stages) == {stage}


def test_a_plan_counts_the_pieces_of_a_clip(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", CHECKPOINT, "--shape", "96x96x33", "--gpu", "rtx4090", "--json"]
    words += ["--precision", "bf16"]
    plans = {}
    for frames in (8, 40):
        cli.main([*words, "--vae-stream", str(frames)])
        plans[frames] = json.loads(capsys.readouterr().out)
    stages = {frames: plan["stages"] for frames, plan in plans.items()}
    assert DECODER not in stages[8]
    assert STREAM in stages[8]
    assert stages[8][STREAM]["activations"] < stages[40][STREAM]["activations"]
    assert stages[8][STREAM]["engine"] == stages[40][STREAM]["engine"]
    once = {frames: plan["gpus"][0]["seconds"][STREAM] for frames, plan in plans.items()}
    transformer = plans[8]["gpus"][0]["seconds"]["transformer"] * plans[8]["steps"]
    total = {frames: plan["gpus"][0]["run_seconds"] for frames, plan in plans.items()}
    assert delay(read(Path(CHECKPOINT)).config.vae) == 60, "33 and these are 12 groups of eight"
    assert total[8] == pytest.approx(transformer + 12 * once[8])
    assert total[40] == pytest.approx(transformer + 3 * once[40])


def test_graphs_for_onnx_runtime_are_made_for_a_stream_only_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert cli.main(["onnx", CHECKPOINT, "--out", str(out), "--stages", f"{DECODER},{STREAM}"]) == 0
    words = ["build-engine", str(out), "--backend", "onnxruntime", "--shape", "64x64x9"]
    assert cli.main(words) == 0
    assert set(bundle.read(out).onnxruntime) == {DECODER}
    assert cli.main([*words, "--vae-stream", "16"]) == 0
    made_for = bundle.read(out).onnxruntime
    assert [p["latent_frames"] for p in made_for[STREAM].profiles] == [(2, 2, 2)]
    assert set(made_for) == {DECODER, STREAM}, "graphs take no room twice"
