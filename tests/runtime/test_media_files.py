"""What is in a file is found in the file; what is wrong with it is one line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ltx_engines.errors import UserError
from ltx_trt import media, media_files
from ltx_trt.media_files import Kind

av = pytest.importorskip("av")
image = pytest.importorskip("PIL.Image")

RED, BLUE = (220, 40, 40), (40, 80, 220)


def frames(count: int = 9, rows: int = 64, columns: int = 96) -> media.Frames:
    """Red above, blue below."""
    found = np.empty((count, rows, columns, 3), np.uint8)
    found[:, : rows // 2], found[:, rows // 2 :] = RED, BLUE
    return found


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    media.write(media.Output(tmp_path / "clip.mp4", "mp4"), frames(), 24)
    return tmp_path / "clip.mp4"


def test_a_video_has_its_frames_and_colours(clip: Path) -> None:
    assert media_files.kind(clip) == "video"
    found = list(media_files.pictures(clip, "video"))
    assert len(found) == 9
    assert found[3].shape == (64, 96, 3)
    np.testing.assert_allclose(found[3][8, 8], RED, atol=4)
    np.testing.assert_allclose(found[3][60, 90], BLUE, atol=4)
    assert media_files.frame_rate(clip) == 24


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_an_image_is_one_picture_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    image.fromarray(frames(1)[0]).save(tmp_path / f"a.{suffix}")
    path = (tmp_path / f"a.{suffix}").rename(tmp_path / "photo")
    assert media_files.kind(path) == media_files.kind_if_moving(path) == "image"
    assert media_files.size(path, "image") == (64, 96)
    (found,) = media_files.pictures(path, "image")
    np.testing.assert_allclose(found[8, 8], RED, atol=12)


def test_a_photo_that_was_held_upright_stands_upright(tmp_path: Path) -> None:
    exif = image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.fromarray(np.rot90(frames(1)[0])).save(tmp_path / "a.png", exif=exif)
    (found,) = media_files.pictures(tmp_path / "a.png", "image")
    np.testing.assert_array_equal(found, frames(1)[0])


def test_a_video_that_was_held_upright_stands_upright(clip: Path) -> None:
    """The matrix of a phone: to be turned clockwise."""
    straight = b"".join(value.to_bytes(4, "big") for value in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0))
    turned = b"".join(value.to_bytes(4, "big") for value in (0, 1 << 16, 0, 0xFFFF0000, 0, 0, 0, 0))
    data = clip.read_bytes()
    track = data.index(b"tkhd")
    place = data.index(straight, track)
    clip.write_bytes(data[:place] + turned + data[place + len(straight) :])
    found = next(media_files.pictures(clip, "video"))
    assert found.shape == (96, 64, 3)
    np.testing.assert_allclose(found[8, 60], RED, atol=4)  # what was above is at the right
    np.testing.assert_allclose(found[8, 4], BLUE, atol=4)


def test_a_moving_gif_is_a_video_where_one_is_wanted_and_else_an_image(tmp_path: Path) -> None:
    several = frames(3)
    several[1] = 0
    several[2] = 255
    media.write(media.Output(tmp_path / "a.gif", "gif"), several, 10)
    assert media_files.kind(tmp_path / "a.gif") == "image"
    assert media_files.kind(tmp_path / "a.gif", "video") == "video"
    assert media_files.kind_if_moving(tmp_path / "a.gif") == "video"
    assert media_files.count(tmp_path / "a.gif") == 3
    assert len(list(media_files.pictures(tmp_path / "a.gif", "video"))) == 3
    assert len(list(media_files.pictures(tmp_path / "a.gif", "image"))) == 1


def test_a_form_that_is_not_in_the_list_is_not_opened_though_pillow_could(tmp_path: Path) -> None:
    """Some of Pillow's start programs."""
    path = tmp_path / "a.png"
    image.fromarray(frames(1)[0]).save(path, format="PCX")
    with image.open(path) as opened:
        assert opened.format == "PCX"
    with pytest.raises(UserError, match="is no image that can be read here"):
        media_files.kind(path, "image")
    with pytest.raises(UserError, match="cannot be read to its end"):
        list(media_files.pictures(path, "image"))


def test_a_device_is_no_missing_file() -> None:
    with pytest.raises(UserError, match="/dev/zero is no ordinary file; name an image"):
        media_files.kind(Path("/dev/zero"), "image")


def nothing(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("a red circle\n" * 50)


def playlist(path: Path) -> None:
    path.write_text(f"#EXTM3U\n#EXTINF:1,\n{path.with_name('clip.mp4')}\n")


def begun(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:800])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (nothing, "there is no file .*; name a video"),
        (folder, "is a folder; name one video in it"),
        (empty, "is empty; name a video"),
        (text, "is no video that can be read here"),
        (playlist, "is no video that can be read here"),
        (begun, "is no video that can be read here"),
    ],
)
def test_a_file_that_is_no_video_is_one_line(
    clip: Path, spoil: Callable[[Path], None], words: str
) -> None:
    path = Path(clip.with_name("other.mp4"))
    path.write_bytes(clip.read_bytes())
    spoil(path)
    with pytest.raises(UserError, match=words):
        media_files.kind(path, "video")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("image", "clip.mp4 is a video, not an image; use --video"),
        ("video", "a.png is an image, not a video; use --image"),
    ],
)
def test_the_other_kind_is_named(clip: Path, wanted: Kind, words: str) -> None:
    image.fromarray(frames(1)[0]).save(clip.with_name("a.png"))
    path = clip if wanted == "image" else clip.with_name("a.png")
    with pytest.raises(UserError, match=words):
        media_files.kind(path, wanted)


def test_an_image_that_ends_too_early_is_one_line(tmp_path: Path) -> None:
    image.fromarray(frames(1)[0]).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read to its end"):
        list(media_files.pictures(tmp_path / "a.png", "image"))
