"""What `ltx-export inspect` says of engines."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ltx_engines.errors import UserError
from ltx_export import card, cli, engine_inspection, polygraphy_engine
from ltx_export.card import Card
from ltx_export.layer_table import Layer
from tests.export import made_engines
from tests.export.made_engines import LAYERS, PLAN, TABLE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(card, "at_hand", lambda: None)
    return made_engines.add(tmp_path / "bundle")


@pytest.fixture
def on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "at_hand", lambda: Card("RTX 4090", 89, 10**9))


def test_a_bundle_and_its_engine_say_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(folder)]) == 0
    of_bundle = capsys.readouterr().out
    assert cli.main(["inspect", str(folder / PLAN)]) == 0
    assert capsys.readouterr().out == of_bundle
    assert f"{PLAN}: transformer, tensorrt-rtx 1.7.1.116 for SM89" in of_bundle
    assert (
        "6 kernels, 1 fp8 gemms, 2 other gemms, 1 fused attentions, 1 reformats, "
        "2 unfused S x S softmaxes" in of_bundle
    )
    assert "kernels by type: 4 BFloat16, 1 FP8, 1 Float" in of_bundle
    assert "not the engine's own inspector: no NVIDIA GPU is here" in of_bundle
    assert "fc_myl0_1" not in of_bundle


def test_rows_that_only_wait_are_no_kernels_and_the_one_gpu_of_the_table_is_named(
    folder: Path,
) -> None:
    (engine,) = engine_inspection.read(folder)
    key = engine.entry.key.model_copy(update={"targets": (89, 120)})
    entry = engine.entry.model_copy(update={"key": key, "accepted": ("2 of 10 layers",)})
    waits = tuple(Layer(f"{kind}_9", kind, (), (), (), frozenset()) for kind in ("wait", "signal"))
    both = replace(engine, entry=entry, table=(*engine.table, *waits))
    said = "\n".join(engine_inspection.lines((both,), layers=True))
    assert "  6 kernels, " in said
    assert "softmaxes (listed for SM120 only)\n" in said
    assert "accepted though not as asked: 2 of 10 layers\n" in said
    assert "wait_9" not in said
    assert "signal_9" not in said


def test_every_kernel_has_a_row_when_layers_are_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(folder), "--layers"]) == 0
    said = capsys.readouterr().out
    assert all(f"{layer.name} (node of {layer.name})" in said for layer in TABLE)
    assert "    FP8       gemm            fc_myl0_1" in said


def test_json_has_every_layer_and_the_counts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)
    assert engine["counts"]["fp8 gemms"] == 1
    assert [layer["name"] for layer in engine["layers"]] == [layer.name for layer in TABLE]
    assert [layer["precision"] for layer in engine["layers"]][:2] == ["FP8", "BFloat16"]
    assert engine["targets"] == [89]
    assert engine["inspector"] is None


def test_on_its_gpu_the_engine_speaks_for_itself(
    folder: Path, on_its_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polygraphy_engine, "inspected", lambda *_: '{"Layers": []}')
    (engine,) = engine_inspection.read(folder)
    assert engine.inspector == {"Layers": []}
    *_, source = engine_inspection.lines((engine,), layers=False)
    assert source.endswith("--json has the engine's own inspector too")


def test_a_plan_that_is_not_the_one_that_was_built_is_not_opened(
    folder: Path, on_its_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polygraphy_engine, "inspected", lambda *_: pytest.fail("it was opened"))
    (folder / PLAN).write_bytes(b"A plan")
    with pytest.raises(UserError, match="its hash is another"):
        engine_inspection.read(folder)


def test_a_table_with_a_flipped_byte_is_not_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((folder / LAYERS).read_bytes())
    data[data.index(b"gemm")] ^= 1
    (folder / LAYERS).write_bytes(data)
    assert cli.main(["inspect", str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{LAYERS} is not the one that was built: its hash is another" in captured.err


def test_it_says_whether_the_engine_itself_was_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine,) = engine_inspection.read(folder)
    *_, source = engine_inspection.lines((engine,), layers=False)
    assert "as built; the engine's own hash was not read" in source
    assert engine_inspection.document((engine,))[0]["engine_hashed"] is False
    monkeypatch.setattr(card, "at_hand", lambda: Card("RTX 4090", 89, 10**9))
    monkeypatch.setattr(polygraphy_engine, "inspected", lambda *_: "{}")
    (engine,) = engine_inspection.read(folder)
    *_, source = engine_inspection.lines((engine,), layers=False)
    assert ", both as built" in source


def test_a_folder_that_is_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "is neither a bundle (no manifest.json) nor a text encoder" in said


@pytest.mark.parametrize("name", ["x.engine", "x.plan"])
def test_a_plan_without_a_manifest_costs_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(b"a plan")
    assert cli.main(["inspect", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no manifest.json beside it" in line
    assert "ltx-export build-engine" in line


def test_a_plan_that_the_manifest_does_not_name_costs_one_line(folder: Path) -> None:
    stray = folder / "transformer.sm89.0123abce.engine"
    stray.write_bytes(b"a plan")
    with pytest.raises(UserError, match=rf"did you mean '{PLAN}'"):
        engine_inspection.read(stray)


def test_a_plan_that_is_not_there_costs_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        engine_inspection.read(folder / "other.engine")


def test_a_table_that_was_cut_short_costs_one_line(folder: Path) -> None:
    (folder / LAYERS).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="build the engine again"):
        engine_inspection.read(folder)


def test_a_bundle_without_engines_says_how_to_get_one() -> None:
    with pytest.raises(UserError, match="has no engines; ltx-export build-engine"):
        engine_inspection.read(made_engines.TINY)


def test_a_checkpoint_has_no_layers(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = made_engines.TINY / "ltx-tiny.safetensors"
    assert cli.main(["inspect", str(checkpoint), "--layers"]) == 2
    assert "holds no engines" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind", "moves"),
    [
        ("__myl_MoveReshTran_myl0_5", "kgen", True),
        ("Reformatting CopyNode for Input Tensor 0", "Reformat", True),
        ("__myl_MoveReshMulTran_myl0_5", "kgen", False),
        ("_gemm_mha_v2_myl0_4", "kgen", False),
    ],
)
def test_a_kernel_that_only_moves_numbers_is_a_reformat(name: str, kind: str, moves: bool) -> None:
    layer = Layer(name, kind, (), (), (), frozenset())
    assert engine_inspection.is_reformat(layer) is moves
