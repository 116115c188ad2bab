"""A client's tensors become an order, or one line that names no file of the server."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.defaults import Pass
from ltx_engines.errors import UserError
from ltx_engines.triton_model import INPUTS
from ltx_engines.triton_settings import Settings
from ltx_trt import SEED
from ltx_trt.cli import SHIPPED
from ltx_trt.request import Wishes, resolve
from ltx_trt.triton import requests
from ltx_trt.triton.responses import Refused, Status

NUMPY: dict[str, Any] = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle(SHIPPED)


def tensors(**values: Any) -> dict[str, Any]:
    """As Triton hands them over: BYTES are objects, the others have the types of the table."""
    types = {wire.name: NUMPY.get(wire.dtype, np.object_) for wire in INPUTS}
    return {
        name: np.array([value.encode() if isinstance(value, str) else value], types[name])
        for name, value in values.items()
    }


def read(bundle: Bundle, settings: Settings | None = None, **values: Any) -> requests.Order:
    return requests.read(tensors(**values), (), bundle, settings or Settings())


def line(bundle: Bundle, settings: Settings | None = None, **values: Any) -> str:
    with pytest.raises(Refused) as caught:
        read(bundle, settings, **values)
    assert caught.value.status is Status.invalid
    assert "\n" not in caught.value.line
    return caught.value.line


def test_all_inputs_are_the_options_of_the_command_line(bundle: Bundle) -> None:
    wishes: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "seed": 5,
        "width": 64,
        "height": 96,
        "num_frames": 9,
        "num_inference_steps": 4,
        "frame_rate": 29.97,
        "guidance_scale": 2.1,
        "stg_scale": 0.3,
    }
    assert read(bundle, **wishes).request == resolve(Wishes(**wishes), bundle)[0]
    assert wishes.keys() | {"format"} == {wire.name for wire in INPUTS}


def test_what_is_not_said_is_the_bundles_own(bundle: Bundle) -> None:
    order = read(bundle, prompt="a red circle")
    assert order.request == resolve(Wishes("a red circle"), bundle)[0]
    assert (order.request.seed, order.form) == (SEED, "mp4")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "there is no prompt"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "x", "num_frames": 0}, "num_frames must be from 1"),
        ({"prompt": "x", "width": -32}, "width must be from 1"),
        ({"prompt": "x", "seed": -1}, "seed must be from 0"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps must be from 1"),
        ({"prompt": "x", "num_inference_steps": 201}, "at most 200"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"prompt": "x", "frame_rate": float("inf")}, "frame rate must be"),
        ({"prompt": "x", "format": "frame"}, "did you mean 'frames'?"),
        ({"prompt": "x", "width": 33}, "even width and height"),
    ],
)
def test_what_a_client_can_mend_is_one_line(
    bundle: Bundle, values: dict[str, Any], said: str
) -> None:
    assert said in line(bundle, **values)


def test_a_prompt_that_is_no_text_is_refused(bundle: Bundle) -> None:
    inputs = {"prompt": np.array([b"a \xff circle"], np.object_)}
    with pytest.raises(Refused, match="prompt is not UTF-8: byte 2"):
        requests.read(inputs, (), bundle, Settings())


def test_an_unknown_parameter_is_refused_with_the_nearest_input(bundle: Bundle) -> None:
    with pytest.raises(Refused, match=r"parameter 'num_frame', .*; did you mean 'num_frames'\?"):
        requests.read(tensors(prompt="x"), ["num_frame"], bundle, Settings())


def test_a_clip_beyond_the_servers_size_is_refused_before_it_is_made(bundle: Bundle) -> None:
    settings = Settings(most_pixels=128 * 128 * 25)
    assert read(bundle, settings, prompt="x").request.width == 128
    assert "at most 409600" in line(bundle, settings, prompt="x", num_frames=26)
    huge: dict[str, Any] = {"prompt": "x", "width": 32768, "height": 32768, "num_frames": 32768}
    assert "ask for fewer frames" in line(bundle, **huge)


def test_twenty_kilobytes_of_prompt_are_read(bundle: Bundle) -> None:
    assert read(bundle, prompt="red " * 5000).request.prompt.startswith("red red")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/models/ltx_video/1/bundle has no stage 'x'", "<path> has no stage 'x'"),
        ("cannot read '/srv/a b.onnx': gone", "cannot read '<path> b.onnx': gone"),
        ("C:\\models\\x.onnx failed", "<path> failed"),
        ("see ~/models", "see <path>"),
        ("24 / 2 and 8k + 1, and/or", "24 / 2 and 8k + 1, and/or"),
        ("two\nlines", "two lines"),
    ],
)
def test_paths_do_not_reach_a_client(text: str, told: str) -> None:
    assert requests.without_paths(UserError(text)) == told


def test_no_error_of_a_missing_file_names_it(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_bundle(tmp_path / "nowhere")
    assert str(tmp_path) in str(caught.value)
    assert str(tmp_path) not in requests.without_paths(caught.value)


def test_the_steps_of_both_passes_count_for_the_servers_limit(bundle: Bundle) -> None:
    second = Pass(num_inference_steps=10, skip_initial_inference_steps=4, skip_block_list=None)
    defaults = bundle.manifest.defaults.model_copy(
        update={"num_inference_steps": 5, "second": second}
    )
    upsampler = bundle.manifest.stages["vae_decoder"]
    stages = {**bundle.manifest.stages, "latent_upsampler": upsampler}
    changes = {"defaults": defaults, "stages": stages}
    two = Bundle(bundle.path, bundle.manifest.model_copy(update=changes))
    said = line(two, Settings(most_steps=10), prompt="a red circle")
    assert said == "11 steps; this server makes at most 10"
