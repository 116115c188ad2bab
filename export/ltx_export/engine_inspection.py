"""What engines run, for a person and for a program: from the table that the builder left beside
each of them, and where its GPU is at hand from the engine itself."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltx_engines import bundle, hashes
from ltx_engines.bundle import EngineEntry, FileEntry, Manifest
from ltx_engines.errors import UserError, nearest
from ltx_export import card, layer_table
from ltx_export.layer_table import CODES, Layer

ENDS = frozenset({".engine", ".plan", ".trt"})
"""Of the names of plans, ours and other people's."""

SCORES = "score kernels"
"""layer_table's word for softmaxes of S x S that are not fused."""

MOVES = re.compile(r"__my[el]l?_(?:Move|Resh|Tran|Slic|Repl|Conc)+_my")
"""A generated kernel whose name has no arithmetic in it."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine of a bundle and its table, which has been seen to be the one that was built; of the
    engine itself that is `hashed`. `inspector` is what the engine says of itself, as JSON, or
    `without`, why it does not."""

    entry: EngineEntry
    bytes: int
    table: tuple[Layer, ...]
    inspector: Any = None
    without: str = ""
    hashed: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Of all profiles together. Softmaxes are as they were counted at build time, when the
        lengths of sequences were known."""
        codes = Counter(layer.codes for layer in self.table if layer.codes)
        found = {f"{form} gemms": codes[word] for form, word in CODES.items() if codes[word]}
        return {
            "kernels": sum(layer.is_kernel for layer in self.table),
            **found,
            "other gemms": sum(_is_gemm(layer) and not layer.codes for layer in self.table),
            "fused attentions": layer_table.attentions(self.table),
            "reformats": sum(map(is_reformat, self.table)),
            "unfused S x S softmaxes": self.entry.counts.get(SCORES, 0),
        }


def is_engine(path: Path) -> bool:
    """Whether there are engines, or one, and not a checkpoint."""
    return path.suffix in ENDS or (path / bundle.MANIFEST).is_file()


def is_reformat(layer: Layer) -> bool:
    """It computes nothing, but writes the same numbers in another order or layout."""
    return layer.kind.lower() in {"reformat", "shuffle"} or MOVES.match(layer.name) is not None


def _is_gemm(layer: Layer) -> bool:
    """Also one whose kernel goes on with the elementwise nodes behind it."""
    return layer.kind == "gemm" or (layer.kind == "runtime_fusion" and "_Fc" in layer.name)


def precision(layer: Layer) -> str:
    """The type that it multiplies codes in, else that of what it writes."""
    return layer.codes or (layer.outputs[0].dtype if layer.outputs else "-")


def read(path: Path) -> tuple[Engine, ...]:
    """An engine of a bundle, or all of them.

    Raises:
        UserError: there is none; it has no manifest, or is another one than the manifest says.
    """
    folder = path.parent if path.suffix in ENDS else path
    if not path.exists():
        raise UserError(f"{path} is not there; ltx-export build-engine makes engines")
    if not (folder / bundle.MANIFEST).is_file():
        raise UserError(
            f"{path} has no {bundle.MANIFEST} beside it, which says what it is of and for; "
            "build it with ltx-export build-engine"
        )
    manifest = bundle.read(folder)
    wanted = manifest.engines
    if path != folder:
        wanted = tuple(engine for engine in wanted if engine.file == path.name)
        if not wanted:
            names = [engine.file for engine in manifest.engines]
            raise UserError(
                f"{path} is not an engine of {folder}{nearest(path.name, names)}; it has "
                f"{', '.join(names) or 'none'} (ltx-export build-engine)"
            )
    if not wanted:
        raise UserError(f"{folder} has no engines; ltx-export build-engine {folder} --gpu NAME")
    return tuple(_read(folder, manifest, engine) for engine in wanted)


def _read(folder: Path, manifest: Manifest, entry: EngineEntry) -> Engine:
    for name in (entry.file, entry.layers):
        file, said = folder / name, manifest.files[name]
        if not file.is_file() or file.stat().st_size != said.bytes:
            raise UserError(
                f"{file} is not the file of {said.bytes:,} bytes that the manifest names; "
                "build the engine again (ltx-export build-engine)"
            )
    _check_hash(folder / entry.layers, manifest.files[entry.layers])
    table, size = layer_table.read(folder / entry.layers), manifest.files[entry.file].bytes
    if (here := _elsewhere(entry)) is not None:
        return Engine(entry, size, table, without=here)
    from ltx_export import polygraphy_engine

    _check_hash(folder / entry.file, manifest.files[entry.file])  # a plan is code
    try:
        text = polygraphy_engine.inspected(entry.key.flavour, folder / entry.file)
    except UserError as error:
        return Engine(entry, size, table, without=str(error), hashed=True)
    return Engine(entry, size, table, inspector=json.loads(text), hashed=True)


def _check_hash(file: Path, said: FileEntry) -> None:
    if hashes.sha256(file) != said.sha256:
        raise UserError(
            f"{file} is not the one that was built: its hash is another; "
            "build the engine again (ltx-export build-engine)"
        )


def _elsewhere(entry: EngineEntry) -> str | None:
    """Why the engine cannot be opened here."""
    if (found := card.at_hand()) is None:
        return "no NVIDIA GPU is here"
    if found.capability not in entry.key.targets:
        return f"the GPU here is SM{found.capability}"
    return None


def document(engines: tuple[Engine, ...]) -> list[dict[str, Any]]:
    return [
        {
            "engine": engine.entry.file,
            **engine.entry.key.model_dump(mode="json", include=set(FACTS)),
            "bytes": engine.bytes,
            "activations": engine.entry.activations,
            "counts": engine.counts,
            "counted": engine.entry.counted,
            "accepted": engine.entry.accepted,
            "layers": [
                asdict(layer)
                | {"nodes": sorted(layer.nodes), "precision": precision(layer)}
                | {"reformat": is_reformat(layer)}
                for layer in engine.table
            ],
            "inspector": engine.inspector,
            "no_inspector": engine.without or None,
            "engine_hashed": engine.hashed,
        }
        for engine in engines
    ]


FACTS = ("stage", "part", "recipe", "flavour", "version", "targets", "profiles", "options")


def lines(engines: tuple[Engine, ...], *, layers: bool) -> Iterator[str]:
    """The sums of each engine; with `layers` a row for each kernel too."""
    for engine in engines:
        key = engine.entry.key
        part = f" {key.part.index + 1} of {key.part.of}" if key.part else ""
        cards = ", ".join(f"SM{target}" for target in key.targets)
        yield (
            f"{engine.entry.file}: {key.stage}{part}, {key.flavour} {key.version} for {cards}, "
            f"{engine.bytes / 1e6:,.1f} MB, {engine.entry.activations / 1e6:,.1f} MB of activations"
        )
        if key.recipe:
            yield f"  recipe: {key.recipe}"
        counts = ", ".join(f"{number:,} {what}" for what, number in engine.counts.items())
        yield f"  {counts}{layer_table.of_one(key.targets)}"
        if engine.entry.accepted:
            yield f"  accepted though not as asked: {'; '.join(engine.entry.accepted)}"
        kernels = [layer for layer in engine.table if layer.is_kernel]
        types = Counter(map(precision, kernels))
        yield f"  kernels by type: {', '.join(f'{n:,} {kind}' for kind, n in types.most_common())}"
        for layer in kernels if layers else ():
            yield f"    {precision(layer):<9} {layer.kind:<15} {_short(layer)}"
        yield f"  source: {_source(engine)}"


def _short(layer: Layer) -> str:
    """The kernel, and the node that it begins with, if that is not in its name."""
    node = min(layer.nodes, default="")
    return layer.name if not node or node in layer.name else f"{layer.name} ({node})"


def _source(engine: Engine) -> str:
    kept = f"the builder's table, saved with the engine ({engine.entry.layers})"
    kept += ", both as built" if engine.hashed else ", as built; the engine's own hash was not read"
    if engine.inspector is None:
        return f"{kept}; not the engine's own inspector: {engine.without}"
    return f"{kept}; --json has the engine's own inspector too"
