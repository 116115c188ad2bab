"""Which tiles are used: as memory has room, as engines were built, or as the user says."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_trt import cli, delivery, media
from ltx_trt.backend import Backend, Choice, VaeTile
from ltx_trt.delivery import Delivery, Destination
from ltx_trt.pipeline import Decoded, frames_of, generate, plan
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import tensorrt_adapter, vae_tiles
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.session.vae_tiles import HostTiles
from tests.runtime import engine_bundles
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

TINY = Path(cli.__file__).parent / "ltx_tiny"
CLIP, TILE = VideoShape(33, 64, 160), VideoShape(17, 64, 96)
WISHES = Wishes("w5 w9", width=160, height=64, num_frames=33, num_inference_steps=2)


def host(budget: int | None, wish: VaeTile | VideoShape = VaeTile.auto) -> HostTiles:
    return HostTiles("vae_decoder", 300.0, budget, wish)


def test_a_clip_that_fits_is_not_cut() -> None:
    grid = (5, 16, 16)
    needed = host(None).need(grid, grid)
    assert needed == 300 * 33 * 512 * 512
    assert host(needed)(grid) is None
    assert host(needed - 1)(grid) is not None
    assert host(None)(grid) is None, "nobody says what is free"
    assert host(1, VaeTile.off)(grid) is None


def test_tiles_fit_into_the_budget_with_what_is_put_together() -> None:
    grid = (33, 22, 38)
    for budget in (1 << 30, 4 << 30, 16 << 30):
        tile = host(budget)(grid)
        assert isinstance(tile, tuple)
        assert budget / 4 < host(budget).need(tile, grid) <= budget


def test_too_little_memory_for_any_tile_is_said_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"vae_decoder needs .* --vae-tile 64x64x9") as told:
        host(1 << 20)((33, 22, 38))
    assert "\n" not in str(told.value)


def test_a_wished_tile_is_not_larger_than_the_clip() -> None:
    assert host(1, VideoShape(65, 512, 768))((3, 20, 30)) == (3, 16, 24)
    assert host(1, VideoShape(65, 512, 768))((3, 8, 8)) is None


def test_a_decoders_need_counts_the_channels_of_its_finest_level() -> None:
    tiles = HostTiles.of("vae_decoder", open_bundle(TINY), Choice())
    assert tiles.per_pixel == vae_tiles.per_pixel("vae_decoder", 16)
    assert tiles.per_pixel < vae_tiles.per_pixel("vae_decoder", vae_tiles.CHANNELS)


@pytest.fixture
def folder(make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Engines of the whole clip, and of the decoder for a tile of it."""
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)
    folder = make_bundle()
    for clip, stages in ((CLIP, ("text_encoder", "transformer")), (TILE, ("vae_decoder",))):
        engine_bundles.add(folder, engine_bundles.Engines((clip,), stages))
    return folder


def opened(folder: Path, choice: Choice, gpu: FakeGpu | None = None) -> Stages:
    gpu = gpu or FakeGpu()
    return open_stages(folder, choice, open_device=lambda _: Device.of(gpu, FakeLibrary(gpu)))


def made(stages: Stages, wishes: Wishes = WISHES) -> tuple[list[Decoded], tuple[str, ...]]:
    request, _ = resolve(wishes, stages.bundle)
    notes = stages.prepare(plan(request, stages.bundle.manifest))
    events = list(generate(request, stages.bundle, stages))
    return [event for event in events if isinstance(event, Decoded)], notes


def test_an_engine_with_a_tile_decodes_a_larger_clip_in_tiles(folder: Path) -> None:
    gpu = FakeGpu()
    with opened(folder, Choice(), gpu) as stages:
        chunks, notes = made(stages)
    assert gpu.leaks() == []
    seams = ", which share so little that seams may show"
    assert f"vae_decoder: 4 tiles, as with --vae-tile 64x96x17{seams}" in notes
    assert [(chunk.first, len(chunk.frames), chunk.total) for chunk in chunks] == [
        (0, 16, 33),
        (16, 17, 33),
    ]
    with opened(folder, Choice(Backend.onnxruntime, vae_tile=VaeTile.off)) as stages:
        (whole,), _ = made(stages)
    frames = frames_of(chunks)
    assert frames.shape == whole.frames.shape
    assert np.abs(frames.astype(int) - whole.frames).max() <= 1, "truncation shows what is below"


def test_what_engines_decode_needs_no_memory_of_the_host(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ltx_engines.host.free_memory", lambda: 1000)
    with opened(folder, Choice()) as stages:
        chunks, _ = made(stages)
    assert len(chunks) == 2
    with (
        opened(folder, Choice(Backend.onnxruntime)) as stages,
        pytest.raises(UserError, match="vae_decoder needs"),
    ):
        made(stages)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (VaeTile.off, "no engine of vae_decoder takes 160x64x33"),
        (
            VideoShape(9, 64, 64),
            r"no engine of vae_decoder takes tiles of 64x64x9 \(height x width x frames\): "
            r".*; leave out --vae-tile, or build it: .*--vae-tile 64x64x9$",
        ),
        (  # as build-engine was told, width first
            VideoShape(17, 96, 64),
            r"; with height and width the other way round there is one: --vae-tile 64x96x17$",
        ),
    ],
)
def test_what_the_engine_does_not_take_is_refused_before_anything_is_loaded(
    folder: Path, wish: VaeTile | VideoShape, said: str
) -> None:
    gpu = FakeGpu()
    with (
        opened(folder, Choice(vae_tile=wish), gpu) as stages,
        pytest.raises(UserError, match=said),
    ):
        made(stages)
    assert gpu.count("load") == 0


def test_frames_are_written_as_they_come(folder: Path, tmp_path: Path) -> None:
    with opened(folder, Choice(Backend.onnxruntime, vae_tile=TILE)) as stages:
        chunks, _ = made(stages)
    frames = frames_of(chunks)
    size = {"count": len(frames), "height": 64, "width": 160}
    for name in ("a.mp4", "a.gif", "a"):
        (tmp_path / "parts").mkdir(exist_ok=True)
        media.write(media.check(tmp_path / name, **size), frames, 24.0)
        sheet = tmp_path / "parts/sheet.png"
        output = media.check(tmp_path / "parts" / name, **size)
        with Delivery(Destination(output, 24.0, len(frames), sheet)) as given:
            for chunk in chunks:
                given.add(chunk.frames)
                assert not output.path.exists(), "before it is complete"
        assert contents(output.path) == contents(tmp_path / name)
        media.write_image(tmp_path / "sheet.png", media.contact_sheet([frames]))
        assert sheet.read_bytes() == (tmp_path / "sheet.png").read_bytes()


def contents(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a", "a_%02d.png"])
def test_a_clip_that_breaks_off_leaves_nothing(tmp_path: Path, name: str) -> None:
    output = media.check(tmp_path / name, count=4, height=64, width=64)
    destination = Destination(output, 24.0, 4, tmp_path / "sheet.png")
    given = Delivery(destination)
    with pytest.raises(KeyboardInterrupt), given:
        given.add(np.zeros((2, 64, 64, 3), np.uint8))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_no_stretch_is_decoded_after_ctrl_c_and_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    def add(self: Delivery, frames: Any) -> None:
        given.append(len(frames))
        raise KeyboardInterrupt

    monkeypatch.setattr(delivery.Delivery, "add", add)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*RUN, "--vae-tile", "64x64x17"]) == 130
    assert given == [16]
    assert list(tmp_path.iterdir()) == []


RUN = ["run", "--prompt", "a red circle", "-o", "a.mp4", "--num-inference-steps", "2"]
RUN += ["--width", "64", "--height", "64", "--num-frames", "33", "--no-prompt-cache"]


def test_the_command_line_says_which_tiles_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*RUN[:4], str(tmp_path / "a.mp4"), *RUN[5:], "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    words = [*RUN[:4], str(tmp_path / "b.mp4"), *RUN[5:], "--json"]
    assert cli.main([*words, "--vae-tile", "64x64x33"]) == 0
    same = capsys.readouterr()
    assert json.loads(same.out)["sha256"] == plain["sha256"], "a tile as large as the clip"
    assert "tiles" not in same.err
    assert cli.main([*words, "--vae-tile", "64x64x17"]) == 0
    tiled = capsys.readouterr()
    assert "vae_decoder: 2 tiles, as with --vae-tile 64x64x17" in " ".join(tiled.err.split())
    assert json.loads(tiled.out)["frames"] == 33


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "large",
            "--vae-tile is auto, stream, off or HEIGHTxWIDTHxFRAMES such as 512x768x65, not large",
        ),
        ("512x768", "not 512x768"),
        ("32x64x9", "too small for tiles to overlap; try 64x64x9"),
        ("500x512x65", "--vae-tile 500x512x65: height must be a multiple of 32, not 500; try 512"),
        ("64x64x10", "frames must be 8k + 1, not 10; try 9"),
    ],
)
def test_a_mistyped_tile_costs_one_line(
    word: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*RUN, "--vae-tile", word]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_where_nobody_says_what_is_free_a_clip_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ltx_engines.host.free_memory", lambda: None)
    with opened(folder, Choice(Backend.onnxruntime)) as stages:
        chunks, notes = made(stages, replace(WISHES, num_frames=9))
    assert len(chunks) == 1
    assert not any("tiles" in note for note in notes)
