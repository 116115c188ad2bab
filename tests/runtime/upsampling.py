"""An upsampler made by hand: each latent four times."""

from pathlib import Path

import numpy as np

from ltx_engines import bundle
from ltx_engines.bundle import StageEntry, tensor_entries
from ltx_engines.stages import Sizes, Upsampling, ltx_video
from tests.runtime.engine_bundles import file_entry

FILE = "latent_upsampler.onnx"
SPATIAL = Upsampling(spatial=True, temporal=False)


def add(folder: Path, upsampling: Upsampling = SPATIAL) -> None:
    """To a bundle that has none. Its graph is of a spatial one, whatever its table says."""
    manifest = bundle.read(folder)
    channels = manifest.model.latent_channels
    sizes = Sizes(channels, channels, 8, 1, channels, True, upsampling=upsampling)
    stage = ltx_video(sizes)["latent_upsampler"]
    inputs, outputs = (tensor_entries(t, "float32") for t in (stage.inputs, stage.outputs))
    entry = StageEntry(file=FILE, inputs=inputs, outputs=outputs, weights=())
    (folder / FILE).write_bytes(_graph(channels))
    files = {**manifest.files, FILE: file_entry(folder / FILE)}
    stages = {**manifest.stages, "latent_upsampler": entry}
    bundle.update(folder, manifest.model_copy(update={"files": files, "stages": stages}))


def _graph(channels: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    axes = {
        "latents": ("batch", channels, "latent_frames", "latent_height", "latent_width"),
        "upsampled": ("batch", channels, "latent_frames", "upsampled_height", "upsampled_width"),
    }
    latents, upsampled = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in axes.items()
    )
    scales = numpy_helper.from_array(np.array([1, 1, 1, 2, 2], np.float32), "scales")
    node = helper.make_node("Resize", ["latents", "", "scales"], ["upsampled"], mode="nearest")
    graph = helper.make_graph([node], "latent_upsampler", [latents], [upsampled], [scales])
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    data: bytes = model.SerializeToString()
    return data
