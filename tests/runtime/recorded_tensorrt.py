"""TensorRT's modules, played: they record what they are told and answer what a test arranged.

The names are those of TensorRT-RTX 1.7.1 (its module) and TensorRT 11.1 (python/src/infer).
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

Call = tuple[Any, ...]


class Enum(SimpleNamespace):
    @property
    def __members__(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class DataType:
    name: str


BF16, FLOAT, FP8 = DataType("BF16"), DataType("FLOAT"), DataType("FP8")

TENSORS = {"latents": (BF16, (-1, -1, 8), "in"), "timestep": (FLOAT, (1,), "in")}
TENSORS |= {"velocity": (BF16, (-1, -1, 8), "out")}
WEIGHTS = {"a": (BF16, 6), "b": (FP8, 4), "d": (BF16, 6), "e": (BF16, 6)}
BYTES = {BF16: 2, FP8: 1}


@dataclass
class Recorder:
    """`refuses` are methods that answer False or None, with a complaint in the log."""

    rtx: bool = True
    version: str = "1.7.1.116"
    refuses: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    validity: tuple[str, int] = ("valid", 0)
    host: str = ""
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    needs: int = 512
    streamable: int = 0
    cached: bytes | None = b"compiled"
    capturable: bool = True
    given: dict[str, Call] = field(default_factory=dict)
    refitted: dict[str, bytes] = field(default_factory=dict)
    logger: Any = None

    def note(self, name: str, *arguments: Any, answer: Any = True) -> Any:
        self.calls.append((name, *arguments))
        if name in self.refuses:
            self.complain(f"{name}\nis not possible")
            return False if answer is True else None
        return answer

    def complain(self, words: str) -> None:
        if self.logger is not None:
            self.logger.log(4, "a detail")
            self.logger.log(1, words)

    def named(self, *names: str) -> list[Call]:
        return [call for call in self.calls if call[0] in names]

    def module(self) -> Any:
        found = SimpleNamespace(
            __name__="tensorrt_rtx" if self.rtx else "tensorrt",
            __version__=self.version,
            ILogger=type("ILogger", (), {"ERROR": 1, "WARNING": 2, "__init__": lambda _: None}),
            Runtime=self.runtime,
            Refitter=self.refitter,
            TensorLocation=SimpleNamespace(DEVICE="device", HOST="host"),
            TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
            LayerInformationFormat=SimpleNamespace(JSON="json"),
            Weights=lambda dtype, address, count: ("weights", dtype, address, count),
        )
        if self.rtx:
            found.IRuntimeCache = object
            found.CudaGraphStrategy = SimpleNamespace(DISABLED="none")
            found.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
            found.EngineValidity = SimpleNamespace(INVALID="invalid", SUBOPTIMAL="suboptimal")
            kinds = Enum(VERSION_MISMATCH=1, UNSUPPORTED_CC=2, INSUFFICIENT_GPU_MEMORY=16)
            found.EngineInvalidityDiagnostics = kinds
        return found

    def runtime(self, logger: Any) -> Any:
        self.logger = logger
        found = SimpleNamespace()

        def deserialize(plan: Any) -> Any:
            engine = Engine(self, deferred=getattr(found, "defer_weights_loading", False))
            return self.note("deserialize_cuda_engine", bytes(plan), answer=engine)

        found.deserialize_cuda_engine = deserialize
        if self.rtx:
            found.defer_weights_loading = False
            found.get_engine_validity = lambda plan: self.note(
                "get_engine_validity", len(plan), answer=self.validity
            )
        return found

    def refitter(self, _: Any, logger: Any) -> Any:
        assert logger is self.logger

        def prototype(name: str) -> Any:
            dtype, size = WEIGHTS.get(name, (FLOAT, -1))
            return SimpleNamespace(dtype=dtype, size=size)

        def give(name: str, given: Call) -> Any:
            self.given[name] = given
            return self.note("set_named_weights", name, given)

        def refit() -> Any:
            """Only now is what was given looked at."""
            for name, (_, dtype, address, count) in self.given.items():
                self.refitted[name] = ctypes.string_at(address, count * BYTES[dtype])
            return self.note("refit_cuda_engine")

        found = SimpleNamespace(
            get_all_weights=lambda: list(WEIGHTS),
            get_weights_prototype=prototype,
            set_named_weights=give,
            get_missing_weights=lambda: self.missing,
            refit_cuda_engine=refit,
        )
        return self.note("Refitter", answer=found)


class Engine:
    def __init__(self, recorder: Recorder, *, deferred: bool) -> None:
        self.recorder, self._deferred, self._loaded = recorder, deferred, not deferred
        self.name, self.refittable = "transformer", True
        self.num_optimization_profiles, self.num_io_tensors = 2, len(TENSORS)
        self.streamable_weights_size = recorder.streamable
        self._budget = recorder.streamable

    def get_tensor_name(self, index: int) -> str:
        return list(TENSORS)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return TENSORS[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return TENSORS[name][1]

    def get_tensor_mode(self, name: str) -> str:
        return TENSORS[name][2]

    def get_tensor_location(self, name: str) -> str:
        return "host" if name == self.recorder.host else "device"

    def get_tensor_profile_shape(self, _: str, profile: int) -> list[list[int]]:
        return [[1, profile, 8], [2, profile, 8], [3, profile, 8]]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1024 * (profile + 1)

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return 0 if self._budget >= self.recorder.streamable else 64

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, size: int) -> None:
        if self.recorder.note("weight_streaming_budget_v2", size):
            self._budget = size

    def create_execution_context(self, how: Any) -> Any:
        return self.recorder.note("create_execution_context", how, answer=Context(self.recorder))

    def create_runtime_config(self) -> Any:
        return RuntimeConfig(self.recorder)

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: f"the layers as {form}")

    def unload_weights(self) -> bool:
        return self._turn("unload_weights", loaded=False)

    def load_weights(self, plan: Any) -> bool:
        return self._turn("load_weights", bytes(plan), loaded=True)

    def _turn(self, name: str, *arguments: Any, loaded: bool) -> bool:
        """As the library does it: only of an engine that was deserialized without weights."""
        done = bool(self.recorder.note(name, *arguments))
        if not (done and self._deferred and self._loaded != loaded):
            return False
        self._loaded = loaded
        return True


class RuntimeConfig:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.recorder.note("set_execution_context_allocation_strategy", strategy)

    def create_runtime_cache(self) -> Any:
        return SimpleNamespace(
            deserialize=lambda data: self.recorder.note("cache.deserialize", data),
            serialize=lambda: self.recorder.note("serialize", answer=self.recorder.cached),
        )

    def set_runtime_cache(self, _: Any) -> Any:
        return self.recorder.note("set_runtime_cache")


class Context:
    """Every method that answers whether it was done."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        if recorder.rtx:
            self.is_stream_capturable = self._is_stream_capturable

    def _is_stream_capturable(self, stream: int) -> bool:
        self.recorder.note("is_stream_capturable", stream)
        return self.recorder.capturable

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in METHODS:
            raise AttributeError(name)
        return lambda *arguments: self.recorder.note(name, *arguments)

    def infer_shapes(self) -> list[str]:
        if "infer_shapes" in self.recorder.refuses:
            raise RuntimeError("2 is not 3")
        return self.recorder.unknown

    def update_device_memory_size_for_shapes(self) -> int:
        self.recorder.note("update_device_memory_size_for_shapes")
        return self.recorder.needs

    def set_device_memory(self, address: int, size: int) -> None:
        self.recorder.note("set_device_memory", address, size)


METHODS = {
    "set_optimization_profile_async",
    "set_input_shape",
    "set_tensor_address",
    "execute_async_v3",
}


def used_of_rtx() -> Iterator[tuple[str, set[str]]]:
    """Each class and what of it the adapter uses, to be looked up in the true module."""
    yield "Runtime", {"deserialize_cuda_engine", "get_engine_validity", "defer_weights_loading"}
    own = {name for name in vars(Engine) if not name.startswith("_")}
    yield "ICudaEngine", {*own, "name", "refittable", "num_optimization_profiles"}
    yield "ICudaEngine", {"num_io_tensors", "streamable_weights_size"}
    own = {name for name in vars(Context) if not name.startswith("_")}
    yield "IExecutionContext", own | METHODS | {"is_stream_capturable"}
    own = {name for name in vars(RuntimeConfig) if not name.startswith("_")}
    graphs = {"cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"}
    yield "IRuntimeConfig", own | graphs
    yield "IRuntimeCache", {"serialize", "deserialize"}
    refitter = {"get_all_weights", "get_weights_prototype", "set_named_weights"}
    yield "Refitter", refitter | {"get_missing_weights", "refit_cuda_engine"}
    yield "EngineInspector", {"get_engine_information"}
    yield "Weights", {"dtype", "size"}
    yield "TensorLocation", {"DEVICE"}
    yield "TensorIOMode", {"INPUT"}
    yield "ExecutionContextAllocationStrategy", {"USER_MANAGED"}
    yield "LayerInformationFormat", {"JSON"}
    yield "CudaGraphStrategy", {"DISABLED"}
    yield "DynamicShapesKernelSpecializationStrategy", {"EAGER"}
    yield "EngineValidity", {"INVALID", "SUBOPTIMAL"}
    yield "EngineInvalidityDiagnostics", {"INSUFFICIENT_GPU_MEMORY"}
    yield "BuilderFlag", {"REQUIRE_USER_ALLOCATION"}  # build.py's, for what we capture
    yield "ILogger", {"ERROR", "WARNING"}
