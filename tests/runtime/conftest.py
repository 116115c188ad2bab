"""A bundle made by hand: graphs of a few nodes whose results a test can write down.

prompt_embeds = token / 100 in every channel, 0 where the mask is
velocity      = (latents - clean) / timestep, clean = gain * mean(prompt) * mean(skip mask)
pixels        = tanh(first three latent channels), each cell repeated 8 x 32 x 32 times
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines import stages
from ltx_engines.bundle import (
    Bundle,
    Defaults,
    Manifest,
    ModelFacts,
    SchedulerFacts,
    StageEntry,
    TokenizerEntry,
    create,
    open_bundle,
    seal,
    tensor_entries,
)

CHANNELS, WIDTH, LAYERS, LENGTH = 4, 6, 3, 12
GAIN = 2.0

SIZES = stages.Sizes(
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    caption_channels=WIDTH,
    num_layers=LAYERS,
    latent_channels=CHANNELS,
    timestep_conditioning=True,
    noise_inputs=(stages.NoiseInput(1, 2),),
)

DEFAULTS = Defaults(
    width=64,
    height=32,
    num_frames=9,
    num_inference_steps=4,
    guidance_scale=2.0,
    stg_scale=1.0,
    rescaling_scale=0.7,
    skip_block_list=(1,),
)

MODEL = ModelFacts.model_validate(
    {
        "latent_channels": CHANNELS,
        "num_layers": LAYERS,
        "causal_temporal_positioning": True,
        "timestep_conditioning": True,
        "stg_mode": "attention_values",
        "noise_blocks": [{"name": "noise_1", "maps": 2, "scale": 2}],
    }
)


def manifest(**changes: Any) -> Manifest:
    """Without files; `changes` replace what it says."""
    facts: dict[str, Any] = {
        "family": "ltx_video",
        "name": "by-hand",
        "model_version": "0.9.5",
        "precision": "float32",
        "stages": {
            name: StageEntry(
                file=f"{name}.onnx",
                inputs=tensor_entries(stage.inputs, "float32"),
                outputs=tensor_entries(stage.outputs, "float32"),
                weights=("by-hand.safetensors",) if name == "transformer" else (),
            )
            for name, stage in stages.ltx_video(SIZES).items()
            if name not in ("vae_encoder", stages.STREAM)
        },
        "checkpoint": "by-hand.safetensors",
        "tokenizer": TokenizerEntry(
            file="text_encoder/tokenizer.json", max_length=LENGTH, pad_token_id=0
        ),
        "model": MODEL,
        "scheduler": SchedulerFacts(sampler="LinearQuadratic"),
        "defaults": DEFAULTS,
        "toolchain": {"onnx": "by hand"},
    }
    return Manifest(**(facts | changes))


Change = Callable[[Path], None]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that ONNX Runtime has opened, one after the other."""
    from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession

    found: list[str] = []
    real = OnnxRuntimeSession.open.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, /, bundle: Bundle, stage: str, **options: Any) -> OnnxRuntimeSession:
        found.append(stage)
        session: OnnxRuntimeSession = real(cls, bundle, stage, **options)
        return session

    monkeypatch.setattr(OnnxRuntimeSession, "open", classmethod(noted))
    return found


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Write a bundle; `change` may spoil its folder before it is sealed."""
    pytest.importorskip("onnx")

    def make(change: Change | None = None, **changes: Any) -> Path:
        folder = tmp_path / "bundle"
        with create(folder) as temporary:
            write_files(temporary)
            if change is not None:
                change(temporary)
            seal(temporary, manifest(**changes))
        return folder

    return make


@pytest.fixture
def bundle(make_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(make_bundle())


def write_files(folder: Path) -> None:
    (folder / "text_encoder").mkdir()
    write_tokenizer(folder / "text_encoder" / "tokenizer.json")
    header = {"gain": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + np.array([GAIN], "<f4").tobytes()
    (folder / "by-hand.safetensors").write_bytes(data)
    write_text_encoder(folder / "text_encoder.onnx")
    write_transformer(folder / "transformer.onnx", offset=8 + len(text))
    write_decoder(folder / "vae_decoder.onnx")


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, 100))]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(path))


def write_graph(
    path: Path, stage: str, nodes: list[Any], constants: dict[str, Any], external: Any = ()
) -> None:
    from onnx import TensorProto, helper, numpy_helper

    types = {"float": TensorProto.FLOAT, "float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    table = stages.ltx_video(SIZES)[stage]
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, types[t.dtype], t.axes) for t in row]
        for row in (table.inputs, table.outputs)
    )
    initializers = [numpy_helper.from_array(np.array(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, stage, inputs, outputs, [*initializers, *external])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())


def write_text_encoder(path: Path) -> None:
    from onnx import helper

    node = helper.make_node
    nodes = [
        node("Mul", ["input_ids", "attention_mask"], ["kept"]),
        node("Cast", ["kept"], ["float_ids"], to=1),
        node("Mul", ["float_ids", "hundredth"], ["scaled"]),
        node("Unsqueeze", ["scaled", "last"], ["column"]),
        node("Mul", ["column", "ones"], ["prompt_embeds"]),
    ]
    constants = {
        "hundredth": np.float32(0.01),
        "last": np.array([2]),
        "ones": np.ones(WIDTH, np.float32),
    }
    write_graph(path, "text_encoder", nodes, constants)


def write_transformer(path: Path, offset: int, location: str = "by-hand.safetensors") -> None:
    from onnx import TensorProto, helper

    gain = TensorProto(name="gain", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", "4")):
        gain.external_data.add(key=key, value=value)
    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["prompt_mask", "two"], ["mask"]),
        node("Mul", ["prompt_embeds", "mask"], ["text"]),
        node("ReduceMean", ["text", "rest"], ["mean_text"], keepdims=1),
        node("ReduceMean", ["skip_layer_mask", "zero"], ["kept"], keepdims=0),
        node("Unsqueeze", ["kept", "rest"], ["kept_column"]),
        node("Mul", ["mean_text", "kept_column"], ["weighed"]),
        node("Mul", ["weighed", "gain"], ["plain"]),
        node("ReduceSum", ["coords", "rest"], ["somewhere"], keepdims=1),
        node("Mul", ["somewhere", "nothing"], ["nowhere"]),
        node("Add", ["plain", "nowhere"], ["clean"]),
        node("Sub", ["latents", "clean"], ["away"]),
        node("Unsqueeze", ["timestep", "two"], ["sigma"]),
        node("Div", ["away", "sigma"], ["velocity"]),
    ]
    constants = {
        "zero": np.array([0]),
        "two": np.array([2]),
        "rest": np.array([1, 2]),
        "nothing": np.float32(0),
    }
    write_graph(path, "transformer", nodes, constants, [gain])


def write_decoder(path: Path) -> None:
    from onnx import helper

    node = helper.make_node
    nodes = [
        node("Slice", ["latents", "zero", "three", "one"], ["rgb"]),
        node("Tanh", ["rgb"], ["bounded"]),
        node("Resize", ["bounded", "", "scales"], ["large"], mode="nearest"),
        node("Slice", ["large", "seven", "end", "two"], ["cut"]),
        node("ReduceMean", ["noise_1"], ["mean_noise"], keepdims=0),
        node("ReduceSum", ["timestep"], ["time"], keepdims=0),
        node("Add", ["mean_noise", "time"], ["sum"]),
        node("Mul", ["sum", "nothing"], ["nil"]),
        node("Add", ["cut", "nil"], ["pixels"]),
    ]
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "two": np.array([2]),
        "three": np.array([3]),
        "seven": np.array([7]),
        "end": np.array([2**31]),
        "scales": np.array([1, 1, 8, 32, 32], np.float32),
        "nothing": np.float32(0),
    }
    write_graph(path, "vae_decoder", nodes, constants)
