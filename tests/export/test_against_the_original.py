"""The runtime's whole pipeline, graphs and all, against the original package's: same weights, same
noise, same prompts, same video."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from ltx_engines.bundle import Bundle
from ltx_trt import decoder, encoder, pipeline
from ltx_trt.conditioning import Item
from ltx_trt.guidance import Guidance
from ltx_trt.pipeline import Floats, Frames, frames_of, generate
from ltx_trt.request import Request, SecondPass
from ltx_trt.schedule import Steps
from ltx_trt.session import Array, Opened, Session
from ltx_trt.session.kept import Kept
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from ltx_trt.tokens import load_tokenizer
from tests.export.checkpoints import LATENT_CHANNELS
from tests.export.conftest import Exported, export
from tests.export.originals import Original, Tape
from tests.export.upsamplers import write_upsampler

TOLERANCE = 1e-3
"""Of the oracle's largest value. AMD EPYC, onnxruntime 1.31: 8.5e-6 at most."""

HEIGHT, WIDTH, FRAMES = 64, 96, 25

REQUEST = Request(
    prompt="a red ball",
    negative_prompt="worst",
    width=WIDTH,
    height=HEIGHT,
    num_frames=FRAMES,
    frame_rate=25.0,
    seed=7,
    steps=Steps(5),
    guidance=Guidance(3.0, 1.0, 0.7, (1,)),
)

# The original calls torch.meshgrid without `indexing`, and reads a config as an attribute.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning"),
]


def pixels(seed: int, frames: int = 1, height: int = HEIGHT, width: int = WIDTH) -> Floats:
    """Smooth enough to be a picture, different everywhere."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(-1, 1, (1, 3, frames, height // 8, width // 8)).astype(np.float32)
    return np.ascontiguousarray(coarse.repeat(8, axis=3).repeat(8, axis=4))


@dataclass
class Studio:
    """Sessions stay open, for many clips."""

    bundle: Bundle
    original: Original
    kept: Kept = field(default_factory=Kept)

    def __call__(self, stage: str) -> Opened:
        return self.kept.lend(
            stage, partial(OnnxRuntimeSession.open, self.bundle, stage, threads=1)
        )

    def texts(self, request: Request) -> dict[str, torch.Tensor]:
        """As the original is given them."""
        tokenize, found = load_tokenizer(self.bundle), {}
        for name, prompt in (("", request.prompt), ("negative_", request.negative_prompt)):
            tokens = tokenize(prompt)
            ids, mask = (np.array([row], np.int64) for row in (tokens.ids, tokens.mask))
            feeds = {"input_ids": ids, "attention_mask": mask}
            with self("text_encoder") as encoder:
                embeds = encoder(feeds)["prompt_embeds"]
            found[f"{name}prompt_embeds"] = torch.from_numpy(embeds)
            found[f"{name}prompt_attention_mask"] = torch.from_numpy(mask)
        return found


@pytest.fixture(scope="module")
def studio(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("multi")
    enlarger = write_upsampler(folder / "upsampler.safetensors", LATENT_CHANNELS)
    stages = "text_encoder,transformer,vae_encoder,vae_decoder,latent_upsampler"
    checkpoint, text_encoder = exported.checkpoint, exported.text_encoder
    made = export(checkpoint, text_encoder, folder / "bundle", stages, "--upsampler", str(enlarger))
    found = Studio(made.bundle, Original(checkpoint, enlarger))
    yield found
    for session in found.kept.take():
        session.__exit__(None, None, None)


@dataclass
class Ours:
    """`pixels` [1, 3, frames, height, width] from -1 to 1, as they become frames."""

    frames: Frames
    latents: Floats
    pixels: Floats
    tape: Tape


def ours(studio: Studio, request: Request, monkeypatch: pytest.MonkeyPatch) -> Ours:
    decoded, shown, tapes = [], [], []

    def noise(seed: int) -> Tape:
        tapes.append(Tape(seed))
        return tapes[-1]

    decode, encode, to_frames = decoder.decode, encoder.encode, decoder.to_frames

    def encoding(*given: Any) -> Floats:
        with tapes[0].sampling():
            return encode(*given)

    def decoding(session: Session, latents: Floats, *rest: Any) -> Any:
        decoded.append(latents)
        return decode(session, latents, *rest)

    def showing(found: Floats) -> Frames:
        shown.append(found)
        return to_frames(found)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "Noise", noise)
        patch.setattr(decoder, "decode", decoding)
        patch.setattr(encoder, "encode", encoding)
        patch.setattr(decoder, "to_frames", showing)
        frames = frames_of(generate(request, studio.bundle, studio))
    return Ours(frames, decoded[0], np.concatenate(shown, axis=2), tapes[0])


def check(studio: Studio, request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Final latents and frames are the original's."""
    found = ours(studio, request, monkeypatch)
    with found.tape.played(monkeypatch):
        images = studio.original(request, studio.texts(request)).numpy()
    latents = studio.original.latents[-1].numpy()
    assert float(images.std()) > 0.05
    assert error(found.latents, latents) <= TOLERANCE
    assert error(found.pixels / 2 + 0.5, images) <= TOLERANCE
    wanted = (images[0] * 255).astype(np.uint8).transpose(1, 2, 3, 0)
    assert found.frames.shape == wanted.shape
    assert np.abs(found.frames.astype(int) - wanted.astype(int)).max() <= 1


def error(found: Array, wanted: Array) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


IMAGE = Item(pixels(1))
ITEMS = {
    "image": (IMAGE,),
    "weak image": (replace(IMAGE, strength=0.5),),
    "image of another size": (Item(pixels(1, height=96, width=64)),),
    "keyframes of strength 0.5": tuple(
        Item(pixels(seed), frame, 0.5) for seed, frame in enumerate((0, 8, 24))
    ),
    "keyframes of strength 1": tuple(
        Item(pixels(seed), frame) for seed, frame in enumerate((0, 8, 24))
    ),
    "keyframe at any frame": (Item(pixels(1), 13, 0.8),),
    "forwards": (Item(pixels(1, frames=9)),),
    "backwards": (Item(pixels(1, frames=17), 8),),
    "backwards, short": (Item(pixels(1, frames=9), 16, 0.7),),
    "several": (
        Item(pixels(1, frames=9), 0, 0.9),
        Item(pixels(2), 12, 0.5),
        Item(pixels(3, frames=9), 16),
        Item(pixels(4), 0, 1.0),
    ),
}


def test_a_clip_without_conditioning_is_the_originals(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(studio, REQUEST, monkeypatch)


@pytest.mark.parametrize("items", ITEMS.values(), ids=ITEMS.keys())
def test_a_conditioned_clip_is_the_originals(
    studio: Studio, items: tuple[Item, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(studio, replace(REQUEST, conditioning=items), monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_cond_noise_scale": 0.0},
        {"sampler": "stochastic"},
        {"guidance": Guidance(1.0, 0.0)},
        {"guidance": Guidance(4.0, 0.0, cfg_star_rescale=True)},
        {"steps": Steps(timesteps=(1.0, 0.7, 0.5, 0.3))},
        {"tone_map_compression_ratio": 0.6},
        {"num_frames": 9, "conditioning": (Item(pixels(1, frames=9)),)},
        {"frame_rate": 30.0, "conditioning": (Item(pixels(1), 24), Item(pixels(2, 9), 16))},
    ],
    ids=str,
)
def test_variants_of_a_conditioned_run(
    studio: Studio, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of strength 0.5 begins to move where a level is exactly 0.5, too."""
    request = replace(REQUEST, conditioning=ITEMS["keyframes of strength 0.5"])
    check(studio, replace(request, **changes), monkeypatch)


VIDEO = pixels(9, frames=FRAMES)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": Steps(8, skip_initial=4)},
        {"steps": Steps(timesteps=(0.8, 0.4)), "sampler": "stochastic"},
        {
            "steps": Steps(8, skip_initial=5, skip_final=1),
            "conditioning": (IMAGE, *ITEMS["forwards"]),
        },
    ],
    ids=["skipped steps", "own timesteps", "with conditioning"],
)
def test_video_to_video_is_the_originals(
    studio: Studio, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(studio, replace(REQUEST, input_video=VIDEO, **changes), monkeypatch)


DISTILLED = replace(
    REQUEST,
    height=96,
    width=128,
    steps=Steps(timesteps=(1.0, 0.9937, 0.9094, 0.725)),
    guidance=Guidance(1.0, 0.0, 1.0),
    second=SecondPass(
        Steps(timesteps=(0.9094, 0.725, 0.4219)),
        Guidance(1.0, 0.0, 1.0),
        tone_map_compression_ratio=0.6,
        downscale_factor=0.6666666,
    ),
)
"""The distilled models' two passes, height x width: 32 x 64, 64 x 128, and frames of 96 x 128."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "steps": Steps(6, skip_final=1),
            "guidance": Guidance((1.0, 6.0), (1.0, 0.0), 0.5, (1,), (0.99, 0.5), True),
            "second": SecondPass(Steps(6, skip_initial=3), Guidance(1.0, 1.0, 1.0, (0,))),
        },
        {"conditioning": (Item(pixels(1, 1, 96, 128)), Item(pixels(2, 9, 96, 128), 16, 0.8))},
        {"sampler": "stochastic", "conditioning": (Item(pixels(1, 1, 96, 128), 8, 0.5),)},
    ],
    ids=["distilled", "guided", "conditioned", "stochastic first pass"],
)
def test_two_passes_are_the_originals(
    studio: Studio, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upsampler, AdaIN, tone map and the resizing of the frames among them."""
    check(studio, replace(DISTILLED, **changes), monkeypatch)


def test_random_numbers_come_in_the_documented_order(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of all passes; then of each pass the noise, its keyframes', its steps'."""
    items = (Item(pixels(1, 9, 96, 128)), Item(pixels(2, 1, 96, 128), 8), Item(pixels(3, 9), 16))
    request = replace(DISTILLED, sampler="stochastic", conditioning=items)
    drawn = iter(ours(studio, request, monkeypatch).tape.shapes)

    def expect(*shape: int) -> None:
        assert next(drawn) == (1, *shape)

    grids, channels = ((1, 2), (2, 4)), LATENT_CHANNELS
    for grid in grids:
        for frames in (2, 1, 2):
            expect(channels, frames, *grid)
    for (rows, columns), steps, draws in zip(grids, (4, 3), (2, 1), strict=True):
        cells = rows * columns
        expect(4 * cells, channels)
        for frames in (1, 2):
            expect(channels, frames, rows, columns)
        for _ in range(steps * draws):
            expect((4 + 3) * cells, channels)
    expect(channels, 4, 2, 4)
    assert not list(drawn)
