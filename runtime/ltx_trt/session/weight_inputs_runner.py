"""A transformer whose engines hold no weights: one block's engine runs once for each block.

    prologue -> block, block, ... -> epilogue        the block's each time with other weights

The hidden states go to and fro between two buffers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ltx_engines.engine_entry import EngineEntry, TensorEntry
from ltx_engines.weight_inputs import HIDDEN, HIDDEN_OUT, SKIP
from ltx_trt.session.checkpoint_weights import CheckpointWeights
from ltx_trt.session.closing import close_all
from ltx_trt.session.driver import Address, Driver, Stream
from ltx_trt.session.element_types import stored
from ltx_trt.session.engine_api import Engine, EngineTensor, Shape
from ltx_trt.session.engine_runner import EngineRunner
from ltx_trt.session.memory import Arena, Buffers, aligned, allocate
from ltx_trt.session.residency import Rotation
from ltx_trt.session.weight_uploads import BlockWeights, Layout, Patch, Uploads, check


@dataclass(frozen=True, slots=True)
class Loading:
    """Where the weights come from, what becomes of them, and how many blocks have theirs on the
    card at once."""

    source: CheckpointWeights
    rotation: Rotation
    patch: Patch | None = None


def needs(entries: Iterable[EngineEntry]) -> tuple[tuple[int, ...], int]:
    """For `residency.Need`: bytes of each block's weights, and of those that always stay."""
    entries = tuple(entries)
    sizes = {number: Layout.of(entry).size for entry in entries for number in entry.blocks}
    stay = sum(Layout.of(entry).size for entry in entries if not entry.blocks)
    return tuple(sizes[number] for number in sorted(sizes)), stay


def without_weights(entry: EngineEntry) -> EngineEntry:
    """What it reads and writes beside them."""
    reads = tuple(tensor for tensor in entry.inputs if tensor.name not in entry.bound)
    return entry.model_copy(update={"inputs": reads})


class PieceRunner(EngineRunner):
    """One engine, which can be given other addresses for the shapes that it was bound to."""

    def __init__(self, engine: Engine, arena: Arena, entry: EngineEntry) -> None:
        super().__init__(engine, arena, entry)
        self.entry, self.layout = entry, Layout.of(entry)

    @property
    def reads(self) -> tuple[TensorEntry, ...]:
        """Its inputs that are no weights."""
        return tuple(t for t in self.entry.inputs if t.name not in self.layout.places)

    def weight_shapes(self) -> dict[str, Shape]:
        return {name: self.tensors[name].shape for name in self.layout.places}

    def move(self, addresses: Mapping[str, Address]) -> None:
        bound = self._bound
        if bound is None:
            raise ValueError("a runner is bound before it is moved")
        for name, address in addresses.items():
            if bound.addresses.get(name) != address:
                bound.context.set_address(name, address)
                bound.addresses[name] = address


@dataclass(frozen=True, slots=True)
class _Binding:
    """The hidden states are read from one buffer and written to the other. The mask has rows of
    `row` bytes at `mask`; each block reads its own at an aligned address from `rows` on."""

    hidden: tuple[Address, Address]
    mask: Address
    rows: Address
    row: int


class WeightInputsRunner:
    """Implements Runner. Closes the engines that it was given."""

    def __init__(
        self,
        driver: Driver,
        arena: Arena,
        engines: Sequence[tuple[Engine, EngineEntry]],
        loading: Loading,
    ) -> None:
        """
        Raises:
            UserError: the checkpoint's weights are others than the engines take, or they do not
                fit on the card.
        """
        self._driver = driver
        self._buffers = Buffers(driver)
        self._pieces: list[PieceRunner] = []
        self._stay: dict[PieceRunner, Address] = {}
        self._uploads: Uploads | None = None
        self._blocks: BlockWeights | None = None
        self._binding: _Binding | None = None
        self._stream: Stream | None = None
        left = list(engines)
        try:
            while left:
                engine, entry = left[0]
                check(loading.source, entry)
                self._pieces.append(PieceRunner(engine, arena, entry))
                left.pop(0)
            self._of_block = {n: p for p in self._pieces for n in p.entry.blocks}
            self._load(loading)
        except BaseException as error:
            close_all((*(engine.close for engine, _ in left), self.close), error)
            raise

    @property
    def tensors(self) -> Mapping[str, EngineTensor]:
        rows = [(tensor, True) for tensor in self._inputs()]
        rows += [(tensor, False) for tensor in self._pieces[-1].entry.outputs]
        return {tensor.name: _engine_tensor(tensor, is_input) for tensor, is_input in rows}

    @property
    def capturable(self) -> bool:
        stay = self._blocks is not None and not self._blocks.streamed
        return stay and all(piece.capturable for piece in self._pieces)

    def bind(self, shapes: Mapping[str, Shape], addresses: Mapping[str, Address]) -> None:
        if self._stream is not None:  # the buffers between the pieces may move
            self._driver.synchronize(self._stream)
        every = {t.name: t for p in self._pieces for t in (*p.reads, *p.entry.outputs)}
        sizes = self._axes(shapes)
        whole = {
            name: tuple(a if isinstance(a, int) else sizes[a] for a in tensor.axes)
            for name, tensor in every.items()
        }
        size = {n: prod(shape) * stored(every[n].dtype).itemsize for n, shape in whole.items()}
        between = [t.name for t in self._pieces[0].entry.outputs if t.name != HIDDEN]
        places = {**addresses, **{name: self._buffers.get(name, size[name]) for name in between}}
        first, second = (self._buffers.get(f"{HIDDEN} {n}", size[HIDDEN]) for n in (0, 1))
        rows = self._buffers.get(SKIP, self._layers * aligned(size[SKIP]))
        self._binding = _Binding((first, second), addresses[SKIP], rows, size[SKIP])
        places |= {HIDDEN: first, HIDDEN_OUT: second, SKIP: rows}
        for piece in self._pieces:
            weights = (
                piece.layout.addresses(self._stay[piece])
                if piece in self._stay
                else dict.fromkeys(piece.layout.places, first)  # until `move`
            )
            names = [t.name for t in (*piece.reads, *piece.entry.outputs)]
            piece.bind(
                {t.name: whole[t.name] for t in piece.reads} | piece.weight_shapes(),
                {name: places[name] for name in names} | weights,
            )

    def enqueue(self, stream: Stream) -> None:
        binding, blocks = self._binding, self._blocks
        if binding is None or blocks is None:
            raise ValueError("a runner is bound before it is enqueued")
        self._stream = stream
        self._copy_rows(binding, stream)
        hidden, other = binding.hidden
        self._pieces[0].enqueue(stream)
        blocks.fetch(0, self._layers - 1)
        for block in range(self._layers):
            piece = self._of_block[block]
            row = Address(binding.rows + block * aligned(binding.row))
            piece.move(blocks.take(block, stream))
            piece.move({HIDDEN: hidden, HIDDEN_OUT: other, SKIP: row})
            piece.enqueue(stream)
            blocks.release(block, stream)
            hidden, other = other, hidden
        self._pieces[-1].move({HIDDEN: hidden})
        self._pieces[-1].enqueue(stream)

    def reload(self, patch: Patch | None) -> None:
        """All weights anew, from now on with this patch. What was captured goes on to be true."""
        uploads, blocks = self._uploads, self._blocks
        if uploads is None or blocks is None:
            raise ValueError("the runner is closed")
        if self._stream is not None:
            self._driver.synchronize(self._stream)
        uploads.patch = patch
        for piece, address in self._stay.items():
            uploads.copy(piece.layout, None, address)
        blocks.load()
        self._driver.synchronize(uploads.stream)

    def close(self) -> None:
        """Waits for what is at work."""
        stream, stay = self._stream, list(self._stay.values())
        steps = [] if stream is None else [lambda: self._driver.synchronize(stream)]
        steps += [held.close for held in (self._uploads, self._blocks) if held is not None]
        steps += [piece.close for piece in self._pieces]
        steps += [self._buffers.close]
        steps += [lambda address=address: self._driver.free(address) for address in stay]  # type: ignore[misc]
        self._uploads = self._blocks = self._binding = self._stream = None
        self._pieces, self._stay = [], {}
        close_all(steps)

    @property
    def _layers(self) -> int:
        return len(self._of_block)

    def _load(self, loading: Loading) -> None:
        largest = max(piece.layout.size for piece in self._pieces)
        self._uploads = uploads = Uploads(self._driver, loading.source, largest)
        for piece in self._pieces:
            if not piece.entry.blocks:
                what = "the weights that all blocks share"
                self._stay[piece] = allocate(self._driver, piece.layout.size, what)
        layouts = [self._of_block[number].layout for number in range(self._layers)]
        self._blocks = BlockWeights(uploads, layouts, loading.rotation)
        self.reload(loading.patch)

    def _copy_rows(self, binding: _Binding, stream: Stream) -> None:
        for block in range(self._layers):
            source = Address(binding.mask + block * binding.row)
            target = Address(binding.rows + block * aligned(binding.row))
            self._driver.copy(target, source, binding.row, stream)

    def _inputs(self) -> Iterator[TensorEntry]:
        """Of the whole stage: what no piece makes for another, and the mask of all blocks."""
        found = {tensor.name: tensor for piece in self._pieces for tensor in piece.reads}
        made = {tensor.name for piece in self._pieces for tensor in piece.entry.outputs}
        mask = found[SKIP].model_copy(update={"axes": (self._layers, *found[SKIP].axes[1:])})
        yield from (t for t in (found | {SKIP: mask}).values() if t.name not in made)

    def _axes(self, shapes: Mapping[str, Shape]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for tensor in self._inputs():
            for axis, size in zip(tensor.axes, shapes[tensor.name], strict=True):
                wanted = axis if isinstance(axis, int) else sizes.setdefault(axis, size)
                if size != wanted:
                    raise ValueError(f"{tensor.name}: {axis} is {size}, wanted {wanted}")
        return sizes


def _engine_tensor(tensor: TensorEntry, is_input: bool) -> EngineTensor:
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in tensor.axes)
    return EngineTensor(tensor.name, tensor.dtype, shape, is_input)
