"""A stage as a model of its own, and the pipeline that calls it: the frames of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.triton_settings import Settings
from ltx_trt.backend import Choice
from ltx_trt.pipeline import frames_of, generate, plan
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import tensorrt_adapter
from ltx_trt.session.bundle_stages import EngineStages
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.triton.called_stages import CalledStages, Models
from ltx_trt.triton.responses import Refused, Status
from ltx_trt.triton.stage_model import answer, open_stage
from tests.runtime import engine_bundles
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu


def frames(bundle: Bundle, stages: Any) -> bytes:
    request, _ = resolve(Wishes("w5 w9", num_inference_steps=3), bundle)
    return frames_of(generate(request, bundle, stages)).tobytes()


def test_stages_that_are_called_make_the_frames_of_one_process(bundle: Bundle) -> None:
    heard: list[str] = []

    def call(model: str, feeds: Any, wanted: Any) -> Any:
        heard.append(model)
        with open_stage(bundle.path, model, Settings()) as session:
            made = answer(session, {name: array for name, (array, _) in feeds.items()})
        assert made.keys() == wanted.keys()
        return made

    found = frames(bundle, CalledStages(bundle.path, Models(call, lambda _: True)))
    with open_stages(bundle.path, Choice()) as stages:
        assert found == frames(bundle, stages)
    assert heard == ["text_encoder"] * 2 + ["transformer"] * 3 + ["vae_decoder"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: {"velocity": made["velocity"].astype(np.float64)},
        lambda made: {"velocity": made["velocity"][:, :1]},
        lambda made: {"speed": made["velocity"]},
        lambda made: {**made, "clean": made["velocity"]},
    ],
)
def test_an_answer_of_another_type_shape_or_name_is_refused(
    bundle: Bundle, spoil: Callable[[Any], Any]
) -> None:
    """Triton does not look at what a Python model gives out."""

    def call(model: str, feeds: Any, wanted: Any) -> Any:
        with open_stage(bundle.path, model, Settings()) as session:
            made = answer(session, {name: array for name, (array, _) in feeds.items()})
        return spoil(made) if model == "transformer" else made

    with pytest.raises(UserError, match="model transformer answers"):
        frames(bundle, CalledStages(bundle.path, Models(call, lambda _: True)))


def test_a_clip_is_refused_before_its_first_step_while_a_stage_is_not_ready(bundle: Bundle) -> None:
    def call(*_: object) -> Any:
        raise AssertionError("no stage is called")

    stages = CalledStages(bundle.path, Models(call, lambda name: name != "vae_decoder"))
    request, _ = resolve(Wishes("w5 w9"), bundle)
    with pytest.raises(UserError, match="no vae_decoder that is ready"):
        stages.prepare(plan(request, bundle.manifest))


def test_a_strangers_tensors_are_its_own_error(bundle: Bundle) -> None:
    with open_stage(bundle.path, "text_encoder", Settings()) as session:
        with pytest.raises(Refused) as caught:
            answer(session, {"input_ids": np.zeros((1, 12), np.int64)})
        assert caught.value.status is Status.invalid
        assert "missing ['attention_mask']" in caught.value.line


def test_a_stage_that_fails_is_the_servers_error_without_its_paths() -> None:
    def broken(*_: object) -> Any:
        raise UserError("stage transformer: /models/x.onnx failed")

    session: Any = broken
    with pytest.raises(Refused) as caught:
        answer(session, {})
    assert (caught.value.status, caught.value.line) == (
        Status.internal,
        "stage transformer: <path> failed",
    )


def test_edges_of_a_plan_are_called_in_its_own_element_types(
    make_bundle: Callable[..., Path],
) -> None:
    folder = make_bundle()
    engine_bundles.add(
        folder,
        engine_bundles.Engines(
            (VideoShape(9, 32, 64),), dtype="bfloat16", flavour="tensorrt", version="10.14.1"
        ),
    )
    kinds: dict[str, str] = {}

    def call(model: str, feeds: Any, wanted: Any) -> Any:
        kinds.update({name: dtype for name, (_, dtype) in feeds.items()})
        raise UserError(f"{model} was called for {dict(wanted)}")

    with pytest.raises(UserError, match="'prompt_embeds': 'bfloat16'"):
        frames(open_bundle(folder), CalledStages(folder, Models(call, lambda _: True)))
    assert kinds == {"input_ids": "int64", "attention_mask": "int64"}


def test_a_stage_on_engines_is_used_without_the_others(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)
    folder = make_bundle()
    engine_bundles.add(folder, engine_bundles.Engines((VideoShape(9, 32, 64),)))
    gpu = FakeGpu()
    device = Device.of(gpu, FakeLibrary(gpu))
    feeds = {name: np.ones((1, 12), np.int64) for name in ("input_ids", "attention_mask")}
    with open_stages(folder, Choice(), open_device=lambda _: device) as stages:
        assert isinstance(stages, EngineStages)
        with stages.alone("text_encoder") as session:
            found = answer(session, feeds)
        assert gpu.count("load") == 1
    assert gpu.leaks() == []
    with open_stage(folder, "text_encoder", Settings(backend="onnxruntime")) as session:
        wanted = answer(session, feeds)
    np.testing.assert_array_equal(found["prompt_embeds"], wanted["prompt_embeds"])
