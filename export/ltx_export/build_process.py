"""A process for each engine: a builder that crashes, or that is stopped, costs one stage."""

import json
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO, Any

from ltx_engines.errors import UserError
from ltx_export import engine_needs
from ltx_export.build_job import Built, Job

COMMAND = (sys.executable, "-m", "ltx_export.build")

CRASHES = frozenset({signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV})
"""Signals by which a process ends itself; others come from outside."""

NO_MEMORY = "bad_alloc"
"""In the last words of a C++ program that ends for want of memory."""

PATIENCE = 5
"""Seconds that a process has to end when it is asked to."""


class RefusalError(UserError):
    """The builder does not take the graph: it said so, or crashed over it."""


def run(job: Job, what: str) -> Generator[str, None, Built]:
    """Build it in a process of its own; yields how far it is. `what` begins each line.

    Closing the generator, or an exception in it, ends the process.

    Raises:
        RefusalError: the builder refused, or crashed.
        UserError: it could not begin, could not write, or was killed.
    """
    with (
        TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        # A session of its own: Ctrl-C comes to us, and we end the builder.
        subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        ) as process,
    ):
        try:
            last = yield from _follow(process, job, what)
            process.wait()
        finally:
            _end(process)
        built = _result(last, process.returncode, job, errors)
    engine_needs.warn_of_bloat(job, built)
    return built


def _follow(
    process: "subprocess.Popen[str]", job: Job, what: str
) -> Generator[str, None, dict[str, Any]]:
    """The last message that is not of progress."""
    if process.stdin is None or process.stdout is None:
        raise AssertionError("the process was started without pipes")
    try:
        process.stdin.write(job.to_json() + "\n")
        process.stdin.flush()  # and stays open: the process ends when it closes
    except BrokenPipeError:
        with suppress(BrokenPipeError):  # what was not written is tried again
            process.stdin.close()
        return {}
    last: dict[str, Any] = {}
    for line in process.stdout:
        message = json.loads(line)
        if "note" in message:
            yield f"{what}, {message['note']}"
        elif "phase" not in message:
            last = message
        else:
            of = f" {message['done']} of {message['of']}" if message["of"] else ""
            yield f"{what}: {message['phase']}{of}"
    return last


def _end(process: "subprocess.Popen[str]") -> None:
    """A builder may not answer while it compiles."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def _result(last: dict[str, Any], code: int, job: Job, errors: IO[str]) -> Built:
    if "built" in last:
        return Built(**last["built"])
    if last.get("mendable"):
        raise UserError(last["failed"])
    name = f"{job.graph.name} was not built by {job.flavour} {job.version}"
    if "failed" in last:
        raise (RefusalError if last.get("refused") else UserError)(f"{name}: {last['failed']}")
    if code == -signal.SIGKILL:
        raise UserError(
            f"{name}: it was killed, most likely for want of host memory; build fewer "
            "stages at once (--stages), or where there is more"
        )
    errors.seek(0)
    *_, said = ["it said nothing", *filter(str.strip, errors.read().splitlines())]
    how = f"signal {-code}" if code < 0 else f"code {code}"
    kind = RefusalError if -code in CRASHES and NO_MEMORY not in said else UserError
    raise kind(f"{name}: it ended with {how} ({said.strip()[:200]})")
