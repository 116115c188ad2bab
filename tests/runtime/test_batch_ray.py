"""The jobs of a batch on a Ray cluster: a stand-in always, a real one where Ray is installed."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from ltx_trt.backend import Choice, Providers
from ltx_trt.batch import cluster, maker, results
from ltx_trt.batch.results import Place
from ltx_trt.batch_commands import ADDRESS
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages
from tests.runtime.batches import ltx_trt, rows
from tests.runtime.fake_ray import Cluster
from tests.waiting import HANG, until

pytest.importorskip("onnxruntime")

CONFIG = b"num_inference_steps: 2\n"

SMALL_STORE = 100 * 2**20
"""Bytes of memory that all processes of a cluster share; jobs and reports are a few kB."""

SECONDS = ("RAY_gcs_server_port_wait_time_s", "RAY_worker_register_timeout_seconds")
MILLISECONDS = ("RAY_agent_register_timeout_ms", "RAY_health_check_timeout_ms")
"""How long parts of Ray wait for each other; less may pass while a machine is busy."""

MakeBundle = Callable[..., Path]


@pytest.fixture
def folder(make_bundle: MakeBundle) -> Path:
    return make_bundle()


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    file = tmp_path / "jobs.jsonl"
    file.write_text("".join(f'{{"prompt": "w5", "seed": {seed}}}\n' for seed in range(4)))
    return file


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setitem(sys.modules, "ray", made.module())
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return made


def test_a_cluster_makes_what_this_process_makes_and_a_lost_actor_makes_nothing_twice(
    folder: Path, jobs: Path, tmp_path: Path, ray: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    ray.loses = 2
    words = ("--bundle", folder, "--json")
    assert ltx_trt("batch", jobs, "--out", tmp_path / "there", "--ray", *words) == 0
    there = rows(capsys)
    assert ltx_trt("batch", jobs, "--out", tmp_path / "here", *words) == 0
    assert [row["sha256"] for row in there] == [row["sha256"] for row in rows(capsys)]
    assert [row["state"] for row in there] == ["made"] * 4
    assert (ray.started, ray.stopped) == (2, 1)
    init, options = ray.asked
    assert init["address"] == "local"
    assert (options["num_cpus"], options["num_gpus"]) == (1, 0)
    assert options["compute"] == {"size": 1, "max_tasks_in_flight_per_actor": 1}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_an_address_and_workers_are_handed_on(
    folder: Path, jobs: Path, tmp_path: Path, ray: Cluster
) -> None:
    words = ("--workers", 3, "--threads", 2, "--bundle", folder, "--out", tmp_path / "out")
    assert ltx_trt("batch", "--ray", "ray://head:10001", jobs, *words) == 0
    init, options = ray.asked
    assert init["address"] == "ray://head:10001"
    assert (options["compute"]["size"], options["num_cpus"]) == (3, 2)


@pytest.fixture
def made(
    folder: Path, jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Make all, and return what was said."""

    def make(*words: str) -> str:
        assert ltx_trt("batch", jobs, *words, "--bundle", folder, "--out", tmp_path / "out") == 0
        return capsys.readouterr().err

    return make


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """With what makers open bundles."""
    found: list[Choice] = []

    def opening(folder: Path, choice: Choice) -> Stages:
        found.append(choice)
        return open_stages(folder, choice)

    monkeypatch.setattr(maker, "open_stages", opening)
    return found


@pytest.mark.parametrize(
    ("gpus", "words", "said"),
    [
        (8, "", "the cluster's GPUs (8) are not used; --provider cuda gives one to each worker"),
        (8, "--provider cpu", ""),
        (0, "", ""),
    ],
)
def test_actors_are_told_the_cpu_where_nobody_says_another_provider(
    made: Callable[..., str], ray: Cluster, opened: list[Choice], gpus: int, words: str, said: str
) -> None:
    """Whatever ONNX Runtime a machine of the cluster has."""
    ray.gpus = gpus
    heard = made("--ray", *words.split())
    assert [choice.provider for choice in opened] == [Providers.cpu]
    assert said in heard
    assert bool(said) is ("GPU" in heard)


def test_a_gpu_is_asked_of_ray_for_each_worker_and_missed_at_once(
    folder: Path, jobs: Path, tmp_path: Path, ray: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--provider", "cuda", "--bundle", folder, "--out", tmp_path / "out")
    assert ltx_trt("batch", jobs, "--ray", *words) == 2
    heard = capsys.readouterr().err
    assert heard.startswith("ltx-trt: --ray: Ray finds no GPU on this machine, and each worker")
    assert heard.count("\n") == 1
    assert ray.stopped == 1
    ltx_trt("batch", jobs, "--ray", "head:6379", *words)
    assert "has no GPU now; jobs wait until it has one" in capsys.readouterr().err
    _, _, options = ray.asked
    assert (options["num_cpus"], options["num_gpus"]) == (0, 1)


def test_a_cluster_that_is_not_there_costs_one_line(
    folder: Path, jobs: Path, tmp_path: Path, ray: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--bundle", folder, "--out", tmp_path / "out")
    assert ltx_trt("batch", jobs, "--ray", "nowhere:1", *words) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "ltx-trt: --ray nowhere:1: there is no such cluster (nobody answers); start it with "
        "`ray start --head`, or leave the address out\n"
    )
    assert not (tmp_path / "out").exists()


def test_without_ray_one_line_says_what_to_install(
    folder: Path,
    jobs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "find_spec", dict[str, None]().get)
    assert ltx_trt("batch", jobs, "--ray", "--bundle", folder, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "ltx-trt: --ray wants Ray, which is not installed; pip install 'ltx-trt[ray]'\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("word", "is_one"),
    [
        ("auto", True),
        ("10.0.0.1:6379", True),
        ("ray://head:10001", True),
        ("jobs.jsonl", False),
        ("--workers", False),
        ("/tmp/a:1", False),
        ("", False),
    ],
)
def test_what_follows_ray_is_an_address_only_if_it_looks_like_one(word: str, is_one: bool) -> None:
    assert bool(ADDRESS.fullmatch(word)) is is_one


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a cluster of this machine needs: little memory, no network, a folder of its own for its
    sockets, whose paths may have 107 bytes, and patience with a machine that others keep busy. Ray
    would kill a worker too where others have taken nearly all memory."""
    folder = tempfile.mkdtemp(prefix="ray")
    told = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(SMALL_STORE), "RAY_TMPDIR": folder}
    told |= {"RAY_memory_monitor_refresh_ms": "0"}
    told |= dict.fromkeys(SECONDS, f"{HANG:.0f}") | dict.fromkeys(MILLISECONDS, f"{HANG:.0f}000")
    told |= {**cluster.QUIET, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    pytest.importorskip("ray", reason="pip install 'ltx-trt[ray]'")
    yield
    shutil.rmtree(folder)


@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.usefixtures("real")
def test_a_killed_worker_of_a_real_cluster_makes_nothing_twice(
    folder: Path, jobs: Path, tmp_path: Path
) -> None:
    from ltx_trt.batch import execution
    from ltx_trt.batch.jobs import read
    from ltx_trt.job import Voice

    out, config = tmp_path / "out", tmp_path / "config.yaml"
    config.write_bytes(CONFIG)
    planned = execution.check(execution.Batch(read(jobs, {}), folder, out, "mp4", config))
    config.unlink()
    os.mkfifo(config)
    here = cluster.Cluster(cluster.LOCAL, 1, on_gpu=False)
    with ThreadPoolExecutor() as pool:
        killed = pool.submit(kill_one, out, config)
        states = [outcome.state for outcome in execution.execute(planned, here, Voice())]
    finished = killed.result()
    assert states == ["made"] * 4
    assert finished
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items())
    assert all(results.find(Place(out, f"{index:04d}", "mp4")) for index in range(4))
    assert len(list(out.iterdir())) == 8


def kill_one(out: Path, config: Path) -> dict[Path, int]:
    """The process that is at another clip once one is finished; what was finished, and when. Each
    clip begins with the config, and waits as long as nobody writes what is read there: it is told
    once, and a file takes the place of the pipe before the kill."""
    tell(config)
    killed: list[dict[Path, int]] = []

    def look() -> bool:
        with suppress(OSError, IndexError):
            finished = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
            for file in out.glob(".*.partial/tries") if finished else ():
                process = int(file.read_text().split()[2])
                config.with_name("plain").write_bytes(CONFIG)
                config.with_name("plain").replace(config)
                os.kill(process, signal.SIGKILL)
                killed.append(finished)
                return True
        return False

    until(look, "somebody at a clip while another is finished")
    return killed[0]


def tell(config: Path) -> None:
    """Whoever opens the pipe to read first."""
    handles: list[int] = []

    def look() -> bool:
        with suppress(OSError):  # nobody does yet
            handles.append(os.open(config, os.O_WRONLY | os.O_NONBLOCK))
        return bool(handles)

    until(look, "somebody who reads the config")
    os.write(handles[0], CONFIG)
    os.close(handles[0])
