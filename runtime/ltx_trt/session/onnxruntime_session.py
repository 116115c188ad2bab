"""A stage on ONNX Runtime: its CPU provider everywhere, CUDA where the package brings it."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ltx_engines import cpu
from ltx_engines.bundle import Bundle, StageEntry
from ltx_engines.errors import UserError
from ltx_engines.providers import NAMES, Provider, refusal
from ltx_engines.stages import NEXT, PAST
from ltx_trt.session import Array, Feeds, check_feeds
from ltx_trt.session.element_types import from_bfloat16 as from_bfloat16
from ltx_trt.session.element_types import to_bfloat16 as to_bfloat16
from ltx_trt.session.execution_provider import Asked, ask
from ltx_trt.session.external_data import locations
from ltx_trt.session.kept_frames import Past, begun

if TYPE_CHECKING:
    import onnxruntime

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

FOLDING = "ConstantFolding"
"""Transposes of weights are not computed beforehand but fused into the product: weights are used as
they lie in the mapped file, where their formats allow it (`ltx_engines.cpu`)."""

FOLDER = "session.model_external_initializers_file_folder_path"
"""Where a graph that is given as bytes has its weights."""

OPSET = 21
"""Beyond it, there is Attention, which wants a mask for each query (onnxruntime 1.31: `inconsistent
q_sequence_length`)."""

BFLOAT16 = 16
"""ONNX's number for it; NumPy has no such type."""
FOREIGN = MappingProxyType({"bfloat16": (BFLOAT16, np.uint16), "float8e4m3fn": (17, np.uint8)})
"""The same, of all such types that weights have, and how NumPy holds their bits."""

log = logging.getLogger(__name__)


ON_THE_CPU = Asked(CPU)


@dataclass(frozen=True, slots=True)
class Held:
    """What a session goes on to need: weights that it reads where they are, and what its provider
    wants to hear in each run."""

    weights: Mapping[str, onnxruntime.OrtValue] = field(default_factory=dict)
    asked: Asked = ON_THE_CPU


class OnnxRuntimeSession:
    """Use `open`; the constructor takes what it made."""

    def __init__(
        self,
        name: str,
        entry: StageEntry,
        file: str,
        session: onnxruntime.InferenceSession,
        held: Held | None = None,
    ) -> None:
        self._name, self._entry, self._file = name, entry, file
        self._held = held or Held()
        self._session: onnxruntime.InferenceSession | None = session

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        stage: str,
        *,
        provider: Provider | None = None,
        threads: int | None = None,
        weights: Iterable[tuple[str, str, Array]] = (),
    ) -> Self:
        """Without a `provider` CUDA if this machine has it, else the CPU; `threads` of one operator
        on the CPU (ONNX Runtime's choice); `weights` come in the place of the bundle's, by name and
        element type, and are the only ones that are in memory."""
        entry = bundle.stage(stage)
        ort = _package()
        asked = _asked(ort, bundle, stage, provider)
        file = bundle.file(entry.file)
        kept = {name: _initializer(dtype, values) for name, dtype, values in weights}
        with _told(f"stage {stage}: cannot load {file}"):
            options = _options(ort, threads, entry)
            asked.give(options)
            for name, value in kept.items():
                options.add_initializer(name, value)
            session = ort.InferenceSession(
                _graph(bundle, entry, options),
                sess_options=options,
                disabled_optimizers=[FOLDING],
                **asked.arguments(),
            )
        if provider is None:
            _check_provider(stage, entry, asked.name, session.get_providers()[0])
        else:
            _check_chosen(stage, asked.name, session.get_providers()[0])
        _check_names(stage, entry, session, str(file))
        return cls(stage, entry, str(file), session, Held(kept, asked))

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        dtypes = {tensor.name: tensor.dtype for tensor in self._entry.inputs}
        check_feeds(self._name, self._entry, feeds)
        made = self._run({n: _to_ort(feed, dtypes[n]) for n, feed in feeds.items()})
        return {name: _from_ort(value) for name, value in made.items()}

    def go_on(self, feeds: Feeds, past: Mapping[str, Any]) -> tuple[dict[str, Array], Past]:
        """What is kept stays with the provider, and is not copied; none at a clip's beginning."""
        if not past:
            feeds = {**feeds, **begun(self._entry, feeds["latents"].shape[2:])}
        inputs = tuple(tensor for tensor in self._entry.inputs if tensor.name not in past)
        check_feeds(self._name, self._entry.model_copy(update={"inputs": inputs}), feeds)
        given = {t.name: _to_ort(feeds[t.name], t.dtype) for t in inputs}
        del feeds
        made = self._run({**given, **past})
        kept = {name: made.pop(name) for name in list(made) if name.startswith(NEXT)}
        arrays = {name: _from_ort(value) for name, value in made.items()}
        return arrays, {name.replace(NEXT, PAST, 1): value for name, value in kept.items()}

    def _run(self, given: Mapping[str, onnxruntime.OrtValue]) -> dict[str, onnxruntime.OrtValue]:
        if self._session is None:
            raise ValueError(f"the session of stage {self._name} is closed")
        binding, names = self._session.io_binding(), [row.name for row in self._entry.outputs]
        device = "cuda" if self._held.asked.name == CUDA else "cpu"
        with _told(f"stage {self._name}: {self._file} failed"):
            for name, value in given.items():
                binding.bind_ortvalue_input(name, value)
            for name in names:
                binding.bind_output(name, device if name.startswith(NEXT) else "cpu")
            told = self._held.asked.run_entries({n: tuple(v.shape()) for n, v in given.items()})
            self._session.run_with_iobinding(binding, _run_options(told))
        return dict(zip(names, binding.get_outputs(), strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session, self._held = None, Held()


def _package() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "onnxruntime is not installed; pip install 'ltx-trt[onnxruntime]'"
        ) from None
    return onnxruntime


def provider_name(provider: Provider | None) -> str:
    """Of what stages are computed by, as ONNX Runtime calls it.

    Raises:
        UserError: there is no ONNX Runtime.
    """
    return _name(_package(), provider)


def version() -> str:
    """
    Raises:
        UserError: there is no ONNX Runtime.
    """
    return str(_package().__version__)


def _name(ort: Any, provider: Provider | None) -> str:
    if provider is not None:
        return NAMES[provider]
    return CUDA if CUDA in ort.get_available_providers() else CPU


def _asked(ort: Any, bundle: Bundle, stage: str, provider: Provider | None) -> Asked:
    """
    Raises:
        UserError: this ONNX Runtime has not got the provider, or it cannot compute the stage.
    """
    entry = bundle.stage(stage)
    if provider is None or provider == "cpu":
        _check_formats(stage, entry)
        name = _name(ort, provider)
        if name == CPU:
            _check_cpu(stage, entry)
        return Asked(name)
    if (reason := refusal(provider, stage, entry)) is not None:
        raise UserError(reason)
    made_for = bundle.manifest.onnxruntime.get(stage)
    return ask(ort, provider, entry, () if made_for is None else made_for.profiles)


def _run_options(entries: Mapping[str, str]) -> Any:
    if not entries:
        return None
    from onnxruntime import RunOptions

    options = RunOptions()
    for name, value in entries.items():
        options.add_run_config_entry(name, value)
    return options


def _formats(entry: StageEntry) -> Collection[str]:
    return () if entry.quantization is None else entry.quantization.layers


def check_cpu(stage: str, entry: StageEntry) -> None:
    """
    Raises:
        UserError: the CPU cannot compute it.
    """
    _check_formats(stage, entry)
    _check_cpu(stage, entry)


def _check_formats(stage: str, entry: StageEntry) -> None:
    if "nvfp4" in _formats(entry):
        raise UserError(
            f"stage {stage} is nvfp4, which only TensorRT computes, on SM120; quantize to int8 for "
            "ONNX Runtime: ltx-export quantize --recipe int8"
        )


def _check_cpu(stage: str, entry: StageEntry) -> None:
    if any(tensor.dtype == "bfloat16" for tensor in (*entry.inputs, *entry.outputs)):
        raise UserError(
            f"stage {stage} is bfloat16, for which ONNX Runtime lacks kernels on the CPU and with "
            "CUDA; build an engine: ltx-export build-engine, or export it again: ltx-export onnx "
            "--precision float32"
        )
    if stage == "transformer" and (entry.opset or OPSET) > OPSET:
        raise UserError(
            f"stage {stage} is at opset {entry.opset}, whose Attention ONNX Runtime's CPU does not "
            "compute with a mask of the text; export it again: ltx-export onnx --opset 20"
        )
    if (reason := refusal("cpu", stage, entry)) is not None:
        raise UserError(reason)


def _check_provider(stage: str, entry: StageEntry, wished: str, found: str) -> None:
    """ONNX Runtime goes on without a GPU that it cannot start; say so."""
    if found != wished:
        log.warning("stage %s runs on %s, %s could not start", stage, found, wished)
        _check_cpu(stage, entry)
    if found == CUDA and "int8" in _formats(entry) and (entry.opset or OPSET) <= OPSET:
        log.warning(
            "stage %s: its int8 products run on the CPU, to and from which all they read and give "
            "is copied, for ONNX Runtime has none for CUDA; use the CPU alone, or export it for "
            "TensorRT: ltx-export onnx --opset 23",
            stage,
        )


def _check_chosen(stage: str, wished: str, found: str) -> None:
    """ONNX Runtime goes on without a GPU that it cannot start; whoever chose it does not."""
    if found != wished:
        raise UserError(
            f"stage {stage}: {wished} could not start, ONNX Runtime would go on with {found}; "
            "see that the vendor's driver and CUDA libraries fit this onnxruntime, or choose "
            "--provider cpu"
        )


def _options(ort: Any, threads: int | None, entry: StageEntry) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions, once is enough
    if threads is not None:
        options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # it reserves the weights' size twice: 13B finds no room
    if any(tensor.name.startswith(NEXT) for tensor in entry.outputs):
        # As written: else what is kept is cut out last, and all that it is cut out of stays. The
        # decoder of VAE 0.9.5 took 680 bytes for each pixel of a frame, and takes 170.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    for name, value in cpu.session_options(_formats(entry)).items():
        options.add_session_config_entry(name, value)
    return options


def _graph(bundle: Bundle, entry: StageEntry, options: Any) -> str | bytes:
    """The graph's file or, if its weights lie in another folder, its bytes and where that is.

    They are mapped there. (`add_external_initializers` would take them from anywhere, and copy.)
    """
    file = bundle.file(entry.file)
    if not any(PurePath(name).is_absolute() for name in entry.weights):
        return str(file)
    homes = {bundle.file(name).parent for name in entry.weights}
    if len(homes) > 1:
        listed = ", ".join(sorted(map(str, homes)))
        raise UserError(f"{file} has weights in {listed}; they must lie in one folder")
    graph = file.read_bytes()
    _check_locations(file, graph, {PurePath(name).name for name in entry.weights})
    options.add_session_config_entry(FOLDER, str(*homes))
    return graph


def _check_locations(file: Path, graph: bytes, listed: set[str]) -> None:
    """It must not read whatever else lies in that folder."""
    try:
        unlisted = locations(graph) - listed
    except ValueError as error:
        raise UserError(f"{file} is not one of our graphs: {error}") from None
    if unlisted:
        raise UserError(
            f"{file} reads {', '.join(sorted(unlisted))}, which the manifest does not list; "
            "export the bundle again (ltx-export onnx)"
        )


def _check_names(
    stage: str, entry: StageEntry, session: onnxruntime.InferenceSession, file: str
) -> None:
    """The graph that was loaded is the one that the manifest speaks of."""
    for what, rows, nodes in (
        ("inputs", entry.inputs, session.get_inputs()),
        ("outputs", entry.outputs, session.get_outputs()),
    ):
        wanted, found = {row.name for row in rows}, {node.name for node in nodes}
        if wanted != found:
            raise UserError(
                f"stage {stage}: {file} has {what} {', '.join(sorted(found))}, the manifest says "
                f"{', '.join(sorted(wanted))}; export the bundle again (ltx-export onnx)"
            )


def _to_ort(feed: Array, dtype: str) -> onnxruntime.OrtValue:
    from onnxruntime import OrtValue

    if dtype == "bfloat16":
        return OrtValue.ortvalue_from_numpy_with_onnx_type(to_bfloat16(feed), BFLOAT16)
    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(feed, dtype))


def _initializer(dtype: str, values: Array) -> onnxruntime.OrtValue:
    from onnxruntime import OrtValue

    if dtype in FOREIGN:
        number, bits = FOREIGN[dtype]
        return OrtValue.ortvalue_from_numpy_with_onnx_type(values.view(bits), number)
    return OrtValue.ortvalue_from_numpy(values)


def _from_ort(value: onnxruntime.OrtValue) -> Array:
    """A copy, float16 and bfloat16 widened to float32."""
    if value.data_type() == "tensor(bfloat16)":
        shape = value.shape()
        words = (ctypes.c_uint16 * int(np.prod(shape))).from_address(value.data_ptr())
        return from_bfloat16(np.ctypeslib.as_array(words).reshape(shape))
    array: Array = value.numpy()
    return array.astype(np.float32) if array.dtype == np.float16 else array


@contextmanager
def _told(what: str) -> Iterator[None]:
    """ONNX Runtime's exceptions have no common ancestor below Exception, so they are listed."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    known = (
        state.EPFail,
        state.EngineError,
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoModel,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
    )
    try:
        yield
    except known as error:
        *_, said = str(error).split("[ONNXRuntimeError] : ")  # it quotes itself
        raise UserError(f"{what}: {' '.join(said.split())}") from error
    except (RuntimeError, ValueError) as error:  # pybind's own: memory, unknown types
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error
