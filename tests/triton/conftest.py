"""The shipped ltx-tiny in both layouts, each on a real server that all tests of a file share."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ltx_engines.triton_settings import Layout, Settings
from ltx_trt.cli import SHIPPED
from tests.triton import held_steps, server

RunAlone = Callable[..., tuple[bytes, dict[str, Any]]]
"""What `ltx-trt run` makes with these options: its file's bytes, and its report."""

AT_ONCE = 9
"""Eight, and one that keeps the model busy until they are there."""

LONGEST_DELAY = 1.0
"""Seconds. Whether a step waits for those of others is then not a matter of a busy machine."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if reason := server.missing():
        for item in items:
            if item.path.is_relative_to(here):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def write_repository(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    from ltx_export.triton import repository

    def write(layout: Layout, **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("triton") / "repository"
        wished = Settings(layout=layout, at_once=AT_ONCE, **settings)
        repository.write(SHIPPED, folder, repository.Order(wished))
        return folder

    return write


@pytest.fixture(scope="module", params=["single", "stages"])
def running(
    request: pytest.FixtureRequest, write_repository: Callable[..., Path]
) -> Iterator[server.Server]:
    repository = write_repository(request.param, batch_delay=LONGEST_DELAY)
    held_steps.add(repository)
    with server.Server(repository) as started:
        yield started


@pytest.fixture(scope="session")
def run_alone(tmp_path_factory: pytest.TempPathFactory) -> RunAlone:
    folder = tmp_path_factory.mktemp("alone")
    made: dict[str, tuple[bytes, dict[str, Any]]] = {}

    def run(**options: Any) -> tuple[bytes, dict[str, Any]]:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            file = folder / f"{len(made)}.mp4"
            words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
            done = subprocess.run(
                [sys.executable, "-m", "ltx_trt.cli", "run", "--json", "-o", str(file), *words],
                capture_output=True,
                text=True,
                check=True,
            )
            made[key] = file.read_bytes(), json.loads(done.stdout)
        return made[key]

    return run
