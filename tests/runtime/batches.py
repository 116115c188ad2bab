"""Batches of hand-made bundles, as the tests give and read them."""

import json
from pathlib import Path
from typing import Any

import pytest

from ltx_trt import cli
from ltx_trt.backend import Choice
from ltx_trt.batch import execution
from ltx_trt.batch.jobs import read
from ltx_trt.batch.maker import Order


def ltx_trt(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def many(folder: Path, count: int) -> Path:
    file = folder / "many.jsonl"
    file.write_text("".join(f'{{"prompt": "w5", "seed": {seed}}}\n' for seed in range(count)))
    return file


def batch_of(bundle: Path, jobs: Path, out: Path) -> execution.Batch:
    return execution.Batch(read(jobs, {}), bundle, out)


def order_of(bundle: Path) -> Order:
    return Order(bundle, Path("out"), "mp4", None, Choice(), redo=False, run="run")
