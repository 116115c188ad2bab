"""What is in a bundle, as tables for people."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from ltx_engines.bundle import Bundle, Defaults, EngineEntry, StageEntry, TensorEntry
from ltx_engines.cache_key import Profile, Range, targets

MIB = 2**20


def show(bundle: Bundle, console: Console) -> None:
    manifest = bundle.manifest
    console.print(
        f"{manifest.name} ({manifest.family} {manifest.model_version}, {manifest.precision})",
        markup=False,
        highlight=False,
    )
    console.print(_stages(bundle))
    if manifest.engines:
        console.print(_engines(bundle))
    console.print(_pairs("files", _files(bundle)))
    defaults, second = manifest.defaults, manifest.defaults.second
    for title, rows in (
        ("model", manifest.model),
        ("scheduler", manifest.scheduler),
        ("defaults", defaults if second is None else _without_second(defaults)),
        *((("second pass", second),) if second else ()),
    ):
        console.print(_pairs(title, ((key, str(value)) for key, value in rows)))
    console.print(_pairs("toolchain", iter(manifest.toolchain.items())))


def _without_second(defaults: Defaults) -> list[tuple[str, Any]]:
    """Which has a table of its own."""
    return [(key, value) for key, value in defaults if key != "second"]


def _stages(bundle: Bundle) -> Table:
    table = Table(title="stages", title_justify="left")
    for column in ("stage", "graph", "inputs", "outputs"):
        table.add_column(column, overflow="fold")
    for name, stage in bundle.manifest.stages.items():
        table.add_row(name, _graph(bundle, stage), _tensors(stage.inputs), _tensors(stage.outputs))
    return table


def _graph(bundle: Bundle, stage: StageEntry) -> str:
    files = bundle.manifest.files
    first = f"{stage.file} ({_mib(files[stage.file].bytes)})"
    return "\n".join((first, *(f"  {w}" for w in stage.weights), *_quantization(stage)))


def _quantization(stage: StageEntry) -> Iterator[str]:
    if (entry := stage.quantization) is not None:
        counts = ", ".join(f"{count} layers {form}" for form, count in entry.layers.items())
        yield f"  {counts} (recipe {entry.recipe})" if entry.recipe else f"  {counts}"


def _engines(bundle: Bundle) -> Table:
    table = Table(title="engines", title_justify="left")
    for column in ("stage", "for", "by", "profiles", "kernels", "size"):
        table.add_column(column, overflow="fold")
    for engine in bundle.manifest.engines:
        key = engine.key
        table.add_row(
            "\n".join(_engine(engine)),
            targets(key.targets),
            f"{key.flavour} {key.version}",
            "\n".join(map(_profile, key.profiles)),
            "\n".join(f"{number} {what}" for what, number in engine.counts.items()),
            _mib(bundle.manifest.files[engine.file].bytes),
        )
    return table


def _engine(engine: EngineEntry) -> Iterator[str]:
    key = engine.key
    yield key.stage
    if key.part is not None:
        part = key.part
        yield f"  part {part.index + 1} of {part.of}, blocks {part.first} to {part.end - 1}"
    if key.recipe is not None:
        yield f"  {key.recipe}"
    if engine.refittable:
        yield "  takes LoRAs"
    if engine.weights == "inputs":
        yield "  takes weights as inputs"


def _profile(profile: Profile) -> str:
    """A line for each clip."""
    return ", ".join(f"{axis} {_said(sizes)}" for axis, sizes in profile.items())


def _said(sizes: Range) -> str:
    low, likely, high = sizes
    return str(low) if low == high else f"{low} to {high} (for {likely})"


def _tensors(tensors: tuple[TensorEntry, ...]) -> str:
    return "\n".join(f"{t.name} {t.dtype} ({', '.join(map(str, t.axes))})" for t in tensors)


def _files(bundle: Bundle) -> Iterator[tuple[str, str]]:
    for name, entry in bundle.manifest.files.items():
        known = f"sha256 {entry.sha256[:12]}" if entry.sha256 else "not hashed (ltx-export seal)"
        yield name, f"{_mib(entry.bytes)}, {known}"


def _pairs(title: str, rows: Iterator[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in rows:
        table.add_row(key, value)
    return table


def _mib(size: int) -> str:
    return f"{size / MIB:.2f} MiB"
