"""The quantized layers of one stage: from its files into its graph, and counted there."""

import logging
from collections.abc import Collection

import onnx_ir as ir

from ltx_engines.bundle import QuantizationEntry
from ltx_export import coverage, onnxruntime_graph, quantized_graph
from ltx_export.quantized_graph import Read
from ltx_export.sources import Sources
from ltx_ref import quantization
from ltx_ref.checkpoint import Header
from ltx_ref.quantization import Layer

log = logging.getLogger(__name__)


def apply(
    model: ir.Model, stage: str, found: Sources, names: Collection[str]
) -> QuantizationEntry | None:
    """Let the graph read the stage's weights as its files have them; None if all are floats.

    `names` are the stage's weights.

    Raises:
        UserError: a quantized weight cannot be computed with in this graph.
        AssertionError: a layer of the files is not quantized in the graph.
    """
    layers: dict[str, Layer] = {}
    readers: dict[str, Read] = {}
    recipes: list[str] = []
    for header in found.headers(stage):
        own = {p: i for p, i in quantization.layers(header).items() if f"{p}.weight" in names}
        read = _reader(found, header)
        quantized_graph.insert(model, own, read)
        readers |= {name: read for layer in own.values() for name, _ in layer.parts()}
        recipes += _recipe(header) if own else []
        layers |= own
    quantized_graph.widen(model, found.weights(stage))
    if model.graph.opset_imports[""] < quantized_graph.NVFP4_OPSET:
        onnxruntime_graph.specialise(model)
    counted = coverage.count(model, layers, lambda name: readers[name](name))
    for sentence in counted.sentences():
        log.info("%s: %s", stage, sentence)
    if counted.missing:
        path, problem = next(iter(counted.missing.items()))
        raise AssertionError(f"{stage}: {path} is not quantized: {problem}")
    if not layers:
        return None
    return QuantizationEntry(recipe=next(iter(recipes), None), layers=counted.counts())


def _recipe(header: Header) -> list[str]:
    """Its name, if the file says it."""
    written = quantization.provenance(header)
    recipe = {} if written is None else written.get("recipe")
    return [str(recipe["name"])] if isinstance(recipe, dict) and "name" in recipe else []


def _reader(found: Sources, header: Header) -> Read:
    """Scales, which are the same in a file that is still to be made from another."""
    derivation = found.derivations.get(header.path)
    return quantized_graph.reader(header if derivation is None else derivation.source)
