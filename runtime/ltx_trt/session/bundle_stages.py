"""The stages of one bundle while clips are made of it: opened when needed, closed after or kept."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Protocol, Self

from ltx_engines.bundle import Bundle
from ltx_engines.byte_sizes import said
from ltx_engines.engine_entry import Chain
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.stages import DECODER, SAMPLER_STEP, STREAM
from ltx_trt.backend import Choice, Memory, TextEncoderDevice
from ltx_trt.passes import UPSAMPLER
from ltx_trt.pipeline import Planned
from ltx_trt.prompt_cache import Encoder, PromptCache, RememberingEncoder
from ltx_trt.session import Opened, Session, buckets, refit, residency, sizes, vae_tiles
from ltx_trt.session.asked import Asked, advice, asked
from ltx_trt.session.closing import close_all, told
from ltx_trt.session.device import Device
from ltx_trt.session.device_loop import DeviceLoop, Engines
from ltx_trt.session.graph_stages import TEXT_ENCODER, Graphs
from ltx_trt.session.kept import Kept
from ltx_trt.session.memory import Watch
from ltx_trt.session.needs import of_loop
from ltx_trt.session.opening import Opening, needed
from ltx_trt.session.residency import Need, Residency
from ltx_trt.session.runner import Runner
from ltx_trt.session.stream_session import StreamSession
from ltx_trt.session.tensorrt_session import TensorRTSession
from ltx_trt.session.vae_streams import DecoderSession
from ltx_trt.session.vae_tiles import EngineTiles, TileSession
from ltx_trt.tiles import Cut, Grid, Streamed

TRANSFORMER = "transformer"
USED = (TEXT_ENCODER, TRANSFORMER, DECODER)
"""The stages of every clip, in order of use."""

SOMETIMES = ("vae_encoder", UPSAMPLER)
"""Those of clips that are given images, and of those in two passes."""


def computed(stage: str, chains: Mapping[str, Chain]) -> bool:
    """Whether engines compute it: of two decoders one is enough."""
    return stage in chains or (stage == DECODER and STREAM in chains)


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

    @property
    def prompts(self) -> PromptCache | None:
        """Where texts are found that were encoded before, if they are looked for."""
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
        self._kept, self._keeps, self._loop = Kept(), False, 0
        self._used = frozenset(USED) - {DECODER}
        with told("the GPU's memory"):
            self._budget = residency.budget(choice.device_memory, device.driver.memory()[0])
        self._graphs = Graphs(bundle, choice, self._lora, self._without())
        self.prompts = self._prompts()
        self._tiles = {s: self._engine_tiles(s) for s in vae_tiles.VAE if computed(s, chains)}

    def prepare(self, planned: Planned, /) -> tuple[str, ...]:
        wishes = tuple(asked(planned, self.bundle.manifest))
        for wish in wishes:
            if computed(wish.stage, self._chains):
                self._check_bucket(planned, self._in_tiles(wish))
        self._make_room(planned)
        grids = [(wish.stage, wish.clip.latent) for wish in wishes]
        notes = residency.notes(list(self._plan.values()))
        return (
            *self._missing(planned),
            *self._scarce(),
            *self._instead(planned),
            *self._policy(),
            *self._graphs.notes(planned, self._on_engines()),
            *vae_tiles.notes(grids, self._tiles),
            *notes,
            *self._check_loras(),
        )

    def __call__(self, stage: str) -> Opened:
        if stage == TEXT_ENCODER and self.prompts is not None:
            return RememberingEncoder(self.prompts, partial(self._opened, stage))
        return self._opened(stage)

    def _opened(self, stage: str) -> Opened:
        if not computed(stage, self._chains):
            return self._graphs(stage)
        opening = partial(self._decoder if stage == DECODER else self._open, stage)
        return self._kept.lend(stage, opening) if self._keeps else opening()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        steps = [partial(session.__exit__, kind, error, trace) for session in self._kept.take()]
        with told("closing the GPU"):
            close_all(
                (*steps, partial(self._graphs.close, error), partial(self._device.close, error)),
                error,
            )

    def clips(self) -> tuple[VideoShape, ...]:
        """The largest of each size that the decoder's engines were built for."""
        if DECODER not in self._chains and STREAM in self._chains:
            transformer = self._chains.get(TRANSFORMER, ())
            return tuple(buckets.endless(self._chains[STREAM], transformer))
        return tuple(buckets.clips(self._chains.get(DECODER, ())))

    def alone(self, stage: str) -> Session:
        """A stage that is used without the others, for any clip that its engines take whole."""
        if not computed(stage, self._chains):
            return self._graphs.alone(stage)
        chain = self._chain(stage)
        (row,) = residency.plan([needed(self.bundle.manifest, chain)], self._budget)
        return self._tiled(stage, self._session(stage, self._runner(stage, row)))

    def _decoder(self, stage: str) -> Session:
        """One that is opened when it is known for what clip, if there are two to choose from."""
        if STREAM not in self._chains:
            return self._open(stage)
        return DecoderSession(stage, self._open, lambda grid: self._tiles[stage](grid))

    def _chain(self, stage: str) -> Chain:
        if stage not in self._chains:  # whoever asks for it has no clip that says which decoder
            raise UserError(
                f"{stage} has no engine, only {STREAM} has; build it: ltx-export build-engine "
                f"--stages {stage}"
            )
        return self._chains[stage]

    def _open(self, stage: str) -> Session:
        if stage not in self._plan:
            raise ValueError("stages are prepared for a clip before one is opened")
        runner = self._runner(stage, self._plan[stage])
        session = self._session(stage, runner)
        if stage != TRANSFORMER or SAMPLER_STEP not in self._chains:
            return self._tiled(stage, session)
        try:
            with told(f"stage {SAMPLER_STEP}"):
                step = self._opening.step(self._chains[SAMPLER_STEP])
        except BaseException as error:
            session.close(error)
            raise
        graphs, engines = self._choice.cuda_graphs, Engines(self._device, runner, step)
        return DeviceLoop(session, engines, cuda_graphs=graphs)

    def _runner(self, stage: str, row: Residency) -> Runner:
        with told(f"stage {stage}"):
            return self._opening.runner(self._chain(stage), row)

    def _session(self, stage: str, runner: Runner) -> TensorRTSession:
        kind = StreamSession if stage == STREAM else TensorRTSession
        return kind(stage, self.bundle.stage(stage), self._device, runner)

    def _engine_tiles(self, stage: str) -> EngineTiles:
        whole, stream = self._chains.get(stage), self._chains.get(STREAM)
        return EngineTiles(
            stage,
            whole[0].key.profiles if whole else (),
            self.bundle.manifest,
            self._choice.vae_tile,
            stream[0].key.profiles if stream and stage == DECODER else (),
        )

    def _on_engines(self) -> frozenset[str]:
        """The stages of clips that engines compute."""
        return frozenset(s for s in (*self._chains, DECODER) if computed(s, self._chains))

    def _tiled(self, stage: str, session: Session) -> Session:
        return TileSession(session, self._tiles[stage]) if stage in self._tiles else session

    def _make_room(self, planned: Planned) -> None:
        """The plan is for the stages and the longest loop of all clips so far; what the budget is
        for does not change else. Stages that are kept go when more takes their room."""
        loop, transformer = self._loop, self._chains.get(TRANSFORMER, ())
        if transformer and SAMPLER_STEP in self._chains:
            passes = (one for one in planned.passes if one.loops)
            loops = (of_loop(self.bundle.manifest, transformer, one) for one in passes)
            loop = max((loop, *loops))
        used = self._used.union(self._as_built(planned))
        if self._plan and (loop, used) == (self._loop, self._used):
            return
        before = self._plan
        try:
            rows = self._residencies(self._needs(loop, used))
        except UserError:
            if DECODER not in used or (less := self._streaming(planned)) is None:
                raise
            used = used - {DECODER} | {STREAM}
            rows = self._residencies(self._needs(loop, used))
            self._tiles[DECODER] = less
        self._plan, self._used, self._loop = {row.need.stage: row for row in rows}, used, loop
        rooms = {stage: row.room for stage, row in self._plan.items()}
        if not self._keeps or any(row.room != rooms.get(s) for s, row in before.items()):
            close_all(partial(one.__exit__, None, None, None) for one in self._kept.take())

    def _streaming(self, planned: Planned) -> EngineTiles | None:
        """What the decoder is given where there is no room for the one for whole clips; None if
        the other does not take this clip, or is not wished."""
        less = replace(self._tiles[DECODER], scarce=True)
        return less if isinstance(_chosen(less, planned.shape.latent), Streamed) else None

    def _needs(self, loop: int, used: Collection[str]) -> list[Need]:
        step, manifest = self._chains.get(SAMPLER_STEP, ()), self.bundle.manifest
        found = []
        for stage, chain in self._chains.items():
            if stage not in used:
                continue
            if stage == TRANSFORMER:
                need = needed(manifest, chain, step)
                found.append(replace(need, buffers=need.buffers + loop))
            else:
                found.append(needed(manifest, chain))
        return found

    def _residencies(self, needs: Sequence[Need]) -> list[Residency]:
        self._keeps = False
        if self._choice.memory is Memory.staged:
            return residency.plan(needs, self._budget)
        try:
            found = residency.plan(needs, self._budget, kept=[n.stage for n in needs])
        except UserError:
            if self._choice.memory is Memory.resident:
                raise
            return residency.plan(needs, self._budget)
        self._keeps = True
        return found

    def _policy(self) -> tuple[str, ...]:
        """What `auto` came to."""
        if self._choice.memory is not Memory.auto or not self._plan:
            return ()
        if not self._keeps:
            return (f"memory: staged, all stages do not fit into {said(self._budget)} at once",)
        total = max(row.total for row in self._plan.values())
        return (f"memory: resident, all stages take {said(total)} of {said(self._budget)}",)

    def _prompts(self) -> PromptCache | None:
        folder = self._choice.prompt_cache
        encoder = None if folder is None else self._encoder()
        return None if folder is None or encoder is None else PromptCache(folder, encoder)

    def _encoder(self) -> Encoder | None:
        if not (chain := self._chains.get(TEXT_ENCODER, ())):
            return self._graphs.encoder()
        library, driver = self._device.library, self._device.driver
        weights = self.bundle.stage(TEXT_ENCODER).weights if chain[0].weights == "inputs" else ()
        computed_by = {"library": library.flavour, "version": library.version, "gpu": driver.name}
        return Encoder.of(self.bundle, (*(one.file for one in chain), *weights), computed_by)

    def _check_loras(self) -> tuple[str, ...]:
        rows = (self._opening.check_lora(self._chains[s], row) for s, row in self._plan.items())
        return tuple(note for notes in rows for note in notes)

    def _scarce(self) -> tuple[str, ...]:
        wished = self._choice.device_memory or 0
        if wished <= self._budget:
            return ()
        return (f"of --device-memory {said(wished)}, {said(self._budget)} can be used",)

    def _instead(self, planned: Planned) -> tuple[str, ...]:
        """That a clip is not decoded whole though an engine takes it."""
        choose = self._tiles.get(DECODER)
        if choose is None or not choose.scarce or DECODER not in planned.stages:
            return ()
        if replace(choose, scarce=False)(planned.shape.latent) is not None:
            return ()
        size = said(self._budget)
        return (f"{DECODER}: {size} are too little for the whole clip, {STREAM} takes its place",)

    def _missing(self, planned: Planned) -> tuple[str, ...]:
        wished = {TEXT_ENCODER} if self._choice.text_encoder is TextEncoderDevice.cpu else set()
        known = self._on_engines() | wished
        without = [stage for stage in planned.stages if stage not in known]
        notes = [f"{stage} has no engine and runs on ONNX Runtime" for stage in without]
        looped = any(one.loops for one in planned.passes)
        if looped and TRANSFORMER in self._chains and SAMPLER_STEP not in self._chains:
            notes.append(f"without an engine of {SAMPLER_STEP}, each step comes back to the host")
        if TRANSFORMER in self._chains and any(one.cached for one in planned.passes):
            notes.append("with step caching, each step comes back to the host")
        return tuple(notes)

    def _without(self) -> list[str]:
        """Those of the bundle that ONNX Runtime may have to compute."""
        there = [stage for stage in (*USED, *SOMETIMES) if stage in self.bundle.manifest.stages]
        return [stage for stage in there if not computed(stage, self._chains)]

    def _in_tiles(self, wish: Asked) -> Asked:
        """What the stage's engines are given at once, or those of the decoder that goes on."""
        choose = self._tiles.get(wish.stage)
        cut = None if choose is None else _chosen(choose, wish.clip.latent)
        if cut is None:
            return wish
        if isinstance(cut, Streamed):
            _, rows, columns = wish.clip.latent
            return self._given(STREAM, (cut.frames, rows, columns))
        return self._given(wish.stage, cut)

    def _given(self, stage: str, grid: Grid) -> Asked:
        clip = vae_tiles.shape(grid)
        return Asked(stage, clip, {**sizes.of_clip(clip, self.bundle.manifest), "batch": 1})

    def _as_built(self, planned: Planned) -> Iterator[str]:
        """The stages of a clip, with the decoder that it takes."""
        for stage in planned.stages:
            streams = stage == DECODER and isinstance(self._cut(planned), Streamed)
            yield STREAM if streams else stage

    def _cut(self, planned: Planned) -> Cut:
        choose = self._tiles.get(DECODER)
        return None if choose is None else _chosen(choose, planned.shape.latent)

    def _check_bucket(self, planned: Planned, wish: Asked) -> None:
        profiles = self._chains[wish.stage][0].key.profiles
        if not (lacks := buckets.refusal(profiles, wish.sizes)):
            return
        clip, made = buckets.word(wish.clip), [buckets.word(made) for made in self.clips()]
        there = f" (it was built for {', '.join(made)})" if made else ""
        raise UserError(
            f"no engine of {wish.stage} takes {clip} with {wish.branches} branches: the nearest "
            f"takes {lacks}{there}; make such a clip, or build it: ltx-export build-engine "
            f"{self.bundle.path} --gpu sm{self._device.driver.capability} "
            f"{advice(planned, self.bundle.manifest)}"
        )


def _chosen(choose: EngineTiles, grid: Grid) -> Cut:
    """
    Raises:
        UserError: tiles were wished that no engine takes; maybe as the engines were asked for,
            with the width first.
    """
    try:
        return choose(grid)
    except UserError as error:
        wish = choose.wish
        if not isinstance(wish, VideoShape):
            raise
        turned = replace(wish, height=wish.width, width=wish.height)
        try:
            fits = replace(choose, wish=turned)(grid) is not None
        except UserError:
            fits = False
        if not fits:
            raise
        raise UserError(
            f"{error}; with height and width the other way round there is one: --vae-tile "
            f"{turned.height}x{turned.width}x{turned.frames}"
        ) from None
