"""Repositories for Triton's TensorRT backend, held against the real core: a stand-in runs them."""

import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ltx_engines.shapes import VideoShape
from ltx_engines.triton_settings import Settings
from ltx_trt.cli import SHIPPED
from ltx_trt.pipeline import frames_of, generate
from ltx_trt.request import Wishes, resolve
from ltx_trt.session.element_types import narrowed, widened
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from ltx_trt.triton.called_stages import CalledStages, Models
from tests.runtime import engine_bundles
from tests.runtime.engine_bundles import Engines
from tests.triton.conftest import RunAlone
from tests.triton.server import Server
from tests.triton.stream import PROMPTS, ask

pytest.importorskip("tritonclient.grpc")

STAND_IN = Path(__file__).parent / "tensorrt_stand_in"
CLIPS = (VideoShape(25, 128, 128), VideoShape(9, 64, 96))
CLIP: dict[str, Any] = {"prompt": PROMPTS[1], "seed": 3, "num_inference_steps": 3}


def bundle_with_plans(folder: Path, dtype: str) -> Path:
    shutil.copytree(SHIPPED, folder)
    engine_bundles.add(
        folder,
        Engines(CLIPS, dtype=dtype, flavour="tensorrt", version="10.14.1", targets=(89, 90)),
    )
    return folder


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Server]]:
    from ltx_export.triton import repository

    folder = tmp_path_factory.mktemp("plans")
    bundle = bundle_with_plans(folder / "bundle", request.param)
    order = repository.Order(Settings(layout="stages"))
    assert repository.write(bundle, folder / "repository", order)[0] == "ltx_video"
    backends = {"tensorrt": STAND_IN}
    with Server(folder / "repository", "--model-config-name=cpu", backends=backends) as server:
        yield request.param, folder, server


def test_the_real_core_takes_the_configurations(served: tuple[str, Path, Server]) -> None:
    """Profiles, graphs, warm-ups and file names for each GPU are still there when it is loaded."""
    from google.protobuf import json_format
    from tritonclient.grpc import InferenceServerClient

    dtype, _, server = served
    with InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        found = client.get_model_config("transformer").config
    told = json_format.MessageToDict(found, preserving_proto_field_name=True)
    assert (told["platform"], told["backend"]) == ("tensorrt_plan", "tensorrt")
    assert told["instance_group"][0]["profile"] == ["0", "1"]
    assert told["cc_model_filenames"] == {"8.9": "model.plan", "9.0": "model.plan"}
    graphs = told["optimization"]["cuda"]["graph_spec"]
    assert [spec["input"]["latents"]["dim"] for spec in graphs] == [
        ["3", "64", "32"],
        ["3", "12", "32"],
    ]
    assert len(told["model_warmup"]) == 2
    word = {"float32": "TYPE_FP32", "bfloat16": "TYPE_BF16", "float16": "TYPE_FP16"}[dtype]
    assert {row["name"]: row["data_type"] for row in told["input"]}["latents"] == word
    assert "error" not in server.said().lower().replace("errors", "")


def test_clips_are_those_of_the_edges_element_type(
    served: tuple[str, Path, Server], run_alone: RunAlone
) -> None:
    """16-bit edges are carried bit by bit: the same numbers as rounding them in one process."""
    dtype, folder, server = served
    heard = ask(server.grpc, **CLIP)
    assert heard.report["sha256"] == made_here(folder / "bundle", dtype)
    if dtype == "float32":
        assert heard.video == run_alone(**CLIP)[0]


def test_a_clip_that_no_profile_takes_is_refused(served: tuple[str, Path, Server]) -> None:
    _, _, server = served
    heard = ask(server.grpc, **CLIP, width=160)
    assert heard.video == b""
    assert "no profile takes" in heard.message


def made_here(bundle: Path, dtype: str) -> str:
    """The frames of the same pipeline with its stages in this process."""
    sessions: dict[str, OnnxRuntimeSession] = {}

    def call(model: str, feeds: Any, wanted: Any) -> Any:
        rounded = {
            name: widened(narrowed(array, kind), kind) for name, (array, kind) in feeds.items()
        }
        made = sessions[model](rounded)
        return {name: widened(narrowed(made[name], kind), kind) for name, kind in wanted.items()}

    stages = CalledStages(bundle, Models(call, lambda _: True))
    for stage in engine_bundles.STAGES:
        sessions[stage] = OnnxRuntimeSession.open(stages.bundle, stage)
    request, _ = resolve(Wishes(**CLIP), stages.bundle)
    made = frames_of(generate(request, stages.bundle, stages))
    return sha256(made.tobytes()).hexdigest()
