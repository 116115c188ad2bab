"""`ltx-trt client`, the example and the metrics on a real Triton server."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.grpc")

from ltx_engines.triton_model import METRICS
from ltx_trt import cli
from tests.test_readme import commands
from tests.triton import held_steps
from tests.triton.asking import until_held
from tests.triton.conftest import RunAlone
from tests.triton.held_steps import Hold
from tests.triton.server import Server
from tests.waiting import HANG, until

PROMPT = "a red circle moves right on a blue background"
CLIP = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 3, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def repository(write_repository: Callable[..., Path]) -> Path:
    written = write_repository("single")
    held_steps.add(written)
    return written


@pytest.fixture(scope="module")
def single(repository: Path) -> Iterator[Server]:
    with Server(repository) as server:
        yield server


def words(server: Server, output: Path, **options: object) -> list[str]:
    url = f"grpc://127.0.0.1:{server.grpc}"
    said = (f"--{name.replace('_', '-')}={value}" for name, value in options.items())
    return ["client", "--url", url, "-o", str(output), *said]


def counted(server: Server, name: str) -> float:
    return sum(n for series, n in server.figures().items() if series.startswith(name))


def test_the_client_writes_the_bytes_of_a_run(
    single: Server, run_alone: RunAlone, tmp_path: Path
) -> None:
    assert cli.main(words(single, tmp_path / "out.mp4", **CLIP)) == 0
    assert (tmp_path / "out.mp4").read_bytes() == run_alone(**CLIP)[0]


def test_the_readmes_command_writes_the_bytes_of_a_run(
    single: Server, run_alone: RunAlone, tmp_path: Path
) -> None:
    """But for the port, and the folder that it writes to."""
    (line,) = (line for line in commands() if line.startswith("ltx-trt client"))
    output = tmp_path / "triton.mp4"
    here = {"grpc://localhost:8001": f"grpc://127.0.0.1:{single.grpc}", "demo/triton.mp4": output}
    said = [str(here.pop(word, word)) for word in shlex.split(line)[1:]]
    assert here == {}
    assert cli.main(said) == 0
    assert output.read_bytes() == run_alone(prompt=PROMPT)[0]


def test_the_client_writes_pictures_too(single: Server, tmp_path: Path) -> None:
    assert cli.main(words(single, tmp_path / "clip", **CLIP, num_frames=9)) == 0
    assert len(list((tmp_path / "clip").glob("*.png"))) == 9


def test_the_example_of_the_repository_writes_the_bytes_of_a_run(
    single: Server, repository: Path, run_alone: RunAlone, tmp_path: Path
) -> None:
    output = tmp_path / "out.mp4"
    script = [sys.executable, str(repository / "client.py"), PROMPT, str(output)]
    done = subprocess.run(
        [*script, f"127.0.0.1:{single.grpc}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == run_alone(prompt=PROMPT, seed=7)[0]
    assert done.stdout.splitlines()[-1].startswith("{'event': 'done'")


def test_ctrl_c_at_the_client_stops_the_server_within_a_step(
    single: Server, tmp_path: Path
) -> None:
    """Its fourth, which is under way."""
    before = counted(single, "ltx_requests_cancelled_total")
    steps = counted(single, "ltx_pass_requests_count")
    hold = Hold(step=4)
    said_words = words(single, tmp_path / "out.mp4", **hold.wishes)
    process = subprocess.Popen(
        [sys.executable, "-m", "ltx_trt.cli", *said_words], stderr=subprocess.PIPE, text=True
    )
    until_held(single, hold, lambda: process.poll() is not None)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert said == "ltx-trt: interrupted; nothing is half-written\n"
    until(lambda: counted(single, "ltx_requests_cancelled_total") > before, "the request's end")
    assert counted(single, "ltx_pass_requests_count") == steps + 4
    time.sleep(0.3)
    assert counted(single, "ltx_pass_requests_count") == steps + 4
    assert list(tmp_path.iterdir()) == []


def test_every_metric_of_the_table_is_there_and_no_other(single: Server, tmp_path: Path) -> None:
    assert cli.main(words(single, tmp_path / "out.mp4", **CLIP)) == 0
    lines = single.told().splitlines()
    kinds = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE ltx_")}
    for metric in METRICS:
        end = "_bucket" if metric.kind == "histogram" else ""
        series = [line for line in lines if line.startswith(f"{metric.name}{end}{{")]
        assert series, metric.name
        assert all(f'{label}="' in line for label in metric.labels for line in series)
    assert kinds == {metric.name: metric.kind for metric in METRICS}
