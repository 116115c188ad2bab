"""A stage on ONNX Runtime: its CPU provider everywhere, CUDA where the package brings it."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ltx_engines import cpu
from ltx_engines.bundle import Bundle, StageEntry
from ltx_engines.errors import UserError
from ltx_trt.session import Array, Feeds, check_feeds
from ltx_trt.session.external_data import locations

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

log = logging.getLogger(__name__)


class OnnxRuntimeSession:
    """Use `open`; the constructor takes what it made."""

    def __init__(
        self, name: str, entry: StageEntry, file: str, session: onnxruntime.InferenceSession
    ) -> None:
        self._name, self._entry, self._file = name, entry, file
        self._session: onnxruntime.InferenceSession | None = session

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        stage: str,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> Self:
        """`providers` in order of preference (all that this machine has, CUDA first); `threads`
        of one operator on the CPU (ONNX Runtime's choice)."""
        entry = bundle.stage(stage)
        ort = _package()
        chosen = _providers(ort.get_available_providers(), providers)
        _check_formats(stage, entry)
        if chosen[0] == CPU:
            _check_cpu(stage, entry)
        file = bundle.file(entry.file)
        with _told(f"stage {stage}: cannot load {file}"):
            options = _options(ort, threads, entry)
            session = ort.InferenceSession(
                _graph(bundle, entry, options),
                sess_options=options,
                providers=chosen,
                disabled_optimizers=[FOLDING],
            )
        _check_provider(stage, entry, chosen[0], session.get_providers()[0])
        _check_names(stage, entry, session, str(file))
        return cls(stage, entry, str(file), session)

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        if self._session is None:
            raise ValueError(f"the session of stage {self._name} is closed")
        check_feeds(self._name, self._entry, feeds)
        dtypes = {tensor.name: tensor.dtype for tensor in self._entry.inputs}
        binding = self._session.io_binding()
        with _told(f"stage {self._name}: {self._file} failed"):
            for name, feed in feeds.items():
                binding.bind_ortvalue_input(name, _to_ort(feed, dtypes[name]))
            for tensor in self._entry.outputs:
                binding.bind_output(tensor.name, "cpu")
            self._session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return {
            tensor.name: _from_ort(value)
            for tensor, value in zip(self._entry.outputs, values, strict=True)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = None


def to_bfloat16(values: Array) -> Array:
    """The upper halves of float32 words, rounded to nearest even; NaN stays NaN."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (words + 0x7FFF + (words >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(words: Array) -> Array:
    return (words.astype(np.uint32) << 16).view(np.float32)


def _package() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "onnxruntime is not installed; pip install 'ltx-trt[onnxruntime]'"
        ) from None
    return onnxruntime


def _providers(available: Sequence[str], wished: Sequence[str] | None) -> list[str]:
    if wished is None:
        return [provider for provider in (CUDA, CPU) if provider in available]
    for provider in wished:
        if provider not in available:
            raise UserError(
                f"this onnxruntime has no {provider}, only {', '.join(available)}; "
                "install the package that brings it (onnxruntime-gpu for CUDA)"
            )
    if not wished:
        raise ValueError("an empty list of providers")
    return list(wished)


def _formats(entry: StageEntry) -> Collection[str]:
    return () if entry.quantization is None else entry.quantization.layers


def _check_formats(stage: str, entry: StageEntry) -> None:
    if "nvfp4" in _formats(entry):
        raise UserError(
            f"stage {stage} is nvfp4, which only TensorRT computes, on SM120; quantize to int8 for "
            "ONNX Runtime: ltx-export quantize --recipe int8"
        )


def _check_cpu(stage: str, entry: StageEntry) -> None:
    if any(tensor.dtype == "bfloat16" for tensor in (*entry.inputs, *entry.outputs)):
        raise UserError(
            f"stage {stage} is bfloat16, which ONNX Runtime cannot compute on the CPU; install "
            "onnxruntime-gpu and use a CUDA GPU, or export it again: ltx-export onnx "
            "--precision float32"
        )
    if stage == "transformer" and (entry.opset or OPSET) > OPSET:
        raise UserError(
            f"stage {stage} is at opset {entry.opset}, whose Attention ONNX Runtime's CPU does not "
            "compute with a mask of the text; export it again: ltx-export onnx --opset 20"
        )


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


def _options(ort: Any, threads: int | None, entry: StageEntry) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions, once is enough
    if threads is not None:
        options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # it reserves the weights' size twice: 13B finds no room
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
