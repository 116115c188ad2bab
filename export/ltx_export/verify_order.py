"""What `ltx-export verify` is asked for, and what of it can be known to be wrong early."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ltx_engines import bundle as bundles
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_export import calibration, denoising, devices, ladder
from ltx_export.denoising import Weights
from ltx_export.ladder import Bounds, Pair, Rung
from ltx_export.onnx_transformer import Graph
from ltx_export.outputs import check as check_output
from ltx_export.pipeline_defaults import Pipeline
from ltx_ref import quantization
from ltx_ref.checkpoint import Header, read_header
from ltx_ref.ltx_video.config import ModelConfig, read_config
from ltx_ref.ltx_video.pipeline import Request, levels
from ltx_ref.quantization import Layer


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for. None is the model's own, or found by itself."""

    checkpoint: Path
    text_encoder: Path
    prompt: str
    shape: VideoShape
    original: Path | None = None
    steps: int | None = None
    seed: int = 0
    bundle: Path | None = None
    bounds: tuple[str, ...] = ()
    pipeline_config: Path | None = None
    device: str = "cpu"
    offload_blocks: bool = False
    ignore_config_keys: tuple[str, ...] = ()
    figures: Path | None = None
    """Where the caller is going to write them; nothing is written here."""
    overwrite: bool = False

    def check_figures(self, inputs: Mapping[str, Path]) -> None:
        """
        Raises:
            UserError: they cannot be written, or in the place of one of these.
        """
        if self.figures is not None:
            check_output(self.figures, inputs, overwrite=self.overwrite, option="--json")


@dataclass(frozen=True, slots=True)
class Checked:
    """An order of which everything that a header says is known to be right."""

    order: Order
    header: Header
    original: Header
    layers: Mapping[str, Layer]
    pipeline: Pipeline
    request: Request
    config: ModelConfig
    bounds: Bounds

    def weights(self, rung: Rung) -> Weights:
        order = self.order
        return Weights(
            (self.header if rung == "quantized" else self.original).path,
            torch.bfloat16 if rung == "bfloat16" else torch.float32,
            order.device,
            order.offload_blocks,
            order.ignore_config_keys,
        )

    @property
    def twin(self) -> Rung:
        """What the graph should equal."""
        return "quantized" if self.layers else ladder.YARDSTICK

    def pair(self, rung: Rung, against: Rung, bounds_of: Rung | None = None) -> Pair:
        """`bounds_of`: whose bounds count, if not those of the rung itself."""
        name = bounds_of or rung
        velocity, latents = self.bounds[f"{name}.velocity"], self.bounds[f"{name}.latents"]
        return Pair(rung, against, {"velocity": velocity, "latents": latents})

    def bound_to(self, graph: Graph) -> "Checked":
        """With the bounds of this graph's element type, and of the engine's, which is the given
        bundle's."""
        formats = {layer.format for layer in self.layers.values()}
        own = graph.bundle.manifest.precision
        given = own if self.order.bundle is None else bundles.read(self.order.bundle).precision
        return replace(self, bounds=ladder.bounds(formats, self.order.bounds, own, given))

    def facts(self) -> dict[str, Any]:
        order, counts = self.order, dict[str, int]()
        for layer in self.layers.values():
            counts[layer.format] = counts.get(layer.format, 0) + 1
        return {
            "checkpoint": str(self.header.path),
            "original": str(self.original.path),
            "formats": counts,
            "bundle": None if order.bundle is None else str(order.bundle),
            "prompt": order.prompt,
            "shape": f"{order.shape.width}x{order.shape.height}x{order.shape.frames}",
            "sigmas": [*levels(self.config, self.request)],
            "seed": order.seed,
            "device": order.device,
        }


def check(order: Order) -> Checked:
    """Everything that can be known to be wrong before a weight is read.

    Raises:
        UserError, CheckpointError: something is.
    """
    if not order.prompt.strip():
        raise UserError("the prompt is empty; say what the clip shows: --prompt TEXT")
    devices.choose(order.device)
    header = read_header(order.checkpoint)
    layers = quantization.layers(header)
    original = _original(order, header) if layers else header
    if not layers and order.original is not None:
        raise UserError(f"{header.path} is not quantized, it has no original; leave out --original")
    order.check_figures(_inputs(order, original))
    config = read_config(header, order.ignore_config_keys)
    pipeline = denoising.pipeline(order.pipeline_config, config, None)
    request, config = denoising.request(pipeline, order.shape, order.steps, config)
    formats = {layer.format for layer in layers.values()}
    bounds = ladder.bounds(formats, order.bounds)
    return Checked(order, header, original, layers, pipeline, request, config, bounds)


def _inputs(order: Order, original: Header) -> dict[str, Path]:
    """All that is read, but for the files that a bundle names elsewhere."""
    found = {
        "the checkpoint": order.checkpoint,
        "the original": original.path,
        "the text encoder": order.text_encoder,
        "the bundle": order.bundle,
        "the pipeline's configuration": order.pipeline_config,
    }
    return {what: path for what, path in found.items() if path is not None}


def _original(order: Order, header: Header) -> Header:
    """What the quantized file was made from: as it is told, or beside it.

    Raises:
        UserError: it is not there, or another one.
    """
    source = (quantization.provenance(header) or {}).get("source")
    known: dict[str, Any] = source if isinstance(source, dict) else {}
    if order.original is None and "name" not in known:
        raise UserError(f"{header.path} does not say what it was made from; give --original FILE")
    path = order.original or header.path.parent / str(known["name"])
    if not path.is_file():
        raise UserError(
            f"{path} is not there, from which {header.path} was quantized; give --original FILE"
        )
    found = read_header(path)
    if quantized_too := next(iter(quantization.layers(found)), None):
        raise UserError(
            f"{path} is quantized too ({quantized_too}); give the float checkpoint with --original"
        )
    here = calibration.identity(path)
    for key in (here.keys() & known.keys()) - {"name"}:
        if here[key] != known[key]:
            raise UserError(
                f"{header.path} was quantized from a {known.get('name')} of other {key} "
                f"({known[key]}) than {path} ({here[key]}); give that file with --original"
            )
    return found
