"""The kernels of an engine, as the builder lists them, and whether they are those of the recipe.

Without a GPU no engine can be opened and inspected, but a verbose builder ends with the same table.
It holds the kernels of every profile, one profile after the other, for one compute capability.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ltx_engines.errors import UserError
from ltx_ref.quantization import Format

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Operand:
    """A size of -1 is only known when the engine runs."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Layer:
    """A row of the builder's table: most are kernels. And the graph's nodes that it computes."""

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    nodes: frozenset[str]

    @property
    def codes(self) -> str | None:
        """The type of less than 16 bits in which it multiplies activations and weights. These are
        a constant or, if they come at run time, the second input."""
        if self.kind != "gemm" or not self.inputs:
            return None
        kind = self.inputs[0].dtype
        weights = [operand.dtype for operand in (*self.constants[:1], *self.inputs[1:2])]
        return kind if kind in CODES.values() and kind in weights else None

    @property
    def is_fused_attention(self) -> bool:
        return FUSED in self.name

    @property
    def is_kernel(self) -> bool:
        return self.kind not in ORDERING


CODES: Mapping[Format, str] = {"fp8": "FP8", "int8": "Int8", "nvfp4": "FP4E2M1"}
"""The builder's word for the formats that are multiplied as codes."""

FUSED = "_gemm_mha"

ORDERING = frozenset({"wait", "signal"})
"""Rows of the table by which streams wait for each other."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a stage's kernels must be: products of codes by layer, and attentions in one kernel.

    `tokens` are the lengths of the profiles' sequences, by which a kernel is known that writes a
    score for each query and key.
    """

    profiles: int
    products: Mapping[str, Format] = field(default_factory=dict)
    attentions: int = 0
    tokens: frozenset[int] = frozenset()


# Printed one after the other, without a separator that is not also inside.
LINE = re.compile(r"(?=Name: [^,]+, LayerType: )")
HEAD = re.compile(r"Name: ([^,]+), LayerType: ([^,]+)")
NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
OPERAND = re.compile(r"Name: ([^,]+), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")


def listed(targets: Iterable[int]) -> int:
    """Whose kernels the table has when an engine is for several compute capabilities: there is one
    table, and it is the newest one's, in whatever order they are given (TensorRT-RTX 1.7.1,
    2026-11; fp8 for SM89 with SM120 or SM121. Of SM75 to SM120 those in bf16 and int8 are alike).
    """
    return max(targets)


def of_one(targets: Collection[int]) -> str:
    """What is to be said of the table of an engine for several."""
    if len(targets) == 1:
        return ""
    return f" (listed for SM{listed(targets)} only)"


def is_table(message: str) -> bool:
    """Whether a message of the builder's log is a table, or part of one."""
    return HEAD.search(message) is not None


def layers(log: str) -> Iterator[Layer]:
    """The table in a verbose builder's log."""
    for text in LINE.split(log):
        if head := HEAD.match(text):
            parts = (tuple(_operands(text, p)) for p in ("Inputs", "Constants", "Outputs"))
            inputs, constants, outputs = parts
            nodes = frozenset(NODE.findall(text))
            yield Layer(head[1], head[2], inputs, constants, outputs, nodes)


def _operands(text: str, part: str) -> Iterator[Operand]:
    listed = re.search(rf"{part}: \[(.*?)\](?=, (?:Constants|Outputs|TacticName))", text)
    for name, sizes, dtype in OPERAND.findall(listed[1] if listed else ""):
        yield Operand(name, tuple(map(int, filter(None, sizes.split(",")))), dtype)


def products(table: Iterable[Layer]) -> dict[str, Counter[str]]:
    """How many kernels multiply each linear layer as codes, and of which type."""
    found: dict[str, Counter[str]] = {}
    for layer in table:
        if (kind := layer.codes) is not None:
            for node in layer.nodes:
                if node.endswith("/MatMul"):
                    found.setdefault(node.removesuffix("/MatMul"), Counter())[kind] += 1
    return found


def attentions(table: Iterable[Layer]) -> int:
    """Attentions that are one kernel."""
    return sum(layer.is_fused_attention for layer in table)


def scores(table: Iterable[Layer], tokens: Iterable[int]) -> list[str]:
    """Kernels that write a score for each query and key to memory."""
    squares = {(size, size) for size in tokens}
    return [layer.name for layer in table if any(o.shape[-2:] in squares for o in layer.outputs)]


def counts(table: tuple[Layer, ...], wanted: Wanted) -> dict[str, int]:
    """The sum of the table, of all profiles together; products by the layers that they compute."""
    kinds = Counter(kind for found in products(table).values() for kind in found.elements())
    return {
        "kernels": sum(layer.is_kernel for layer in table),
        **{f"products in {kind}": number for kind, number in sorted(kinds.items())},
        "fused attentions": attentions(table),
        "score kernels": len(scores(table, wanted.tokens)),
    }


def problems(table: tuple[Layer, ...], wanted: Wanted) -> list[str]:
    """What is not as the recipe says, a sentence for each cause."""
    return [*_products(table, wanted), *_attentions(table, wanted)]


def _products(table: tuple[Layer, ...], wanted: Wanted) -> Iterator[str]:
    found = products(table)
    for form in dict.fromkeys(wanted.products.values()):
        paths = [path for path, other in wanted.products.items() if other == form]
        other = [p for p in paths if found.get(p, Counter())[CODES[form]] < wanted.profiles]
        if other:
            yield (
                f"{len(other)} of {len(paths)} layers are not products of {form} in each profile "
                f"({', '.join(sorted(other)[:3])})"
            )


def _attentions(table: tuple[Layer, ...], wanted: Wanted) -> Iterator[str]:
    number = wanted.attentions * wanted.profiles
    if (found := attentions(table)) < number:
        yield f"{found} of {number} attentions are one kernel"
    if written := scores(table, wanted.tokens):
        yield (
            f"{len(written)} kernels write the score of each query and key to memory "
            f"({', '.join(written[:3])})"
        )


def to_json(table: Iterable[Layer]) -> str:
    rows = [asdict(layer) | {"nodes": sorted(layer.nodes)} for layer in table]
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
    return f'{{"format_version": {FORMAT_VERSION}, "layers": [\n{lines}\n]}}\n'


def read(path: Path) -> tuple[Layer, ...]:
    """
    Raises:
        UserError: it is not a table, or not one that this program knows.
    """
    try:
        data = json.loads(path.read_bytes())
        if data["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {data['format_version']}, this program reads "
                f"{FORMAT_VERSION}; build the engine again (ltx-export build-engine)"
            )
        return tuple(_layer(row) for row in data["layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a table of layers ({error}); build the engine again "
            "(ltx-export build-engine)"
        ) from None


def _layer(row: Mapping[str, Any]) -> Layer:
    inputs, constants, outputs = (
        tuple(Operand(o["name"], tuple(o["shape"]), o["dtype"]) for o in row[part])
        for part in ("inputs", "constants", "outputs")
    )
    nodes = frozenset(row["nodes"])
    return Layer(row["name"], row["kind"], inputs, constants, outputs, nodes)
