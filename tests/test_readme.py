"""Every command that the README shows is run here, in its order, in the repository's folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [line for block in BLOCK.findall(text) for line in block.splitlines() if line.strip()]


# Run by another test, which is named here and looked up below.
ELSEWHERE = {
    "make test": (".ci/run", "make test"),
    "pip install '.[onnxruntime]'": ("tests/test_install.py", "[onnxruntime]"),
    'ltx-trt client --url grpc://localhost:8001 --prompt "a red circle moves right on a blue '
    'background" -o demo/triton.mp4': (
        "tests/triton/test_client_on_a_server.py",
        'startswith("ltx-trt client")',
    ),
}


@pytest.fixture(scope="module", autouse=True)
def clean() -> None:
    """As on a fresh clone; the demo's bundle may stay, it is made anew when it is too old."""
    for folder in ("demo", "build/mine", "build/13b"):
        shutil.rmtree(ROOT / folder, ignore_errors=True)
    for file in (ROOT / "build").glob("*.safetensors"):
        file.unlink()


def test_the_readme_shows_commands() -> None:
    assert len(commands()) > 8, "did the fences of the README change?"


def test_every_fence_is_a_block_of_commands_or_the_tree() -> None:
    fences = re.findall(r"^```(\S*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    openings = fences[::2]
    assert set(fences[1::2]) == {""}
    assert openings.count("") == 1, "only the tree stands in a fence without a language"
    assert set(openings) == {"sh", ""}


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_works(command: str) -> None:
    if command in ELSEWHERE:
        place, words = ELSEWHERE[command]
        assert words in (ROOT / place).read_text(encoding="utf-8"), f"{place} runs it no more"
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        shlex.split(command),
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    for word in re.findall(r"demo/[\w.-]+", command):
        assert (ROOT / word).stat().st_size > 0


def test_the_demo_leaves_three_videos_and_a_contact_sheet() -> None:
    if "make demo" not in commands():
        pytest.fail("the README no longer shows make demo")
    videos = sorted(path.name for path in (ROOT / "demo").glob("*.mp4"))
    assert {"circle.mp4", "diamond.mp4", "square.mp4"} <= set(videos)
    assert (ROOT / "demo/contact-sheet.png").read_bytes()[:4] == b"\x89PNG"
