"""LoRAs in engines that are loaded: their weights are set by name, a block's layers at a time.

    plan(bundle, stage, entries, wishes)    before anything is loaded: every refusal
    Refit(bundle, entry, engine)            of one engine, or of each part of a chain
        .replace(plan)                      all of it, or all is as it was
        .replace(None)                      the bundle's own weights, bit by bit

Layers that read one tensor are merged by the builder, so they are set together.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from ltx_engines.bundle import Bundle, EngineEntry
from ltx_engines.errors import UserError
from ltx_ref.checkpoint import read_header
from ltx_ref.lora import Wish, parse
from ltx_ref.quantization import SHARED_INPUTS, layers
from ltx_trt.session import lora_weights
from ltx_trt.session.engine_api import Engine
from ltx_trt.session.lora_weights import FUSE, Changed, Plan, Weight

BLOCK = re.compile(r".*blocks\.(\d+)\.")


def asked(bundle: Bundle, entries: Sequence[EngineEntry], words: Sequence[str]) -> Plan | None:
    """What the command line wishes for the transformer; None if nothing.

    Raises:
        UserError, CheckpointError: as `plan`, or a strength is no number.
    """
    return plan(bundle, "transformer", entries, parse(words)) if words else None


def plan(
    bundle: Bundle, stage: str, entries: Sequence[EngineEntry], wishes: Sequence[Wish]
) -> Plan:
    """What LoRAs will change in the engines of a stage; none if it runs as a graph.

    Raises:
        UserError, CheckpointError: an engine was built for its own weights alone, or a LoRA does
            not fit, or changes what cannot be changed.
    """
    fixed = [entry for entry in entries if entry.weights == "embedded"]
    for entry in fixed:
        if not entry.refittable:
            raise UserError(
                f"{entry.file} takes no LoRA, for its weights are fixed; build it with ltx-export "
                f"build-engine --refittable, or {FUSE}"
            )
    found = lora_weights.plan(bundle, stage, wishes)
    for changed in found.changed.values() if fixed else ():
        if not is_linear(changed.name, changed.header.tensors[changed.name].shape):
            raise UserError(
                f"{changed.patches[0].path} changes {changed.name}, and of an engine only the "
                f"weights of linear layers can be set; {FUSE}"
            )
    return found


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """What `build-engine --refittable` lets be set, with its scale."""
    return name.endswith(".weight") and len(shape) == 2


class Refit:
    """Of one engine. `revision` counts changes: a CUDA graph captured before is stale."""

    def __init__(self, bundle: Bundle, entry: EngineEntry, engine: Engine) -> None:
        (file,) = bundle.stage(entry.key.stage).weights
        self._header = read_header(bundle.file(file))
        self._layers = layers(self._header)
        self._entry, self._engine = entry, engine
        self._settable = engine.refittable()
        self._now: Mapping[str, Changed] = {}
        self.revision = 0

    def replace(self, wanted: Plan | None) -> None:
        """Take these LoRAs in the place of those that are there now.

        Raises:
            UserError, CheckpointError: it cannot be; every weight is as before.
            EngineError: the engine refuses; every weight is as before, if it takes them back.
        """
        new = {} if wanted is None else wanted.changed
        self._check(new)
        names = self._together({*self._now, *new})
        try:
            self._set(names, new)
        except BaseException:
            self._set(names, self._now)
            raise
        self._now = new

    def _set(self, names: Collection[str], new: Mapping[str, Changed]) -> None:
        """No more than the layers of one block are in memory."""
        for _, block in groupby(sorted(names, key=lambda name: (_start(name), name)), _start):
            self.revision += 1
            self._engine.refit(self._weights(block, new))

    def _weights(self, names: Iterable[str], new: Mapping[str, Changed]) -> Iterator[Weight]:
        for name in names:
            if (changed := new.get(name)) is not None:
                yield from changed.weights()
            else:
                layer = self._layers.get(name.removesuffix(".weight"))
                yield from Changed(name, self._header, (), layer).base()

    def _check(self, new: Mapping[str, Changed]) -> None:
        """
        Raises:
            UserError: a weight should be in the engine and is not, or its scale is not.
        """
        for changed in new.values():
            for name in changed.names:
                if self._has(changed.name) and name not in self._settable:
                    raise UserError(
                        f"{self._entry.file} has no {name} that can be set; build it again "
                        f"(ltx-export build-engine --refittable), or {FUSE}"
                    )

    def _has(self, name: str) -> bool:
        """Other parts of a chain have the other blocks; what is in none is in the first or last."""
        block, part = BLOCK.match(name), self._entry.key.part
        if part is None:
            return True
        if block is None:
            return name in self._settable
        return part.first <= int(block[1]) < part.end

    def _together(self, names: Collection[str]) -> frozenset[str]:
        """Those of the weights that the engine has, and those with which they may be merged."""
        found = set(names)
        for path in (name.removesuffix(".weight") for name in names):
            for group in SHARED_INPUTS:
                for member in group:
                    if path.endswith(f".{member}"):
                        start = path.removesuffix(member)
                        found |= {f"{start}{other}.weight" for other in group}
        return frozenset(found & self._settable)


def _start(name: str) -> str:
    """Up to the number of its block."""
    found = BLOCK.match(name)
    return "" if found is None else found[0]
