"""What a Triton server shows of us: the model's tensors, its element types and its metrics.

Server, client, configuration, check and README read these tables.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ltx_engines.manifest import Manifest

VIDEO = "ltx_video"
"""The model that makes clips; the others are stages."""


def served(manifest: "Manifest") -> tuple[str, ...]:
    """The stages of a server's clips, in order of use. No request brings an image to encode."""
    upsampler = () if manifest.defaults.second is None else ("latent_upsampler",)
    return ("text_encoder", "transformer", *upsampler, "vae_decoder")


@dataclass(frozen=True, slots=True)
class Wire:
    """A tensor of the model; `dtype` is Triton's word in requests, -1 is any size."""

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True


INPUTS = (
    Wire("prompt", "BYTES", optional=False),
    Wire("negative_prompt", "BYTES"),
    Wire("seed", "INT64"),
    Wire("width", "INT32"),
    Wire("height", "INT32"),
    Wire("num_frames", "INT32"),
    Wire("num_inference_steps", "INT32"),
    Wire("frame_rate", "FP32"),
    Wire("guidance_scale", "FP32"),
    Wire("stg_scale", "FP32"),
    Wire("format", "BYTES"),
)

OUTPUTS = (
    Wire("event", "BYTES", optional=False),
    Wire("video", "BYTES"),
    Wire("frames", "UINT8", (-1, -1, -1, 3)),
)
"""`frames` are [frames, height, width, 3]."""

FORMATS = ("mp4", "frames")
"""What `format` may say; the first is what it says when it is left out."""

ELEMENT_TYPES = MappingProxyType(
    {
        "float32": "FP32",
        "float16": "FP16",
        "bfloat16": "BF16",
        "int8": "INT8",
        "uint8": "UINT8",
        "int32": "INT32",
        "int64": "INT64",
        "bool": "BOOL",
    }
)
"""A bundle's word -> Triton's. 8-bit floats and 4-bit integers have none: they stay in engines."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of /metrics; `labels` are what its series differ by, beside the model's name. One
    with `buckets`, the upper ends of its classes, is a histogram."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)

METRICS = (
    Metric("ltx_step_seconds", "histogram", "Seconds of one denoising step.", buckets=SECONDS),
    Metric(
        "ltx_stage_seconds", "histogram", "Seconds of one stage of a request.", ("stage",), SECONDS
    ),
    Metric(
        "ltx_queue_seconds",
        "histogram",
        "Seconds from a request's arrival to its start.",
        buckets=SECONDS,
    ),
    Metric(
        "ltx_pass_requests",
        "histogram",
        "Requests that shared a pass of the transformer.",
        buckets=(1.0, 2.0, 4.0, 8.0, 16.0),
    ),
    Metric("ltx_requests_running", "gauge", "Requests that are being computed."),
    Metric("ltx_requests_waiting", "gauge", "Requests that wait for a place."),
    Metric("ltx_requests_done_total", "counter", "Requests that ended with a clip."),
    Metric("ltx_requests_cancelled_total", "counter", "Requests that their client gave up."),
    Metric("ltx_requests_failed_total", "counter", "Requests that ended with an error."),
)
