"""Write a checkpoint of a released model's size and layout, with random weights or with none.

    python tools/make_checkpoint.py --model 13b --sparse --out ltxv-13b.safetensors

Names, shapes and metadata are those of the released files. A weight's numbers depend on its name
and the seed alone: a slice of some layers has the whole model's numbers. `--sparse` writes the
header and a hole as long as the weights, which reads as zeros and takes no disk.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

import typer

from ltx_engines.command import invoke
from ltx_engines.errors import UserError
from releases import Dtype, File, Model, Tensor, Vae, Wish, files, t5_config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK = 1 << 22
"""Numbers drawn at a time: 16 MB of memory, whatever the tensor's size."""


def numbers(tensor: Tensor, seed: int) -> Iterator[NDArray[np.float32]]:
    """The tensor's numbers in pieces: normal, and such that activations neither fade nor grow."""
    import numpy as np

    spread, centre = _spread(tensor), _centre(tensor)
    source = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    for begin in range(0, prod(tensor.shape), CHUNK):
        count = min(CHUNK, prod(tensor.shape) - begin)
        piece = source.standard_normal(count, np.float32)
        piece *= np.float32(spread)
        piece += np.float32(centre)
        yield piece


def _spread(tensor: Tensor) -> float:
    if tensor.name.endswith("timestep_scale_multiplier"):
        return 0.0
    if tensor.name.endswith(".weight") and len(tensor.shape) > 1:
        return float(prod(tensor.shape[1:]) ** -0.5)  # of what one output is the sum of
    return 0.02


def _centre(tensor: Tensor) -> float:
    """Norms multiply, so they are around one; the VAE's scale of timesteps is a constant."""
    if tensor.name.endswith("timestep_scale_multiplier"):
        return 1000.0
    norm = tensor.name.endswith(".weight") and len(tensor.shape) == 1
    return 1.0 if norm or tensor.name.endswith("std-of-means") else 0.0


def write_random(path: Path, file: File, seed: int) -> Iterator[int]:
    """Yields the bytes of each piece as it is written."""
    import ml_dtypes
    import numpy as np

    types: dict[str, Any] = {
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
    }
    with path.open("wb") as out:
        out.write(file.head())
        for tensor in file.tensors:
            for piece in numbers(tensor, seed):
                yield out.write(piece.astype(types[tensor.dtype]).view(np.uint8).data)


def write_sparse(path: Path, file: File) -> None:
    head = file.head()
    with path.open("wb") as out:
        out.write(head)
        out.truncate(len(head) + file.nbytes)


def make(wish: Wish, out: Path, seed: int | None) -> Generator[tuple[int, int], None, None]:
    """Write the checkpoint; without a seed, a hole instead of the weights.

    Yields bytes done and bytes in all. What was asked for is there when this ends, not before.

    Raises:
        UserError: there is something already, or too little disk.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} is already there; remove it or choose another --out")
    wanted = files(wish)
    out.parent.mkdir(parents=True, exist_ok=True)
    if seed is not None:
        _check_disk(out, sum(file.nbytes for file in wanted))
    with _whole(out) as partial:
        if wish.model is Model.t5_xxl:
            _write_t5_sides(partial, wish, wanted)
        yield from _write(partial, wanted, seed)


def _check_disk(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(f"{out} needs {needed:,} bytes, {out.parent} has {free:,}; try --sparse")


def _write(target: Path, wanted: Sequence[File], seed: int | None) -> Iterator[tuple[int, int]]:
    done, total = 0, sum(file.nbytes for file in wanted)
    for file in wanted:
        path = target / file.name if file.name else target
        if seed is None:
            write_sparse(path, file)
            continue
        for count in write_random(path, file, seed):
            done += count
            yield done, total


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A name beside the target, which becomes the target or vanishes."""
    partial = target.with_name(f".{target.name}.{uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.rename(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _write_t5_sides(folder: Path, wish: Wish, shards: tuple[File, ...]) -> None:
    """The folder with all but the weights: configuration, index and a tokenizer of letters."""
    folder.mkdir()
    index = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
    }
    for name, table in (("config", t5_config(wish)), ("model.safetensors.index", index)):
        text = json.dumps(table, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    _write_tokenizer(folder / "tokenizer.json")


def _write_tokenizer(path: Path) -> None:
    """T5's kind, one token for each letter: the real table cannot be made up."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]  # 0, 1, 2 as in every T5
    letters = [(letter, -2.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz"]
    words = Words(models.Unigram([*((word, 0.0) for word in special), *letters], unk_id=2))
    words.add_special_tokens(special)
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    words.save(str(path))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__)
def command(  # noqa: PLR0913 - options of a command
    model: Annotated[Model, typer.Option(help="Which release's size and layout.")],
    out: Annotated[Path, typer.Option(help="A file; a folder for t5-xxl. Not there yet.")],
    dtype: Annotated[Dtype, typer.Option(help="fp8: of the blocks' matrices.")] = Dtype.bf16,
    layers: Annotated[int | None, typer.Option(help="Blocks; default: the release's.")] = None,
    vae: Annotated[Vae | None, typer.Option(help="Of 2b and 13b; default: 0.9.5.")] = None,
    distilled: Annotated[
        bool, typer.Option("--distilled", help="With the timesteps of a distilled release.")
    ] = False,
    sparse: Annotated[bool, typer.Option("--sparse", help="No weights, and no disk.")] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the random weights; default: 0.")
    ] = None,
) -> None:
    wish = Wish(model, dtype, layers, vae, distilled)
    if sparse and seed is not None:
        raise UserError("--sparse writes no weights, so --seed has no effect; leave one out")
    with closing(make(wish, out, None if sparse else seed or 0)) as steps:
        _follow(steps, str(out))
    paths = sorted(out.iterdir()) if out.is_dir() else [out]
    apparent = sum(path.stat().st_size for path in paths)
    on_disk = sum(path.stat().st_blocks * 512 for path in paths)
    typer.echo(f"{out}: {apparent:,} bytes, {on_disk:,} of them on disk")


def _follow(steps: Iterator[tuple[int, int]], what: str) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        for done, total in steps:
            progress.update(task, completed=done, total=total)


def main(arguments: list[str] | None = None) -> int:
    if find_spec("torch") is None:
        print("make_checkpoint: it reads layouts off ltx_ref, which needs torch", file=sys.stderr)
        return 2
    return invoke(app, "make_checkpoint", arguments)


if __name__ == "__main__":
    sys.exit(main())
