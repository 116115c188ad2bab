"""Files appear whole or not at all, and equal frames give equal bytes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines.errors import UserError
from ltx_trt import media

NAMES = ["clip.mp4", "clip.gif", "frames", "clip_%03d.png"]


def clip(count: int = 9, height: int = 64, width: int = 96) -> Any:
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 255, width)
    frames[..., 1] = np.arange(count)[:, None, None] * 20
    frames[..., 2] = np.linspace(0, 200, height)[:, None]
    return frames


def write(path: Path, frames: Any, rate: float = 24.0) -> None:
    count, height, width, _ = frames.shape
    media.write(media.check(path, count=count, height=height, width=width), frames, rate)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", NAMES)
def test_equal_frames_give_equal_bytes(tmp_path: Path, name: str) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, clip())
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one
    assert one == other


@pytest.mark.parametrize("name", NAMES)
def test_frames_that_come_in_parts_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    frames = clip(19)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "whole" / name, frames)
    output = media.check(tmp_path / "parts" / name, count=19, height=64, width=96)
    with media.Writer(output, 24.0) as writer:
        for first in range(0, 19, 4):
            writer.write(frames[first : first + 4])
            assert not output.path.exists()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_begun_before_the_first_frame(tmp_path: Path, name: str) -> None:
    with media.Writer(media.check(tmp_path / name, count=9, height=64, width=96), 24.0):
        assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", [24.0, 30.0, 29.97, 12.5])
def test_a_video_plays_back_its_frames_at_its_rate(tmp_path: Path, rate: float) -> None:
    av = pytest.importorskip("av")
    frames = clip(17)
    write(tmp_path / "clip.mp4", frames, rate)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(rate, rel=1e-4)
        assert stream.codec_context.pix_fmt == "yuv420p"
        found = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert found.shape == frames.shape
    assert np.abs(found.astype(int) - frames).mean() < 4


def test_png_frames_are_exact(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    frames = clip()
    write(tmp_path / "frames", frames)
    write(tmp_path / "f_%02d.png", frames)
    for index, frame in enumerate(frames):
        for path in (tmp_path / "frames" / f"{index:04d}.png", tmp_path / f"f_{index:02d}.png"):
            with image.open(path) as found:
                assert np.array_equal(np.asarray(found), frame)


def test_a_gif_shows_each_frame_for_its_time(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    write(tmp_path / "clip.gif", clip(5), rate=10)
    with image.open(tmp_path / "clip.gif") as found:
        assert found.n_frames == 5
        assert found.info["duration"] == 100


def test_one_frame_may_be_a_plain_png(tmp_path: Path) -> None:
    write(tmp_path / "image.png", clip(1))
    assert (tmp_path / "image.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clip.avi", r"cannot write \.avi; choose \.mp4"),
        ("clip.png", "holds one frame, not 9; name it .*clip_%04d.png"),
        ("clip_%s_%d.png", "needs one number"),
        ("clip_%.png", "needs one number"),
        ("nowhere/clip.mp4", "there is no folder"),
        ("full", "is not empty"),
        ("file", "is a file"),
        ("folder.mp4", "is a folder"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_work(
    tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "0000.png").write_bytes(b"old")
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder.mp4").mkdir()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=words):
        media.check(tmp_path / name, count=9, height=64, width=96)
    assert contents(tmp_path) == before


def test_an_odd_size_is_no_mp4(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="try 98 x 64"):
        media.check(tmp_path / "clip.mp4", count=9, height=63, width=97)
    media.check(tmp_path / "clip.gif", count=9, height=63, width=97)


def test_a_folder_without_permission_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(media, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"cannot write .*clip\.mp4: Permission denied"):
        media.check(tmp_path / "clip.mp4", count=9, height=64, width=96)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_nothing_half_written_stays(
    tmp_path: Path, name: str, stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = []

    def fail(source: Path, target: Path) -> None:
        replaced.append((source, target))
        raise stop

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(stop):
        write(tmp_path / name, clip())
    assert replaced
    assert contents(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_encoding_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    av = pytest.importorskip("av")
    write(tmp_path / "clip.mp4", clip())
    before = contents(tmp_path)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", stop, raising=True)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "clip.mp4", clip(17))
    assert contents(tmp_path) == before


def test_a_contact_sheet_shows_first_and_last_of_each_clip() -> None:
    long, short = clip(9, 4, 6), clip(2, 4, 6)
    sheet = media.contact_sheet([long, short], columns=3)
    assert sheet.shape == (8, 18, 3)
    assert np.array_equal(sheet[:4, :6], long[0])
    assert np.array_equal(sheet[:4, 6:12], long[4])
    assert np.array_equal(sheet[:4, 12:], long[8])
    assert np.array_equal(sheet[4:, 6:12], short[1])
    assert not sheet[4:, 12:].any()


def test_a_folder_in_the_way_of_one_frame_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "f_0003.png").mkdir()
    with pytest.raises(UserError, match=r"f_0003\.png is a folder"):
        media.check(tmp_path / "f_%04d.png", count=5, height=32, width=32)
    assert media.check(tmp_path / "f_%04d.png", count=3, height=32, width=32).kind == "pattern"


ENCODES = """
import sys
from hashlib import sha256
import numpy as np
from ltx_trt import media
rows, columns = np.mgrid[:128, :64]
frames = np.stack([(rows * (i + 1) + columns * 5) % 251 for i in range(25)]).astype(np.uint8)
print(sha256(media.video_bytes(np.repeat(frames[..., None], 3, -1), 24.0)).hexdigest())
"""


def test_a_videos_bytes_do_not_depend_on_what_memory_held_before() -> None:
    """x264's macroblock tree read memory that nobody had written; glibc fills it for us here."""
    made = set()
    for filling in ("0", "85", "170"):
        done = subprocess.run(
            [sys.executable, "-c", ENCODES],
            env={**os.environ, "MALLOC_PERTURB_": filling},
            capture_output=True,
            text=True,
            check=True,
        )
        made.add(done.stdout)
    assert len(made) == 1


def test_a_video_in_memory_is_the_one_of_a_file(tmp_path: Path) -> None:
    frames = np.zeros((9, 64, 96, 3), np.uint8)
    media.write(media.Output(tmp_path / "clip.mp4", "mp4"), frames, 24.0)
    assert media.video_bytes(frames, 24.0) == (tmp_path / "clip.mp4").read_bytes()
