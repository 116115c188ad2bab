"""Requests beyond the places: they wait in Triton's queue, in order, and not more than it holds."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")

from ltx_engines.triton_settings import Settings
from ltx_export.triton import config, repository
from ltx_trt.cli import SHIPPED
from tests.triton import held_steps
from tests.triton.asking import busy
from tests.triton.held_steps import Hold
from tests.triton.server import Server
from tests.triton.stream import PROMPTS, ask
from tests.waiting import until

CLIP: dict[str, Any] = {"prompt": PROMPTS[0], "num_inference_steps": 6}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One place, and a queue of one."""
    folder = tmp_path_factory.mktemp("narrow") / "repository"
    order = repository.Order(Settings(at_once=1), config.Queue(size=1))
    repository.write(SHIPPED, folder, order)
    held_steps.add(folder)
    with Server(folder) as server:
        yield server


def test_what_does_not_fit_into_the_queue_is_refused_at_once(narrow: Server) -> None:
    """While the one place is taken, one waits for it and one is in the queue."""
    with ThreadPoolExecutor(8) as pool, busy(narrow, Hold(step=1)):
        asked = [pool.submit(ask, narrow.grpc, seed=seed, **CLIP) for seed in range(8)]
        until(lambda: sum(one.done() for one in asked) >= 6, "refusals")
    heard = [one.result() for one in asked]
    made = [found for found in heard if not found.message]
    refused = [found for found in heard if found.message]
    assert made
    for found in refused:
        # the core says so before the stream has begun: 2.51 gives it no status, only words
        assert found.status in ("None", "StatusCode.UNAVAILABLE")
        assert "Exceeds maximum queue size" in found.message
    assert all(found.steps == list(range(1, 7)) for found in made)
    assert narrow.is_ready()
