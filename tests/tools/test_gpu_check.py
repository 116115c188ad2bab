"""The check's order of parts: what runs, what is skipped and why, what a crash leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import gpu_check
import gpu_machine
import gpu_parts
from gpu_check import PARTS, Part
from ltx_engines.errors import UserError

RUNNER = CliRunner()


def machine(capability: int | None = 89, *, torch: bool = True, **packages: bool) -> dict[str, Any]:
    found = {
        name: {"imports": packages.get(name, True), "found": "1", "why": "it is not installed"}
        for name in gpu_machine.MODULES
    }
    found["torch"]["found"] = ["2.13", "13.0", torch]
    card = None if capability is None else {"name": "a card", "capability": capability}
    return {"card": card, "packages": found}


def part(folder: Path, name: str, code: str, **given: Any) -> Part:
    script = folder / f"{name}.py"
    script.write_text(code, encoding="utf-8")
    return Part(name, f"the part {name}", script, **given)


GOOD = """
import json, sys
print('a figure')
print(json.dumps({'passed': True, 'argv': sys.argv[1:]}))
"""
CRASH = """
import os, sys
print('half', flush=True)
sys.stderr.write('a driver')
sys.stderr.flush()
os.kill(os.getpid(), 11)
"""
BAD = """
import json, sys
print(json.dumps({'passed': False, 'psnr': 12}))
sys.exit(1)
"""


def test_a_part_that_crashes_or_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "check.json"
    parts = [
        part(tmp_path, "crash", CRASH),
        part(tmp_path, "silent", ""),
        part(tmp_path, "bad", BAD),
        part(tmp_path, "good", GOOD, words=("--gpu", "{gpu}")),
    ]
    found = gpu_check.check(parts, out, machine)
    assert json.loads(out.read_text()) == found
    verdicts = {name: gpu_check.verdict(facts) for name, facts in found["parts"].items()}
    assert verdicts == {"crash": "failed", "silent": "failed", "bad": "failed", "good": "passed"}
    assert found["parts"]["crash"]["failed"] == "it ended with -11"
    assert found["parts"]["crash"]["said"] == ["a driver"]
    assert "no JSON" in found["parts"]["silent"]["failed"]
    assert found["parts"]["bad"]["psnr"] == 12
    assert found["parts"]["good"]["argv"] == ["--gpu", "sm89"]
    assert "    a figure\n" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "check", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    app = typer.Typer()
    app.command()(gpu_check.main)
    for out in (tmp_path, tmp_path / "file" / "x.json", Path("/proc/x.json")):
        done = RUNNER.invoke(app, ["--out", str(out), "--only", "tiny"])
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith(f"gpu_check: --out {out} ")
        assert done.stderr.count("\n") == 1


def test_what_a_part_reads_must_have_been_made(tmp_path: Path) -> None:
    parts = [
        part(tmp_path, "first", BAD),
        part(tmp_path, "second", GOOD, after="first"),
        part(tmp_path, "third", GOOD, after="second"),
    ]
    found = gpu_check.check(parts, tmp_path / "o.json", machine)["parts"]
    assert found["second"] == {"skipped": "first is not there: failed: see its figures"}
    assert found["third"]["skipped"].startswith("second is not there: skipped: first is not")


def test_a_part_that_never_ends_is_stopped(tmp_path: Path) -> None:
    endless = part(tmp_path, "endless", "import time; time.sleep(60)", hours=0.3 / 3600)
    found = gpu_check.run(endless, tmp_path, machine())
    assert "it took more than" in found["failed"]


@pytest.mark.parametrize(
    ("need", "here", "reason"),
    [
        ("gpu", machine(None), "no NVIDIA GPU is here"),
        ("torch", machine(torch=False), "torch 2.13 sees no CUDA device"),
        ("builder", machine(90, tensorrt=False), "no builder for SM90 imports (tensorrt_rtx: not"),
        ("polygraphy", machine(polygraphy=False), "polygraphy: it is not installed"),
        ("gpu", machine(), None),
        ("torch", machine(), None),
        ("builder", machine(), None),
        ("builder", machine(90), None),
        ("onnx", machine(), None),
    ],
)
def test_what_is_lacking_is_said(need: str, here: dict[str, Any], reason: str | None) -> None:
    for name in here["packages"].values():
        if name["imports"]:
            del name["why"]
    found = gpu_check.lacking(need, here)
    assert (found or "").startswith(reason or "") if reason else found is None


@pytest.mark.parametrize(
    ("capability", "missing", "flavour"),
    [
        (89, (), "tensorrt-rtx"),
        (89, ("tensorrt_rtx",), "tensorrt"),
        (90, (), "tensorrt"),
        (90, ("tensorrt",), None),
        (None, (), None),
    ],
)
def test_the_flavour_is_one_that_imports_and_knows_the_card(
    capability: int | None, missing: tuple[str, ...], flavour: str | None
) -> None:
    here = machine(capability, **dict.fromkeys(missing, False))
    assert gpu_machine.flavour(here) == flavour


def test_every_part_has_a_script_and_comes_after_what_it_reads() -> None:
    names = [one.name for one in PARTS]
    assert len({*names}) == len(names)
    for index, one in enumerate(PARTS):
        assert one.script.is_file()
        assert one.after is None or one.after in names[:index]
        if one.script.name == "gpu_parts.py":
            assert one.words[0] == one.name
            assert one.name in {work.__name__ for work in gpu_parts.PARTS}


def test_a_part_brings_what_it_comes_after() -> None:
    assert [one.name for one in gpu_check.choose("lora, rtx")] == ["rtx", "tiny", "lora"]
    assert gpu_check.choose("") == PARTS
    with pytest.raises(UserError, match="no part 'lorra'; did you mean 'lora'"):
        gpu_check.choose("lorra")


def app() -> Any:

    own = typer.Typer(add_completion=False)
    own.command()(gpu_check.main)
    return own


def test_without_a_gpu_all_is_skipped_and_the_reason_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_machine, "look", lambda: machine(None))
    monkeypatch.setattr(gpu_check.check, "__defaults__", (gpu_machine.look,))
    done = RUNNER.invoke(app(), ["--out", str(tmp_path / "check.json")])
    assert done.exit_code == 0, done.output
    verdicts = json.loads(done.output.splitlines()[-1])
    assert verdicts == {one.name: "skipped" for one in PARTS}
    written = json.loads((tmp_path / "check.json").read_text())["parts"]
    assert all("no NVIDIA GPU is here" in facts["skipped"] for facts in written.values())


def test_a_list_says_what_each_part_needs() -> None:
    done = RUNNER.invoke(app(), ["--list"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()] == [one.name for one in PARTS]


def test_a_package_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "gpu_broken.py").write_text("raise OSError('libfoo.so.1: no such file')")
    (tmp_path / "gpu_whole.py").write_text("__version__ = '1.2'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = gpu_machine.package("gpu_broken", "gpu_broken.__version__")
    assert broken == {"imports": False, "why": "OSError: libfoo.so.1: no such file"}
    whole = gpu_machine.package("gpu_whole", "gpu_whole.__version__")
    assert whole == {"imports": True, "found": "1.2"}
    assert not gpu_machine.package("gpu_nothing.at_all", "1")["imports"]


def test_the_lora_of_the_check_fits_ltx_tiny(tmp_path: Path) -> None:
    from ltx_export import fusion

    file = gpu_parts.write_lora(tmp_path / "lora.safetensors")
    said = "\n".join(fusion.lines([f"{file}:0.8"], gpu_parts.CHECKPOINT))
    assert "24 tensors" in said


def test_the_check_itself_needs_nothing_but_the_base_install() -> None:
    """In a fresh process: what a part needs is loaded in the part."""
    heavy = ("torch", "onnx", "onnxruntime", "polygraphy", "tensorrt_rtx", "safetensors")
    code = (
        "import sys, gpu_check, gpu_parts, engine_gpu\n"
        "from ltx_export import card\n"
        f"print(*({{*{heavy!r}}} & {{*sys.modules}}))"
    )
    path = [gpu_check.BENCHMARKS, gpu_check.TOOLS, *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout, done.stderr) == ("\n", "")
