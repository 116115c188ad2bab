"""See how large activations become: whole denoising runs of the reference, watched by ModelOpt.

    prompts x shapes -> runs -> all steps, with all branches of guidance in each
                                  |  the input of every linear layer of every block
                                  v
                     ModelOpt's MaxCalibrator, one maximum for each input
                                  |  after each run
                                  v
                     FILE.calibration.safetensors, with how many runs it holds

A maximum of maxima does not depend on where one stopped: a calibration that is broken off goes on
after the last whole run, and ends with the same bits. A second pass at another resolution walks a
part of the schedule that is walked here as a whole, so that its shape is all that it needs.
"""

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx_engines import prompts as prompt_file
from ltx_engines.bundle import StgMode
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape, snap
from ltx_export import calibration, convert, denoising, devices, foreign
from ltx_export.activation_ranges import NotFiniteError, watched
from ltx_export.calibration import Calibration, Ranges
from ltx_export.pipeline_defaults import Pipeline
from ltx_export.plan_question import largest
from ltx_export.unfinished import begun, check_place, held
from ltx_ref import text
from ltx_ref.checkpoint import Header, read_header
from ltx_ref.ltx_video import model as ltx_video
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX, ModelConfig
from ltx_ref.ltx_video.guidance import Prompts
from ltx_ref.ltx_video.model import LTXVideo
from ltx_ref.ltx_video.pipeline import Draw, Request, Step, denoise, levels
from ltx_ref.offload import offloaded
from ltx_ref.quantization import layers
from ltx_ref.quantized import linears

PACKAGES = ("torch", "nvidia-modelopt", "ltx-trt")
"""Whose version may be in the numbers."""

LAST_SEED = 2**63 - 1
"""torch knows more, and a clip's decoder wants seeds above its own."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to calibrate, on what. None is the model's or the configuration's usual."""

    checkpoint: Path
    text_encoder: Path
    prompts: Path
    out: Path
    shapes: tuple[VideoShape, ...] = ()
    steps: int | None = None
    seed: int = 0
    pipeline_config: Path | None = None
    negative_prompt: str | None = None
    stg_mode: StgMode | None = None
    first: int | None = None
    """Only so many prompts of the file."""
    device: str | None = None
    offload_blocks: bool = False
    overwrite: bool = False
    ignore_config_keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One clip. The sigmas are in its request."""

    prompt: str
    shape: VideoShape
    seed: int
    request: Request

    @property
    def steps(self) -> int:
        return len(self.request.timesteps or ())


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked order: all that can be known without a weight."""

    order: Order
    header: Header
    inputs: Mapping[str, int]
    """Of each layer that is to be watched."""
    negative_prompt: str
    max_length: int
    runs: tuple[Run, ...]
    device: torch.device

    @property
    def steps(self) -> int:
        return sum(run.steps for run in self.runs)

    @property
    def dtype(self) -> str:
        """Of the weights, as safetensors says it."""
        return self.header.tensors[f"{TRANSFORMER_PREFIX}proj_out.weight"].dtype

    def texts(self) -> tuple[str, ...]:
        """All that are to be encoded, each once."""
        return tuple(dict.fromkeys((self.negative_prompt, *(run.prompt for run in self.runs))))


@dataclass(frozen=True, slots=True)
class Encoded:
    """Embeddings [1, L, width] and mask [1, L] of each text."""

    texts: Mapping[str, tuple[Tensor, Tensor]]
    negative_prompt: str

    def prompts(self, prompt: str) -> Prompts:
        return Prompts(*self.texts[prompt], *self.texts[self.negative_prompt])


@dataclass(frozen=True, slots=True)
class Session:
    """A model that is ready to denoise the runs: hooks may be put on its layers."""

    model: LTXVideo
    plan: Plan
    encoded: Encoded

    def steps(self, run: Run) -> Iterator[Step]:
        """The steps of a run, as they are made. Its latents are on the session's device."""
        device = self.plan.device
        draw = _drawing(device, run.seed)
        walk = denoise(self.model, self.encoded.prompts(run.prompt), run.request, draw)
        while True:
            with torch.device(device):  # of what the pipeline makes: coordinates, masks, sigmas
                step = next(walk, None)
            if step is None:
                return
            yield step


def run(order: Order) -> Iterator[str]:
    """Calibrate. Yields what is being done; what follows a colon is how far that is.

    Raises:
        UserError, CheckpointError, OSError: something that the user can mend.
    """
    yield "reading"
    calibration.check_packages()
    with held(order.out):
        check_place(order.out, overwrite=order.overwrite)
        plan = check(order)
        yield from _calibrated(plan, facts_of(plan))


def _calibrated(plan: Plan, facts: Mapping[str, Any]) -> Iterator[str]:
    out, done = plan.order.out, 0
    ranges: Ranges = {}
    if out.exists() and not plan.order.overwrite:
        before = begun(out, facts, plan.inputs)
        done, ranges = before.facts["done"], before.ranges
    if done == len(plan.runs):
        return
    encoded = yield from encode(plan)
    yield "loading"
    with session(plan, encoded) as ready, watched(ready.model) as seen:
        yield from _seen_runs(ready, seen, ranges, facts, done)


def _seen_runs(
    ready: Session,
    seen: Callable[[], Ranges],
    ranges: Ranges,
    facts: Mapping[str, Any],
    done: int,
) -> Iterator[str]:
    plan, out = ready.plan, ready.plan.order.out
    steps = sum(clip.steps for clip in plan.runs[:done])
    for index, clip in enumerate(plan.runs[done:], done + 1):
        for _ in _finite(ready, clip):
            yield f"calibrating: {100 * steps // plan.steps} %"
            steps += 1
        ranges = calibration.merged(seen(), ranges)
        if index == len(plan.runs):
            calibration.check(ranges, str(out))
        calibration.write(Calibration(out, ranges, {**facts, "done": index}))


def _finite(ready: Session, clip: Run) -> Iterator[Step]:
    """
    Raises:
        UserError: a layer was given something that is not a number, or the latents became so.
    """
    made = 0
    try:
        for step in ready.steps(clip):
            if not step.latents.isfinite().all():
                raise NotFiniteError("NaN or infinity in the latents, from the last layers")
            made += 1
            yield step
    except NotFiniteError as error:
        where = f"step {made + 1} of {clip.steps} of {clip.prompt!r} at {said(clip.shape)}"
        raise UserError(f"{where}: {error}; {_advice(ready.plan)}") from None


def _advice(plan: Plan) -> str:
    damaged = "the weights, or the text encoder's, are damaged: download them again"
    if plan.dtype != "F16":
        return damaged
    return f"float16 is too narrow, so take a wider checkpoint, or {damaged}"


@contextmanager
def opened(order: Order) -> Iterator[Session]:
    """The order's model and runs, for whoever else wants to watch them, without a word between."""
    plan = check(order)
    texts = encode(plan)
    while True:
        try:
            next(texts)
        except StopIteration as end:
            encoded: Encoded = end.value
            break
    with session(plan, encoded) as ready:
        yield ready


def check(order: Order) -> Plan:
    """Everything that can be known to be wrong before a weight is read, but for `out`.

    Raises:
        UserError, CheckpointError: something is.
    """
    foreign.check_gguf(order.checkpoint)
    header = read_header(order.checkpoint)
    _check_float(header)
    model = ltx_video.skeleton(header, order.ignore_config_keys)
    ltx_video.check_fit(model, header)
    _check_width(order, model.config)
    pipeline = denoising.pipeline(order.pipeline_config, model.config, order.stg_mode)
    usual = pipeline.defaults
    shapes = order.shapes or (snap(usual.num_frames, usual.height, usual.width),)
    prompts = _prompts(order)
    runs = tuple(
        Run(prompt, shape, order.seed + index, request)
        for shape, request in _requests(order, pipeline, model.config, shapes)
        for index, prompt in enumerate(prompts)
    )
    return Plan(
        order,
        header,
        {path: layer.in_features for path, layer in linears(model)},
        usual.negative_prompt if order.negative_prompt is None else order.negative_prompt,
        pipeline.max_length,
        runs,
        devices.choose(order.device),
    )


def _check_float(header: Header) -> None:
    convert.check_kind(header, "cannot be calibrated")
    for path, layer in layers(header).items():
        raise UserError(
            f"{header.path} is quantized already ({path} is {layer.format}); calibrate what it "
            "was made from"
        )


def _requests(
    order: Order, pipeline: Pipeline, config: ModelConfig, shapes: tuple[VideoShape, ...]
) -> Iterator[tuple[VideoShape, Request]]:
    """The configuration's run at each shape, with its sigmas written out."""
    for shape in dict.fromkeys(shapes):
        request, scheduled = denoising.request(pipeline, shape, order.steps, config)
        yield shape, replace(request, timesteps=levels(scheduled, request)[:-1])


def _prompts(order: Order) -> tuple[str, ...]:
    """
    Raises:
        UserError: the file has fewer, or they have no seeds.
    """
    known = prompt_file.read(order.prompts)
    if order.first is not None and not 1 <= order.first <= len(known):
        raise UserError(
            f"--first {order.first}: {order.prompts} has {len(known)} prompts; give fewer, or "
            "leave --first out"
        )
    chosen = known[: order.first]
    if not 0 <= order.seed <= LAST_SEED - len(chosen) + 1:
        raise UserError(
            f"--seed {order.seed}: the seeds of {len(chosen)} prompts are to lie from 0 to "
            f"{LAST_SEED}; choose a smaller one"
        )
    return chosen


def facts_of(plan: Plan) -> dict[str, Any]:
    """Everything that decides about the numbers, as JSON has it, and that nothing is done yet."""
    order, request = plan.order, plan.runs[0].request
    home = text.encoder_folder(order.text_encoder)
    prompts = list(dict.fromkeys((run.prompt, run.seed) for run in plan.runs))
    facts = {
        "format_version": calibration.FORMAT,
        "checkpoint": calibration.identity(order.checkpoint),
        "text_encoder": [calibration.identity(h.path) for h in text.weight_headers(home)],
        "text_tokens": plan.max_length,
        "prompts": [prompt for prompt, _ in prompts],
        "seeds": [seed for _, seed in prompts],
        "negative_prompt": plan.negative_prompt,
        "shapes": list(dict.fromkeys(said(run.shape) for run in plan.runs)),
        "sigmas": {said(run.shape): [*(run.request.timesteps or ()), 0.0] for run in plan.runs},
        "frame_rate": request.frame_rate,
        "sampler": request.sampler,
        "guidance": asdict(request.guidance),
        "stg_mode": request.stg_mode,
        "dtype": plan.dtype,
        "device": devices.name(plan.device),
        "offload_blocks": order.offload_blocks,
        "collector": "ModelOpt MaxCalibrator, a maximum for each input (axis -1)",
        "versions": {name: _version(name) for name in PACKAGES},
        "runs": len(plan.runs),
        "done": 0,
    }
    table: dict[str, Any] = json.loads(json.dumps(facts))
    return table


def encode(plan: Plan) -> Generator[str, None, Encoded]:
    """All texts; the encoder is gone when this ends."""
    folder, texts = plan.order.text_encoder, plan.texts()
    yield "encoding prompts"
    tokenizer = text.load_tokenizer(folder, plan.max_length)
    encoder = text.load_text_encoder(folder)
    nn.Module.to(encoder, plan.device)
    found = {}
    for index, words in enumerate(texts):
        yield f"encoding prompts: {100 * index // len(texts)} %"
        with torch.device(plan.device):
            found[words] = text.encode(encoder, tokenizer, [words])
    return Encoded(found, plan.negative_prompt)


@contextmanager
def session(plan: Plan, encoded: Encoded) -> Iterator[Session]:
    """The model on its device, or with `offload_blocks` what of it is there at a time."""
    order = plan.order
    if order.offload_blocks:
        model = ltx_video.skeleton(plan.header, order.ignore_config_keys)
        with offloaded(model, order.checkpoint, plan.device):
            yield Session(model, plan, encoded)
    else:
        model = ltx_video.load(order.checkpoint, order.ignore_config_keys, device=plan.device)
        yield Session(model, plan, encoded)


def _check_width(order: Order, config: ModelConfig) -> None:
    width = text.read_text_config(text.encoder_folder(order.text_encoder)).d_model
    if width != config.transformer.caption_channels:
        raise UserError(
            f"{order.text_encoder} has embeddings of width {width}, {order.checkpoint} wants "
            f"{config.transformer.caption_channels}; give the encoder that belongs to it"
        )


def _drawing(device: torch.device, seed: int) -> Draw:
    """The numbers of torch's generator of the CPU, on any device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, device="cpu").to(device)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def shape_of(word: str) -> VideoShape:
    """
    Raises:
        UserError: it is no shape, or none that a model can make.
    """
    if ".." in word:
        raise UserError(f"shape {word!r} is a range; give each of its shapes that is to be run")
    return largest((word,))


def said(shape: VideoShape) -> str:
    return f"{shape.width}x{shape.height}x{shape.frames}"
