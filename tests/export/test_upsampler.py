"""The latent upsampler's graph against the PyTorch module, at shapes it was not traced at."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from ltx_engines.stages import Sizes, Stage, Upsampling, ltx_video
from ltx_export.element_types import settle
from ltx_export.trace import trace
from ltx_ref.ltx_video.upsampler import UpsamplerStage
from ltx_ref.ltx_video.upsampler_config import SPATIAL, TEMPORAL, UpsamplerConfig
from tests.ref.oracles import difference, normals, randomize

TOLERANCE = 1e-5
"""Of the reference's largest value. AMD EPYC, onnxruntime 1.31: 1.3e-6 at most."""

RANK_LIMIT = 8
"""TensorRT's."""

CHANNELS = 12


def small(release: UpsamplerConfig) -> UpsamplerConfig:
    return replace(release, in_channels=CHANNELS, mid_channels=64, num_blocks_per_stage=1)


CONFIGS: Mapping[str, UpsamplerConfig] = MappingProxyType(
    {
        "spatial": small(SPATIAL),
        "temporal": small(TEMPORAL),
        "both": replace(small(TEMPORAL), spatial_upsample=True),
        "images": replace(small(SPATIAL), dims=2),
    }
)


def table_of(config: UpsamplerConfig) -> Stage:
    channels = config.in_channels
    upsampling = Upsampling(config.spatial_upsample, config.temporal_upsample)
    sizes = Sizes(channels, channels, 24, 2, channels, True, upsampling=upsampling)
    return ltx_video(sizes)["latent_upsampler"]


def on_meta(config: UpsamplerConfig) -> UpsamplerStage:
    with torch.device("meta"):
        module = UpsamplerStage(config)
    return module.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Traced:
    """A float32 graph, the names that the trace left without values, and the reference."""

    config: UpsamplerConfig
    model: ir.Model
    weights: frozenset[str]
    reference: UpsamplerStage


@pytest.fixture(scope="module", params=CONFIGS)
def traced(request: pytest.FixtureRequest) -> Traced:
    config = CONFIGS[request.param]
    model = trace(on_meta(config), table_of(config))
    settle(model, "float32")
    initializers = model.graph.initializers
    weights = frozenset(name for name, v in initializers.items() if v.const_value is None)
    reference = on_meta(config)
    randomize(reference, seed=1)
    for name, tensor in reference.state_dict().items():
        initializers[name].const_value = ir.Tensor(tensor.numpy(), name=name)
    return Traced(config, model, weights, reference)


def test_every_weight_is_an_initializer_under_its_own_name(traced: Traced) -> None:
    assert traced.weights == set(traced.reference.state_dict())


def test_the_graphs_borders_are_the_tables(traced: Traced) -> None:
    stage, graph = table_of(traced.config), traced.model.graph
    for tensors, values in ((stage.inputs, graph.inputs), (stage.outputs, graph.outputs)):
        assert [(t.name, ir.Shape(t.axes)) for t in tensors] == [(v.name, v.shape) for v in values]
        assert {v.dtype for v in values} == {ir.DataType.FLOAT}


def test_a_group_norm_is_one_node_and_nothing_scatters_or_branches(traced: Traced) -> None:
    counts = Counter(node.op_type for node in traced.model.graph)
    assert counts["GroupNormalization"] == 1 + 4 * traced.config.num_blocks_per_stage
    assert not counts.keys() & {"If", "InstanceNormalization", "Loop", "ScatterND"}
    assert not any(node.domain for node in traced.model.graph)


def test_no_tensor_has_more_axes_than_tensorrt_takes(traced: Traced) -> None:
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(traced.model), strict_mode=True)
    ranks = [len(v.type.tensor_type.shape.dim) for v in proto.graph.value_info]
    assert len(ranks) >= len(traced.model.graph) - 1, "shapes are not known everywhere"
    assert max(ranks) <= RANK_LIMIT


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 3, 2, 5), (3, 2, 4, 3), (1, 4, 7, 2)])
def test_the_graph_upsamples_as_the_reference(
    traced: Traced, shape: tuple[int, int, int, int]
) -> None:
    latents = normals(shape[0], CHANNELS, *shape[1:], seed=2)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = ir.to_proto(traced.model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"latents": latents.numpy()})
    assert isinstance(found, np.ndarray)
    assert difference(torch.from_numpy(found), traced.reference(latents)) <= TOLERANCE
