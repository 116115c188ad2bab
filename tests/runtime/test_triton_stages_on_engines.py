"""The stages layout on engines: each stage on the GPU by itself, as a model's process has it."""

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx_ir", reason="the parts are cut by the exporter")
pytest.importorskip("onnxruntime")

from ltx_engines import bundle
from ltx_engines.errors import UserError
from ltx_engines.triton_settings import Settings
from ltx_trt.backend import Backend, Choice
from ltx_trt.pipeline import Decoded, generate
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import OpenSession, tensorrt_adapter
from ltx_trt.session.bundle_stages import USED
from ltx_trt.session.choice import open_stages
from ltx_trt.session.opening import needed
from ltx_trt.triton.called_stages import CalledStages, Models
from ltx_trt.triton.responses import Refused
from ltx_trt.triton.stage_model import answer, open_stage
from tests.runtime import split_engines, weight_input_engines
from tests.runtime.fake_gpu import FakeGpu
from tests.runtime.split_engines import CLIP
from tests.runtime.test_device_memory import free_for
from tests.runtime.test_gpu_pipeline import Machine

WISHES = Wishes(
    prompt="a red circle",
    width=CLIP.width,
    height=CLIP.height,
    num_frames=CLIP.frames,
    num_inference_steps=2,
)
TRANSFORMER = "transformer"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)


@pytest.fixture(scope="module", params=["whole", "split", "inputs"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages") / "bundle"
    if request.param == "inputs":
        weight_input_engines.make(folder)
    else:
        split_engines.make(folder, {"whole": 1, "split": 3}[request.param])
    return folder


def frames(folder: Path, stages: OpenSession, wishes: Wishes = WISHES) -> NDArray[np.uint8]:
    found = bundle.open_bundle(folder)
    request, _ = resolve(wishes, found)
    with closing(generate(request, found, stages)) as events:
        return next(event for event in events if isinstance(event, Decoded)).frames


class Cards:
    """A process of its own for each stage, each on a card of its own."""

    def __init__(self, folder: Path, held: ExitStack, memory: Mapping[str, int]) -> None:
        self.gpus = {stage: FakeGpu(memory=memory.get(stage, 2**30)) for stage in USED}
        self._sessions = {
            stage: held.enter_context(
                open_stage(folder, stage, Settings(), open_device=Machine(gpu))
            )
            for stage, gpu in self.gpus.items()
        }

    def __call__(self, model: str, feeds: Any, wanted: Any) -> Any:
        made = answer(self._sessions[model], {name: array for name, (array, _) in feeds.items()})
        assert made.keys() == wanted.keys()
        return made


def least(folder: Path) -> int:
    """Memory of a card on which one part of the transformer fits, or a few of its smallest."""
    engines = tuple(e for e in bundle.read(folder).engines if e.key.stage == TRANSFORMER)
    need = needed(bundle.read(folder), engines)
    spare = 2**20  # engines of the fixture that take weights as inputs do not say what they need
    return free_for(need.activations + need.buffers + max(need.weights) + spare)


@pytest.mark.parametrize("small", [False, True])
def test_stages_on_cards_of_their_own_make_the_frames_of_onnx_runtime(
    folder: Path, small: bool
) -> None:
    """But for a last bit of float32, which here and there is another of 256 levels."""
    with ExitStack() as held:
        cards = Cards(folder, held, {TRANSFORMER: least(folder)} if small else {})
        found = frames(folder, CalledStages(folder, Models(cards, lambda _: True)))
    with open_stages(folder, Choice(Backend.onnxruntime, threads=1)) as stages:
        wanted = frames(folder, stages)
    assert np.abs(found.astype(int) - wanted).max() <= 1
    for gpu in cards.gpus.values():
        assert gpu.count("enqueue") > 0
        assert gpu.leaks() == []


def test_a_stage_for_which_the_card_is_too_small_is_refused_when_it_is_opened(folder: Path) -> None:
    """So that its server never says that it is ready."""
    gpu = FakeGpu(memory=least(folder) // 50)
    with pytest.raises(UserError, match=TRANSFORMER), ExitStack() as held:
        held.enter_context(open_stage(folder, TRANSFORMER, Settings(), open_device=Machine(gpu)))
    assert gpu.leaks() == []


def test_a_clip_that_no_engine_takes_is_refused_and_the_next_one_made(folder: Path) -> None:
    with ExitStack() as held:
        cards = Cards(folder, held, {})
        stages = CalledStages(folder, Models(cards, lambda _: True))
        with pytest.raises(Refused, match=r"no profile of .* takes tokens 24"):
            frames(folder, stages, replace(WISHES, width=2 * CLIP.width))
        assert frames(folder, stages).shape == (CLIP.frames, CLIP.height, CLIP.width, 3)
