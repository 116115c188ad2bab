"""Whatever goes wrong, a client sees one line without a path, and the server goes on or is started
again. The table in docs/triton-faults.md is made here (WRITE_TABLES=1) and held against here.
"""

import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.grpc")

from ltx_engines import bundle
from ltx_export.triton import operations
from ltx_trt.cli import SHIPPED
from tests.triton import held_steps
from tests.triton.asking import Outcome, Question, ask, busy, metric
from tests.triton.held_steps import Hold
from tests.triton.server import Server
from tests.waiting import until

TABLE = Path(__file__).parents[2] / "docs" / "triton-faults.md"

WISHES = {
    "prompt": "a red circle moves right on a blue background",
    "seed": 7,
    "num_inference_steps": 3,
    "num_frames": 9,
    "width": 64,
    "height": 64,
}
SILENCE = 6.0
"""Seconds after a kill in which nothing must be heard."""

PATHS = re.compile(r"(^|[\s'\"(])(/[\w.-]+){2,}|Traceback|\.py\b|line \d+")


@dataclass(frozen=True)
class Row:
    """`after` is what the next request gets, `recovered` what it gets when the server was started
    again, None where it was not; `index` is what the server says of its models, `steps` how many
    it made."""

    fault: str
    outcome: Outcome
    ready: bool
    after: Outcome
    recovered: Outcome | None = None
    index: str = ""
    steps: float = 0.0

    def cells(self) -> str:
        seen = self.outcome
        words = {"OK": "OK", "(in the stream)": "none"}.get(seen.status, seen.status)
        answer = "a clip" if seen.status == "OK" else f"`{seen.text}`"
        then = "goes on" if self.after.status == "OK" else "start it again"
        return f"| {self.fault} | {words} | {answer} | {'yes' if self.ready else 'no'} | {then} |"


class Loaded(Server):
    """Started when loading has ended, well or not."""

    def _has_begun(self) -> bool:
        return self.is_live()


def started(repository: Path) -> Loaded:
    """By the words of the repository's own README, but for its folder."""
    facts = operations.Facts("single", bundle.read(SHIPPED), ("ltx_video",), "ltx_video/1/bundle")
    words = operations.plan(repository, facts).command
    return Loaded(repository, *(word for word in words[2:] if "exit-timeout" not in word))


def put(server: Server, question: Question) -> Outcome:
    return ask(f"127.0.0.1:{server.grpc}", question)


REFUSED = {
    "0 frames": Question({**WISHES, "num_frames": 0}),
    "wrong dtype": Question(WISHES, types={"seed": "INT32"}),
    "wrong shape": Question({**WISHES, "seed": [7, 8]}, shapes={"seed": (2,)}),
    "text that is not UTF-8": Question({**WISHES, "prompt": b"\xff\xfe"}),
    "unknown parameter": Question(WISHES, parameters={"num_framez": "9"}),
    "unknown input": Question({**WISHES, "num_framez": "9"}),
    "unknown model": Question(WISHES, model="ltx_vide"),
    "a clip of terabytes": Question({**WISHES, **dict.fromkeys(("width", "height"), 32768)}),
}
ACCEPTED = {"prompt of 20 kB": Question({**WISHES, "prompt": "circle " * 3000})}


def refusals(server: Server) -> Iterator[Row]:
    for fault, question in {**ACCEPTED, **REFUSED}.items():
        seen = put(server, question)
        yield Row(fault, seen, server.is_ready(), put(server, Question(WISHES)))


def client_gone(server: Server) -> Row:
    """Before its third step has ended."""
    before = metric(server.told(), "ltx_pass_requests_count")
    seen = put(server, Question(Hold(step=3).wishes, leave_after=6))
    seen = Outcome("CANCELLED", "(of its own wish)", seen.events, seconds=seen.seconds)
    until(lambda: metric(server.told(), "ltx_requests_cancelled_total"), "the end of who has left")
    made = metric(server.told(), "ltx_pass_requests_count") - before
    after = put(server, Question(WISHES))
    return Row("client gone", seen, server.is_ready(), after, steps=made)


def stub_killed(server: Server) -> tuple[Outcome, bool]:
    """While it computes a request, which is never answered: what the next one sees, and whether
    the server calls itself ready."""
    # others never come: while it is held, the stub says nothing to the server
    with busy(server, Hold(step=2, waiting=9)) as unanswered:
        for stub in server.stubs():
            os.kill(stub, signal.SIGKILL)
        next_one = put(server, Question(WISHES))
        ended = wait([unanswered], SILENCE).done
        assert not ended, "Triton has learnt to end it; tell the README"
    return next_one, server.is_ready()


def after_a_kill(next_one: Outcome, ready: bool, recovered: Outcome) -> Iterator[Row]:
    silent = Outcome("none", "(no answer ever: ltx-trt client asks after 30 s, then ends)")
    for fault, seen in (("its request", silent), ("the next request", next_one)):
        yield Row(f"stub killed: {fault}", seen, ready, next_one, recovered)


def index(server: Server) -> str:
    """Of the models, and why some are not loaded, to whoever asks."""
    request = urllib.request.Request(server.url("v2/repository/index"), b"{}", method="POST")
    return server.read(request)


def spoilt(
    fault: str, source: Path, folder: Path, spoil: Callable[[Path], Callable[[], object]]
) -> Row:
    """`spoil` returns what mends it."""
    shutil.copytree(source, folder)
    mend = spoil(folder)
    with started(folder) as server:
        seen, ready = put(server, Question(WISHES)), server.is_ready()
        after, said = put(server, Question(WISHES)), index(server)
    mend()
    with started(folder) as again:
        return Row(fault, seen, ready, after, put(again, Question(WISHES)), said)


def change_a_byte(folder: Path) -> Callable[[], object]:
    path = folder / "ltx_video/1/bundle/transformer.onnx"
    good = path.read_bytes()
    path.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    return lambda: path.write_bytes(good)


def take_a_stage_away(folder: Path) -> Callable[[], object]:
    away = folder.with_name("away")
    (folder / "vae_decoder").rename(away)
    return lambda: away.rename(folder / "vae_decoder")


def break_a_stage(folder: Path) -> Callable[[], object]:
    path = folder / "vae_decoder/1/model.py"
    good = path.read_text()
    path.write_text("raise RuntimeError('broken')\n")
    return lambda: path.write_text(good)


@pytest.fixture(scope="module")
def rows(
    write_repository: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Row]:
    """Side by side: most of it is waiting for servers to end."""
    single, held, stages = (write_repository(word) for word in ("single", "single", "stages"))
    held_steps.add(held)
    folder = tmp_path_factory.mktemp("faults")
    spoils = [
        ("a changed byte in the bundle", single, folder / "byte", change_a_byte),
        ("a stage is missing", stages, folder / "missing", take_a_stage_away),
        ("a stage fails to load", stages, folder / "broken", break_a_stage),
    ]
    with ThreadPoolExecutor(3) as pool:
        spoilt_rows = [pool.submit(spoilt, *words) for words in spoils]
        found = [*of_one_server(held), *(row.result() for row in spoilt_rows)]
    return {row.fault: row for row in found}


def of_one_server(repository: Path) -> Iterator[Row]:
    with started(repository) as server:
        yield from refusals(server)
        yield client_gone(server)
        next_one, ready = stub_killed(server)
    with started(repository) as again:
        yield from after_a_kill(next_one, ready, put(again, Question(WISHES)))


def test_the_table_is_what_clients_see(rows: dict[str, Row]) -> None:
    head = (
        "| fault | status | what the client reads | ready | the server |\n|---|---|---|---|---|\n"
    )
    text = head + "".join(f"{row.cells()}\n" for row in rows.values())
    if os.environ.get("WRITE_TABLES"):
        TABLE.write_text(
            "# Faults, and what a client of Triton sees of them\n\nMade by "
            "tests/triton/test_faults.py on Triton 2.51 (24.10). `none` is a text without a "
            "status. Do not send\n`triton_grpc_error`, which would give it one: such a refusal may "
            "end the whole server (signal 11, 8 times of\n2,400; without it never of 3,200). "
            "Started again means\n`docker restart`, after the files are as they were written "
            "(`ltx-export triton --check`). Do not freeze a\nserver either (`docker pause`, "
            "SIGSTOP): this Triton calls a model's process dead, or ends itself, when it stood"
            f"\nstill for about a second while a request came; 0.6 s did no harm.\n\n{text}",
            encoding="utf-8",
        )
    assert text in TABLE.read_text(encoding="utf-8"), text


def test_no_path_and_no_trace_reaches_a_client(rows: dict[str, Row]) -> None:
    for row in rows.values():
        for seen in (row.outcome, row.after):
            assert not PATHS.search(seen.text), seen.text
            assert "\n" not in seen.text.strip()
        assert not PATHS.search(row.index), row.index


def test_the_index_of_models_is_for_the_operator(rows: dict[str, Row]) -> None:
    """It says why a model did not load, with paths and lines of the source."""
    said = [row.index for row in rows.values() if row.index]
    assert len(said) == 3
    assert all("restricted" in word for word in said), said


def test_the_search_for_paths_finds_some() -> None:
    assert PATHS.search("UserError: /tmp/x/y.onnx is missing")
    assert PATHS.search('File "model.py", line 3')
    assert not PATHS.search("frames/second, 3 / 4, and/or")


@pytest.mark.parametrize("fault", [*ACCEPTED, *REFUSED, "client gone"])
def test_a_fault_of_the_client_is_the_clients_alone(fault: str, rows: dict[str, Row]) -> None:
    row = rows[fault]
    assert row.ready
    assert row.after.status == "OK"
    if fault in REFUSED:
        assert row.outcome.status == "(in the stream)"
        assert row.outcome.events == []


@pytest.mark.parametrize(
    "fault",
    [
        "stub killed: its request",
        "stub killed: the next request",
        "a changed byte in the bundle",
        "a stage is missing",
        "a stage fails to load",
    ],
)
def test_a_server_that_is_started_again_recovers(fault: str, rows: dict[str, Row]) -> None:
    row = rows[fault]
    assert row.after.status != "OK"
    assert row.recovered is not None
    assert row.recovered.status == "OK"
    assert row.recovered.report["sha256"] == rows["client gone"].after.report["sha256"]


def test_what_does_not_load_is_not_ready(rows: dict[str, Row]) -> None:
    assert not rows["a changed byte in the bundle"].ready
    assert not rows["a stage is missing"].ready
    assert not rows["a stage fails to load"].ready


def test_who_leaves_is_not_computed_for(rows: dict[str, Row]) -> None:
    """But for the step under way."""
    row = rows["client gone"]
    assert len(row.outcome.events) == 6
    assert row.outcome.steps == [1, 2]
    assert row.steps == 3
