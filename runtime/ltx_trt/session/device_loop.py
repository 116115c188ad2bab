"""The loop over the steps on the GPU: between the first step and the last, nothing leaves the host.

    before   latents, coordinates, prompts, the steps' rows and noises go up
    a step   copy(row), copy(noise)                               within the GPU
             velocity [branches] = transformer(batch, row, prompts)
             next_latents, clean, batch = sampler_step(latents, velocities, previous, noise, row)
             copy(next_latents -> latents), copy(clean -> previous)
    after    the latents come down

All addresses stay the same from step to step while the same branches run, so that a CUDA graph can
hold a step. The host is one step ahead of what it has yielded: the GPU has work while somebody
looks at the progress, and who stops waits for no more than that.

C latent channels
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ltx_engines.errors import UserError
from ltx_engines.stages import BRANCHES, COEFFICIENTS, SAMPLER_STEP
from ltx_trt.denoising import Denoising, check_finite
from ltx_trt.session import Array, Feeds, Session
from ltx_trt.session.closing import close_all, told
from ltx_trt.session.cuda_graphs import Graphs
from ltx_trt.session.device import Device
from ltx_trt.session.driver import Address, DeviceError, Event
from ltx_trt.session.engine_api import EngineError, Shape
from ltx_trt.session.loop_memory import LoopMemory, Move, of
from ltx_trt.session.runner import Runner
from ltx_trt.session.step_rows import Branches

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Engines:
    """Both are the loop's alone while it runs."""

    device: Device
    transformer: Runner
    step: Runner


class DeviceLoop:
    """The transformer as a session whose latents stay on the GPU (`Denoises`).

    Called with arrays it is `session`. Its end is the end of `session` and of the step's engine.
    """

    def __init__(self, session: Session, engines: Engines, *, cuda_graphs: bool = True) -> None:
        self._session, self._engines, self._cuda_graphs = session, engines, cuda_graphs

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        return self._session(feeds)

    def denoise(self, job: Denoising) -> Generator[None, None, Floats]:
        """Yields when a step is done; returns the clean latents."""
        with _Loop(job, self._engines, cuda_graphs=self._cuda_graphs) as loop:
            loop.upload()
            yield from loop.steps()
            return loop.latents()

    def __enter__(self) -> Self:
        self._session.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        session = partial(self._session.__exit__, kind, error, trace)
        close_all((session, self._close_step), error)

    def _close_step(self) -> None:
        with told(f"stage {SAMPLER_STEP}"):
            self._engines.step.close()


@dataclass(frozen=True, slots=True)
class _Binding:
    """Of one stage."""

    shapes: Mapping[str, Shape]
    addresses: Mapping[str, Address]


@dataclass(frozen=True, slots=True)
class _Bound:
    """What a captured step holds. `moves` are the velocities that are not where an engine takes
    them: target and source. `revision` is the arena's."""

    branches: Branches
    transformer: _Binding
    step: _Binding
    moves: tuple[Move, ...]
    revision: int


class _Loop:
    """One run, from `with` to its end."""

    def __init__(self, job: Denoising, engines: Engines, *, cuda_graphs: bool) -> None:
        self._job, self._engines = job, engines
        self._driver, self._stream = engines.device.driver, engines.device.stream
        self._memory = LoopMemory(job, _types(engines), self._driver, self._stream)
        runners = engines.transformer, engines.step
        self._captures, self._graphs = cuda_graphs, Graphs(self._driver, self._stream, runners)
        self._events: list[Event] = []
        self._bound: _Bound | None = None

    def upload(self) -> None:
        with told("stage transformer"):
            self._events += (self._driver.event() for _ in range(2))
            self._memory.upload()

    def steps(self) -> Generator[None, None, None]:
        """Yields after each, when the next one is enqueued."""
        total = len(self._job.table)
        for index in range(total + 1):
            if index < total:
                self._settle(index)
                with self._told(index):
                    self._enqueue(index)
                    self._driver.record(self._events[index % 2], self._stream)
            if index > 0:
                with self._told(index - 1):
                    self._driver.synchronize_event(self._events[(index - 1) % 2])
                yield

    def latents(self) -> Floats:
        """Looked at here for the first time."""
        with told("stage transformer"):
            latents = self._memory.download()
        check_finite(latents, "the latents of the last step (no other is looked at on the GPU)")
        return latents

    def _enqueue(self, index: int) -> None:
        bound = self._bound = self._bind(index)
        self._memory.begin(index)
        compute = partial(self._compute, bound)
        if self._captures:
            self._graphs.run(bound, compute)
        else:
            compute()

    def _compute(self, bound: _Bound) -> None:
        self._engines.transformer.enqueue(self._stream)
        self._memory.move(bound.moves)
        self._engines.step.enqueue(self._stream)
        self._memory.end()

    def _bind(self, index: int) -> _Bound:
        """The engines for this step's branches; left alone if they are bound for them."""
        branches, arena = self._job.guidance[index].branches, self._engines.device.arena
        bound = self._bound
        while bound is None or not self._holds(bound, index):
            bound = self._binding(branches, arena.revision)
            self._engines.transformer.bind(bound.transformer.shapes, bound.transformer.addresses)
            self._engines.step.bind(bound.step.shapes, bound.step.addresses)  # may move the arena
        return bound

    def _holds(self, bound: _Bound, index: int) -> bool:
        now = self._job.guidance[index].branches, self._engines.device.arena.revision
        return (bound.branches, bound.revision) == now

    def _settle(self, index: int) -> None:
        """An engine at work is not bound anew."""
        if self._bound is not None and not self._holds(self._bound, index):
            with self._told(index - 1):
                self._driver.synchronize(self._stream)

    def _binding(self, branches: Branches, revision: int) -> _Bound:
        velocities, moves = self._memory.velocities(branches)
        transformer, step = self._transformer_binding(branches), self._step_binding(velocities)
        return _Bound(branches, transformer, step, moves, revision)

    def _transformer_binding(self, branches: Branches) -> _Binding:
        job, batch = self._job, len(branches)
        _, tokens, channels = job.latents.shape
        text, width = job.text.embeds.shape[1:]
        shapes = {
            "latents": (batch, tokens, channels),
            "coords": (batch, *job.coordinates.shape[1:]),
            "timestep": (batch, 1),
            "prompt_embeds": (batch, text, width),
            "prompt_mask": (batch, text),
            "skip_layer_mask": (job.num_layers, batch),
        }
        addresses = {
            "latents": self._memory.at("batch"),
            "coords": self._memory.at("coords"),
            "timestep": self._memory.in_row("timestep"),
            "prompt_embeds": self._memory.at(of(branches, "prompt_embeds")),
            "prompt_mask": self._memory.at(of(branches, "prompt_mask")),
            "skip_layer_mask": self._memory.in_row("skip_layer_mask"),
            "velocity": self._memory.at("velocity"),
        }
        return _Binding(shapes, addresses)

    def _step_binding(self, velocities: Mapping[str, Address]) -> _Binding:
        shape = self._job.latents.shape
        names = ("latents", *BRANCHES, "previous", "noise")
        shapes: dict[str, Shape] = dict.fromkeys(names, shape)
        shapes["coefficients"] = (len(COEFFICIENTS),)
        buffers = ("latents", "previous", "noise", "next_latents", "clean", "batch")
        addresses = {name: self._memory.at(name) for name in buffers}
        addresses |= {"coefficients": self._memory.in_row("coefficients")}
        return _Binding(shapes, {**addresses, **velocities})

    @contextmanager
    def _told(self, index: int) -> Iterator[None]:
        try:
            yield
        except (DeviceError, EngineError, UserError) as error:
            said = " ".join(str(error).split())
            step = f"step {index + 1} of {len(self._job.table)}"
            raise UserError(f"stage transformer: {step}: {said}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        events = (partial(self._driver.close_event, event) for event in self._events)
        wait = partial(self._driver.synchronize, self._stream)
        memory = self._memory.unpin, self._memory.close
        with told("stage transformer"):
            close_all((wait, self._graphs.close, *events, *memory), error)


def _types(engines: Engines) -> dict[str, str]:
    """The element types of both stages; `latents` is the step's, the transformer's is `batch`.

    Raises:
        UserError: the two engines do not go together.
    """
    transformer = {name: tensor.dtype for name, tensor in engines.transformer.tensors.items()}
    step = {name: tensor.dtype for name, tensor in engines.step.tensors.items()}
    for theirs, ours in (("latents", "batch"), *(("velocity", branch) for branch in BRANCHES)):
        if transformer[theirs] != step[ours]:
            raise UserError(
                f"the transformer's {theirs} is {transformer[theirs]}, the sampler step's {ours} "
                f"is {step[ours]}; build both engines again (ltx-export build-engine)"
            )
    return transformer | step
