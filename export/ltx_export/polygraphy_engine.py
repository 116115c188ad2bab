"""A bundle's engines on the GPU at hand, by polygraphy's runner, called as ltx_ref's model is.

polygraphy decides once in a process whether its TensorRT is TensorRT-RTX; its copies need CUDA's
runtime library, which it looks for in fewer places than there are.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ltx_engines.bundle import Bundle, EngineEntry
from ltx_engines.cache_key import Profile
from ltx_engines.errors import UserError
from ltx_engines.targets import Flavour
from ltx_export import build
from ltx_export.onnx_transformer import VELOCITY
from ltx_ref.ltx_video.transformer import StgMode

LIBRARIES = "LD_LIBRARY_PATH"
"""polygraphy reads it when it first needs CUDA."""


class Runner(Protocol):
    """polygraphy's BaseRunner, active."""

    def infer(self, feed_dict: Mapping[str, Tensor]) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Link:
    """A runner, and the element types of what it reads."""

    runner: Runner
    inputs: Mapping[str, torch.dtype]

    def __call__(self, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feeds = {name: known[name].to(dtype).contiguous() for name, dtype in self.inputs.items()}
        found = self.runner.infer(feeds)
        # A runner writes into the same memory the next time.
        return {name: torch.as_tensor(value).clone() for name, value in found.items()}


class RunnerTransformer:
    """A VelocityModel: one link, or a chain of which each reads what those before it give."""

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = links

    def __call__(
        self,
        latents: Tensor,
        coords: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        skip_layer_mask: Tensor,
        *,
        stg_mode: StgMode,  # noqa: ARG002 - it is in the graph
    ) -> Tensor:
        given = {"latents": latents, "coords": coords, "timestep": timestep}
        given |= {"prompt_embeds": prompt_embeds, "prompt_mask": prompt_mask}
        return self.run(given | {"skip_layer_mask": skip_layer_mask})[VELOCITY]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All that the links give, by name, in float32."""
        known = dict(inputs)
        found: dict[str, Tensor] = {}
        for link in self.links:
            given = link(known)
            known |= given
            found |= given
        return {name: value.float().cpu() for name, value in found.items()}


@contextmanager
def opened(
    bundle: Bundle, chain: Sequence[EngineEntry], profile: int
) -> Iterator[RunnerTransformer]:
    """Every engine of the chain, on the GPU until the end of the `with`.

    Raises:
        UserError: the library is missing, or refuses an engine.
    """
    backend = load(chain[0].key.flavour)
    with ExitStack() as stack, told(f"{bundle.path}: {chain[0].file}"):
        links = []
        for entry in chain:
            plan = bundle.file(entry.file)
            runner = runner_of(backend, plan, profile)
            types = {tensor.name: getattr(torch, tensor.dtype) for tensor in entry.inputs}
            links.append(Link(stack.enter_context(runner), types))
        yield RunnerTransformer(links)


def runner_of(backend: Any, plan: Path, profile: int) -> Any:
    """The plan is read when the runner becomes active."""
    engine = backend.EngineFromBytes(plan.read_bytes)
    return backend.TrtRunner(engine, name=plan.name, optimization_profile=profile)


@contextmanager
def told(what: str) -> Iterator[None]:
    """polygraphy's and the loader's complaints as what the user can mend."""
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            yield
    except PolygraphyException as error:
        raise UserError(f"{what}: polygraphy: {' '.join(str(error).split())}") from error
    except OSError as error:
        if "cudart" not in str(error):
            raise
        raise UserError(
            f"{what}: CUDA's runtime library is not found ({error}); "
            "pip install nvidia-cuda-runtime"
        ) from error


def load(flavour: Flavour) -> Any:
    """polygraphy's TensorRT backend, of this flavour.

    Raises:
        UserError: it is not installed.
    """
    if reason := missing(flavour):
        raise UserError(reason)
    from polygraphy import config

    rtx = flavour == "tensorrt-rtx"
    # As POLYGRAPHY_USE_TENSORRT_RTX=1 does, which is read when polygraphy is first imported.
    if "polygraphy.backend.trt.loader" in sys.modules and rtx != config.USE_TENSORRT_RTX:
        other = "tensorrt" if rtx else "tensorrt-rtx"
        raise UserError(f"polygraphy runs {other} in this process; run {flavour} in another one")
    config.USE_TENSORRT_RTX = rtx
    known = os.environ.get(LIBRARIES, "").split(os.pathsep)
    os.environ[LIBRARIES] = os.pathsep.join(dict.fromkeys(filter(None, [*known, *_homes()])))
    from polygraphy.backend import trt

    return trt


def missing(flavour: Flavour) -> str | None:
    """What is not installed, and the one command that gets it."""
    if find_spec("polygraphy") is None:
        return "polygraphy is not installed; pip install 'ltx-trt[quantize]'"
    if find_spec(build.MODULES[flavour]) is None:
        return f"{build.MODULES[flavour]} is not installed; {build.COMMANDS[flavour]}"
    return None


def _homes() -> list[str]:
    """Where the wheels of CUDA 13 have their libraries."""
    found = (home for path in sys.path for home in Path(path).glob("nvidia/*/lib"))
    return [str(home) for home in found if any(home.glob("libcudart.so*"))]


def profile_for(
    profiles: Sequence[Profile], chain: Sequence[EngineEntry], inputs: Mapping[str, Tensor]
) -> int | None:
    """The first profile that takes inputs of these shapes, and of fewer branches."""
    sizes = {
        axis: size
        for tensor in chain[0].inputs
        if tensor.name in inputs
        for axis, size in zip(tensor.axes, inputs[tensor.name].shape, strict=True)
        if isinstance(axis, str)
    }
    for index, profile in enumerate(profiles):
        fits = (profile[axis][0] <= size <= profile[axis][2] for axis, size in sizes.items())
        if profile.keys() >= sizes.keys() and all(fits):
            return index
    return None


def inspected(flavour: Flavour, plan: Path) -> str:
    """The inspector's own JSON of a plan, which is on the GPU meanwhile.

    Raises:
        UserError: the library is missing, or refuses the engine.
    """
    backend = load(flavour)
    from polygraphy.mod.trt_importer import lazy_import_trt

    trt = lazy_import_trt()
    with told(str(plan)):
        engine = backend.EngineFromBytes(plan.read_bytes)()
        inspector = engine.create_engine_inspector()
        text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return text
