"""A bundle of graphs for ONNX Runtime's GPU providers: which of them compute each stage, and for
which clips one that builds engines is to do so."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ltx_engines import bundle, providers
from ltx_engines.bundle import Manifest
from ltx_engines.errors import UserError
from ltx_engines.manifest import OnnxRuntimeEntry
from ltx_engines.providers import Provider
from ltx_engines.targets import Target
from ltx_export import engine_profiles, engine_stages
from ltx_export.engine_order import Order
from ltx_export.engine_profiles import Buckets

GPU: tuple[Provider, ...] = ("cuda", "tensorrt-rtx")

FOR_ENGINES = (
    *("optimization_level", "workspace", "weight_streaming", "refittable", "split", "cache"),
    *("host_memory", "allow_fallback", "ignore_limits", "gpus"),
)


@dataclass(frozen=True, slots=True)
class Checked:
    """What the manifest is to say."""

    path: Path
    manifest: Manifest
    entries: dict[str, OnnxRuntimeEntry]


def check_early(order: Order) -> tuple[Target, ...]:
    """No GPU is meant: the graphs are for all.

    Raises:
        UserError: an option is of engines, or a clip there is not.
    """
    for option in FOR_ENGINES:
        value = getattr(order, option)
        if value is not None and value is not False and value != ():
            word = "--gpu" if option == "gpus" else f"--{option.replace('_', '-')}"
            raise UserError(f"{word} is for engines; leave it out with --backend onnxruntime")
    if order.engine_weights != "embedded":
        raise UserError("--engine-weights is for engines; leave it out with --backend onnxruntime")
    for word in (*order.shapes, *filter(None, [order.vae_tile])):
        engine_profiles.ends(word)
    if order.vae_stream is not None:
        engine_profiles.check_stream(order.vae_stream)
    return ()


def check(folder: Path, order: Order) -> Checked:
    """
    Raises:
        UserError: a stage is for no GPU; with what to do.
    """
    opened = bundle.open_bundle(folder)
    manifest = opened.manifest
    known = engine_stages.beside(opened, order)
    engine_stages.check_vae(known, order)
    branches = order.branches or engine_profiles.usual_branches(manifest)
    text = engine_profiles.text_tokens(manifest)
    buckets = Buckets(
        order.shapes,
        branches,
        text,
        conditioning=order.conditioning,
        vae_tile=order.vae_tile,
        vae_stream=order.vae_stream,
        passes=order.passes,
    )
    entries = {}
    for stage in known:
        found = providers.possible(stage, opened.stage(stage))
        if not set(found) & set(GPU):
            raise UserError(str(providers.refusal("cuda", stage, opened.stage(stage))))
        builds = "tensorrt-rtx" in found
        profiles = engine_profiles.profiles(stage, manifest, buckets) if builds else ()
        entries[stage] = OnnxRuntimeEntry(providers=found, profiles=profiles)
    return Checked(folder, manifest, entries)


def write(checked: Checked) -> Iterator[str]:
    """Put it into the manifest. Yields the providers of each stage, and why not the others."""
    if checked.entries.items() <= checked.manifest.onnxruntime.items():
        yield f"{checked.path}: up to date ({', '.join(checked.entries)})"
        return
    manifest = bundle.read(checked.path)
    found = manifest.onnxruntime | checked.entries
    bundle.update(checked.path, manifest.model_copy(update={"onnxruntime": found}))
    for stage, entry in checked.entries.items():
        yield f"{stage}: {', '.join(entry.providers)}"
        for provider in GPU:
            if reason := providers.refusal(provider, stage, manifest.stages[stage]):
                yield f"not {provider}: {reason}"
