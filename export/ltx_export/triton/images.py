"""Which image of NVIDIA's catalogue serves the plans of which TensorRT.

NVIDIA's own table is https://docs.nvidia.com/deeplearning/frameworks/support-matrix; a plan is read
only by the version that built it. Where we know no image, the tag is a word that no registry has.
"""

from dataclasses import dataclass

IMAGE = "nvcr.io/nvidia/tritonserver"
UNKNOWN = "YY.MM-py3"
LATEST = "26.08-py3"
"""The last of NVIDIA's compatibility table that we have read (server, r26.08)."""

NUMPY_2 = "24.11"
"""The first whose Python backend reads arrays of numpy 2; older ones read them as zeros."""

MATRIX = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html"


@dataclass(frozen=True, slots=True)
class Known:
    """`tensorrt` is as far as the source says it; `source` is where it was read."""

    tensorrt: str
    tag: str
    source: str


KNOWN = (
    Known("10.13.3", "25.10-py3", "a benchmark that was run in tensorrt:25.10-py3"),
    Known("10.14.1.48", "25.11-py3", "a course that uses pytorch:25.11-py3"),
    Known("10.16", "26.05-py3", "a build script that uses tensorrt:26.05-py3"),
    Known("11.1.0", "26.07-py3", "a build script that uses tensorrt:26.07-py3"),
    Known("11.2.1.2", "26.08-py3", "a change log that names tensorrt:26.08-py3"),
)
"""Images of one month hold one TensorRT (NVIDIA in triton-inference-server/server#3904), but for
23.05 (#5975). None of these was run by us."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`tag` is UNKNOWN where none is; `why` is a sentence for a person."""

    tag: str
    why: str

    @property
    def image(self) -> str:
        return f"{IMAGE}:{self.tag}"

    @property
    def is_known(self) -> bool:
        return self.tag != UNKNOWN


def choose(tensorrt: str | None) -> Choice:
    """The image for plans of this TensorRT; any recent one if there are none."""
    if tensorrt is None:
        return Choice(
            LATEST,
            f"No plan is loaded by the server itself, so that any image from {NUMPY_2} on will do.",
        )
    for known in KNOWN:
        if _begins(tensorrt, known.tensorrt):
            return Choice(
                known.tag,
                f"The plans are of TensorRT {tensorrt}; {known.tag} has {known.tensorrt} by what "
                f"others report ({known.source}), not by a table of NVIDIA's that we could read.",
            )
    return Choice(
        UNKNOWN,
        f"The plans are of TensorRT {tensorrt}, and we know no image that has it: look it up in "
        f"{MATRIX} and put its tag in the place of {UNKNOWN}.",
    )


def _begins(version: str, prefix: str) -> bool:
    have, want = version.split("."), prefix.split(".")
    return have[: len(want)] == want
