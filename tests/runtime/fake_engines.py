"""TensorRT on the fake GPU: a plan is a line of JSON that names an ONNX graph, which really runs.

An engine's tensors may be float16 or bfloat16 where its graph has float32; the numbers are
converted where they meet the device's memory.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltx_engines import cpu
from ltx_engines.targets import Flavour
from ltx_trt.session.driver import Address, Stream
from ltx_trt.session.engine_api import EngineError, EngineTensor, Shape
from ltx_trt.session.onnxruntime_session import FOLDING, from_bfloat16, to_bfloat16
from tests.runtime.fake_gpu import FRESH, FakeGpu, MisuseError, Work, checked

TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(float16)": "float16"}
STORED = {"bfloat16": "uint16"}

Limits = tuple[Shape, Shape, Shape]


@dataclass(frozen=True, slots=True)
class Plan:
    """`dtypes` of tensors where they differ from the graph's; `weights` and `streamable` are bytes;
    `refittable` are names of initializers."""

    name: str
    graph: str
    profiles: tuple[Mapping[str, Limits], ...]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    flavour: Flavour = "tensorrt-rtx"
    version: str = "1.7.1.116"
    targets: tuple[int, ...] = (89,)
    weights: int = 1000
    streamable: int = 0
    refittable: tuple[str, ...] = ()
    capturable: bool = True

    def write(self, file: Path) -> Path:
        file.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        return file


def read_plan(file: Path) -> Plan:
    try:
        data = json.loads(file.read_bytes())
        profiles = tuple(
            {name: _limits(limits) for name, limits in profile.items()}
            for profile in data["profiles"]
        )
        lists = {name: tuple(data[name]) for name in ("targets", "refittable")}
        return Plan(**data | lists | {"profiles": profiles})
    except (ValueError, TypeError, KeyError) as error:
        raise EngineError(f"{file.name} is no engine: {error}") from None


def _limits(rows: Any) -> Limits:
    least, likely, most = (tuple(map(int, row)) for row in rows)
    return least, likely, most


class FakeLibrary:
    """Implements Library."""

    def __init__(
        self, gpu: FakeGpu, flavour: Flavour = "tensorrt-rtx", version: str = "1.7.1.116"
    ) -> None:
        self.gpu, self.flavour, self.version = gpu, flavour, version
        self._sessions: dict[str, Any] = {}

    def load(
        self,
        plan: Path,
        *,
        cache: Path | None = None,
        swaps: bool = False,
        streams: bool = False,
    ) -> "FakeEngine":
        read = read_plan(plan)
        self.gpu.note("load", read.name)
        if (read.flavour, read.version) != (self.flavour, self.version):
            raise EngineError(f"the plan is of {read.flavour} {read.version}")
        if self.gpu.capability not in read.targets:
            raise EngineError(f"the plan is for {read.targets}")
        if read.graph not in self._sessions:
            self._sessions[read.graph] = session(read.graph)
        engine = FakeEngine(self.gpu, read, self._sessions[read.graph], cache)
        engine.swaps, engine.streams = swaps and self.flavour == "tensorrt-rtx", streams
        return engine


def session(graph: str | bytes) -> Any:
    """As OnnxRuntimeSession sets it, so that both compute the same bits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = False
    for name, value in cpu.session_options(()).items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=[FOLDING]
    )


class FakeEngine:
    """Implements Engine. `revision` counts refits."""

    def __init__(self, gpu: FakeGpu, plan: Plan, run: Any, cache: Path | None) -> None:
        self.gpu, self.plan, self.run, self.cache = gpu, plan, run, cache
        self.contexts: list[FakeContext] = []
        self.budget, self.revision = plan.streamable, 0
        self.given: dict[str, NDArray[Any]] = {}
        self.swaps, self.streams, self.awake = False, False, True
        self.fixed, self.placed = plan.weights - plan.streamable, 0
        self.gpu.take(self.fixed)
        self._handle = gpu.opened(f"engine {plan.name}")

    @property
    def tensors(self) -> dict[str, EngineTensor]:
        found = {}
        for nodes, is_input in ((self.run.get_inputs(), True), (self.run.get_outputs(), False)):
            for node in nodes:
                dtype = self.plan.dtypes.get(node.name, TYPES[node.type])
                shape = tuple(a if isinstance(a, int) else -1 for a in node.shape)
                found[node.name] = EngineTensor(node.name, dtype, shape, is_input)
        return found

    @property
    def profiles(self) -> int:
        return len(self.plan.profiles)

    def limits(self, profile: int, name: str) -> Limits:
        return self.plan.profiles[profile][name]

    def context(self, profile: int) -> "FakeContext":
        self.gpu.note("context", self.plan.name, profile)
        if any(context.profile == profile for context in self.contexts):
            raise MisuseError(f"two contexts with profile {profile}")
        self._place(self.budget)  # whoever never set one has them all
        context = FakeContext(self, profile)
        self.contexts.append(context)
        return context

    @property
    def streamable(self) -> int:
        return self.plan.streamable

    @property
    def scratch(self) -> int:
        return 0 if self.budget >= self.plan.streamable else -(-self.plan.streamable // 8)

    def set_streaming_budget(self, size: int) -> int:
        self.gpu.note("set_streaming_budget", self.plan.name, size)
        if self.contexts:
            raise EngineError("the budget is set before any context is made")
        if size < 0:
            raise EngineError(f"a budget of {size}")
        if not self.streams:
            raise MisuseError("it was not said at the load that weights stay on the host")
        self._place(min(size, self.plan.streamable))
        return self.scratch

    def _place(self, budget: int) -> None:
        """So many bytes of the weights that can be streamed are on the GPU."""
        self.gpu.take(budget - self.placed)
        self.budget = self.placed = budget

    def sleep(self) -> bool:
        if self.swaps:
            self.gpu.note("sleep", self.plan.name)
            self.awake = False
            self.gpu.take(-self.fixed)
        return self.swaps

    def wake(self) -> None:
        self.gpu.note("wake", self.plan.name)
        if self.awake:
            raise MisuseError("weights are loaded twice")
        self.gpu.take(self.fixed)
        self.awake = True

    def refittable(self) -> frozenset[str]:
        return frozenset(self.plan.refittable)

    def refit(self, weights: Iterable[tuple[str, str, NDArray[Any]]]) -> None:
        given = {name: (dtype, values) for name, dtype, values in weights}
        self.gpu.note("refit", self.plan.name, *sorted(given))
        fresh = dict(self.given)
        for name, (dtype, values) in given.items():
            if name not in self.plan.refittable:
                raise EngineError(f"no weights are called {name}")
            fresh[name] = _widened(values, dtype)
        self.run = session(replaced(Path(self.plan.graph), fresh))
        self.given, self.revision = fresh, self.revision + 1

    def layers(self) -> str:
        return json.dumps({"Layers": [self.plan.name]})

    def save_cache(self) -> None:
        self.gpu.note("save_cache", self.plan.name)

    def close(self) -> None:
        self.gpu.note("close_engine", self.plan.name)
        if self.contexts:
            raise MisuseError("an engine is closed before its contexts")
        self.gpu.gone(self._handle)
        self.gpu.take(-self.placed - self.fixed * self.awake)


class FakeContext:
    """Implements Context."""

    def __init__(self, engine: FakeEngine, profile: int) -> None:
        self.engine, self.profile, self.gpu = engine, profile, engine.gpu
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, Address] = {}
        self._block: tuple[Address, int] | None = None
        self._handle = self.gpu.opened(f"context {profile} of {engine.plan.name}")
        self._closed = False

    def set_shape(self, name: str, shape: Shape) -> None:
        self.gpu.note("set_shape", self.engine.plan.name, self.profile, name, shape)
        least, _, most = self.engine.limits(self.profile, name)
        if len(shape) != len(least) or not all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        ):
            raise EngineError(f"{name} {shape} is not within {least} to {most}")
        self._shapes[name] = shape

    def memory(self) -> int:
        self._check_shapes()
        size = sum(4 * int(np.prod(shape)) for shape in self._shapes.values())
        return -(-size // 256) * 256 + self.engine.scratch

    def set_memory(self, address: Address, size: int) -> None:
        self.gpu.note("set_memory", self.engine.plan.name, self.profile, address, size)
        checked([address])
        self.gpu.bytes_at(address, size)
        self._block = address, size

    def set_address(self, name: str, address: Address) -> None:
        self.gpu.note("set_address", self.engine.plan.name, self.profile, name, address)
        if name not in self.engine.tensors:
            raise EngineError(f"no tensor is called {name}")
        checked([address])
        self.gpu.bytes_at(address, 1)
        self._addresses[name] = address

    def capturable(self, stream: Stream) -> bool:
        self.gpu.note("capturable", self.engine.plan.name, stream)
        if self.gpu.capturing():
            raise MisuseError("asked too late")
        return self._capturable

    @property
    def _capturable(self) -> bool:
        return self.engine.plan.capturable and not self.engine.scratch

    def enqueue(self, stream: Stream) -> None:
        self.gpu.note("enqueue", self.engine.plan.name, self.profile, stream)
        self._check_shapes()
        if missing := sorted(self.engine.tensors.keys() - self._addresses):
            raise EngineError(f"no address for {', '.join(missing)}")
        if self._block is None or self._block[1] < self.memory():
            raise MisuseError(f"{self._block} is no room for {self.memory()} bytes of activations")
        if self.gpu.capturing() and not self._capturable:
            raise EngineError("streamed weights, or memory of its own, cannot be captured")
        work = _Run(self, dict(self._shapes), dict(self._addresses), self._block)
        work.read()  # every input is where it is said to be, as large as it is said to be
        self.gpu.submit(stream, Work(work, owner=self, block=work.range))

    def close(self) -> None:
        self.gpu.note("close_context", self.engine.plan.name, self.profile)
        self.gpu.gone(self._handle)
        self.engine.contexts.remove(self)
        self._closed = True

    def check_open(self) -> None:
        if self._closed:
            raise MisuseError("work of a closed context")
        if not self.engine.awake:
            raise MisuseError("work of an engine whose weights are not there")

    def _check_shapes(self) -> None:
        self.check_open()
        inputs = {name for name, tensor in self.engine.tensors.items() if tensor.is_input}
        if missing := sorted(inputs - self._shapes.keys()):
            raise EngineError(f"no shape for {', '.join(missing)}")


class _Run:
    """What was enqueued, with the shapes and addresses of then."""

    def __init__(
        self,
        context: FakeContext,
        shapes: dict[str, Shape],
        addresses: dict[str, Address],
        block: tuple[Address, int],
    ) -> None:
        self.context, self.shapes, self.addresses = context, shapes, addresses
        self.engine, self.gpu = context.engine, context.gpu
        self.address, self.size = block
        self.range = range(self.address, self.address + self.size)
        self.revision = self.engine.revision

    def __call__(self) -> None:
        self.context.check_open()
        if self.revision != self.engine.revision:
            raise MisuseError("enqueued or captured before the engine was refitted")
        self.gpu.bytes_at(self.address, self.size).fill(FRESH)
        names = [node.name for node in self.engine.run.get_outputs()]
        for name, values in zip(names, self.engine.run.run(names, self.read()), strict=True):
            stored = _narrowed(values, self.engine.tensors[name].dtype)
            target = self.gpu.bytes_at(self.addresses[name], stored.nbytes)
            target[:] = stored.reshape(-1).view(np.uint8)

    def read(self) -> dict[str, NDArray[Any]]:
        found = {}
        for name, shape in self.shapes.items():
            dtype = self.engine.tensors[name].dtype
            stored = np.dtype(STORED.get(dtype, dtype))
            size = int(np.prod(shape)) * stored.itemsize
            raw = self.gpu.bytes_at(self.addresses[name], size).copy()
            found[name] = self._as_the_graph_has_it(name, _widened(raw.view(stored), dtype), shape)
        return found

    def _as_the_graph_has_it(self, name: str, values: NDArray[Any], shape: Shape) -> NDArray[Any]:
        (node,) = (node for node in self.engine.run.get_inputs() if node.name == name)
        return values.astype(TYPES[node.type], copy=False).reshape(shape)


def _widened(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "bfloat16":
        return from_bfloat16(values.reshape(-1).view(np.uint16)).reshape(values.shape)
    return values.astype(np.float32) if dtype == "float16" else values


def _narrowed(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "bfloat16":
        return to_bfloat16(values)
    return np.ascontiguousarray(values, dtype)


def replaced(graph: Path, weights: Mapping[str, NDArray[Any]]) -> bytes:
    """The graph with other numbers in its initializers."""
    import onnx

    model = onnx.load(graph)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            values = weights[tensor.name].reshape(tuple(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    serialized: bytes = model.SerializeToString()
    return serialized
