"""Our export at true size, and the one that a user does today, in one run.

    python benchmarks/export.py [--only NAME ...] [--no-peer] [--no-float32] [--work FOLDER]

Each row is `ltx-export onnx` as a process of its own, from start to end, on a checkpoint of the
released size without weights (`tools/make_checkpoint.py --sparse`). Then what came out is read: the
weights' names and places, the nodes, onnx.checker, and, from a float32 checkpoint, whether ONNX
Runtime loads it. Everything written is removed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from child import Cost, run
from report import Facts, attempt, machine, ratios

ROOT = Path(__file__).resolve().parents[1]
MAKE = ROOT / "tools/make_checkpoint.py"
FACTS, LOADER, PEER = (
    ROOT / "benchmarks" / name for name in ("graph_facts.py", "load_once.py", "peer_export.py")
)
STATISTICS = ("vae.per_channel_statistics.mean-of-means", "vae.per_channel_statistics.std-of-means")


@dataclass(frozen=True, slots=True)
class Row:
    """`weights` is the model whose file has the stage's weights, `parts` how their names begin."""

    name: str
    stage: str
    checkpoint: str
    weights: str
    parts: tuple[str, ...] = ()
    peer: str | None = None


TRANSFORMER = ("model.diffusion_model.",)
ROWS = (
    Row("transformer-2b", "transformer", "2b", "2b", TRANSFORMER, peer="transformer"),
    Row("transformer-13b", "transformer", "13b", "13b", TRANSFORMER),
    Row(
        "vae-decoder", "vae_decoder", "2b", "2b", ("vae.decoder.", *STATISTICS), peer="vae_decoder"
    ),
    Row("vae-encoder", "vae_encoder", "2b", "2b", ("vae.encoder.", *STATISTICS)),
    Row("t5-xxl", "text_encoder", "2b", "t5-xxl"),
    Row("spatial-upscaler", "latent_upsampler", "2b", "spatial-upscaler"),
    Row("temporal-upscaler", "latent_upsampler", "2b", "temporal-upscaler"),
)
NAMES = tuple(row.name for row in ROWS)


@dataclass(frozen=True, slots=True)
class Run:
    """One row exported in one element type."""

    row: Row
    dtype: str
    opset: int
    work: Path

    @property
    def bundle(self) -> Path:
        return self.work / "bundles" / f"{self.row.name}-{self.dtype}"

    @property
    def graph(self) -> Path:
        return self.bundle / f"{self.row.stage}.onnx"

    def made(self, model: str) -> Path:
        """The checkpoint of this model, made if it is not there yet."""
        path = self.work / f"{model}-{self.dtype}{'' if model == 't5-xxl' else '.safetensors'}"
        if not path.exists():
            options = ["--model", model, "--dtype", self.dtype, "--sparse", "--out", str(path)]
            run([sys.executable, MAKE, *options])
        return path

    def files(self) -> list[Path]:
        """Where the stage's weights are."""
        path = self.made(self.row.weights)
        return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]

    def command(self) -> list[str | Path]:
        words: list[str | Path] = [sys.executable, "-m", "ltx_export.cli", "onnx"]
        words += [self.made(self.row.checkpoint), "--out", self.bundle]
        words += ["--stages", self.row.stage, "--opset", str(self.opset)]
        option = {"text_encoder": "--text-encoder", "latent_upsampler": "--upsampler"}
        if self.row.stage in option:
            words += [option[self.row.stage], self.made(self.row.weights)]
        return words


@contextmanager
def exported(this: Run) -> Iterator[Cost]:
    """The bundle, for as long as the `with` lasts."""
    command = this.command()  # makes the checkpoints, before the clock runs
    try:
        cost, _ = run(command)
        yield cost
    finally:
        shutil.rmtree(this.bundle, ignore_errors=True)


def measure(this: Run) -> Facts:
    with exported(this) as cost:
        options = ["--part", *this.row.parts] if this.row.parts else []
        _, said = run([sys.executable, FACTS, this.graph, "--weights", *this.files(), *options])
        return cost.row() | written(this) | Facts(json.loads(said))


def written(this: Run) -> Facts:
    """Bytes that the export put on the disk; hard links of the checkpoint are none."""
    bundle = [path for path in this.bundle.rglob("*") if path.is_file()]
    others = (path for path in this.work.rglob("*") if this.bundle not in path.parents)
    before = {path.stat().st_ino for path in others}
    new = [path for path in bundle if path.stat().st_ino not in before]
    weights = [path for path in new if path.suffix == ".safetensors"]
    return {
        "new_bytes": sum(path.stat().st_size for path in new),
        "graph_bytes": this.graph.stat().st_size,
        "copied_weight_bytes": sum(path.stat().st_size for path in weights),
    }


def load(this: Run) -> Facts:
    """The float32 graph in ONNX Runtime, as our runtime opens it, in a process of its own."""
    with exported(this):
        cost, said = run([sys.executable, LOADER, this.bundle, this.row.stage])
        return cost.row() | Facts(json.loads(said))


def peer(row: Row, work: Path) -> Facts:
    out = work / f"peer-{row.name}"
    try:
        cost, said = run([sys.executable, PEER, str(row.peer), "--out", out])
        sizes = {path.suffix: path.stat().st_size for path in out.iterdir()}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    last = Facts(json.loads(said.splitlines()[-1]))
    return cost.row() | {"new_bytes": sum(sizes.values())} | last


def benchmark(options: argparse.Namespace, work: Path) -> Facts:
    rows = [row for row in ROWS if row.name in options.only]
    ours, float32, theirs = Facts(), Facts(), Facts()
    for row in rows:
        ours[row.name] = attempt(row.name, partial(measure, Run(row, "bf16", 23, work)))
    for row in rows if options.float32 else ():
        what = f"{row.name}, ONNX Runtime"
        float32[row.name] = attempt(what, partial(load, Run(row, "f32", 20, work)))
    for row in rows if options.peer else ():
        if row.peer:
            theirs[row.name] = attempt(f"{row.name}, peer", partial(peer, row, work))
    better = {name: ratios(ours[name], row) for name, row in theirs.items()}
    parts = {"machine": machine(), "ours": ours, "float32": float32, "peer": theirs}
    return {**parts, "ratios": better}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--no-float32", dest="float32", action="store_false")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="a folder with 5 GB left")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-export-") as work:
        os.environ["XDG_CACHE_HOME"] = f"{work}/cache"  # every run starts without a memory
        report = benchmark(options, Path(work))
    print(json.dumps(report))
    rows = (*report["ours"].values(), *report["float32"].values(), *report["peer"].values())
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
