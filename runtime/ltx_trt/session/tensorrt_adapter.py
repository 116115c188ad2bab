"""TensorRT and TensorRT-RTX at run time: the one file that imports either of them.

Both have the same API but for RTX's cache of compiled kernels and its check before loading. What
either refuses is raised as EngineError with what it logged meanwhile.
"""

import logging
import mmap
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_engines.libraries import COMMANDS, MODULES, released
from ltx_engines.libraries import version as version
from ltx_engines.targets import Flavour
from ltx_trt.session import compiled_kernels, complaints
from ltx_trt.session.complaints import Said, reason
from ltx_trt.session.driver import Address, Driver, Stream
from ltx_trt.session.engine_api import EngineError, EngineTensor, Shape

OLDEST: Mapping[Flavour, tuple[int, int]] = MappingProxyType(
    {"tensorrt": (10, 14), "tensorrt-rtx": (1, 7)}
)
"""TensorRT reads the Attention of our graphs from 10.14 on; of RTX, 1.7 is what was tried."""

TYPES = MappingProxyType(
    {
        "FLOAT": "float32",
        "HALF": "float16",
        "BF16": "bfloat16",
        "FP8": "float8e4m3fn",
        "INT8": "int8",
        "INT32": "int32",
        "INT64": "int64",
        "UINT8": "uint8",
        "BOOL": "bool",
    }
)
"""Their names of the element types -> ours."""

BYTES = MappingProxyType({"float32": 4, "float16": 2, "bfloat16": 2, "float8e4m3fn": 1, "int8": 1})
"""Of one element of a weight."""

log = logging.getLogger(__name__)


class TensorRT:
    """Implements Library."""

    def __init__(self, flavour: Flavour, driver: Driver) -> None:
        """
        Raises:
            UserError: it is not installed, does not load, or is too old.
        """
        self.flavour, self._driver = flavour, driver
        self._trt = _module(flavour)
        self.version = released(str(self._trt.__version__))
        self._said = complaints.of_library(MODULES[flavour])
        self._runtime = self._said.ask("to start", self._trt.Runtime, self._said.logger)

    def load(
        self,
        plan: Path,
        *,
        cache: Path | None = None,
        swaps: bool = False,
        streams: bool = False,
    ) -> "TensorRTEngine":
        """The plan is mapped, so that it is in memory once while its weights go to the GPU."""
        deferred = swaps and hasattr(self._runtime, "defer_weights_loading")
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._check(plan, data, whole=not (swaps or streams))
            if deferred:
                self._runtime.defer_weights_loading = True
            try:
                engine = self._said.ask(
                    f"to open {plan.name}", self._runtime.deserialize_cuda_engine, data
                )
            finally:
                if deferred:
                    self._runtime.defer_weights_loading = False
        opened = TensorRTEngine(self._trt, self._said, self._driver, engine, cache)
        if deferred:
            opened.swaps = plan
            opened.wake()
        return opened

    def _check(self, plan: Path, data: mmap.mmap, *, whole: bool) -> None:
        """RTX answers from the head of the file, TensorRT has no such question. `whole`: all of its
        weights have to be on the GPU, which is all that RTX thinks of."""
        if (ask := getattr(self._runtime, "get_engine_validity", None)) is None:
            return
        with self._said.heard() as heard:
            validity, diagnostics = ask(data)
        if validity == self._trt.EngineValidity.INVALID:
            kinds = self._trt.EngineInvalidityDiagnostics.__members__
            if not whole and diagnostics == int(kinds["INSUFFICIENT_GPU_MEMORY"]):
                log.warning("%s as a whole is too large for this GPU, as was planned", plan.name)
                return
            reasons = [_words(name) for name, bit in kinds.items() if int(bit) & diagnostics]
            said = ", ".join(reasons) or reason(heard)
            raise EngineError(f"{plan.name} is not valid on this machine: {said}")
        if validity == self._trt.EngineValidity.SUBOPTIMAL:
            log.warning("%s runs here, but was built for a faster way", plan.name)


class TensorRTEngine:
    """Implements Engine."""

    def __init__(
        self, trt: Any, said: Said, driver: Driver, engine: Any, cache: Path | None
    ) -> None:
        self._trt, self._said, self._driver, self._engine = trt, said, driver, engine
        self._name = str(engine.name)
        self._tensors = {tensor.name: tensor for tensor in map(self._tensor, self._names())}
        self._cache = cache
        self._config, self._kernels = self._runtime_config()
        self._written: bytes | None = None
        self.swaps: Path | None = None
        """Its plan, if it was loaded without weights."""

    @property
    def tensors(self) -> Mapping[str, EngineTensor]:
        return self._tensors

    @property
    def profiles(self) -> int:
        return int(self._engine.num_optimization_profiles)

    def limits(self, profile: int, name: str) -> tuple[Shape, Shape, Shape]:
        least, likely, most = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(likely), tuple(most)

    def context(self, profile: int) -> "TensorRTContext":
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._said.ask(
            "a context",
            self._engine.create_execution_context,
            strategy if self._config is None else self._config,
        )
        stream = self._driver.stream()  # it may copy the profile's data there
        try:
            self._said.ask(
                f"profile {profile}",
                context.set_optimization_profile_async,
                profile,
                int(stream),
            )
            self._driver.synchronize(stream)
        finally:
            self._driver.close_stream(stream)
        return TensorRTContext(self._said, self._engine, context, profile)

    @property
    def streamable(self) -> int:
        return int(self._engine.streamable_weights_size)

    def set_streaming_budget(self, size: int) -> int:
        budget = min(size, self.streamable)
        with self._said.heard() as heard:
            self._engine.weight_streaming_budget_v2 = budget
        if (found := self._engine.weight_streaming_budget_v2) != budget:
            raise EngineError(
                f"a budget of {budget} bytes of weights was refused ({found} are set): "
                f"{reason(heard)}"
            )
        return int(self._engine.weight_streaming_scratch_memory_size)

    def sleep(self) -> bool:
        if self.swaps is None:
            return False
        self._said.ask("to unload its weights", self._engine.unload_weights)
        return True

    def wake(self) -> None:
        """The plan is mapped again: its pages are in the host's memory if there is room."""
        if self.swaps is None:
            raise ValueError(f"{self._name} was loaded with its weights")
        with (
            self.swaps.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            self._said.ask("to load its weights", self._engine.load_weights, data)

    def refittable(self) -> frozenset[str]:
        if not self._engine.refittable:
            return frozenset()
        return frozenset(self._refitter().get_all_weights())

    def refit(self, weights: Iterable[tuple[str, str, NDArray[Any]]]) -> None:
        refitter, kept = self._refitter(), []
        for name, dtype, values in weights:
            given = self._weights(refitter, name, dtype, values)
            kept.append((given, values))  # until it has read them
            self._said.ask(f"the weights {name}", refitter.set_named_weights, name, given)
        if missing := refitter.get_missing_weights():
            raise EngineError(
                f"{len(missing)} weights are merged with these and must be set too, such as "
                f"{', '.join(sorted(missing)[:3])}"
            )
        self._said.ask(
            "to take the weights, of which some may be in it now", refitter.refit_cuda_engine
        )

    def layers(self) -> str:
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def save_cache(self) -> None:
        if self._cache is None or self._kernels is None:
            return
        held = self._said.ask("to hand over its kernels", self._kernels.serialize)
        data = bytes(memoryview(held))
        if data != self._written:
            compiled_kernels.write(self._cache, data)
            self._written = data

    def close(self) -> None:
        self._engine = self._config = self._kernels = None

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]

    def _tensor(self, name: str) -> EngineTensor:
        if self._engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
            raise EngineError(f"{name} would have to be in the host's memory")
        dtype = self._engine.get_tensor_dtype(name).name
        return EngineTensor(
            name,
            TYPES.get(dtype, dtype),
            tuple(self._engine.get_tensor_shape(name)),
            self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT,
        )

    def _runtime_config(self) -> tuple[Any, Any]:
        """RTX's, with the kernels that were compiled here before. It compiles for the shapes of a
        context before it runs: a captured graph would never see what was compiled later."""
        if not hasattr(self._trt, "IRuntimeCache"):
            return None, None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED  # we capture ourselves
        kinds = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
        kernels = config.create_runtime_cache()
        data = b"" if self._cache is None else compiled_kernels.read(self._cache)
        if data and not kernels.deserialize(data):
            log.warning("%s is of another GPU or driver; kernels are compiled again", self._cache)
        self._said.ask("the cache of kernels", config.set_runtime_cache, kernels)
        return config, kernels

    def _refitter(self) -> Any:
        return self._said.ask(
            "to take other weights",
            self._trt.Refitter,
            self._engine,
            self._said.logger,
        )

    def _weights(self, refitter: Any, name: str, dtype: str, values: NDArray[Any]) -> Any:
        """Element type and size are checked here: TensorRT would take other bytes for these."""
        wanted = refitter.get_weights_prototype(name)
        if wanted.size < 0:
            raise EngineError(f"it has no weights {name} that can be set")
        here = TYPES.get(wanted.dtype.name, wanted.dtype.name)
        count = values.nbytes // BYTES[dtype]
        if (dtype, count) != (here, wanted.size):
            raise EngineError(f"weights {name} are {wanted.size} {here}, not {count} {dtype}")
        if not values.flags.c_contiguous:
            raise ValueError(f"weights {name} are not contiguous")
        return self._trt.Weights(wanted.dtype, values.ctypes.data, count)


class TensorRTContext:
    """Implements Context."""

    def __init__(self, said: Said, engine: Any, context: Any, profile: int) -> None:
        self._said, self._engine, self._context, self._profile = said, engine, context, profile

    def set_shape(self, name: str, shape: Shape) -> None:
        self._said.ask(f"{name} of shape {shape}", self._context.set_input_shape, name, shape)

    def memory(self) -> int:
        try:
            unknown = self._context.infer_shapes()
        except RuntimeError as error:
            raise EngineError(f"the shapes do not fit each other: {error}") from None
        if unknown:
            raise EngineError(f"no shape for {', '.join(unknown)}")
        most = int(self._engine.get_device_memory_size_for_profile_v2(self._profile))
        if self._engine.streamable_weights_size and (
            self._engine.weight_streaming_budget_v2 < self._engine.streamable_weights_size
        ):
            return most  # with what streaming needs
        with self._said.heard() as heard:
            size = int(self._context.update_device_memory_size_for_shapes())
        if not size and most:
            raise EngineError(f"memory for these shapes: {reason(heard)}")
        return size

    def set_memory(self, address: Address, size: int) -> None:
        with self._said.heard() as heard:
            self._context.set_device_memory(int(address), size)
        if heard:
            raise EngineError(f"{size} bytes of activations: {reason(heard)}")

    def set_address(self, name: str, address: Address) -> None:
        self._said.ask(
            f"{name} at {address:#x}", self._context.set_tensor_address, name, int(address)
        )

    def capturable(self, stream: Stream) -> bool:
        """TensorRT has no such question: its engines are."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(int(stream)))

    def enqueue(self, stream: Stream) -> None:
        self._said.ask("to enqueue", self._context.execute_async_v3, int(stream))

    def close(self) -> None:
        self._context = None


def _module(flavour: Flavour) -> Any:
    name = MODULES[flavour]
    try:
        trt = import_module(name)
    except ImportError as error:
        missing = error.name == name
        said = "is not installed" if missing else f"does not load ({error})"
        raise UserError(f"{name} {said}, which these engines need; {COMMANDS[flavour]}") from None
    numbers = tuple(map(int, re.findall(r"\d+", trt.__version__)[:2]))
    if numbers < OLDEST[flavour]:
        wanted = ".".join(map(str, OLDEST[flavour]))
        raise UserError(
            f"{name} is {trt.__version__}, wanted {wanted} or later; {COMMANDS[flavour]}"
        )
    return trt


def _words(name: str) -> str:
    """UNSUPPORTED_CC -> unsupported cc."""
    return name.lower().replace("_", " ")
