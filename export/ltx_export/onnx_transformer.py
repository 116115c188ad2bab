"""An exported transformer on ONNX Runtime, called as ltx_ref's is; values inside it can be seen.

Blocks and layers have their checkpoint's names in the graph, so their outputs are found and made
outputs of the graph: in memory, the bundle stays as it is.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from ltx_engines import cpu
from ltx_engines.bundle import AGAIN, Bundle, QuantizedFormat, StageEntry
from ltx_engines.errors import UserError
from ltx_export import coverage
from ltx_export.quantized_graph import Read
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX
from ltx_ref.ltx_video.transformer import StgMode
from ltx_ref.quantization import Layer
from ltx_ref.quantized import BLOCKS

STAGE = "transformer"
VELOCITY = "velocity"

NEWEST = 21
"""The opset from which ONNX Runtime's CPU does not compute our Attention."""

FOLDING = "ConstantFolding"
"""It would make float32 copies of all weights."""

NAMED = 3
"""Layers that a sentence about missing ones names."""

FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Graph:
    """The transformer of a bundle."""

    bundle: Bundle

    @property
    def entry(self) -> StageEntry:
        return self.bundle.stage(STAGE)

    @property
    def path(self) -> Path:
        return self.bundle.file(self.entry.file)

    @cached_property
    def model(self) -> ir.Model:
        """
        Raises:
            UserError: the file is no graph.
        """
        try:
            return ir.from_proto(self.proto())
        except (ir.serde.SerdeError, ValueError) as error:
            raise self._foreign(" ".join(str(error).split())) from error

    def proto(self) -> onnx.ModelProto:
        """A copy, without weights."""
        try:
            return onnx.load(self.path, load_external_data=False)
        except DecodeError:
            raise self._foreign("it cannot be read") from None

    def _foreign(self, problem: str) -> UserError:
        return UserError(f"{self.path} is not one of our graphs: {problem}; {AGAIN}")

    def check(self, stg_mode: StgMode) -> None:
        """
        Raises:
            UserError: it perturbs blocks in another way than the ladder does.
        """
        if (found := self.bundle.manifest.model.stg_mode) != stg_mode:
            raise UserError(
                f"{self.bundle.path} was exported with --stg-mode {found}, the ladder is climbed "
                f"with {stg_mode}; give the --pipeline-config that the bundle was exported with"
            )

    def check_formats(self, layers: Mapping[str, Layer]) -> None:
        """
        Raises:
            UserError: the manifest says that other layers are quantized than those of the file.
        """
        entry = self.entry.quantization
        found = {} if entry is None else dict(entry.layers)
        wanted = Counter(layer.format for layer in layers.values())
        if found != wanted:
            raise UserError(
                f"{self.bundle.path} holds a model with {_listed(found)}, the checkpoint has "
                f"{_listed(wanted)}; give the bundle that was exported from this checkpoint"
            )

    def check_names(self, layers: Iterable[str], blocks: int) -> None:
        """Everything that will be followed is there under its name.

        Raises:
            UserError: something is not.
        """
        for wanted, values in (
            (self.entry.inputs, self.model.graph.inputs),
            (self.entry.outputs, self.model.graph.outputs),
        ):
            known, found = {tensor.name for tensor in wanted}, {str(value.name) for value in values}
            for name in sorted(known ^ found):
                raise self._foreign(
                    f"{name!r} of the {'manifest' if name in known else 'graph'} alone"
                )
        for path in layers:
            self.layer_input(path)
        for index in range(blocks):
            self.block_output(index)

    def refusal(self) -> str | None:
        """Why ONNX Runtime's CPU cannot compute it, if it cannot."""
        dtypes = {tensor.dtype for tensor in (*self.entry.inputs, *self.entry.outputs)}
        if "bfloat16" in dtypes:
            return "bfloat16, which ONNX Runtime's CPU does not compute"
        if (self.entry.opset or 0) > NEWEST:
            return f"at opset {self.entry.opset}, whose Attention ONNX Runtime does not compute"
        return None

    def covered(self, layers: Mapping[str, Layer], read: Read) -> str:
        """How many of the file's layers are quantized in the graph: all. `read` gives the file's
        scales (`quantized_graph.reader`).

        Raises:
            UserError: one is not.
        """
        found = coverage.count(self.model, layers, read)
        listed = ", ".join(
            form if len(found.wanted) == 1 else f"{number} {form}"
            for form, number in found.wanted.items()
        )
        line = f"Q/DQ coverage {len(found.found)} of {len(layers)} layers ({listed})"
        if found.missing:
            named = [f"{path}: {why}" for path, why in found.missing.items()]
            rest = [f"and {len(named) - NAMED} more"] if len(named) > NAMED else []
            problems = "; ".join([*named[:NAMED], *rest])
            raise UserError(f"{self.path}: {line}; {problems}; {AGAIN}")
        return line

    def block_output(self, index: int) -> str:
        """The name of the value that a block hands on: its last node's."""
        prefix = f"{TRANSFORMER_PREFIX}{BLOCKS}.{index}"
        own = [n for n in self.model.graph if str(n.name).startswith((f"{prefix}.", f"{prefix}/"))]
        if not own:
            raise self._foreign(f"no node has a name in {prefix}")
        return _name(own[-1].outputs[0])

    def layer_output(self, path: str) -> str:
        """The name of what a linear layer gives: the sum with its bias. `path` is the model's."""
        return _name(self._sum(path))

    def layer_input(self, path: str) -> str:
        """The name of what it is given, before it is smoothed and rounded to codes: the first value
        on the way back that is of no linear layer, or what another one gives. Layers share such
        nodes."""
        value = self._source(self._sum(path))
        ends = set(self._sums.values())
        while value not in ends and (node := value.producer()) is not None:
            if str(node.name).split("/")[0] not in self._sums:
                break
            value = self._source(value)
        return _name(value)

    def _sum(self, path: str) -> ir.Value:
        name = f"{TRANSFORMER_PREFIX}{path}"
        if name not in self._sums:
            raise self._foreign(f"it has no {name}.bias")
        return self._sums[name]

    def _source(self, value: ir.Value) -> ir.Value:
        """What a node computes it from, beside weights and scales."""
        node = value.producer()
        for source in () if node is None else node.inputs:
            if source is not None and source not in self._constants:
                return source
        raise self._foreign(f"{value.name} is made of weights alone")

    @cached_property
    def _constants(self) -> set[ir.Value]:
        """Initializers, and what is computed from them alone."""
        found = set(self.model.graph.initializers.values())
        for node in self.model.graph:
            if all(value is None or value in found for value in node.inputs):
                found.update(node.outputs)
        return found

    @cached_property
    def _sums(self) -> dict[str, ir.Value]:
        """What each linear layer gives, by its path in the file."""
        found = {}
        for name, bias in self.model.graph.initializers.items():
            if name.endswith(".bias"):
                nodes = [use.node for use in bias.uses()]
                if [node.op_type for node in nodes] != ["Add"]:
                    raise self._foreign(f"{name} is not added once")
                found[name.removesuffix(".bias")] = nodes[0].outputs[0]
        return found

    def with_outputs(self, names: Iterable[str]) -> bytes:
        """The graph, whose only outputs are these values."""
        proto = self.proto()
        known = {value.name: value for value in proto.graph.output}
        del proto.graph.output[:]
        for name in names:
            proto.graph.output.append(known.get(name) or onnx.ValueInfoProto(name=name))
        data: bytes = proto.SerializeToString()
        return data

    def session_options(self) -> dict[str, str]:
        """As the runtime's sessions have them, so that it is their way that is verified."""
        entry = self.entry.quantization
        formats = () if entry is None else entry.layers
        return {**cpu.session_options(formats), FOLDER: str(self._folder())}

    def _folder(self) -> Path:
        """Where its weights lie."""
        homes = {self.bundle.file(name).parent for name in self.entry.weights}
        return homes.pop() if len(homes) == 1 else self.bundle.path


def _listed(formats: Mapping[QuantizedFormat, int]) -> str:
    counts = ", ".join(f"{number} {form}" for form, number in formats.items())
    return f"{counts} layers" if counts else "no quantized layers"


def _name(value: ir.Value) -> str:
    if value.name is None:
        raise AssertionError("a value without a name in a graph that was read from a file")
    return value.name


class OnnxTransformer:
    """A VelocityModel. `outputs` are the values of the graph that `run` gives."""

    def __init__(self, graph: Graph, outputs: Collection[str] = (VELOCITY,)) -> None:
        import onnxruntime

        self.graph, self.outputs = graph, list(outputs)
        self.dtypes = {t.name: getattr(torch, t.dtype) for t in graph.entry.inputs}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        options.enable_mem_pattern = False
        for name, value in graph.session_options().items():
            options.add_session_config_entry(name, value)
        with _told(graph.path):
            self.session = onnxruntime.InferenceSession(
                graph.with_outputs(self.outputs),
                sess_options=options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=[FOLDING],
            )

    def __call__(
        self,
        latents: Tensor,
        coords: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        skip_layer_mask: Tensor,
        *,
        stg_mode: StgMode,
    ) -> Tensor:
        self.graph.check(stg_mode)
        inputs = (latents, coords, timestep, prompt_embeds, prompt_mask, skip_layer_mask)
        names = (tensor.name for tensor in self.graph.entry.inputs)
        return self.run(dict(zip(names, inputs, strict=True)))[VELOCITY]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, in float32."""
        feeds = {
            name: inputs[name].to(dtype).contiguous().numpy() for name, dtype in self.dtypes.items()
        }
        with _told(self.graph.path):
            found = self.session.run(self.outputs, feeds)
        pairs = zip(self.outputs, found, strict=True)
        return {name: torch.from_numpy(array).float() for name, array in pairs}


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """ONNX Runtime's exceptions have no common ancestor below Exception, so they are listed."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    known = (
        *(state.EPFail, state.EngineError, state.Fail, state.InvalidArgument, state.InvalidGraph),
        *(state.InvalidProtobuf, state.NoModel, state.NoSuchFile, state.NotImplemented),
        *(state.RuntimeException, RuntimeError, ValueError),  # pybind's own: memory, unknown types
    )
    try:
        yield
    except known as error:
        *_, said = str(error).split("[ONNXRuntimeError] : ")  # it quotes itself
        raise UserError(f"{path}: ONNX Runtime: {' '.join(said.split())}; {AGAIN}") from error
