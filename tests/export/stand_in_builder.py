"""A builder that writes a few bytes for each engine, so that what is around it can be tested."""

import hashlib
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from ltx_export import build_process, cli, layer_table
from ltx_export.build_job import Built, Job
from tests.export.made_engines import TABLE

FILE = Path(__file__)
OPTIONS = ("--gpu", "sm89", "--shape", "64x64x9", "--branches", "1", "--allow-fallback")


def run(job: Job, what: str) -> Generator[str, None, Built]:
    yield what
    plan = b"plan of " + job.engine.name.encode()
    job.engine.write_bytes(plan)
    job.layers.write_text(layer_table.to_json(TABLE), encoding="utf-8")
    return Built(len(plan), hashlib.sha256(plan).hexdigest(), 7)


def build(source: Path, *options: str) -> int:
    arguments = ["build-engine", str(source), "--stages", "transformer", *OPTIONS]
    return cli.main([*arguments, *options])


def main(gate: Path, source: Path, out: Path) -> int:
    """A process of its own: it is at its first engine from the time that `gate.waits` is there
    until `gate` is."""

    def waiting(job: Job, what: str) -> Generator[str, None, Built]:
        gate.with_suffix(".waits").touch()
        while not gate.exists():
            time.sleep(0.01)
        return (yield from run(job, what))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_process, "run", waiting)
        return build(source, "--out", str(out))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
