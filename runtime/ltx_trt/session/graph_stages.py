"""The stages that ONNX Runtime computes: freed after use, or kept where there is room."""

import os
from collections.abc import Collection, Iterable
from functools import partial
from types import TracebackType
from typing import Self

from ltx_engines.bundle import Bundle
from ltx_engines.providers import Provider
from ltx_engines.stages import DECODER, SAMPLER_STEP, STREAM
from ltx_trt.backend import Choice, TextEncoderDevice
from ltx_trt.pipeline import Planned
from ltx_trt.prompt_cache import Encoder, PromptCache, RememberingEncoder
from ltx_trt.session import (
    Opened,
    Session,
    host_room,
    lora_weights,
    onnxruntime_session,
    refit,
    vae_tiles,
)
from ltx_trt.session.asked import asked
from ltx_trt.session.closing import close_all
from ltx_trt.session.kept import Kept
from ltx_trt.session.memory import Watch
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from ltx_trt.session.vae_streams import DecoderSession
from ltx_trt.session.vae_tiles import TileSession

TEXT_ENCODER = "text_encoder"


class Graphs:
    """Those of `stages`, which may be open at once."""

    def __init__(
        self, bundle: Bundle, choice: Choice, lora: lora_weights.Plan | None, stages: Iterable[str]
    ) -> None:
        self._bundle, self._choice, self._lora = bundle, choice, lora
        stages = tuple(stages)
        policy = host_room.policy(bundle, choice, stages) if stages else host_room.Policy(False)
        self._keeps, self._kept = policy.keeps, Kept()
        self._notes = (policy.note,) if policy.note else ()
        there = vae_tiles.VAE.intersection(bundle.manifest.stages)
        self._tiles = {stage: vae_tiles.of_graph(stage, bundle, choice) for stage in sorted(there)}

    def notes(self, planned: Planned, engines: Collection[str] = ()) -> tuple[str, ...]:
        """What there is to say before a clip, of the stages that are not among `engines`.

        Raises:
            UserError: there is no memory for it.
        """
        clips = asked(planned, self._bundle.manifest)
        wishes = [(one.stage, one.clip.latent) for one in clips if one.stage not in engines]
        policy = self._notes if set(planned.stages).difference(engines) else ()
        return *policy, *vae_tiles.notes(wishes, self._tiles)

    def __call__(self, stage: str) -> Opened:
        opening = partial(self.alone, stage)
        return self._kept.lend(stage, opening) if self._keeps else opening()

    def alone(self, stage: str) -> Session:
        """Whoever asks closes it."""
        if stage not in self._tiles:
            return self._session(stage)
        if stage == DECODER and STREAM in self._bundle.manifest.stages:
            return DecoderSession(stage, self._session, self._tiles[stage])
        return TileSession(self._session(stage), self._tiles[stage])

    def _session(self, stage: str) -> Session:
        return OnnxRuntimeSession.open(
            self._bundle,
            stage,
            provider=self._provider(stage),
            threads=self._choice.threads,
            weights=lora_weights.of_stage(self._lora, stage),
        )

    def encoder(self) -> Encoder | None:
        """What computes the text encoder, for whoever wants to know its results again."""
        entry = self._bundle.stage(TEXT_ENCODER)
        computed_by = {
            "library": "onnxruntime",
            "version": onnxruntime_session.version(),
            "provider": onnxruntime_session.provider_name(self._provider(TEXT_ENCODER)),
            "threads": str(self._choice.threads or f"default of {os.cpu_count()}"),  # rounding
        }
        return Encoder.of(self._bundle, (entry.file, *entry.weights), computed_by)

    def close(self, error: BaseException | None = None) -> None:
        """`error` is what they are closed because of."""
        close_all((partial(one.__exit__, None, error, None) for one in self._kept.take()), error)

    def _provider(self, stage: str) -> Provider | None:
        if stage == TEXT_ENCODER and self._choice.text_encoder is TextEncoderDevice.cpu:
            return "cpu"
        return None if self._choice.provider is None else self._choice.provider.value


class OnnxRuntimeStages:
    """Implements Stages. Graphs take any clip."""

    def __init__(self, bundle: Bundle, choice: Choice) -> None:
        self.bundle = bundle
        self.watch: Watch | None = None
        self.loras = choice.loras
        stages = [stage for stage in bundle.manifest.stages if stage not in (SAMPLER_STEP, STREAM)]
        lora = refit.asked(bundle, (), choice.loras)
        self._graphs = Graphs(bundle, choice, lora, stages)
        self.prompts: PromptCache | None = None
        if choice.prompt_cache is not None and (encoder := self._graphs.encoder()):
            self.prompts = PromptCache(choice.prompt_cache, encoder)

    def prepare(self, planned: Planned, /) -> tuple[str, ...]:
        return self._graphs.notes(planned)

    def __call__(self, stage: str) -> Opened:
        if stage == TEXT_ENCODER and self.prompts is not None:
            return RememberingEncoder(self.prompts, partial(self._graphs, stage))
        return self._graphs(stage)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._graphs.close(error)
