"""What can be known of an engine before it is built: what no builder accepts, and what its kernels
must be."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from ltx_engines import cache_key
from ltx_engines.bundle import Bundle, StageEntry
from ltx_engines.cache_key import EngineKey
from ltx_engines.errors import UserError
from ltx_engines.targets import Flavour, Precision, Target
from ltx_export import build, engine_numbers
from ltx_export.build import MODULES
from ltx_export.engine_numbers import Numbers
from ltx_export.layer_table import CODES, Wanted
from ltx_export.onnx_order import Order
from ltx_export.plan_question import FLOATING, FLOATS, STORED_AS, own_precision
from ltx_ref import quantization, text
from ltx_ref.checkpoint import Header, read_header
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX
from ltx_ref.quantization import Format

log = logging.getLogger(__name__)

SHORT: Mapping[str, Precision] = MappingProxyType({long: word for word, long in FLOATS.items()})


def flavour(cards: tuple[Target, ...], wish: Flavour | None) -> Flavour:
    """The builder for these GPUs: the one that is wished, else the first that is installed.

    Raises:
        UserError: none builds for all of them.
    """
    legal: list[Flavour] = [f for f in cards[0].flavours if all(f in c.flavours for c in cards)]
    if wish is not None and wish not in legal:
        other = next(card for card in cards if wish not in card.flavours)
        raise UserError(
            f"{wish} does not build for {other.name} (SM{other.capability}); use --backend "
            f"{other.flavours[0]}, or leave out this --gpu"
        )
    if wish is not None:
        return wish
    present = [f for f in legal if find_spec(MODULES[f]) is not None]
    return next(iter((*present, *legal)))


def check_machine(flavour: Flavour, cards: tuple[Target, ...]) -> None:
    """
    Raises:
        UserError: the builder is not installed, or wants a GPU that is not here.
    """
    build.version(flavour)
    if flavour == "tensorrt":
        build.check_card(tuple(sorted({card.capability for card in cards})))


def check_floats(
    graphs: Order, numbers: Numbers, cards: tuple[Target, ...], *, fallback: bool
) -> None:
    """Of a checkpoint, before its graphs are made.

    Raises:
        UserError: a stage with attention is to be float32.
    """
    if fallback:
        return
    header = read_header(graphs.checkpoint)
    floats = engine_numbers.floats(numbers, header)
    files: dict[str, tuple[Header, ...]] = {"transformer": (header,)}
    if graphs.text_encoder is not None:
        files["text_encoder"] = text.weight_headers(text.encoder_folder(graphs.text_encoder))
    for stage, headers in files.items():
        if graphs.stages is not None and stage not in graphs.stages:
            continue
        if (floats or _floats(stage, headers)) == "float32":
            legal = [p for p in HALVES if not any(card.refusal(p) for card in cards)]
            option = "--precision" if numbers.recipe is None else "--rest-precision"
            raise UserError(
                f"{stage} is float32, for which no builder has attention in one kernel; give "
                f"{option} {' (or '.join(legal)}{')' * (len(legal) - 1)}, or accept that with "
                "--allow-fallback"
            )


HALVES: tuple[Precision, ...] = ("bf16", "fp16")


def _floats(stage: str, headers: tuple[Header, ...]) -> str | None:
    """The type of most of a stage's own weights that are not codes."""
    prefix = TRANSFORMER_PREFIX if stage == "transformer" else ""
    found = {
        name: info
        for header in headers
        for name, info in header.tensors.items()
        if name.startswith(prefix) and info.dtype in FLOATING
    }
    return FLOATS[own_precision(stage, found)] if found else None


def check_kept(opened: Bundle, wanted: Iterable[EngineKey]) -> None:
    """
    Raises:
        UserError: an engine that would be kept has kernels that were accepted with
            --allow-fallback.
    """
    for engine in opened.manifest.engines:
        for key in wanted:
            if not engine.accepted or (engine.key.stage, engine.key.part) != (key.stage, key.part):
                continue
            if not cache_key.difference(engine.key, key):
                raise UserError(not_as_asked(key.stage, engine.accepted))


def not_as_asked(what: str, problems: Iterable[str]) -> str:
    return (
        f"the engine of {what} is not what was asked for: {'; '.join(problems)}; "
        "--allow-fallback accepts it"
    )


def check(
    stage: str, entry: StageEntry, cards: tuple[Target, ...], *, fallback: bool = False
) -> None:
    """With `fallback` attention may be in many kernels.

    Raises:
        UserError: the stage is of a precision that one of the GPUs has not, or its graph is one
            for ONNX Runtime.
    """
    for card in cards:
        for precision in precisions(entry):
            if reason := card.refusal(precision):
                raise UserError(f"{stage}: {reason}")
    quantized = entry.quantization is not None
    if quantized and entry.opset is not None and entry.opset < OPSET:
        raise UserError(
            f"{stage} is quantized for ONNX Runtime (opset {entry.opset}); export it with "
            f"--opset {OPSET}"
        )
    if stage not in ATTENDS or "fp32" not in precisions(entry):
        return
    if entry.opset == OPSET or not fallback:
        way = "--opset 20 too" if entry.opset == OPSET else "it"
        raise UserError(
            f"{stage} is float32, for which no attention kernel is; export it with --precision "
            f"bfloat16 or float16 (--allow-fallback takes {way})"
        )


OPSET = 23
ATTENDS = frozenset({"text_encoder", "transformer"})
"""Stages whose graphs have the operator Attention at opset 23."""


def precisions(entry: StageEntry) -> Iterator[Precision]:
    """Of the stage's activations and, where other, of its weights."""
    yield from dict.fromkeys(SHORT[t.dtype] for t in entry.outputs if t.dtype in SHORT)
    if entry.quantization is not None:
        yield from dict.fromkeys(STORED_AS[form] for form in entry.quantization.layers)


def wanted(opened: Bundle, key: EngineKey, graph: Path) -> Wanted:
    """What the files say that the kernels of a graph, or of a part of one, must be."""
    import onnx

    if "weights as inputs" in key.options:
        from ltx_export import weight_input_engines

        return weight_input_engines.wanted(opened, key, graph)
    entry = opened.stage(key.stage)
    proto = onnx.load(graph, load_external_data=False)
    weights = {tensor.name for tensor in proto.graph.initializer}
    sizes = {size for tensor in proto.graph.initializer for size in tensor.dims}
    products: dict[str, Format] = {}
    for name in entry.weights:
        layers = quantization.layers(read_header(opened.file(name)))
        products |= {
            path: layer.format
            for path, layer in layers.items()
            if layer.format in CODES and f"{path}.weight" in weights
        }
    # A length that is also a width of the model would make scores of activations.
    tokens = {p["tokens"][2] for p in key.profiles if "tokens" in p} - sizes
    attentions = sum(node.op_type == "Attention" for node in proto.graph.node)
    return Wanted(len(key.profiles), products, attentions, frozenset(tokens))
