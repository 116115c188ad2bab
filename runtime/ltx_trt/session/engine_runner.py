"""One engine as a Runner: the profile that fits, its context, and nothing set twice."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from ltx_engines.engine_entry import EngineEntry
from ltx_engines.errors import UserError
from ltx_trt.session.closing import close_all
from ltx_trt.session.driver import Address, Stream
from ltx_trt.session.engine_api import Context, Engine, EngineError, EngineTensor, Shape
from ltx_trt.session.memory import Arena

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Prepared:
    """A context and what it was told last."""

    context: Context
    shapes: dict[str, Shape] = field(default_factory=dict)
    addresses: dict[str, Address] = field(default_factory=dict)
    memory: int = 0
    block: tuple[Address, int] | None = None


class EngineRunner:
    """Implements Runner. Closes the engine that it was given."""

    def __init__(
        self, engine: Engine, arena: Arena, entry: EngineEntry, *, streamed: bool = False
    ) -> None:
        """`streamed`: some of its weights are fetched in each run.

        Raises:
            UserError: the engine is not the one that the manifest speaks of.
        """
        self._engine, self._arena, self._entry = engine, arena, entry
        self._tensors = engine.tensors
        self._prepared: dict[int, _Prepared] = {}
        self._bound: _Prepared | None = None
        self._ran: Stream | None = None
        self._streamed, self._warned = streamed, False
        _check(entry, self._tensors)

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def tensors(self) -> Mapping[str, EngineTensor]:
        return self._tensors

    @property
    def capturable(self) -> bool:
        """What RTX says of it is known when it has run once."""
        if self._streamed or self._bound is None or self._ran is None:
            return not self._streamed
        found = self._bound.context.capturable(self._ran)
        if not (found or self._warned):
            self._warned = True
            log.warning("%s cannot be in a CUDA graph; its kernels go one by one", self._entry.file)
        return found

    def sleep(self) -> bool:
        """`Sleeps`, for a chain whose parts take turns."""
        return self._engine.sleep()

    def wake(self) -> None:
        self._engine.wake()

    def bind(self, shapes: Mapping[str, Shape], addresses: Mapping[str, Address]) -> None:
        profile = self._profile(shapes)
        if profile not in self._prepared:
            self._prepared[profile] = _Prepared(self._engine.context(profile))
        prepared = self._prepared[profile]
        if prepared.shapes != shapes:
            prepared.shapes = {}
            for name, shape in shapes.items():
                prepared.context.set_shape(name, shape)
            prepared.memory = prepared.context.memory()
            prepared.shapes, prepared.block = dict(shapes), None
        for name in self._tensors:
            if prepared.addresses.get(name) != addresses[name]:
                prepared.context.set_address(name, addresses[name])
                prepared.addresses[name] = addresses[name]
        self._bound = prepared
        self._place(prepared)

    def enqueue(self, stream: Stream) -> None:
        if self._bound is None:
            raise ValueError("a runner is bound before it is enqueued")
        self._place(self._bound)  # another stage may have made the arena grow
        self._bound.context.enqueue(stream)
        self._ran = stream

    def close(self) -> None:
        prepared, self._prepared, self._bound = self._prepared, {}, None
        steps = [p.context.close for p in prepared.values()]
        if self._ran is not None:  # it has compiled whatever it will need
            steps.insert(0, self._save_cache)
        close_all((*steps, self._engine.close))

    def _save_cache(self) -> None:
        try:
            self._engine.save_cache()
        except (OSError, EngineError) as error:  # the next start is slower, this one did its work
            log.warning("compiled kernels are not kept: %s", error)

    def _place(self, prepared: _Prepared) -> None:
        if not prepared.memory:
            return
        block = self._arena.reserve(prepared.memory), prepared.memory
        if block != prepared.block:
            prepared.context.set_memory(*block)
            prepared.block = block

    def _profile(self, shapes: Mapping[str, Shape]) -> int:
        """The one with the least room to spare, then the one that was tuned nearest to this."""
        fitting = [i for i in range(self._engine.profiles) if self._fits(i, shapes)]
        if not fitting:
            raise UserError(self._refusal(shapes))
        return min(fitting, key=lambda index: self._waste(index, shapes))

    def _fits(self, profile: int, shapes: Mapping[str, Shape]) -> bool:
        return not any(True for _ in self._misfits(profile, shapes))

    def _misfits(
        self, profile: int, shapes: Mapping[str, Shape]
    ) -> Iterator[tuple[str, int, tuple[int, int]]]:
        """Name, size and range of each axis that the profile does not take."""
        for tensor in self._entry.inputs:
            least, _, most = self._engine.limits(profile, tensor.name)
            rows = zip(tensor.axes, least, shapes[tensor.name], most, strict=True)
            for axis, low, size, high in rows:
                if not low <= size <= high:
                    yield str(axis), size, (low, high)

    def _waste(self, profile: int, shapes: Mapping[str, Shape]) -> tuple[int, int]:
        """Elements of the inputs: of the largest shapes, and away from the likeliest."""
        limits = [self._engine.limits(profile, name) for name in shapes]
        sizes = zip(limits, shapes.values(), strict=True)
        away = sum(abs(prod(likely) - prod(shape)) for (_, likely, _), shape in sizes)
        return sum(prod(most) for _, _, most in limits), away

    def _refusal(self, shapes: Mapping[str, Shape]) -> str:
        """The profile that lacks least, and what it lacks."""
        misfits = [dict.fromkeys(self._misfits(i, shapes)) for i in range(self._engine.profiles)]
        nearest = min(misfits, key=len)
        asked = ", ".join(f"{axis} {size}" for axis, size, _ in nearest)
        taken = (", ".join(f"{axis} {_said(ends)}" for axis, _, ends in row) for row in misfits)
        return (
            f"no profile of {self._entry.file} takes {asked}: "
            f"{'; '.join(dict.fromkeys(taken))}; build it for this size "
            "(ltx-export build-engine --shape)"
        )


def _said(ends: tuple[int, int]) -> str:
    low, high = ends
    return str(low) if low == high else f"{low} to {high}"


def _check(entry: EngineEntry, found: Mapping[str, EngineTensor]) -> None:
    wanted = {tensor.name: (tensor.dtype, True) for tensor in entry.inputs}
    wanted |= {tensor.name: (tensor.dtype, False) for tensor in entry.outputs}
    has = {tensor.name: (tensor.dtype, tensor.is_input) for tensor in found.values()}
    if differ := sorted(name for name, _ in wanted.items() ^ has.items()):
        raise UserError(
            f"{entry.file} and the manifest differ in {', '.join(dict.fromkeys(differ))}; build it "
            "again (ltx-export build-engine)"
        )
