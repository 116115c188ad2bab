"""build-engine --split: an engine for each group of blocks, all of which are used, or none."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")

import torch

from ltx_engines import bundle
from ltx_engines.bundle import Bundle, EngineEntry, open_bundle
from ltx_engines.cache_key import Part
from ltx_engines.errors import UserError
from ltx_engines.stages import SAMPLER_STEP
from ltx_export import block_groups, build_process, cli, engine_bundle
from ltx_export.block_groups import STAGE
from ltx_export.build_job import Job
from tests.export import quantized_files

LAYERS = 3
Run = Callable[..., object]


def built(source: Path, *options: str) -> int:
    usual = ("--stages", STAGE, "--gpu", "sm89", "--shape", "64x64x9", "--branches", "1")
    return cli.main(["build-engine", str(source), *usual, *options])


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks of ltx-tiny in two engines; tests take `copy`."""
    folder = tmp_path_factory.mktemp("split")
    file = folder / "tiny.safetensors"
    quantized_files.write(file, "fp8", dtype=torch.bfloat16, blocks=LAYERS)
    assert cli.main(["onnx", str(file), "--stages", STAGE, "--out", str(folder / "bundle")]) == 0
    assert built(folder / "bundle", "--split", "2") == 0
    return folder / "bundle"


@pytest.fixture
def copy(split: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(split, tmp_path / "bundle"))


def parts(opened: Bundle) -> list[Part | None]:
    return [e.key.part for e in opened.manifest.engines if e.key.stage == STAGE]


def chain(folder: Path) -> tuple[EngineEntry, ...]:
    return open_bundle(folder).engines(STAGE, 89)


def test_each_group_is_an_engine_with_its_own_tables(split: Path) -> None:
    opened = open_bundle(split)
    first, last = found = opened.engines(STAGE, 89)
    assert [engine.key.part for engine in found] == [
        Part(index=0, of=2, first=0, end=1),
        Part(index=1, of=2, first=1, end=3),
    ]
    assert first.inputs == opened.stage(STAGE).inputs
    assert last.outputs == opened.stage(STAGE).outputs
    written = {tensor.name for tensor in first.outputs}
    assert {"hidden_states_1", "modulation", "text_states"} < written
    assert written < {tensor.name for tensor in last.inputs}
    assert [engine.counts["products in FP8"] for engine in found] == [10, 20]
    assert [engine.counts["fused attentions"] for engine in found] == [2, 4]
    assert all(engine.activations > 0 and not engine.counts["score kernels"] for engine in found)
    assert not list(split.glob("*-of-*.onnx"))


def test_the_step_of_the_sampler_is_built_with_the_transformer(split: Path) -> None:
    (step,) = open_bundle(split).engines(SAMPLER_STEP, 89)
    assert "next_latents" in {tensor.name for tensor in step.outputs}
    assert step.key.profiles[0]["tokens"] == (8, 8, 8)


@pytest.mark.parametrize("options", [(), ("--split", "2")])
def test_a_chain_is_up_to_date_however_it_came_to_be_split(
    split: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert built(split, *options) == 0
    assert capsys.readouterr().out == f"{split}: up to date (transformer)\n"


def order(**changes: Any) -> engine_bundle.Order:
    usual: dict[str, Any] = {"gpus": ("sm89",), "shapes": ("64x64x9",), "branches": 1}
    return engine_bundle.Order(**usual | {"stages": (STAGE,)} | changes)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The fewest parts that there is room for; tests change it."""
    fewest = [1]
    monkeypatch.setattr(
        block_groups._Sizes,
        "problem",
        lambda _, parts, __: "too much" if len(parts) < fewest[0] else "",
    )
    return fewest


def numbers(folder: Path, **changes: Any) -> list[int]:
    """Of the chains that are built for an order."""
    work = engine_bundle.check(folder, order(**changes)).work
    return [w.key.part.of if w.key.part else 1 for w in work if w.key.stage == STAGE]


def test_auto_is_counted_anew_whatever_is_there(split: Path, room: list[int]) -> None:
    assert numbers(split, split="auto") == [1]
    room[0] = 2
    assert numbers(split, split="auto") == []
    room[0] = 3
    assert numbers(split, split="auto") == [3, 3, 3]


def test_a_split_stays_only_as_long_as_it_is_enough(split: Path, room: list[int]) -> None:
    room[0] = 3
    assert numbers(split) == []  # nothing changed: it is there and runs
    assert numbers(split, branches=2) == [3, 3, 3]
    room[0] = 1
    assert numbers(split, branches=2) == [2, 2]


def test_the_memory_of_the_host_decides_about_an_engine_that_is_there(split: Path) -> None:
    with pytest.raises(UserError, match="give more with --host-memory"):
        numbers(split, split="auto", host_memory=10**6)


def test_another_split_is_said_in_one_line_and_takes_the_place_of_the_old_one(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built(copy, "--split", "1") == 0
    assert capsys.readouterr().out.startswith("transformer: it was split in 2, now it is whole\n")
    assert parts(open_bundle(copy)) == [None]
    assert not list(copy.glob("*-of-2*"))


class Builds:
    """What was to be built. The run ends before number `most`, as with Ctrl-C."""

    def __init__(self, run: Run) -> None:
        self.run, self.most = run, 99
        self.said: list[str] = []

    def __call__(self, job: Job, what: str) -> object:
        self.said.append(what)
        if len(self.said) == self.most:
            raise KeyboardInterrupt
        return self.run(job, what)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    found = Builds(build_process.run)
    monkeypatch.setattr(build_process, "run", found)
    return found


def test_a_build_that_was_stopped_goes_on_and_the_old_chain_is_in_use_until_the_new_one_is_whole(
    copy: Path, builds: Builds, capsys: pytest.CaptureFixture[str]
) -> None:
    old, builds.most = chain(copy), 2
    assert built(copy, "--split", "3") == 130
    assert capsys.readouterr().out == "transformer: it was split in 2, now in 3\n"
    assert [part.of for part in parts(open_bundle(copy)) if part] == [2, 2, 3]
    assert chain(copy) == old
    assert built(copy) == 0  # as the last one was split
    assert capsys.readouterr().out.startswith(
        "transformer: part 2 of 3 is missing\ntransformer: part 3 of 3 is missing\n"
    )
    assert [part.index for part in parts(open_bundle(copy)) if part] == [0, 1, 2]
    assert [engine.key.part.of for engine in chain(copy) if engine.key.part] == [3, 3, 3]
    assert len(list(copy.glob("transformer*.engine"))) == 3
    assert not list(copy.parent.glob(".*"))


def test_a_chain_without_a_part_is_not_used_and_only_that_part_is_built(
    copy: Path, builds: Builds
) -> None:
    manifest = bundle.read(copy)
    lost = next(e for e in manifest.engines if e.key.part and e.key.part.index == 1)
    engines = tuple(e for e in manifest.engines if e != lost)
    bundle.update(copy, manifest.model_copy(update={"engines": engines}))
    with pytest.raises(UserError, match=r"the chain of transformer lacks part 2 of 2; build it"):
        chain(copy)
    assert built(copy) == 0
    assert builds.said == ["engine of transformer 2 of 2"]
    assert [engine.file for engine in chain(copy)][1] == lost.file


def test_a_part_that_is_missing_is_built_for_the_gpus_of_the_others(copy: Path) -> None:
    """A chain for two GPUs was stopped; asked for one of them, it does not become two halves."""
    manifest = bundle.read(copy)

    def both(engine: EngineEntry) -> EngineEntry:
        key = engine.key.model_copy(update={"targets": (89, 120)})
        return engine.model_copy(update={"key": key})

    engines = tuple(both(e) for e in manifest.engines if not e.key.part or not e.key.part.index)
    bundle.update(copy, manifest.model_copy(update={"engines": engines}))
    order = engine_bundle.Order(("sm89",), ("64x64x9",), stages=(STAGE,), branches=1)
    found = engine_bundle.check(copy, order)
    assert [(work.what, work.key.targets) for work in found.work] == [
        ("transformer 2 of 2", (89, 120))
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--split", "4"), "--split 4: the transformer has 3 blocks; give fewer"),
        (("--split", "half"), "--split half: give auto, or in how many parts"),
        (("--host-memory", "8GB"), "--host-memory is for --split auto; give both, or leave it out"),
        (("--split", "auto", "--host-memory", "much"), "--host-memory much: not an amount"),
    ],
)
def test_a_split_that_cannot_be_is_refused_in_one_line(
    split: Path, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built(split, *options) == 2
    assert said in capsys.readouterr().err
