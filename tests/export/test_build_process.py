"""A builder is a process of its own: whatever becomes of it, we say it in one line and go on."""

import os
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from ltx_engines import libraries
from ltx_engines.errors import UserError
from ltx_engines.targets import Flavour
from ltx_export import build, build_job, build_process, card, engine_order
from ltx_export.build_job import Built, Job
from ltx_export.card import Card
from tests.waiting import HANG

JOB = Job(
    graph=Path("transformer.onnx"),
    engine=Path("e"),
    layers=Path("l"),
    flavour="tensorrt-rtx",
    version="1.7.1",
    targets=(86, 89),
    profiles=({"latents": ((1, 2), (1, 2), (3, 2))},),
    types={"latents": "bfloat16"},
    weights={"w.safetensors": "/far/w.safetensors"},
    workspace=64,
    weight_bytes=8,
    refittable=("a.weight",),
)
DONE = """{"built": {"bytes": 7, "sha256": "ab", "activations": 9}}"""


def acting(code: str, monkeypatch: pytest.MonkeyPatch) -> Generator[str, None, Built]:
    """A process that does this in a builder's place."""
    lines = f"import json, os, signal, sys, time\njob = json.loads(sys.stdin.readline())\n{code}"
    monkeypatch.setattr(build_process, "COMMAND", (sys.executable, "-c", lines))
    return build_process.run(JOB, "engine of it")


def finish(steps: Generator[str, None, Built]) -> tuple[list[str], Built]:
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return seen, end.value


def test_a_job_is_the_same_at_the_other_end() -> None:
    back = build_job.from_json(JOB.to_json())
    assert back.to_json() == JOB.to_json()
    assert (back.graph, back.targets, back.types) == (JOB.graph, JOB.targets, JOB.types)
    assert back.refittable == JOB.refittable


def test_progress_comes_before_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
print(json.dumps({{"note": "workspace of 3 bytes"}}))
print(json.dumps({{"phase": "Timing", "done": 1, "of": 2}}))
print(json.dumps({{"phase": "Writing", "done": 0, "of": 0}}))
print('''{DONE}''')
"""
    seen, built = finish(acting(code, monkeypatch))
    assert seen == [
        "engine of it, workspace of 3 bytes",
        "engine of it: Timing 1 of 2",
        "engine of it: Writing",
    ]
    assert built == Built(7, "ab", 9)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ('print(json.dumps({"failed": "no kernel"}))', "by tensorrt-rtx 1.7.1: no kernel$"),
        ('print(json.dumps({"failed": "mend it", "mendable": True}))', "^mend it$"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"it ended with signal 11 \(it said nothing\)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "it was killed, most likely for want of host"),
        ('sys.exit("CHECK(x) failed")', r"it ended with code 1 \(CHECK\(x\) failed\)"),
        ("os._exit(0)", "it ended with code 0"),
    ],
)
def test_whatever_ends_a_builder_is_one_line(
    code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=said) as failure:
        finish(acting(code, monkeypatch))
    assert "\n" not in str(failure.value)


def test_a_builder_that_ends_before_it_has_heard_its_job_was_a_broken_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ended(subprocess.Popen[str]):
        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, **options)
            self.wait(HANG)

    monkeypatch.setattr(build_process, "COMMAND", (sys.executable, "-c", "raise SystemExit(7)"))
    monkeypatch.setattr(subprocess, "Popen", Ended)
    with pytest.raises(UserError, match=r"it ended with code 7 \(it said nothing\)"):
        finish(build_process.run(JOB, "engine of it"))


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ('print(json.dumps({"failed": "no kernel", "refused": True}))', True),
        ("os.kill(os.getpid(), signal.SIGSEGV)", True),
        ("os.abort()", True),
        ('sys.stderr.write("std::bad_alloc\\n"); sys.stderr.flush(); os.abort()', False),
        ('print(json.dumps({"failed": "no space left", "refused": False}))', False),
        ('print(json.dumps({"failed": "no GPU", "mendable": True}))', False),
        ("os.kill(os.getpid(), signal.SIGKILL)", False),
        ("os.kill(os.getpid(), signal.SIGTERM)", False),
        ('raise ImportError("libcudart.so.13")', False),
    ],
)
def test_only_what_the_builder_says_or_does_itself_is_a_verdict_on_the_graph(
    code: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as failure:
        finish(acting(code, monkeypatch))
    assert isinstance(failure.value, build_process.RefusalError) is refused


@pytest.mark.parametrize(
    ("found", "gpus", "said"),
    [
        (None, ("h200",), "there is none here"),
        (Card("H100", 90, 1), ("h200", "rtx4090"), "is SM90, not for SM89, SM90"),
        (Card("RTX 4090", 89, 1), ("h200",), "is SM89, not for SM90"),
    ],
)
def test_tensorrt_is_refused_without_its_gpu_before_anything_is_exported(
    found: Card | None, gpus: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "at_hand", lambda: found)
    monkeypatch.setattr(build, "version", lambda _: "11.0")
    order = engine_order.Order(gpus, ("96x96x17",), backend="tensorrt")
    with pytest.raises(UserError, match=said):
        engine_order.check_early(order)


PID = """
signal.signal(signal.SIGTERM, signal.{0})
print(json.dumps({{"phase": str(os.getpid()), "done": 0, "of": 0}}), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("disposition", ["SIG_DFL", "SIG_IGN"])
def test_ctrl_c_ends_the_builder_even_if_it_does_not_listen(
    disposition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_process, "PATIENCE", 0.2)
    steps = acting(PID.format(disposition), monkeypatch)
    pid = int(next(steps).rpartition(" ")[2])
    assert os.getsid(pid) == pid  # the terminal's Ctrl-C does not reach it
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_builder_does_not_outlive_who_asked_for_it() -> None:
    """As when we are killed: our end of its input closes."""
    code = "from ltx_export.build import _end_with_input; _end_with_input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        time.sleep(0.2)
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(HANG) == 1


@pytest.mark.parametrize("flavour", build.MODULES)
def test_a_builder_that_is_missing_costs_one_line_with_the_command(
    flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"builds for {flavour}; pip install"):
        build.version(flavour)


def test_the_version_is_known_without_loading_the_builder() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")
    assert build.version("tensorrt-rtx") == libraries.released(trt.__version__)


@pytest.mark.parametrize(
    ("found", "said"),
    [(None, "there is none here"), (Card("H100", 90, 1), "is SM90, not for SM86, SM89")],
)
def test_tensorrt_builds_only_for_the_gpu_at_hand(
    found: Card | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "at_hand", lambda: found)
    with pytest.raises(UserError, match=said):
        build.check_card((86, 89))


FREED = """
import ctypes, re, threading, time
from pathlib import Path
from ltx_export import build

build.TRIM_INTERVAL = 0.01
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
held = [libc.malloc(1000) for _ in range(40_000)]
for piece in held:
    ctypes.memset(ctypes.c_void_p(piece), 1, 1000)
for piece in held[:-1]:  # the last one holds the end of the heap
    libc.free(piece)

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = anonymous()
threading.Thread(target=build.give_back, daemon=True).start()
while before - anonymous() < 30_000:
    time.sleep(0.01)
"""


def test_what_a_builder_has_freed_goes_back_to_the_system() -> None:
    """30 of 40 MB at least, at some time."""
    subprocess.run([sys.executable, "-c", FREED], check=True, timeout=HANG)
