"""Climb the ladder: is the quantized model still the same model, and where does it stop to be?

    original   -- float32 --+-- bfloat16
                            |
    checkpoint -- quantized +-- onnx, exported in a temporary folder if no bundle is given
                            |
                            +-- engine, if the bundle has one for the GPU at hand

One rung is in memory at a time. The first one beyond its bound is taken apart, by `bisection.py` or
`graph_following.py`.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ltx_engines.bundle import Precision, open_bundle
from ltx_engines.errors import UserError
from ltx_export import convert, denoising, engine_rung, ladder, onnx_bundle, quantized_graph
from ltx_export.bisection import Mixture, Parts, swapped
from ltx_export.denoising import Inputs, OnDevice, Walk
from ltx_export.graph_following import Follower, Part, linear_layers
from ltx_export.ladder import YARDSTICK, Culprit, Output, Outputs, Pair, Report, Row, Rung, Skipped
from ltx_export.onnx_transformer import Graph, OnnxTransformer
from ltx_export.verify_order import Checked as Checked
from ltx_export.verify_order import Order as Order
from ltx_export.verify_order import check as check
from ltx_ref import quantized
from ltx_ref.checkpoint import Header
from ltx_ref.ltx_video.model import skeleton
from ltx_ref.ltx_video.pipeline import levels
from ltx_ref.ltx_video.transformer import Transformer
from ltx_ref.quantization import Layer
from ltx_ref.quantized import QuantizedLinear
from ltx_ref.tensor_file import TensorFile


def run(order: Order) -> Generator[str, None, Report]:
    """Yields what is being done; what follows a colon is how far that is.

    Raises:
        UserError, CheckpointError, OSError: something that the user can mend; a graph in which not
            every layer of the file's recipe is quantized is that.
    """
    yield "reading"
    ladder.check_packages()
    checked = check(order)
    with TemporaryDirectory(prefix="ltx-verify-") as scratch:
        graph, skipped, coverage = yield from _graph(checked, Path(scratch))
        if graph is not None:
            checked = checked.bound_to(graph)
        yield "encoding the prompt"
        climb = Climb(checked, _walk(checked))
        yield from climb.up(graph)
        skipped += yield from climb.engine()
        culprit = None
        if (broken := ladder.first_broken(climb.rows)) is not None:
            culprit = yield from climb.culprit(broken)
    return Report(checked.facts(), tuple(climb.rows), skipped, coverage, culprit)


Graphed = tuple[Graph | None, tuple[Skipped, ...], str | None]
"""The graph if ONNX Runtime computes it, what is skipped, and the line about coverage."""


def _graph(checked: Checked, scratch: Path) -> Generator[str, None, Graphed]:
    """Coverage is counted where the codes are: in the given bundle, else in an export of the file
    as it is. A float32 twin is climbed if that is for GPUs only."""
    order, formats = checked.order, {layer.format for layer in checked.layers.values()}
    if order.bundle is not None:
        bundle = open_bundle(order.bundle)
        order.check_figures(
            {f"the bundle's {name}": bundle.file(name) for name in bundle.manifest.files}
        )
        graph = Graph(bundle)
        graph.check(checked.request.stg_mode)
        graph.check_formats(checked.layers)
        _check_names(checked, graph)
    elif "nvfp4" in formats:
        graph = yield from _exported(checked, scratch / "own", None, 23)
    elif convert.kind(checked.header).name == "fp8_plain":  # float32 would widen it
        graph = yield from _exported(checked, scratch / "own", None, None)
    else:
        graph = yield from _exported(checked, scratch / "own", "float32", 20)
    coverage = None
    if checked.layers:
        coverage = graph.covered(checked.layers, quantized_graph.reader(checked.header))
    if (refusal := graph.refusal()) is None:
        OnnxTransformer(graph)  # ONNX Runtime can load it
        return graph, (), coverage
    if "nvfp4" in formats:
        return None, (Skipped("onnx", "nvfp4 is computed by TensorRT alone, on SM120"),), coverage
    twin = yield from _exported(checked, scratch / "twin", "float32", 20)
    why = f"{graph.path} is {refusal}: a float32 export was climbed instead"
    return twin, (Skipped("onnx", why),), coverage


def _check_names(checked: Checked, graph: Graph) -> None:
    transformer = skeleton(checked.header, checked.order.ignore_config_keys).transformer
    graph.check_names(linear_layers(transformer), len(transformer.transformer_blocks))


def _exported(
    checked: Checked, out: Path, precision: Precision | None, opset: onnx_bundle.Opset | None
) -> Generator[str, None, Graph]:
    order = onnx_bundle.Order(
        checked.header.path,
        out,
        stages=("transformer",),
        stg_mode=checked.request.stg_mode,
        precision=precision,
        opset=opset,
        weights="refer",
        ignore_config_keys=checked.order.ignore_config_keys,
    )
    for step in onnx_bundle.write(order):
        yield f"exporting: {step}"
    return Graph(open_bundle(out))


def _walk(checked: Checked) -> Walk:
    pipeline, order = checked.pipeline, checked.order
    texts = (order.prompt, pipeline.defaults.negative_prompt)
    prompts = denoising.prompts(order.text_encoder, texts, pipeline.max_length)
    wanted = checked.config.transformer.caption_channels
    if (width := prompts.positive.shape[-1]) != wanted:
        raise UserError(
            f"{order.text_encoder} has width {width}, the checkpoint reads text of width {wanted}; "
            "use the text encoder that the checkpoint was trained with"
        )
    sigmas = levels(checked.config, checked.request)
    return Walk(checked.config, checked.request, prompts, order.seed, sigmas)


class Climb:
    """The outputs of the rungs so far, and how far they are apart."""

    def __init__(self, checked: Checked, walk: Walk) -> None:
        self.checked, self.walk = checked, walk
        self.rows: list[Row] = []
        self.outputs: dict[Rung, Outputs] = {}
        self.first: Inputs | None = None
        """Of the yardstick's first step, and so of everybody's."""

    def up(self, graph: Graph | None) -> Generator[str, None, None]:
        """
        Raises:
            UserError: the yardstick is not finite.
        """
        checked, yardstick = self.checked, YARDSTICK
        yield yardstick
        self.outputs[yardstick], self.first = self._torch(yardstick)
        _check_finite(self.outputs[yardstick], checked.original)
        yield "bfloat16"
        self._compare({"bfloat16": self._torch("bfloat16")[0]}, checked.pair("bfloat16", yardstick))
        if checked.layers:
            yield "quantized"
            self.rows.append(worst_weight(checked))
            found = self._torch("quantized")[0]
            self._compare({"quantized": found}, checked.pair("quantized", yardstick))
        if graph is not None:
            yield "onnx"
            yield from self._follow(graph)
            found, _ = self.walk.outputs(OnnxTransformer(graph), torch.float32)
            self._compare({"onnx": found}, checked.pair("onnx", checked.twin))
            if checked.layers:
                self._compare({"onnx": found}, checked.pair("onnx", yardstick, "quantized"))

    def engine(self) -> Generator[str, None, tuple[Skipped, ...]]:
        """Beside ONNX Runtime's graph where there is one, else beside what that should equal."""
        checked = self.checked
        if self.first is None:
            raise AssertionError("an engine is climbed before there is a yardstick")
        order = checked.order
        found = engine_rung.find(order.bundle, order.shape, self.first.tensors())
        if isinstance(found, Skipped):
            return (found,)
        yield "engine"
        with found.opened() as model:
            outputs, _ = self.walk.outputs(model, torch.float32)
        against: Rung = "onnx" if "onnx" in self.outputs else checked.twin
        self._compare({"engine": outputs}, checked.pair("engine", against))
        if checked.layers:
            self._compare({"engine": outputs}, checked.pair("engine", YARDSTICK, "quantized"))
        return ()

    @contextmanager
    def _followed(self, graph: Graph) -> Iterator[Follower]:
        if self.first is None:
            raise AssertionError("a graph is followed before there is a yardstick")
        with self.checked.weights(self.checked.twin).opened() as transformer:
            yield Follower(graph, transformer, self.first)

    def _follow(self, graph: Graph) -> Generator[str, None, None]:
        """The worst layer and the worst block of the graph, each given the same inputs."""
        with self._followed(graph) as follower:
            layer = yield from follower.worst_layer()
            block = yield from follower.worst_block()
        worst: dict[Output, Part] = {"layers": layer, "blocks": block}
        for output, part in worst.items():
            pair = Pair("onnx", self.checked.twin, {output: self.checked.bounds[f"onnx.{output}"]})
            found, wanted = {output: part.graph.numpy()}, {output: part.own.numpy()}
            self.rows += [
                replace(row, place=part.path) for row in ladder.compare(pair, found, wanted)
            ]

    def _torch(self, rung: Rung) -> tuple[Outputs, Inputs]:
        weights = self.checked.weights(rung)
        with weights.opened() as transformer:
            return self.walk.outputs(OnDevice(transformer, weights.device), weights.dtype)

    def _compare(self, found: Mapping[Rung, Outputs], pair: Pair) -> None:
        self.outputs.update(found)
        rows = ladder.compare(pair, self.outputs[pair.rung], self.outputs[pair.against])
        self.rows.extend(rows)

    def culprit(self, broken: Row) -> Generator[str, None, Culprit | None]:
        """What takes the rung over its bound."""
        if broken.place is not None:
            return Culprit(broken.place, broken.distance)
        if broken.rung in {"onnx", "engine"}:
            return None
        return (yield from self._mixed(broken))

    def _mixed(self, broken: Row) -> Generator[str, None, Culprit]:
        weights = {rung: self.checked.weights(rung) for rung in (broken.against, broken.rung)}
        reference, candidate = weights.values()
        with reference.opened() as own, candidate.opened() as other:

            def measure(parts: Parts) -> float:
                with swapped(own, parts):
                    return self._distance(broken, own)

            def held(model: Transformer, index: int) -> torch.nn.Module:
                return (reference if model is own else candidate).block(model, index)

            limit, found = broken.bound.limit, broken.distance
            return (yield from Mixture(own, other, measure, limit, found, held).culprit())

    def _distance(self, row: Row, transformer: Transformer) -> float:
        """Of the same output, by a float32 transformer."""
        model = OnDevice(transformer, self.checked.order.device)
        if self.first is not None and row.output == "velocity":
            found = self.walk.velocity(model, self.first)
        else:
            found = self.walk.latents(model, torch.float32)
        return ladder.distance(found, self.outputs[row.against][row.output])


def _check_finite(outputs: Outputs, original: Header) -> None:
    for name, numbers in outputs.items():
        if not np.isfinite(numbers).all():
            raise UserError(
                f"{original.path} gives NaN or infinity in float32 ({name}), so nothing can be "
                "compared with it; download it again"
            )


def worst_weight(checked: Checked) -> Row:
    """The layer whose codes are farthest from the original's weights.

    A scale that is wrong in queries or keys does not show in what a model gives: they are
    normalised.
    """
    found: dict[str, float] = {}
    with TensorFile(checked.header) as codes, TensorFile(checked.original) as floats:
        for path, layer in checked.layers.items():
            found[path] = ladder.distance(*_weights(layer, codes, floats))
        # NaN is the worst of all.
        worst = max(found, key=lambda path: (np.isnan(found[path]), found[path]))
        values, wanted = _weights(checked.layers[worst], codes, floats)
    pair = Pair("quantized", YARDSTICK, {"weights": checked.bounds["quantized.weights"]})
    (row,) = ladder.compare(pair, {"weights": values}, {"weights": wanted})
    return replace(row, place=worst)


def _weights(layer: Layer, codes: TensorFile, floats: TensorFile) -> tuple[Any, Any]:
    """What the codes stand for, and what they were made from; float32 [N, K]."""
    parts = {"weight": codes.read(f"{layer.path}.weight")}
    parts |= {name.rpartition(".")[2]: codes.read(name) for name, _ in layer.parts()}
    values = quantized.dequantized(QuantizedLinear.of(layer.format, parts), torch.float32)
    if (pre := parts.get("pre_quant_scale")) is not None:
        values = values * pre
    return values.numpy(), floats.read(f"{layer.path}.weight").float().numpy()
