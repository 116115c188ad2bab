"""Trace the stages of every released model, and of ltx-tiny, into the templates that are shipped.

    python tools/make_templates.py [--only STAGE]      (five minutes on two cores)

A template that is no longer anybody's is deleted. `tests/export/test_templates.py` traces some of
them again and compares.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import typer

from ltx_engines.bundle import StgMode
from ltx_engines.command import invoke
from ltx_engines.stages import STAGES, STREAM
from ltx_export import templates
from ltx_export.graphs import Graphs, Model, traced
from ltx_export.sources import read
from ltx_ref.ltx_video.config import SD3_SHIFT, VAE_GENERATIONS, ModelConfig, TransformerConfig
from ltx_ref.ltx_video.upsampler_config import SPATIAL, TEMPORAL
from ltx_ref.text import TextConfig

TINY = Path(__file__).parents[1] / "runtime/ltx_trt/ltx_tiny"

SIZES = (
    TransformerConfig(),
    TransformerConfig(attention_head_dim=128, num_layers=48, cross_attention_dim=4096),
)
"""2B and 13B."""

T5_XXL = TextConfig(
    d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def released() -> Iterator[tuple[str, Model]]:
    """Every stage that a released model has."""
    base = Model(ModelConfig(SIZES[0], VAE_GENERATIONS["0.9.5"], SD3_SHIFT), T5_XXL)
    yield "text_encoder", base
    for size in SIZES:
        for mode in get_args(StgMode):
            config = replace(base.config, transformer=size)
            yield "transformer", replace(base, config=config, stg_mode=mode)
    for vae in VAE_GENERATIONS.values():
        for stage in ("vae_encoder", "vae_decoder", STREAM):
            yield stage, replace(base, config=replace(base.config, vae=vae))
    for upsampler in (SPATIAL, TEMPORAL):
        yield "latent_upsampler", replace(base, upsampler=upsampler)


def tiny() -> Iterator[tuple[str, Model]]:
    """The stages of the model that is shipped."""
    model = read(TINY / "ltx-tiny.safetensors", TINY / "text_encoder").model()
    for stage in (*STAGES, STREAM):
        yield stage, model


@app.command()
def make(
    only: Annotated[str | None, typer.Option(help="One stage; nothing is deleted.")] = None,
) -> None:
    """Trace and write all templates."""
    templates.FOLDER.mkdir(exist_ok=True)
    kept = set()
    for stage, model in (*released(), *tiny()):
        if only is not None and stage != only:
            continue
        graphs = Graphs(model)
        name = templates.name(stage, graphs.facts(stage))
        if name in kept:
            continue
        start = time.perf_counter()
        graph = traced(stage, graphs.smallest(stage))
        path = templates.save(graph, stage, graphs.facts(stage))
        kept.add(name)
        seconds = time.perf_counter() - start
        typer.echo(f"{path.name}: {path.stat().st_size:,} bytes, {seconds:.1f} s")
    for path in templates.FOLDER.glob("*.onnx.gz"):
        if only is None and path.name not in kept:
            path.unlink()
            typer.echo(f"{path.name}: deleted")


def main(arguments: list[str] | None = None) -> int:
    return invoke(app, "make_templates", arguments)


if __name__ == "__main__":
    sys.exit(main())
