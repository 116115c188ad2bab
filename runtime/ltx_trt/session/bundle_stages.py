"""The stages of one bundle while clips are made of it: opened when needed, closed after or kept."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Protocol, Self

from ltx_engines.bundle import Bundle
from ltx_engines.byte_sizes import said
from ltx_engines.engine_entry import Chain
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.stages import SAMPLER_STEP
from ltx_trt.backend import Choice, Keep
from ltx_trt.pipeline import Planned
from ltx_trt.session import Opened, Session, buckets, lora_weights, refit, residency, sizes
from ltx_trt.session.closing import close_all, told
from ltx_trt.session.device import Device
from ltx_trt.session.device_loop import DeviceLoop, Engines
from ltx_trt.session.memory import Watch
from ltx_trt.session.needs import of_loop
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from ltx_trt.session.opening import Opening, needed
from ltx_trt.session.residency import Need, Residency
from ltx_trt.session.runner import Runner
from ltx_trt.session.tensorrt_session import TensorRTSession

TRANSFORMER, DECODER = "transformer", "vae_decoder"
USED = ("text_encoder", TRANSFORMER, DECODER)
"""The stages of a clip, in order of use."""


class Stages(Protocol):
    """Opens a stage by its name (`OpenSession`), from `with` to its end."""

    @property
    def bundle(self) -> Bundle: ...

    @property
    def watch(self) -> Watch | None:
        """On the GPU's memory, if there is a GPU."""
        ...

    @property
    def loras(self) -> tuple[str, ...]:
        """Those that are added, as they were named."""
        ...

    def prepare(self, planned: Planned, /) -> tuple[str, ...]:
        """Before a clip; returns what there is to say of it.

        Raises:
            UserError: these stages cannot make it.
        """
        ...

    def __call__(self, stage: str) -> Opened: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class OnnxRuntimeStages:
    """Implements Stages. Graphs take any clip, and are closed after use."""

    def __init__(self, bundle: Bundle, choice: Choice) -> None:
        self.bundle, self._choice = bundle, choice
        self._lora = refit.asked(bundle, (), choice.loras)
        self.watch: Watch | None = None
        self.loras = choice.loras

    def prepare(self, _: Planned, /) -> tuple[str, ...]:
        return ()

    def __call__(self, stage: str) -> Session:
        return _on_onnxruntime(self.bundle, stage, self._choice, self._lora)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class EngineStages:
    """Implements Stages. `chains` has an entry for each stage that has engines; the others run on
    ONNX Runtime, and `prepare` says so. Closes the device."""

    def __init__(
        self, bundle: Bundle, choice: Choice, device: Device, chains: Mapping[str, Chain]
    ) -> None:
        self.bundle, self._choice, self._device, self._chains = bundle, choice, device, chains
        self.watch: Watch | None = device.watch
        self.loras = choice.loras
        self._lora = refit.asked(bundle, chains.get(TRANSFORMER, ()), choice.loras)
        self._opening = Opening(bundle, device, self._lora)
        self._plan: dict[str, Residency] = {}
        self._kept: dict[str, Session] = {}
        self._keeps, self._loop = False, 0
        with told("the GPU's memory"):
            self._budget = residency.budget(choice.device_memory, device.driver.memory()[0])

    def prepare(self, planned: Planned, /) -> tuple[str, ...]:
        clip = sizes.of_clip(planned.shape, self.bundle.manifest)
        for stage, chain in self._chains.items():
            batches = planned.batches if stage == TRANSFORMER else (1,)
            for batch in sorted(set(batches)):
                self._check_bucket(planned, stage, chain, {**clip, "batch": batch})
        self._make_room(planned)
        notes = residency.notes(list(self._plan.values()))
        return (*self._missing(), *self._scarce(), *notes, *self._check_loras())

    def __call__(self, stage: str) -> Opened:
        if stage not in self._chains:
            return _on_onnxruntime(self.bundle, stage, self._choice, self._lora)
        if stage in self._kept:
            return _Lent(self._kept[stage])
        session = self._open(stage)
        if not self._keeps:
            return session
        self._kept[stage] = session
        return _Lent(session)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept, self._kept = list(self._kept.values()), {}
        steps = [partial(session.__exit__, kind, error, trace) for session in kept]
        with told("closing the GPU"):
            close_all((*steps, partial(self._device.close, error)), error)

    def clips(self) -> tuple[VideoShape, ...]:
        """The largest of each size that the decoder's engines were built for."""
        return tuple(buckets.clips(self._chains.get(DECODER, ())))

    def alone(self, stage: str) -> Session:
        """A stage that is used without the others, for any clip that its engines take."""
        if stage not in self._chains:
            return _on_onnxruntime(self.bundle, stage, self._choice, self._lora)
        need = needed(self.bundle.manifest, self._chains[stage])
        (found,) = residency.plan([need], self._budget)
        runner = self._runner(stage, found)
        return TensorRTSession(stage, self.bundle.stage(stage), self._device, runner)

    def _open(self, stage: str) -> Session:
        if stage not in self._plan:
            raise ValueError("stages are prepared for a clip before one is opened")
        runner = self._runner(stage, self._plan[stage])
        entry, device = self.bundle.stage(stage), self._device
        session = TensorRTSession(stage, entry, device, runner)
        if stage != TRANSFORMER or SAMPLER_STEP not in self._chains:
            return session
        try:
            with told(f"stage {SAMPLER_STEP}"):
                step = self._opening.step(self._chains[SAMPLER_STEP])
        except BaseException as error:
            session.close(error)
            raise
        graphs = self._choice.cuda_graphs
        return DeviceLoop(session, Engines(device, runner, step), cuda_graphs=graphs)

    def _runner(self, stage: str, found: Residency) -> Runner:
        with told(f"stage {stage}"):
            return self._opening.runner(self._chains[stage], found)

    def _make_room(self, planned: Planned) -> None:
        """The plan is for the longest loop of all clips so far; what the budget is for does not
        change else. Stages that are kept go when a longer one takes their room."""
        loop, transformer = 0, self._chains.get(TRANSFORMER, ())
        if transformer and SAMPLER_STEP in self._chains:
            loop = of_loop(self.bundle.manifest, transformer, planned)
        if self._plan and loop <= self._loop:
            return
        before = self._plan
        self._plan = {row.need.stage: row for row in self._residencies(self._needs(loop))}
        self._loop = loop
        if not self._keeps or any(r.room != self._plan[s].room for s, r in before.items()):
            kept, self._kept = list(self._kept.values()), {}
            close_all(partial(session.__exit__, None, None, None) for session in kept)

    def _needs(self, loop: int) -> list[Need]:
        step, manifest = self._chains.get(SAMPLER_STEP, ()), self.bundle.manifest
        found = []
        for stage, chain in self._chains.items():
            if stage == TRANSFORMER:
                need = needed(manifest, chain, step)
                found.append(replace(need, buffers=need.buffers + loop))
            elif stage != SAMPLER_STEP:
                found.append(needed(manifest, chain))
        return found

    def _residencies(self, needs: Sequence[Need]) -> list[Residency]:
        self._keeps = False
        if self._choice.keep is Keep.never:
            return residency.plan(needs, self._budget)
        try:
            found = residency.plan(needs, self._budget, kept=[n.stage for n in needs])
        except UserError:
            if self._choice.keep is Keep.always:
                raise
            return residency.plan(needs, self._budget)
        self._keeps = True
        return found

    def _check_loras(self) -> tuple[str, ...]:
        rows = (self._opening.check_lora(self._chains[s], row) for s, row in self._plan.items())
        return tuple(note for notes in rows for note in notes)

    def _scarce(self) -> tuple[str, ...]:
        wished = self._choice.device_memory or 0
        if wished <= self._budget:
            return ()
        return (f"of --device-memory {said(wished)}, {said(self._budget)} can be used",)

    def _missing(self) -> tuple[str, ...]:
        without = [stage for stage in USED if stage not in self._chains]
        notes = [f"{stage} has no engine and runs on ONNX Runtime" for stage in without]
        if TRANSFORMER in self._chains and SAMPLER_STEP not in self._chains:
            notes.append(f"without an engine of {SAMPLER_STEP}, each step comes back to the host")
        return tuple(notes)

    def _check_bucket(
        self, planned: Planned, stage: str, chain: Chain, wanted: Mapping[str, int]
    ) -> None:
        if not (lacks := buckets.refusal(chain[0].key.profiles, wanted)):
            return
        clip, made = buckets.word(planned.shape), [buckets.word(made) for made in self.clips()]
        there = f" (it was built for {', '.join(made)})" if made else ""
        raise UserError(
            f"no engine of {stage} takes {clip} with {wanted['batch']} branches: the nearest takes "
            f"{lacks}{there}; make such a clip, or build it: ltx-export build-engine "
            f"{self.bundle.path} --gpu sm{self._device.driver.capability} --shape {clip}"
        )


def _on_onnxruntime(
    bundle: Bundle, stage: str, choice: Choice, lora: lora_weights.Plan | None
) -> OnnxRuntimeSession:
    return OnnxRuntimeSession.open(
        bundle,
        stage,
        provider=None if choice.provider is None else choice.provider.value,
        threads=choice.threads,
        weights=lora_weights.of_stage(lora, stage),
    )


class _Lent:
    """A session that stays open when its user is done with it."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> Session:
        return self._session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass
