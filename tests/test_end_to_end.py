"""The shipped model through the whole house: its PyTorch reference and the runtime agree."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pytest
import torch

from ltx_engines.bundle import Bundle, open_bundle
from ltx_ref import text
from ltx_ref.ltx_video import model as reference
from ltx_ref.ltx_video import pipeline as yardstick
from ltx_ref.ltx_video.guidance import Guidance, Prompts
from ltx_ref.ltx_video.pipeline import Step, Video
from ltx_trt.cli import SHIPPED
from ltx_trt.pipeline import frames_of, generate
from ltx_trt.request import Request, Wishes, resolve
from ltx_trt.session import Array, Feeds, Session
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from ltx_trt.tokens import tokenizer_entry

PROMPT = "a red circle moves right on a blue background"
SEED = 3


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(SHIPPED, cache=tmp_path_factory.mktemp("cache"))


class Recording:
    """A session that keeps what it was last fed."""

    def __init__(self, session: Session, feeds: dict[str, Array]) -> None:
        self.session, self.feeds = session, feeds

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        self.feeds.update(feeds)
        return self.session(feeds)

    def __enter__(self) -> Self:
        self.session.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.session.__exit__(kind, error, trace)


def play(bundle: Bundle, request: Request) -> tuple[np.ndarray, np.ndarray]:
    """The latents that reach the decoder, and the frames."""
    fed: dict[str, Array] = {}

    def open_session(stage: str) -> Session:
        session = OnnxRuntimeSession.open(bundle, stage)
        return Recording(session, fed) if stage == "vae_decoder" else session

    made = frames_of(generate(request, bundle, open_session))
    return np.asarray(fed["latents"]), made


def reference_run(bundle: Bundle, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch, from the checkpoint: the latents before decoding, and the pixels."""
    entry = tokenizer_entry(bundle)
    model = reference.load(bundle.file(bundle.manifest.checkpoint))
    encoder = text.load_text_encoder(SHIPPED / "text_encoder")
    tokenizer = text.load_tokenizer(SHIPPED / "text_encoder", max_length=entry.max_length)
    embeds, mask = text.encode(encoder, tokenizer, [request.prompt, request.negative_prompt])
    prompts = Prompts(embeds[:1], mask[:1], embeds[1:], mask[1:])
    guidance = Guidance(
        guidance_scale=3.0, stg_scale=1.0, rescaling_scale=0.7, skip_block_list=(2,)
    )
    order = yardstick.Request(
        num_frames=request.num_frames,
        height=request.height,
        width=request.width,
        frame_rate=request.frame_rate,
        num_inference_steps=40,
        guidance=guidance,
        decode_timestep=request.decode_timestep,
        decode_noise_scale=request.decode_noise_scale,
    )
    latents, pixels = torch.empty(0), torch.empty(0)
    for event in yardstick.text_to_video(model, prompts, order, yardstick.seeded(request.seed)):
        if isinstance(event, Step):
            latents = event.latents
        elif isinstance(event, Video):
            pixels = event.pixels
    return latents, pixels


def test_the_whole_base_pipeline_gives_what_the_reference_gives(shipped: Bundle) -> None:
    """40 steps, CFG 3, STG 1, rescale 0.7, one skipped block, from one seed."""
    request, _ = resolve(Wishes(PROMPT, num_inference_steps=40, seed=SEED), shipped)
    guided = replace(
        request.guidance,
        guidance_scale=3.0,
        stg_scale=1.0,
        rescaling_scale=0.7,
        skip_block_list=(2,),
    )
    request = replace(request, guidance=guided)
    fed, frames = play(shipped, request)
    latents, pixels = reference_run(shipped, request)

    scale = request.decode_noise_scale
    draw = yardstick.seeded(request.seed)
    tokens = latents[0, 0].numel()
    draw((1, tokens, latents.shape[1]))  # the first noise; the next is the decoder's
    wanted = latents * (1 - scale) + draw(tuple(latents.shape)) * scale
    error = np.abs(fed - wanted.numpy()).max() / wanted.abs().max().item()
    assert error <= 1e-3, f"relative error of the final latents is {error:.1e}"

    bytes_ = (pixels[0] * 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()
    difference = np.abs(frames.astype(int) - bytes_.astype(int))
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.01


def test_the_same_seed_gives_the_same_frames_and_another_seed_does_not(shipped: Bundle) -> None:
    request, _ = resolve(Wishes(PROMPT, num_inference_steps=4, seed=SEED), shipped)
    other, _ = resolve(Wishes(PROMPT, num_inference_steps=4, seed=SEED + 1), shipped)
    first, again, different = (play(shipped, r)[1] for r in (request, request, other))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != different.tobytes()


def test_the_shipped_bundle_is_what_the_exporter_makes_of_its_checkpoint(
    shipped: Bundle, tmp_path: Path
) -> None:
    """After a change to the exporter, `make bundle` brings the shipped graphs up to date."""
    from ltx_export.onnx_bundle import Order, write

    config = Path(__file__).parents[1] / "tools/tiny/ltx-tiny.yaml"
    out = tmp_path / "again"
    checkpoint = SHIPPED / shipped.manifest.checkpoint
    order = Order(
        checkpoint,
        out,
        text_encoder=SHIPPED / "text_encoder",
        pipeline_config=config,
        weights="copy",
    )
    for _ in write(order):
        pass
    again = open_bundle(out, cache=tmp_path / "cache").manifest
    graphs = {f"{stage}.onnx" for stage in again.stages}
    for manifest in (again, shipped.manifest):
        assert graphs <= manifest.files.keys()
    ours, theirs = (
        m.model_dump(exclude={"toolchain": True, "files": graphs})
        for m in (again, shipped.manifest)
    )
    assert ours == theirs
    for graph in sorted(graphs):
        weights = _weights(out / graph)
        assert weights, f"{graph} has no weights in files"
        assert weights == _weights(SHIPPED / graph), "run make bundle"


def _weights(path: Path) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    import onnx

    proto = onnx.load(path, load_external_data=False)
    return {
        (t.name, tuple(sorted((e.key, e.value) for e in t.external_data)))
        for t in proto.graph.initializer
        if t.external_data
    }


def test_every_stage_opens_by_itself(shipped: Bundle) -> None:
    opener = partial(OnnxRuntimeSession.open, shipped)
    for stage in shipped.manifest.stages:
        with opener(stage):
            pass
