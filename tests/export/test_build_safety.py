"""What build-engine does to files that are there, with a builder that only writes a few bytes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="its version is in every key")

import torch

from ltx_engines import bundle, hashes, host
from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_engines.stages import SAMPLER_STEP
from ltx_export import build_process, cli, engine_bundle, engine_files, step_graph
from ltx_export.engine_order import Order
from ltx_ref.checkpoint import read_header
from tests.export import quantized_files, stand_in_builder
from tests.export.stand_in_builder import build
from tests.waiting import HANG, until

NAME = "tiny.safetensors"
WEIGHT = "transformer_blocks.0.attn1.to_q.bias"


@pytest.fixture(autouse=True)
def no_true_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_process, "run", stand_in_builder.run)


def checkpoint(folder: Path) -> Path:
    """One block of ltx-tiny."""
    return quantized_files.write(folder / NAME, lambda _: None, dtype=torch.bfloat16, blocks=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and the bundle that was built of it; tests take `file` and `out`."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_process, "run", stand_in_builder.run)
        assert build(checkpoint(folder), "--out", str(folder / "out")) == 0
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both, in the working directory: a checkpoint is known by the path that was given."""
    shutil.copytree(made / "out", tmp_path / "out")
    shutil.copy2(made / NAME, tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def file(work: Path) -> Path:
    return Path(NAME)


@pytest.fixture
def out(work: Path, file: Path) -> Path:
    """Up to date with the checkpoint in the working directory."""
    assert build(file, "--out", "out") == 0
    return Path("out")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        ("build-engine", "out/" + NAME, "--precision", "bf16", *stand_in_builder.OPTIONS),
        ("build-engine", "link", *stand_in_builder.OPTIONS),
        ("onnx", "out/" + NAME, "--precision", "float16", "--overwrite"),
        ("onnx", NAME, "--pipeline-config", "out/p.yaml", "--overwrite"),
    ],
)
def test_what_is_read_is_not_in_the_folder_that_is_replaced(
    command: tuple[str, ...], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("link").symlink_to("out/" + NAME)
    config = Path(__file__).parents[2] / "tools/tiny/ltx-tiny.yaml"
    (out / "p.yaml").write_text(config.read_text().replace("skip_block_list: [3]", ""))
    before = tree(out)
    assert cli.main([*command, "--stages", "transformer", "--out", "out"]) == 2
    assert "lies in out, which is replaced, and would be deleted" in capsys.readouterr().err
    assert tree(out) == before
    assert not list(Path().glob(".*"))


def test_a_file_that_is_put_where_it_was_may_lie_in_the_bundle(out: Path) -> None:
    arguments = ["onnx", f"out/{NAME}", "--stages", "transformer", "--out", "out", "--overwrite"]
    wanted = (out / NAME).read_bytes()
    assert cli.main(arguments) == 0
    assert (out / NAME).read_bytes() == wanted


@pytest.mark.parametrize(("source", "target"), [("out", "out/sub"), ("up/out", "up")])
def test_no_bundle_is_made_in_another(
    source: str, target: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("up").mkdir()
    shutil.copytree(out, "up/out")
    assert build(Path(source), "--out", target) == 2
    assert "lie one in the other" in capsys.readouterr().err
    assert not (out / "sub").exists()


def start(gate: Path) -> "subprocess.Popen[str]":
    module = [sys.executable, "-m", "tests.export.stand_in_builder"]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [*module, str(gate), NAME, "both"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_of_two_that_build_one_bundle_from_a_checkpoint_one_does(file: Path) -> None:
    """They begin at once; whoever is first is in the middle of its work when the other ends."""
    gate = Path("gate")
    both = [start(gate), start(gate)]
    until(lambda: any(one.poll() is not None for one in both), "the end of the second")
    (loser,) = (one for one in both if one.poll() is not None)
    (winner,) = (one for one in both if one is not loser)
    assert "both is being built by another process; wait for it" in loser.communicate()[1]
    assert loser.returncode == 2
    gate.touch()
    said = winner.communicate(timeout=HANG)[1]
    assert winner.returncode == 0, said
    assert {e.key.stage for e in open_bundle(Path("both")).manifest.engines} == {
        "transformer",
        SAMPLER_STEP,
    }
    assert not list(Path().glob(".*"))
    assert build(file, "--out", "both") == 0


def order(out: Path, **changes: object) -> engine_bundle.Checked:
    usual: dict[str, object] = {"gpus": ("sm89",), "shapes": ("64x64x9",), "branches": 1}
    wanted = usual | {"stages": ("transformer",), "allow_fallback": True} | changes
    return engine_bundle.check(out, Order(**wanted))  # type: ignore[arg-type]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("which", ["file", "layers"])
@pytest.mark.parametrize(
    ("harm", "reason"),
    [(flip, "its file is damaged"), (Path.unlink, "its file is missing")],
)
def test_an_engine_that_is_not_whole_is_built_again_and_no_other(
    which: str,
    harm: Callable[[Path], None],
    reason: str,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = bundle.read(out)
    (engine,) = (e for e in before.engines if e.key.stage == "transformer")
    harm(out / getattr(engine, which))
    with pytest.raises(UserError, match=r"build it again \(ltx-export build-engine\)"):
        open_bundle(out)
    capsys.readouterr()
    assert build(out) == 0
    assert capsys.readouterr().out.startswith(f"transformer: {reason}\ntransformer: ")
    assert sorted(open_bundle(out).manifest.engines, key=repr) == sorted(before.engines, key=repr)
    assert build(out) == 0
    assert "up to date" in capsys.readouterr().out


def test_a_graph_that_is_not_whole_is_none_of_that(out: Path) -> None:
    flip(out / "transformer.onnx")
    with pytest.raises(UserError, match="export the bundle again"):
        order(out)


def test_engines_for_other_gpus_go_when_nothing_runs_them_any_more(
    file: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert build(out, "--gpu", "sm120") == 0
    flip(file)
    arguments = ["build-engine", NAME, "--stages", "transformer", "--out", "out"]
    options = ["--gpu", "sm86", *stand_in_builder.OPTIONS[2:]]
    assert cli.main([*arguments, *options]) == 0
    engines = [e for e in open_bundle(out).manifest.engines if e.key.stage == "transformer"]
    assert [e.key.targets for e in engines] == [(86,)]
    assert len(list(out.glob("transformer*.engine"))) == 1
    assert "is deleted: the weights in tiny.safetensors changed" in caplog.text


def test_a_byte_that_changed_beside_size_and_time_is_seen_in_the_engines_too(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after rsync --times; and the step, which has no weights, stays as it is."""
    monkeypatch.setattr(hashes, "sample", lambda _: "0" * 64)  # it is not in the sample
    assert build(file, "--out", "out") == 0
    stat = file.stat()
    flip(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    capsys.readouterr()
    assert build(file, "--out", "out") == 0
    said = capsys.readouterr().out
    assert said.startswith("transformer: the weights in tiny.safetensors changed\n")
    assert SAMPLER_STEP not in said
    assert Path("out", NAME).read_bytes() == file.read_bytes()


def test_a_precision_that_converts_sees_such_a_byte_too(
    file: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--precision", "fp16", "--out", "half")
    assert build(file, *options) == 0
    before = (work / "half" / "tiny.float16.safetensors").read_bytes()
    tensors = read_header(file).tensors
    (place,) = (info.end - 1 for name, info in tensors.items() if name.endswith(WEIGHT))
    stat = file.stat()
    with file.open("r+b") as handle:
        handle.seek(place)
        handle.write(b"\x40")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert build(file, *options) == 0
    assert (work / "half" / "tiny.float16.safetensors").read_bytes() != before


def test_a_step_that_is_made_otherwise_now_is_made_anew(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bundle.read(out).toolchain["sampler step made of"]
    monkeypatch.setattr(engine_bundle, "_step_made_of", lambda _: "another text")
    monkeypatch.setattr(step_graph, "NOT_ZERO", 1e-29)
    capsys.readouterr()
    assert build(out) == 0
    assert capsys.readouterr().out.startswith(f"{SAMPLER_STEP}: the graph changed\n")
    assert len(list(out.glob(f"{SAMPLER_STEP}.*.onnx"))) == 1


def test_a_cache_that_cannot_be_written_is_said_before_the_first_engine(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("cache").touch()
    monkeypatch.setattr(build_process, "run", never)
    assert build(out, "--branches", "2", "--cache", "cache") == 2
    assert "cannot keep an engine in cache" in capsys.readouterr().err


def never(*_: object) -> Iterator[str]:
    raise AssertionError("a builder was started")


def test_an_engine_is_in_its_bundle_before_it_is_in_the_cache(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("ltx_export.engine_cache.keep", full)
        assert build(out, "--branches", "2", "--cache", "cache") == 2
    monkeypatch.setattr(build_process, "run", never)
    assert not [w for w in order(out, branches=2).work if w.key.stage == "transformer"]


def test_what_the_cache_has_takes_no_memory(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path(shutil.copytree(out, "before"))
    assert build(out, "--branches", "2", "--cache", "cache") == 0
    monkeypatch.setattr(host, "free_memory", lambda: 1000)
    monkeypatch.setattr(build_process, "run", never)
    assert build(before, "--branches", "2", "--cache", "cache") == 0
    assert build(before, "--branches", "3", "--cache", "cache") == 2
    assert "bytes of memory to build" in capsys.readouterr().err


OTHERS = ("mine.engine", "my.layers.json", "transformer.engine", "transformer.sm89.0123abc.engine")
OURS = (
    *("transformer-1-of-2.sm89-sm120.0123abcd.engine", "vae_decoder.sm86.0123abcd.layers.json"),
    *("vae_decoder_stream.sm86.0123abcd.engine", "latent_upsampler.sm86.0123abcd.engine"),
    "vae_decoder_stream.sm89-sm120.0123abcd.layers.json",
)
STEP = ("sampler_step.0123abcd.onnx", ".manifest.json.0123abcd")


def test_only_what_a_build_has_left_is_deleted(out: Path) -> None:
    named = {p.name for p in out.iterdir()}
    for name in (*OTHERS, *OURS, *STEP):
        (out / name).touch()
    engine_files.remove_strays(out)
    assert {p.name for p in out.iterdir()} == {*named, *OTHERS}
    for work in order(out, branches=2).work:
        assert engine_files.OURS.fullmatch(f"{work.name}.engine"), work.name


def test_a_killed_build_goes_on_with_other_graphs_too(file: Path, out: Path) -> None:
    (out / OURS[0]).touch()
    flip(file)
    assert build(file, "--out", "out") == 0
    assert not (out / OURS[0]).exists()


def test_a_file_of_the_users_is_said_before_anything_is_exported(
    file: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "mine.engine").touch()
    flip(file)
    assert build(file, "--out", "out") == 2
    said = capsys.readouterr().err
    assert "holds files that are not the bundle's (mine.engine)" in said
    assert "graph of" not in said


def on_graphs(*options: str) -> int:
    arguments = ["build-engine", NAME, "--stages", "transformer", "--backend", "onnxruntime"]
    return cli.main([*arguments, "--shape", "64x64x9", "--branches", "1", *options])


def test_graphs_for_onnx_runtime_do_not_take_the_place_of_engines(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(out)
    assert on_graphs("--out", "out", "--pipeline-config", "p.yaml") == 2
    assert "out has engines, which graphs for ONNX Runtime would make useless" in (
        capsys.readouterr().err
    )
    assert tree(out) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--optimization-level", "0"), "--optimization-level is for engines"),
        (("--host-memory", "1GiB"), "--host-memory is for engines"),
        (("--allow-fallback",), "--allow-fallback is for engines"),
        (("--ignore-limits",), "--ignore-limits is for engines"),
    ],
)
def test_options_of_engines_are_not_swallowed_for_graphs(
    options: tuple[str, ...], said: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert on_graphs("--out", "new", *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--weights", "copy"), "--weights copy is for graphs that are put elsewhere"),
        (("--weights", "refer"), "--weights refer is for a checkpoint"),
        (("--weights", "refer", "--out", "new"), "--weights refer is for a checkpoint"),
        (("--engine-weights", "inputs", "--split", "2"), "--split is for engines that hold"),
    ],
)
def test_options_without_effect_on_a_bundle_are_refused(
    options: tuple[str, ...], said: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(out, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--split", "2"), ("--weight-streaming",)])
def test_weights_as_inputs_are_refused_before_graphs_are_replaced(
    option: tuple[str, ...], file: Path, out: Path
) -> None:
    flip(file)
    before = tree(out)
    assert build(file, "--out", "out", "--engine-weights", "inputs", *option) == 2
    assert tree(out) == before


@pytest.mark.parametrize("changes", [{"engine_weights": "inputs"}, {"refittable": True}])
def test_options_of_the_transformer_want_it_among_the_stages(changes: dict[str, object]) -> None:
    shipped = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
    with pytest.raises(UserError, match="is for the transformer, which is not among the stages"):
        order(shipped, stages=("vae_decoder",), **changes)


def test_a_bundle_may_go_to_another_disk(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def far(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", far)
    assert build(out, "--out", "new") == 2
    assert "use --weights copy" in capsys.readouterr().err
    assert build(out, "--out", "new", "--weights", "copy") == 0
    assert not Path("new", NAME).samefile(out / NAME)
    assert len(open_bundle(Path("new")).manifest.engines) == 2
