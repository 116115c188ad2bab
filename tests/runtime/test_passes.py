"""The passes of a run: their sizes and levels, and the contradictions that are refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ltx_engines import stages
from ltx_engines.bundle import Manifest, StageEntry, tensor_entries
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.stages import Upsampling
from ltx_trt import passes
from ltx_trt.conditioning import Item
from ltx_trt.guidance import Guidance
from ltx_trt.long_video import Chunks
from ltx_trt.pipeline import Planned, plan
from ltx_trt.request import Request, SecondPass
from ltx_trt.schedule import Steps
from tests.runtime import conftest

REQUEST = Request(
    prompt="w5",
    negative_prompt="w3",
    width=128,
    height=96,
    num_frames=17,
    frame_rate=25.0,
    steps=Steps(4),
    guidance=Guidance(3.0, 1.0, 0.7, (1,)),
)
SECOND = SecondPass(
    Steps(timesteps=(0.9, 0.4)), Guidance(1.0, 0.0), "stochastic", downscale_factor=0.6666666
)
VIDEO = np.zeros((1, 3, 17, 96, 128), np.float32)
IMAGE = Item(np.zeros((1, 3, 1, 96, 128), np.float32))


def manifest(spatial: bool = True, temporal: bool = False, **changes: Any) -> Manifest:
    """With every stage. `changes` replace what it says."""
    sizes = replace(conftest.SIZES, upsampling=Upsampling(spatial=spatial, temporal=temporal))
    entries = {
        name: StageEntry(
            file=f"{name}.onnx",
            inputs=tensor_entries(stage.inputs, "float32"),
            outputs=tensor_entries(stage.outputs, "float32"),
        )
        for name, stage in stages.ltx_video(sizes).items()
    }
    return conftest.manifest(**{"stages": entries, **changes})


def planned(request: Request, found: Manifest | None = None) -> Planned:
    return plan(request, manifest() if found is None else found)


def test_one_pass_is_of_the_clips_size() -> None:
    found = planned(REQUEST)
    (one,) = found.passes
    assert one.shape == found.shape == VideoShape(17, 96, 128)
    assert found.sigmas == (*one.sigmas, 0)
    assert found.sigmas_by_pass == (found.sigmas,)
    assert found.batches == one.batches == (3, 3, 3, 3)
    assert found.encoded == ()
    assert found.stages == ("text_encoder", "transformer", "vae_decoder")


def test_two_passes_are_of_a_part_of_the_size_and_of_twice_this_part() -> None:
    found = planned(replace(REQUEST, second=SECOND))
    first, second = found.passes
    assert first.shape == VideoShape(17, 32, 64)
    assert second.shape == found.shape == VideoShape(17, 64, 128)
    levels = tuple(float(np.float32(level)) for level in (0.9, 0.4))
    assert found.sigmas == (*first.sigmas, *levels, 0)
    assert found.sigmas_by_pass == ((*first.sigmas, 0), (*levels, 0))
    assert (first.batches, second.batches) == ((3,) * 4, (1, 1))
    assert found.batches == (3, 3, 3, 3, 1, 1)
    assert (first.noises, second.noises) == (0, 1)
    assert found.stages == ("text_encoder", "transformer", "latent_upsampler", "vae_decoder")


def test_images_are_encoded_for_each_pass_and_add_tokens_to_each() -> None:
    keyframe, sequence = replace(IMAGE, frame=3), Item(VIDEO[:, :, :9], 8)
    request = replace(REQUEST, second=SECOND, conditioning=(IMAGE, keyframe, sequence))
    found = planned(request)
    sizes = ((32, 64), (64, 128))
    assert found.encoded == tuple(VideoShape(n, *size) for size in sizes for n in (1, 9))
    assert [one.extra for one in found.passes] == [3 * 1 * 2, 3 * 2 * 4]
    assert [one.tokens for one in found.passes] == [6 * 1 * 2, 6 * 2 * 4]
    assert all(one.per_token for one in found.passes)
    assert "vae_encoder" in found.stages


def test_a_video_to_begin_from_is_encoded_and_adds_no_tokens() -> None:
    request = replace(REQUEST, input_video=VIDEO, steps=Steps(8, skip_initial=4))
    (one,) = planned(request).passes
    assert (one.extra, one.per_token) == (0, False)
    assert planned(request).encoded == (one.shape,)
    assert len(one.table) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": Steps(8, skip_initial=2)}, "begins with a video; give one with --input-video"),
        ({"input_video": VIDEO}, "noise level 1, at which nothing of it is left"),
        ({"input_video": VIDEO[:, :, :9]}, "the input video is 9 frames of 128 x 96, the clip is"),
        ({"input_video": VIDEO[..., :64]}, "made of 17 of 128 x 96; make the two equal"),
        ({"input_video": VIDEO, "second": SECOND}, "--input-video is for a run of one pass"),
        ({"second": SecondPass(Steps(4))}, "second pass begins at noise level 1, at which nothing"),
        ({"second": replace(SECOND, downscale_factor=0.1)}, "would be empty; make both at least"),
        (
            {"second": SECOND, "num_frames": 1, "width": 64, "height": 64},
            "single latent, which has no statistics; make the height or the width at least 128, or",
        ),
        ({"conditioning": (replace(IMAGE, frame=17),)}, "do not fit into a clip of 17"),
    ],
)
def test_what_contradicts_itself_is_refused_in_one_line(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        planned(replace(REQUEST, **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"num_frames": 9, "width": 64}, {"num_frames": 1}])
def test_the_least_size_that_is_named_for_two_passes_is_enough(changes: dict[str, Any]) -> None:
    request = replace(REQUEST, height=64, second=SECOND)
    first, _ = planned(replace(request, **changes)).passes
    assert first.tokens == 2


def test_a_clip_in_chunks_has_a_noise_level_for_each_token() -> None:
    """What is held of the window before is told to be free of noise."""
    (one,) = planned(replace(REQUEST, chunks=Chunks(9))).passes
    assert (one.shape.frames, one.extra) == (9, 0)
    assert one.per_token
    assert not one.loops
    (whole,) = planned(replace(REQUEST, chunks=Chunks(17))).passes
    assert not whole.per_token


@pytest.mark.parametrize("kind", [(True, True), (False, True)])
def test_an_upsampler_that_makes_frames_is_none_for_a_second_pass(kind: tuple[bool, bool]) -> None:
    with pytest.raises(UserError, match="export a spatial one with --upsampler FILE"):
        planned(replace(REQUEST, second=SECOND), manifest(*kind))


@pytest.mark.parametrize(
    "changes", [{"conditioning": (IMAGE,)}, {"input_video": VIDEO, "steps": Steps(4, None, 2)}]
)
def test_without_an_encoder_nothing_can_be_given(changes: dict[str, Any]) -> None:
    """A bundle that was exported without it."""
    with pytest.raises(UserError, match="this bundle has no vae_encoder, which reads images"):
        planned(replace(REQUEST, **changes), conftest.manifest())


def test_a_distilled_model_knows_the_levels_of_both_passes() -> None:
    known = manifest(allowed_inference_steps=(1.0, 0.9))
    request = replace(REQUEST, steps=Steps(timesteps=(1.0, 0.9)), second=SECOND)
    with pytest.raises(UserError, match=r"has not learned timestep 0\.4000"):
        planned(request, known)
    levels = SecondPass(Steps(timesteps=(0.9,)))
    assert len(passes.plan(replace(request, second=levels), known)) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "eular"}, "unknown sampler"),
        ({"tone_map_compression_ratio": 2}, "must be from 0 to 1, not 2"),
        ({"downscale_factor": 0}, "downscale_factor must be above 0 and at most 1, not 0"),
        ({"downscale_factor": 1.5}, "at most 1, not 1.5"),
    ],
)
def test_a_second_pass_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SecondPass(**changes)


@pytest.mark.parametrize("scale", [-0.1, float("inf"), float("nan")])
def test_a_scale_of_noise_is_a_number_from_0(scale: float) -> None:
    with pytest.raises(UserError, match="image_cond_noise_scale must be 0 or more"):
        replace(REQUEST, image_cond_noise_scale=scale)
