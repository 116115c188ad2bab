"""A prompt becomes frames: text encoder, transformer in a loop, decoder; one resident at a time.

A generator of events: progress, timing, cancelling and writing belong to whoever iterates. Closing
it closes the session that is open.

B branches of guidance; C latent channels; f h w the latent grid; tokens = f h w
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from ltx_engines.bundle import Bundle, Manifest
from ltx_engines.errors import UserError
from ltx_engines.shapes import SPACE, TIME, VideoShape, snap
from ltx_trt import guidance, sampler, schedule
from ltx_trt.coordinates import token_coordinates, unpatchify
from ltx_trt.denoising import Denoises, Denoising, Text, check_finite, on_the_host
from ltx_trt.guidance import StepGuidance
from ltx_trt.noise import Noise
from ltx_trt.request import Request
from ltx_trt.sampler import Table
from ltx_trt.session import OpenSession, Session
from ltx_trt.tokens import Tokens, load_tokenizer

Floats = NDArray[np.float32]
Frames = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Planned:
    """Before anything is loaded: the clip that will be made, and how many branches each step
    runs. `prompts` are the rows of all different sets of branches, `noises` the steps that add
    noise: what a loop on the GPU has there from its beginning."""

    shape: VideoShape
    sigmas: tuple[float, ...]
    batches: tuple[int, ...]
    notes: tuple[str, ...] = ()
    prompts: int = 0
    noises: int = 0


@dataclass(frozen=True, slots=True)
class StageOpened:
    stage: str
    seconds: float


@dataclass(frozen=True, slots=True)
class PromptEncoded:
    tokens: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepDone:
    """`index` counts from 1; the latents are now at noise level `sigma`."""

    index: int
    total: int
    sigma: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Decoded:
    """[frames, height, width, 3], cropped to the wished size."""

    frames: Frames
    seconds: float


Event = Planned | StageOpened | PromptEncoded | StepDone | Decoded


def plan(request: Request, manifest: Manifest) -> Planned:
    """What `generate` says first; nothing of the model is read.

    Raises:
        UserError: it is not for this model.
    """
    return _Run.plan(request, manifest).planned()


def generate(
    request: Request, bundle: Bundle, open_session: OpenSession
) -> Generator[Event, None, None]:
    """Events up to Decoded; `open_session` gives a stage by its name."""
    run = _Run.plan(request, bundle.manifest)
    yield run.planned()
    tokenize = load_tokenizer(bundle)
    prompt, negative = tokenize(request.prompt), tokenize(request.negative_prompt)

    started = perf_counter()
    with open_session("text_encoder") as encoder:
        yield StageOpened("text_encoder", perf_counter() - started)
        started = perf_counter()
        text = _encode(encoder, prompt)
        uncond = _encode(encoder, negative) if run.needs_uncond else text
    notes = (*prompt.notes("prompt"), *(negative.notes("negative prompt") * run.needs_uncond))
    yield PromptEncoded(sum(prompt.mask), perf_counter() - started, notes)

    started = perf_counter()
    with open_session("transformer") as transformer:
        yield StageOpened("transformer", perf_counter() - started)
        latents = yield from run.denoise(transformer, text, uncond)

    started = perf_counter()
    with open_session("vae_decoder") as decoder:
        yield StageOpened("vae_decoder", perf_counter() - started)
        started = perf_counter()
        pixels = run.decode(decoder, latents)
    frames = crop(to_frames(pixels), request.num_frames, request.height, request.width)
    yield Decoded(frames, perf_counter() - started)


@dataclass(frozen=True, slots=True)
class _Run:
    """What is known before the first engine is loaded, and the stream of noise."""

    request: Request
    manifest: Manifest
    shape: VideoShape
    table: Table
    guidance: tuple[StepGuidance, ...]
    noise: Noise

    @classmethod
    def plan(cls, request: Request, manifest: Manifest) -> "_Run":
        model = manifest.model
        if (found := (model.time_compression, model.space_compression)) != (TIME, SPACE):
            raise UserError(
                f"this bundle's VAE compresses time and space by {found}, this program knows "
                f"{(TIME, SPACE)} only; update ltx-trt"
            )
        shape = choose_shape(request)
        if request.steps.skip_initial:
            raise UserError(
                "skip_initial_inference_steps starts from a video, which this version cannot "
                "read; remove it"
            )
        sigmas = schedule.sigmas(request.steps, manifest.scheduler, shape.tokens)
        schedule.check_allowed(sigmas, manifest.allowed_inference_steps)
        return cls(
            request,
            manifest,
            shape,
            sampler.table(request.sampler, sigmas, eta=request.eta),
            guidance.plan(request.guidance, sigmas, model.num_layers),
            Noise(request.seed),
        )

    @property
    def needs_uncond(self) -> bool:
        return any("uncond" in step.branches for step in self.guidance)

    def planned(self) -> Planned:
        wished = (self.request.num_frames, self.request.height, self.request.width)
        made = (self.shape.frames, self.shape.height, self.shape.width)
        note = "{} frames of {} x {} (height x width) are cut out of {} of {} x {}"
        notes = () if wished == made else (note.format(*wished, *made),)
        sigmas = (*(step.sigma for step in self.table), self.table[-1].sigma_next)
        return Planned(
            self.shape,
            sigmas,
            batches=tuple(len(guide.branches) for guide in self.guidance),
            notes=notes,
            prompts=sum(map(len, {guide.branches for guide in self.guidance})),
            noises=sum(bool(step.noise) for step in self.table),
        )

    def denoise(
        self, transformer: Session, text: Text, uncond: Text
    ) -> Generator[StepDone, None, Floats]:
        """Where the transformer is, if it has a loop there."""
        latents = self.noise.normal((1, self.shape.tokens, self.manifest.model.latent_channels))
        coordinates = token_coordinates(
            self.shape,
            self.request.frame_rate,
            causal=self.manifest.model.causal_temporal_positioning,
        )
        job = Denoising(
            latents,
            coordinates,
            text,
            uncond,
            self.table,
            self.guidance,
            self.manifest.model.num_layers,
            self.noise,
        )
        if isinstance(transformer, Denoises):
            return (yield from self._timed(transformer.denoise(job)))
        return (yield from self._timed(on_the_host(transformer, job)))

    def _timed(self, steps: Generator[None, None, Floats]) -> Generator[StepDone, None, Floats]:
        index, total, started = 0, len(self.table), perf_counter()
        with closing(steps):
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    latents: Floats = end.value
                    return latents
                seconds = perf_counter() - started
                yield StepDone(index + 1, total, self.table[index].sigma_next, seconds)
                index, started = index + 1, perf_counter()

    def decode(self, decoder: Session, tokens: Floats) -> Floats:
        """[1, tokens, C] -> [1, 3, frames, height, width]."""
        latents, model = unpatchify(tokens, self.shape.latent), self.manifest.model
        feeds = {"latents": latents}
        if model.timestep_conditioning:
            scale = np.float32(self.request.decode_noise_scale)
            fresh = self.noise.normal(latents.shape)
            feeds["latents"] = latents * (1 - scale) + fresh * scale
            feeds["timestep"] = np.full(1, self.request.decode_timestep, np.float32)
        _, rows, columns = self.shape.latent
        for block in model.noise_blocks:
            size = (block.maps, rows * block.scale, columns * block.scale)
            feeds[block.name] = self.noise.normal(size)
        pixels: Floats = decoder(feeds)["pixels"]
        check_finite(pixels, "the decoder's pixels")
        return pixels


def choose_shape(request: Request) -> VideoShape:
    """The smallest legal clip that holds the wished one, or an error if it must be exact."""
    size = (request.num_frames, request.height, request.width)
    return VideoShape(*size) if request.strict_shape else snap(*size)


def to_frames(pixels: Floats) -> Frames:
    """[1, 3, frames, height, width] in -1..1 -> [frames, height, width, 3]; truncates, as the
    original does."""
    unit = np.clip(pixels[0] / np.float32(2) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray((unit * np.float32(255)).astype(np.uint8).transpose(1, 2, 3, 0))


def crop(frames: Frames, count: int, height: int, width: int) -> Frames:
    """The first `count` frames, cut out of the middle; an odd pixel is cut at bottom and right."""
    top, left = ((frames.shape[axis] - size) // 2 for axis, size in ((1, height), (2, width)))
    return np.ascontiguousarray(frames[:count, top : top + height, left : left + width])


def _encode(encoder: Session, tokens: Tokens) -> Text:
    ids, mask = (np.array([row], np.int64) for row in (tokens.ids, tokens.mask))
    embeds = encoder({"input_ids": ids, "attention_mask": mask})["prompt_embeds"]
    check_finite(embeds, "the text encoder's embeddings")
    return Text(embeds, mask.astype(np.float32))
