"""A prompt becomes frames: text encoder, transformer in a loop, decoder; one resident at a time.

A generator of events: progress, timing, cancelling and writing belong to whoever iterates. Closing
it closes the session that is open.

Every random number comes out of one stream, in this order: the posterior samples of an input video
and of the conditioning items [1, C, f, h, w], those of all passes; then for each pass its noise
[1, tokens, C], the noise of each item with extra tokens [1, C, 1 or 2, h, w], and in each step
noise for the tokens that are held and noise of the sampler [1, extra + tokens, C]; then what the
decoder needs.

B branches of guidance; C latent channels; f h w the latent grid; tokens = f h w
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from ltx_engines.bundle import Bundle, Manifest
from ltx_engines.errors import UserError
from ltx_engines.shapes import SPACE, TIME, VideoShape, counted
from ltx_trt import decoder, encoder, multi_scale, passes, step_caching
from ltx_trt.cache_walk import Walk
from ltx_trt.conditioning import Conditioned, Item, Place, condition
from ltx_trt.coordinates import unpatchify
from ltx_trt.decoder import Decoding, finished
from ltx_trt.denoising import Denoises, Denoising, Text, check_finite, on_the_host
from ltx_trt.events import (
    Decoded,
    Event,
    Frames,
    MediaEncoded,
    Planned,
    PromptEncoded,
    StageOpened,
    StepDone,
    Upsampled,
    frames_of,
)
from ltx_trt.long_video import Scene, Window, by_windows, check_prompts, prompts
from ltx_trt.noise import Noise
from ltx_trt.passes import UPSAMPLER, Pass, choose_shape
from ltx_trt.request import Request
from ltx_trt.resampling import resize
from ltx_trt.session import OpenSession, Session
from ltx_trt.step_caching import CachedTransformer
from ltx_trt.tokens import Tokens, load_tokenizer

__all__ = [
    "Decoded",
    "Event",
    "Floats",
    "Frames",
    "MediaEncoded",
    "Planned",
    "PromptEncoded",
    "StageOpened",
    "StepDone",
    "Upsampled",
    "choose_shape",
    "frames_of",
    "generate",
    "plan",
]

Floats = NDArray[np.float32]


def plan(request: Request, manifest: Manifest) -> Planned:
    """What `generate` says first; nothing of the model is read.

    Raises:
        UserError: it is not for this model.
    """
    return _Run.plan(request, manifest).planned()


def generate(
    request: Request, bundle: Bundle, open_session: OpenSession
) -> Generator[Event, None, None]:
    """Events up to the last Decoded; `open_session` gives a stage by its name."""
    run = _Run.plan(request, bundle.manifest)
    yield run.planned()
    texts = yield from _texts(run, bundle, open_session)
    given = yield from run.encode(open_session)
    latents, steps = None, _Steps(sum(len(one.table) for one in run.passes) * len(run.windows))
    for one, media in zip(run.passes, given, strict=True):
        if latents is not None:
            latents = yield from run.upsample(open_session, latents, one)
        started = perf_counter()
        with open_session("transformer") as transformer:
            yield StageOpened("transformer", perf_counter() - started)
            begun = media if latents is None else replace(media, start=latents)
            latents = yield from run.denoise(transformer, one, begun, texts, steps)
    if latents is None:
        raise AssertionError("a run without a pass")

    started = perf_counter()
    with open_session("vae_decoder") as session:
        decoder.ready(session, latents)
        yield StageOpened("vae_decoder", perf_counter() - started)
        yield from run.decode(session, latents)


@dataclass(frozen=True, slots=True)
class _Given:
    """What a pass is given: an item with its latents, and latents to begin from."""

    items: tuple[tuple[Item, Floats], ...] = ()
    start: Floats | None = None


@dataclass(slots=True)
class _Steps:
    """Of all passes and windows; how many of them are made."""

    total: int
    made: int = 0


@dataclass(frozen=True, slots=True)
class _Run:
    """What is known before the first engine is loaded, and the stream of noise."""

    request: Request
    manifest: Manifest
    made: VideoShape
    passes: tuple[Pass, ...]
    windows: tuple[Window, ...]
    noise: Noise
    moved: tuple[str, ...]

    @classmethod
    def plan(cls, request: Request, manifest: Manifest) -> "_Run":
        model = manifest.model
        if (found := (model.time_compression, model.space_compression)) != (TIME, SPACE):
            raise UserError(
                f"this bundle's VAE compresses time and space by {found}, this program knows "
                f"{(TIME, SPACE)} only; update ltx-trt"
            )
        found_passes = passes.plan(request, manifest)
        if request.caching is not None:
            step_caching.check(request.caching, _walk(request, found_passes[0]), manifest)
        made, parts = choose_shape(request), passes.all_windows(request)
        moved = check_prompts(request.chunks, parts, request.frame_rate)
        return cls(request, manifest, made, found_passes, parts, Noise(request.seed), moved)

    @property
    def needs_uncond(self) -> bool:
        return any(one.needs_uncond for one in self.passes)

    def planned(self) -> Planned:
        wished = (self.request.num_frames, self.request.height, self.request.width)
        made = (self.made.frames, self.made.height, self.made.width)
        note = "{} of {} x {} (height x width) {} cut out of {} of {} x {}"
        be = "is" if wished[0] == 1 else "are"
        said = note.format(counted(wished[0]), *wished[1:], be, *made)
        notes: tuple[str, ...] = () if wished == made else (said,)
        if len(self.windows) > 1:
            seconds = self.passes[0].shape.frames / self.request.frame_rate
            notes += (f"made in {len(self.windows)} chunks of {seconds:.3g} seconds",)
        notes += self.moved
        if (caching := self.request.caching) is not None:
            walk = _walk(self.request, self.passes[0])
            notes += step_caching.without_effect(caching, walk)
        encoded = [clip for one in self.passes for clip in self._encoded(one)]
        return Planned(self.passes, notes, tuple(dict.fromkeys(encoded)), self.windows)

    def encode(
        self, open_session: OpenSession
    ) -> Generator[StageOpened | MediaEncoded, None, tuple[_Given, ...]]:
        """For all passes at once; nothing is opened if there is nothing to encode."""
        if not (count := sum(len(self._encoded(one)) for one in self.passes)):
            return tuple(_Given() for _ in self.passes)
        started = perf_counter()
        with open_session("vae_encoder") as session:
            yield StageOpened("vae_encoder", perf_counter() - started)
            started = perf_counter()
            given = tuple(self._given(session, one) for one in self.passes)
        yield MediaEncoded(count, perf_counter() - started)
        return given

    def _encoded(self, one: Pass) -> tuple[VideoShape, ...]:
        shape, video = replace(one.shape, frames=self.made.frames), self.request.input_video
        videos = () if video is None else (shape,)
        items = (VideoShape(i.frames, shape.height, shape.width) for i in self.request.conditioning)
        return (*videos, *items)

    def _given(self, session: Session, one: Pass) -> _Given:
        request, channels = self.request, self.manifest.model.latent_channels

        def latents(pixels: Floats) -> Floats:
            pixels = resize(pixels, one.shape.height, one.shape.width)
            return encoder.encode(session, pixels, channels, self.noise)

        start = None if request.input_video is None else latents(request.input_video)
        return _Given(tuple((item, latents(item.pixels)) for item in request.conditioning), start)

    def denoise(
        self,
        transformer: Session,
        one: Pass,
        given: _Given,
        texts: Sequence[tuple[Text, Text]],
        steps: _Steps,
    ) -> Generator[StepDone, None, Floats]:
        """Window after window, each with its texts; the latents of the whole clip."""
        grid = (self.windows[-1].end, *one.shape.latent[1:])
        made = np.zeros((1, self.manifest.model.latent_channels, *grid), np.float32)
        scene = Scene.of(given.items, made.shape) if len(self.windows) > 1 else None
        for part, said in zip(self.windows, texts, strict=True):
            latents, place = self._begun(one, part, given.start)
            if scene is None:
                held = condition(latents, given.items, place, self.noise)
            else:
                held = scene.condition(latents, part, made, place, self.noise)
            job = self._job(one, held, said)
            tokens = yield from _timed(self.cached(transformer, one), job, steps)
            found = unpatchify(tokens[:, held.extra :], one.shape.latent)
            made[:, :, part.new] = found[:, :, part.held :]
        return made

    def _begun(self, one: Pass, part: Window, start: Floats | None) -> tuple[Floats, Place]:
        """The pass's first noise, over latents to start from if there are some."""
        model, request = self.manifest.model, self.request
        fresh = self.noise.normal((1, one.shape.tokens, model.latent_channels))
        latents = unpatchify(fresh, one.shape.latent)
        if start is not None:
            level = np.float32(one.table[0].sigma)
            latents = level * latents + (1 - level) * start[:, :, part.all]
        return latents, Place(one.shape, request.frame_rate, model.causal_temporal_positioning)

    def _job(self, one: Pass, held: Conditioned, texts: tuple[Text, Text]) -> Denoising:
        return Denoising(
            held.latents,
            held.coordinates,
            *texts,
            one.table,
            one.guidance,
            self.manifest.model.num_layers,
            self.noise,
            held.strengths,
            self.request.image_cond_noise_scale if self.request.conditioning else 0.0,
            held.settled,
        )

    def cached(self, transformer: Session, one: Pass) -> Session:
        """As the request wishes, and anew for each pass that is cached."""
        caching = self.request.caching
        if caching is None or not one.cached:
            return transformer
        return step_caching.cached(transformer, caching, _walk(self.request, one))

    def upsample(
        self, open_session: OpenSession, latents: Floats, one: Pass
    ) -> Generator[StageOpened | Upsampled, None, Floats]:
        """To the grid of pass `one`, with the statistics that they had before."""
        started = perf_counter()
        with open_session(UPSAMPLER) as session:
            yield StageOpened(UPSAMPLER, perf_counter() - started)
            started = perf_counter()
            larger = by_windows(latents, self.windows, partial(_enlarged, session))
        yield Upsampled(one.shape, perf_counter() - started)
        return larger

    def decode(self, session: Session, latents: Floats) -> Generator[Decoded, None, None]:
        """Of latents [1, C, f, h, w]. Frames of another size than the clip's are resized."""
        request, first, started = self.request, 0, perf_counter()
        last = request if request.second is None else request.second
        decoding = Decoding(
            self.manifest.model,
            request.decode_timestep,
            request.decode_noise_scale,
            tone_map_compression_ratio=last.tone_map_compression_ratio,
        )
        with closing(decoder.decode(session, latents, decoding, self.noise)) as chunks:
            for pixels in chunks:
                frames = finished(pixels, self.made, request, request.num_frames - first)
                del pixels  # nobody else needs them while the next ones are made
                yield Decoded(frames, first, request.num_frames, perf_counter() - started)
                first, started = first + len(frames), perf_counter()


def _enlarged(session: Session, latents: Floats) -> Floats:
    """With the statistics that they had before."""
    larger: Floats = session({"latents": latents})["upsampled"]
    check_finite(larger, "the upsampler's latents")
    return multi_scale.adain(larger, latents)


def _texts(
    run: _Run, bundle: Bundle, open_session: OpenSession
) -> Generator[StageOpened | PromptEncoded, None, tuple[tuple[Text, Text], ...]]:
    """Of each window the prompt's, and the negative prompt's if a step needs it."""
    request, tokenize = run.request, load_tokenizer(bundle)
    said = prompts(request.prompt, request.chunks, run.windows)
    every, negative = {text: tokenize(text) for text in said}, tokenize(request.negative_prompt)
    started = perf_counter()
    with open_session("text_encoder") as session:
        yield StageOpened("text_encoder", perf_counter() - started)
        started = perf_counter()
        texts = {text: _encode(session, tokens) for text, tokens in every.items()}
        uncond = _encode(session, negative) if run.needs_uncond else None
    notes = [note for tokens in every.values() for note in tokens.notes("prompt")]
    notes += negative.notes("negative prompt") * run.needs_uncond
    yield PromptEncoded(sum(every[said[0]].mask), perf_counter() - started, tuple(notes))
    return tuple((texts[text], uncond or texts[text]) for text in said)


def _steps(transformer: Session, job: Denoising) -> Generator[None, None, Floats]:
    """Where the transformer is, if it has a loop there; tokens with noise levels of their own come
    back to the host after each step."""
    if isinstance(transformer, Denoises) and job.strengths is None:
        return transformer.denoise(job)
    return on_the_host(transformer, job)


def _timed(
    transformer: Session, job: Denoising, all_steps: _Steps
) -> Generator[StepDone, None, Floats]:
    index, started = 0, perf_counter()
    with closing(_steps(transformer, job)) as steps:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                latents: Floats = end.value
                return latents
            seconds = perf_counter() - started
            reused = isinstance(transformer, CachedTransformer) and transformer.reused[-1]
            all_steps.made += 1
            sigma = job.table[index].sigma_next
            yield StepDone(all_steps.made, all_steps.total, sigma, seconds, reused)
            index, started = index + 1, perf_counter()


def _walk(request: Request, first: Pass) -> Walk:
    return Walk.of(first.table, first.guidance, request.sampler)


def _encode(encoder: Session, tokens: Tokens) -> Text:
    ids, mask = (np.array([row], np.int64) for row in (tokens.ids, tokens.mask))
    embeds = encoder({"input_ids": ids, "attention_mask": mask})["prompt_embeds"]
    check_finite(embeds, "the text encoder's embeddings")
    return Text(embeds, mask.astype(np.float32))
