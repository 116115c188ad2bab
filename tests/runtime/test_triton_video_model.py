"""The video model with a small backend in Triton's place: every end that a request has."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.triton_settings import Settings
from ltx_trt.backend import Choice, Memory
from ltx_trt.pipeline import frames_of, generate, plan
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import tensorrt_adapter
from ltx_trt.session.bundle_stages import EngineStages
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.session.engine_api import EngineError
from ltx_trt.triton.kept_stages import ExclusiveStages
from ltx_trt.triton.metrics import Meter
from ltx_trt.triton.requests import read
from ltx_trt.triton.responses import Refused, Response, Status
from ltx_trt.triton.video_model import FAILED, TritonPythonModel, answer
from tests.runtime import engine_bundles
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu
from tests.waiting import HANG, until

FINAL = 1


class Backend(SimpleNamespace):
    """`triton_python_backend_utils`, as far as the model uses it."""

    def __init__(self) -> None:
        super().__init__(
            TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
            Tensor=lambda name, array: SimpleNamespace(name=name, array=array),
            InferenceResponse=lambda output_tensors=(), error=None: SimpleNamespace(
                tensors={tensor.name: tensor.array for tensor in output_tensors}, error=error
            ),
            MetricFamily=Family,
            is_model_ready=lambda _: True,
        )

    class TritonError(SimpleNamespace):
        INVALID_ARG, INTERNAL, CANCELLED, UNAVAILABLE = "invalid", "internal", "cancelled", "away"

        def __init__(self, message: str, code: str) -> None:
            super().__init__(message=message, code=code)


class Family:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    values: dict[str, float] = {}  # noqa: RUF012 - the server's, one for all

    def __init__(self, name: str, description: str, kind: str) -> None:
        assert description
        self.name, self.kind = name, kind

    def Metric(  # noqa: N802 - Triton's name
        self, labels: dict[str, str], buckets: list[float] | None = None
    ) -> Any:
        assert labels["model"] == "ltx_video"
        assert (buckets is not None) == (self.kind == self.HISTOGRAM)
        return SimpleNamespace(increment=partial(self.add, ""), observe=self.observe)

    def observe(self, value: float) -> None:
        self.add("_sum", value)
        self.add("_count", 1)

    def add(self, end: str, value: float) -> None:
        Family.values[self.name + end] = Family.values.get(self.name + end, 0.0) + value


class Sender:
    """Triton's response sender. Who asks whether its client has gone hears so after `gone_after`
    times: the model asks before each event that it tells."""

    def __init__(self, gone_after: float = float("inf")) -> None:
        self.responses: list[Any] = []
        self.ended = threading.Event()
        self.gone_after, self.asked = gone_after, 0

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.ended.is_set(), "nothing comes after the end"
        if response is not None:
            self.responses.append(response)
        if flags == FINAL:
            self.ended.set()

    def is_cancelled(self) -> bool:
        self.asked += 1
        return self.asked > self.gone_after

    @property
    def events(self) -> list[dict[str, Any]]:
        told = [r.tensors["event"][0] for r in self.responses if "event" in r.tensors]
        return [json.loads(text) for text in told]

    @property
    def error(self) -> Any:
        assert self.ended.wait(HANG)
        return self.responses[-1].error


class Request:
    def __init__(self, sender: Sender, parameters: str = "{}", **values: Any) -> None:
        self._sender, self._parameters = sender, parameters
        self._values = {
            name: np.array([value.encode() if isinstance(value, str) else value])
            for name, value in values.items()
        }

    def inputs(self) -> list[Any]:
        return [
            SimpleNamespace(name=lambda n=name: n, as_numpy=lambda a=array: a)
            for name, array in self._values.items()
        ]

    def parameters(self) -> str:
        return self._parameters

    def get_response_sender(self) -> Sender:
        return self._sender


@pytest.fixture
def model(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[TritonPythonModel]:
    """As Triton makes it of a repository: the bundle lies beside the model's file."""
    folder = make_bundle()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend())
    Family.values.clear()
    made = TritonPythonModel()
    (folder.parent / "1").mkdir()
    made.initialize(told(folder.parent, Settings(bundle=f"../{folder.name}", at_once=2)))
    yield made
    made.finalize()


def told(home: Path, settings: Settings) -> dict[str, str]:
    """What Triton says to a model whose folder is `home`."""
    words = {**settings.parameters(), "FORCE_CPU_ONLY_INPUT_TENSORS": "no"}
    entries = {name: {"string_value": word} for name, word in words.items()}
    return {
        "model_config": json.dumps({"parameters": entries}),
        "model_repository": str(home),
        "model_version": "1",
        "model_name": "ltx_video",
    }


def test_without_the_model_of_a_stage_the_server_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton itself says nothing of a model whose folder is not there."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend())
    for name in ("ltx_video", "text_encoder", "vae_decoder"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="has no model transformer; write it again"):
        TritonPythonModel().initialize(told(tmp_path / "ltx_video", Settings(layout="stages")))


def ask(model: TritonPythonModel, sender: Sender | None = None, **values: Any) -> Sender:
    sender = sender or Sender()
    model.execute([Request(sender, **values)])
    assert sender.ended.wait(HANG)
    return sender


WISHES: dict[str, Any] = {"prompt": "w5 w9", "num_inference_steps": 4}


def test_a_request_hears_each_step_and_then_its_video(model: TritonPythonModel) -> None:
    sender = ask(model, **WISHES)
    kinds = [event["event"] for event in sender.events]
    steps = ["step"] * 4
    assert kinds == ["planned", "stage", "prompt", "stage", *steps, "stage", "done"]
    assert [e["index"] for e in sender.events if e["event"] == "step"] == [1, 2, 3, 4]
    last = sender.responses[-1].tensors
    assert last["video"][0][4:8] == b"ftyp"
    assert "frames" not in last
    assert Family.values["ltx_requests_done_total"] == 1
    assert Family.values["ltx_step_seconds_count"] == 4


def test_frames_are_given_instead_of_a_video_when_asked_for(model: TritonPythonModel) -> None:
    sender = ask(model, **WISHES, format="frames")
    last = sender.responses[-1].tensors
    assert "video" not in last
    assert sha256(last["frames"].tobytes()).hexdigest() == sender.events[-1]["sha256"]


def test_a_client_that_has_gone_costs_no_further_step(model: TritonPythonModel) -> None:
    """It has gone when the third step is made, which is the last."""
    sender = ask(model, Sender(gone_after=7), **{**WISHES, "num_inference_steps": 50})
    assert sender.error.code == "cancelled"
    assert Family.values["ltx_requests_cancelled_total"] == 1
    kinds = [event["event"] for event in sender.events]
    assert kinds == ["planned", "stage", "prompt", "stage", "step", "step"]
    assert Family.values["ltx_step_seconds_count"] == 2
    assert Family.values["ltx_pass_requests_count"] == 3


def test_a_client_that_went_while_it_waited_costs_nothing(model: TritonPythonModel) -> None:
    assert ask(model, Sender(gone_after=0), **WISHES).error.code == "cancelled"
    assert "ltx_step_seconds_count" not in {n for n, v in Family.values.items() if v}


def test_what_a_client_can_mend_is_its_own_error(model: TritonPythonModel) -> None:
    sender = ask(model, **{**WISHES, "num_frames": 0})
    assert (sender.error.code, sender.error.message) == (
        "invalid",
        "num_frames must be from 1 to 32768, not 0",
    )
    assert ask(model, **WISHES).error is None


def test_a_bug_is_one_word_to_the_client_and_a_story_in_the_log(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("/srv/secret")

    monkeypatch.setattr("ltx_trt.triton.video_model.answer", broken)
    sender = ask(model, **WISHES)
    assert (sender.error.code, sender.error.message) == ("internal", FAILED)
    assert "/srv/secret" in caplog.text
    monkeypatch.undo()


def test_an_overflow_is_the_servers_error_in_one_line(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise UserError("stage transformer: /models/x.onnx failed\nat length")

    monkeypatch.setattr("ltx_trt.triton.video_model.generate", broken)
    sender = ask(model, **WISHES)
    assert sender.error.code == "internal"
    assert sender.error.message == "stage transformer: <path> failed at length"


def test_no_more_are_computed_at_once_than_there_are_places(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most, go, lock = [0], [0], threading.Event(), threading.Lock()

    def slow(*_: object) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        go.wait(HANG)
        with lock:
            inside[0] -= 1

    monkeypatch.setattr("ltx_trt.triton.video_model.answer", slow)
    senders = [Sender() for _ in range(5)]
    feeder = threading.Thread(target=model.execute, args=([Request(s, **WISHES) for s in senders],))
    feeder.start()
    until(lambda: inside == [2], "two at once")
    feeder.join(0.2)
    assert feeder.is_alive(), "the third waits in Triton's queue"
    go.set()
    feeder.join(HANG)
    assert all(sender.ended.wait(HANG) for sender in senders)
    assert most == [2]


class Listener:
    def __init__(self) -> None:
        self.heard: list[Response] = []

    def send(self, response: Response) -> None:
        self.heard.append(response)

    def gone(self) -> bool:
        return len(self.heard) > 100


@pytest.fixture
def engines(make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with engines of every stage and of the step."""
    from ltx_export import step_graph

    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)
    folder = make_bundle()
    step_graph.add(open_bundle(folder))
    names = (*engine_bundles.STAGES, "sampler_step")
    engine_bundles.add(folder, engine_bundles.Engines((VideoShape(9, 32, 64),), names))
    return folder


def on_a_gpu(folder: Path, gpu: FakeGpu) -> EngineStages:
    device = Device.of(gpu, FakeLibrary(gpu))
    stages = open_stages(folder, Choice(memory=Memory.auto), open_device=lambda _: device)
    assert isinstance(stages, EngineStages)
    return stages


def test_engines_are_loaded_before_the_server_is_ready_and_make_the_command_lines_clip(
    engines: Path,
) -> None:
    gpu, client = FakeGpu(), Listener()
    quiet = SimpleNamespace(increment=lambda _: None, observe=lambda _: None)
    meter = Meter(lambda *_: quiet, "ltx_video")
    with ExclusiveStages(on_a_gpu(engines, gpu)) as studio:
        loaded = gpu.count("load")
        assert loaded == 4
        order = read({"prompt": np.array(["w5 w9"])}, (), studio.bundle, Settings())
        answer(order, studio, client, meter)
        assert gpu.count("load") == loaded
    assert gpu.leaks() == []
    with on_a_gpu(engines, FakeGpu()) as stages:
        request, _ = resolve(Wishes("w5 w9"), stages.bundle)
        stages.prepare(plan(request, stages.bundle.manifest))
        made = frames_of(generate(request, stages.bundle, stages))
    done = client.heard[-1].event
    assert done["sha256"] == sha256(made.tobytes()).hexdigest()
    assert done["device_memory"] > 0


def test_engines_that_do_not_load_are_heard_of_before_the_server_is_ready(engines: Path) -> None:
    gpu = FakeGpu()
    gpu.fail("load", EngineError("no memory"))
    with pytest.raises(UserError, match="no memory"), ExclusiveStages(on_a_gpu(engines, gpu)):
        pass
    assert gpu.leaks() == []


def test_statuses_are_names_that_triton_has() -> None:
    for status in Status:
        assert hasattr(Backend.TritonError, status.value)
    assert str(Refused(Status.invalid, "a line")) == "a line"
