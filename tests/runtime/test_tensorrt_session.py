"""A stage on the GPU takes and gives arrays as any session does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from ltx_engines.bundle import open_bundle
from ltx_engines.shapes import VideoShape
from ltx_trt.session import Session
from ltx_trt.session.device import Device
from ltx_trt.session.opening import Opening, needed
from ltx_trt.session.residency import plan
from ltx_trt.session.tensorrt_session import TensorRTSession
from tests.runtime import engine_bundles
from tests.runtime.engine_bundles import Engines
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

CLIPS = VideoShape(9, 32, 64), VideoShape(17, 64, 64)
PROMPT = {
    "input_ids": np.arange(12, dtype=np.int64)[np.newaxis],
    "attention_mask": np.ones((1, 12), np.int64),
}

Make = Callable[[str, str], tuple[FakeGpu, Session, Device]]


@pytest.fixture
def make(make_bundle: Callable[..., Path]) -> Make:
    def made(stage: str, dtype: str) -> tuple[FakeGpu, Session, Device]:
        folder = make_bundle()
        engine_bundles.add(folder, Engines(CLIPS, dtype=dtype))
        bundle, gpu = open_bundle(folder), FakeGpu()
        device = Device.of(gpu, FakeLibrary(gpu))
        chain = bundle.engines(stage, gpu.capability, device.library.flavour)
        (residency,) = plan([needed(bundle.manifest, chain)], gpu.memory()[0])
        runner = Opening(bundle, device).runner(chain, residency)
        return gpu, TensorRTSession(stage, bundle.stage(stage), device, runner), device

    return made


@pytest.mark.parametrize(
    ("dtype", "step"), [("float32", 1e-7), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_floats_go_in_and_out_in_float32_whatever_the_engine_has(
    make: Make, dtype: str, step: float
) -> None:
    _, session, _ = make("text_encoder", dtype)
    with session:
        found = session(PROMPT)["prompt_embeds"]
    assert found.dtype == np.float32
    wanted = np.repeat(PROMPT["input_ids"][..., np.newaxis] / 100, 6, axis=2)
    np.testing.assert_allclose(found, wanted, rtol=step)
    assert (dtype == "float32") == (np.abs(found - wanted).max() < 1e-7)


def test_what_was_given_out_stays_when_the_next_call_comes(make: Make) -> None:
    _, session, _ = make("text_encoder", "float32")
    with session:
        first = session(PROMPT)["prompt_embeds"]
        before = first.copy()
        session(PROMPT | {"input_ids": np.full((1, 12), 50, np.int64)})
    np.testing.assert_array_equal(first, before)


def test_sizes_may_change_from_call_to_call(make: Make) -> None:
    gpu, session, device = make("vae_decoder", "float32")
    with device, session:
        for clip in (*CLIPS, *CLIPS):
            frames, height, width = clip.latent
            latents = np.full((1, 4, frames, height, width), 0.5, np.float32)
            noise = np.zeros((2, 2 * height, 2 * width), np.float32)
            feeds = {"latents": latents, "timestep": np.ones(1, np.float32), "noise_1": noise}
            pixels = session(feeds)["pixels"]
            assert pixels.shape == (1, 3, clip.frames, clip.height, clip.width)
            np.testing.assert_allclose(pixels, np.tanh(0.5), rtol=1e-6)
    assert gpu.count("context") == 2
    assert gpu.leaks() == []


def test_feeds_that_break_the_table_are_refused_before_the_gpu_hears_of_it(make: Make) -> None:
    gpu, session, _ = make("text_encoder", "float32")
    before = len(gpu.calls)
    with pytest.raises(ValueError, match="input_ids is float32, wanted int64"):
        session(PROMPT | {"input_ids": np.zeros((1, 12), np.float32)})
    assert len(gpu.calls) == before


def test_a_closed_session_says_so_and_closes_once(make: Make) -> None:
    gpu, session, device = make("text_encoder", "float32")
    with session:
        session(PROMPT)
    with session, pytest.raises(ValueError, match="text_encoder is closed"):
        session(PROMPT)
    device.close()
    assert gpu.leaks() == []
