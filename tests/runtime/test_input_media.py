"""What a user says of images and videos: where they stand, and every mistake in one line."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from ltx_engines.errors import UserError
from ltx_trt import cli, input_media, media, preprocessing
from ltx_trt.backend import Choice
from ltx_trt.input_media import Media, Wish, attach, parse
from ltx_trt.request import Request, SecondPass, Wishes

pytest.importorskip("av")
image = pytest.importorskip("PIL.Image")

REQUEST = Request("a fox", "", width=64, height=64, num_frames=25, frame_rate=24)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an image, another of other size, and videos of 25 and of 5 frames."""
    monkeypatch.chdir(tmp_path)
    frames = np.full((25, 64, 64, 3), (40, 80, 220), np.uint8)
    for index, frame in enumerate(frames):
        frame[20:44, index : index + 24] = 220, 40, 40
    image.fromarray(frames[0]).save("a.png")
    image.fromarray(frames[1, :, :48]).save("b.png")
    image.fromarray(frames[2]).save("odd@3:name.png")
    media.write(media.Output(Path("v.mp4"), "mp4"), frames, 24)
    media.write(media.Output(Path("short.mp4"), "mp4"), frames[:5], 24)
    Path("no.png").write_text("not a picture at all\n" * 9)
    Path("dir").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("a.png", Wish(Path("a.png"))),
        ("a.png@24", Wish(Path("a.png"), 24)),
        ("a.png:0.5", Wish(Path("a.png"), 0, 0.5)),
        ("a.png@-1:.25", Wish(Path("a.png"), -1, 0.25)),
        ("odd@3:name.png", Wish(Path("odd@3:name.png"))),
        ("odd@3:name.png@8:1", Wish(Path("odd@3:name.png"), 8, 1.0)),
        (r"C:\new\a.png@8", Wish(Path(r"C:\new\a.png"), 8)),
    ],
)
def test_a_place_and_a_strength_follow_the_name(text: str, wish: Wish) -> None:
    assert parse(text) == wish


def attached(*items: Wish, request: Request = REQUEST) -> tuple[Request, tuple[str, ...]]:
    return attach(request, Media(items))


def test_an_image_may_stand_at_any_frame_and_a_negative_one_counts_from_the_end() -> None:
    request, notes = attached(Wish(Path("a.png"), 7, 0.5), Wish(Path("a.png"), -1))
    assert [(item.frame, item.strength) for item in request.conditioning] == [(7, 0.5), (24, 1)]
    assert all(item.pixels.shape == (1, 3, 1, 64, 64) for item in request.conditioning)
    assert notes == ()


@pytest.mark.parametrize(("frame", "taken"), [(0, 25), (8, 17), (16, 9), (-9, 9)])
def test_a_video_is_cut_to_what_the_clip_holds(frame: int, taken: int) -> None:
    request, notes = attached(Wish(Path("v.mp4"), frame, kind="video"))
    assert request.conditioning[0].pixels.shape == (1, 3, taken, 64, 64)
    assert notes == (() if taken == 25 else (f"of v.mp4 the first {taken} frames are taken",))


def test_of_an_originals_video_that_is_too_short_the_first_frame_is_taken() -> None:
    request, notes = attached(Wish(Path("short.mp4"), 7))
    assert request.conditioning[0].pixels.shape[2] == 1
    assert "of short.mp4 the first frame is taken" in notes


def test_a_picture_of_another_aspect_is_cut_with_a_word() -> None:
    request, notes = attached(Wish(Path("b.png")))
    assert request.conditioning[0].pixels.shape == (1, 3, 1, 64, 64)
    assert notes == ("b.png is 48 x 64: cut to the aspect of 64 x 64",)


def test_another_frame_rate_is_said() -> None:
    slow = Request("a fox", "", width=64, height=64, num_frames=25, frame_rate=12)
    _, notes = attached(Wish(Path("v.mp4")), request=slow)
    assert notes == ("v.mp4 has 24 frames a second, the clip 12: they are taken one for one",)


def test_a_run_of_two_passes_gets_pictures_in_their_own_size() -> None:
    image.fromarray(np.zeros((200, 200, 3), np.uint8)).save("large.png")
    twice = Request(
        "a fox", "", width=64, height=64, num_frames=25, frame_rate=24, second=SecondPass()
    )
    request, _ = attached(Wish(Path("large.png")), request=twice)
    assert request.conditioning[0].pixels.shape[3:] == (200, 200)


def test_a_padded_clip_gets_padded_pictures() -> None:
    """50 of 64 rows are kept: 7 above and 7 below are grey."""
    low = Request("a fox", "", width=64, height=50, num_frames=9, frame_rate=24)
    image.fromarray(np.full((50, 64, 3), 255, np.uint8)).save("white.png")
    request, _ = attached(Wish(Path("white.png")), request=low)
    column = request.conditioning[0].pixels[0, 0, 0, :, 30]
    assert column.shape == (64,)
    assert (column[:7] == 0).all() and (column[57:] == 0).all()  # noqa: PT018 - one thought
    assert column[7:57].min() > 0.98


SMALL = "v.mp4 is 64 x 64, the clip is 128 x 96"
LARGER = ("--width", "128", "--height", "96")


@pytest.mark.parametrize("flag", ["--video", "--input-video"])
def test_a_video_of_another_size_is_refused(
    flag: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["run", "--prompt", "a fox", "-o", "o.mp4", *LARGER, "--num-frames", "25"]
    Path("c.yaml").write_text("timesteps: [0.5]\n")
    assert cli.main([*line, "--pipeline-config", "c.yaml", flag, "v.mp4"]) == 2
    assert capsys.readouterr().err == (
        f"ltx-trt: {SMALL} (width x height); give --width 64 --height 64, or --resize\n"
    )
    assert not (here / "o.mp4").exists()


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes("a fox", video=("v.mp4",), resize=True),
        Wishes("a fox", input_video="v.mp4", resize=True),
        Wishes("a fox", input_media_path="v.mp4"),
        Wishes("a fox", conditioning_media_paths=("v.mp4",), conditioning_start_frames=(0,)),
    ],
)
@pytest.mark.parametrize(
    ("size", "note"),
    [
        ((128, 96), "cut to the aspect of 128 x 96 and resized"),
        ((96, 96), "resized to 96 x 96"),
    ],
)
def test_a_video_is_resized_where_that_is_wished_and_for_the_originals_words(
    wishes: Wishes, size: tuple[int, int], note: str
) -> None:
    request = replace(REQUEST, width=size[0], height=size[1])
    found, notes = attach(request, input_media.media(wishes))
    pixels = found.input_video if not found.conditioning else found.conditioning[0].pixels
    assert pixels is not None
    assert pixels.shape == (1, 3, 25, size[1], size[0])
    assert notes == (f"v.mp4 is 64 x 64: {note}",)


def test_a_larger_image_is_resized_without_a_word() -> None:
    image.fromarray(np.zeros((128, 128, 3), np.uint8)).save("large.png")
    assert attached(Wish(Path("large.png"), kind="image"))[1] == ()


def moving_gif(count: int) -> Path:
    frames = np.zeros((count, 64, 64, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[20:44, index : index + 24] = 220, 40, 40
    media.write(media.Output(Path("m.gif"), "gif"), frames, 25)
    return Path("m.gif")


def test_a_gif_that_moves_is_a_video_to_continue_and_to_begin_from() -> None:
    """It was counted as one image, with the message that it has less than 9 frames."""
    moving_gif(25)
    request = replace(REQUEST, frame_rate=25)
    found, _ = attach(request, input_media.media(Wishes("a fox", video=("m.gif",))))
    assert found.conditioning[0].frames == 25
    found, _ = attach(request, input_media.media(Wishes("a fox", input_video="m.gif")))
    assert found.input_video is not None
    assert found.input_video.shape[2] == 25


def test_noise_that_nothing_takes_is_said() -> None:
    said = "--image-cond-noise-scale has no effect: "
    _, notes = attach(REQUEST, Media(image_cond_noise_scale=0.1))
    assert notes == (f"{said}without an --image or --video",)
    weak, strong = Wish(Path("a.png"), 0, 0.5), Wish(Path("a.png"), 1)
    _, notes = attach(REQUEST, Media((weak,), image_cond_noise_scale=0.1))
    assert notes == (f"{said}what the clip is held to has strengths below 1",)
    found, notes = attach(REQUEST, Media((weak, strong), image_cond_noise_scale=0))
    assert (found.image_cond_noise_scale, notes) == (0, ())


NOT_FROM_NOISE = "noise level 1, at which nothing of it is left"


def test_what_needs_no_pixels_is_refused_before_a_picture_is_prepared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a picture is prepared")

    monkeypatch.setattr(preprocessing, "prepare", never)
    monkeypatch.setattr(preprocessing, "prepare_resized", never)
    size = ("--width", "64", "--height", "64", "--num-frames", "25")
    line = ["run", "--prompt", "a fox", "-o", "o.mp4", *size, "--image", "a.png"]
    for words, said in (
        (("--input-video", "v.mp4"), NOT_FROM_NOISE),
        (("--input-video", "short.mp4"), "short.mp4 has 5 frames, the clip is made of 25"),
        (("--video", "short.mp4@8"), "short.mp4 has less than 9 frames"),
        (("--image", "b.png@8", "--strict-shape"), "b.png is 48 x 64"),
    ):
        assert cli.main([*line, *words]) == 2
        assert said in capsys.readouterr().err


def test_each_picture_that_is_prepared_is_told_of() -> None:
    told: list[Path] = []
    wishes = Wishes("a fox", image=("a.png",), video=("v.mp4@16",))
    attach(REQUEST, input_media.media(wishes), told.append)
    assert told == [Path("a.png"), *[Path("v.mp4")] * 9]


def test_who_waits_for_pictures_sees_that_they_are_prepared() -> None:
    from rich.console import Console

    from ltx_trt import job

    voice = job.Voice()
    voice.console = Console(file=StringIO(), force_terminal=True, width=80)
    found = input_media.media(Wishes("a fox", video=("v.mp4",)))
    request, _ = job._with_pictures(REQUEST, found, voice)
    assert request.conditioning[0].frames == 25
    assert "pictures" in voice.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_cache_table_is_doubted_where_pictures_are_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["run", "--prompt", "a fox", "--num-inference-steps", "30", "-o", "o.mp4"]
    line += ["--height", "64", "--width", "64", "--num-frames", "9", "--image", "a.png"]
    assert cli.main([*line, "--cache-steps", "teacache"]) == 0
    assert "the cache table was measured without images or videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("--image", "a.png", "-o", "o.mp4", "--contact-sheet", "a.png"), "a.png"),
        (("--video", "v.mp4", "-o", "v.mp4"), "v.mp4"),
        (("--video", "v.mp4", "-o", "dir/../v.mp4"), "v.mp4"),
        (("--video", "link.mp4", "-o", "v.mp4"), "link.mp4"),
        (("--image", "f_0003.png", "-o", "f_%04d.png"), "f_0003.png"),
        (("--pipeline-config", "c.png", "-o", "o.gif", "--contact-sheet", "c.png"), "c.png"),
    ],
)
def test_a_run_does_not_write_over_what_it_reads(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], name: str
) -> None:
    Path("link.mp4").symlink_to("v.mp4")
    Path("f_0003.png").write_bytes(Path("a.png").read_bytes())
    Path("c.png").write_text("num_inference_steps: 1\n")
    before = {path: path.read_bytes() for path in here.iterdir() if path.is_file()}
    size = ("--width", "64", "--height", "64", "--num-frames", "9")
    assert cli.main(["run", "--prompt", "a fox", *size, *words]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"ltx-trt: {name} is read for this clip, which would replace it; name the output, or the "
        "contact sheet, otherwise\n"
    )
    assert {path: path.read_bytes() for path in here.iterdir() if path.is_file()} == before


def test_a_contact_sheet_is_none_of_the_frames(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["run", "--prompt", "a fox", "-o", "f_%04d.png", "--contact-sheet", "f_0001.png"]
    assert cli.main(line) == 2
    assert "f_0001.png is one of the frames" in capsys.readouterr().err


def test_a_clip_of_one_frame_has_no_1_frames(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["run", "--prompt", "a fox", "--num-inference-steps", "1", "--num-frames", "1"]
    assert cli.main([*line, "--height", "32", "--width", "40", "-o", "o.png"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("o.png: 1 frame of 40 x 32, ")
    assert "1 frame of 32 x 40 (height x width) is cut out of 1 of 32 x 64" in said.err


def test_video_to_video_begins_from_as_many_frames_as_are_made() -> None:
    begun = Wish(Path("v.mp4"), kind="video")
    request, notes = attach(REQUEST, Media(input_video=begun))
    assert request.input_video is not None
    assert request.input_video.shape == (1, 3, 25, 64, 64)
    assert notes == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--image", "no.png"), "no.png is no image that can be read here"),
        (("--image", "gone.png"), "there is no file gone.png; name an image"),
        (("--image", "dir"), "dir is a folder; name one image in it"),
        (("--image", "v.mp4"), "v.mp4 is a video, not an image; use --video"),
        (("--video", "a.png@8"), "a.png is an image, not a video; use --image"),
        (("--image", "a.png:2"), "a.png:2: a strength is from 0 to 1, not '2'"),
        (("--image", "a.png:nan"), "a strength is from 0 to 1, not 'nan'"),
        (("--image", "a.png@x:1"), "write a.png[@FRAME][:STRENGTH], not '@x:1'; FRAME is a whole"),
        (("--image", "a.png@25"), "a.png@25: the clip has 25 frames, 0 to 24 or -25 to -1"),
        (("--image", "a.png@-26"), "a.png@-26: the clip has 25 frames"),
        (("--video", "v.mp4@7"), "v.mp4@7: a video begins at a multiple of 8; try @0 or @8"),
        (("--video", "v.mp4@24"), "v.mp4@24: 1 frame of the clip is left from there"),
        (("--video", "short.mp4"), "short.mp4 has less than 9 frames, a video has 9 at least"),
        (("--image", "a.png", "--image", "b.png"), "a.png and b.png are both to stand at frame 0"),
        (("--image", "b.png", "--strict-shape"), "b.png is 48 x 64, the clip is 64 x 64; make the"),
        (("--input-video", "short.mp4"), "short.mp4 has 5 frames, the clip is made of 25; take a"),
        (("--input-video", "no.png"), "no.png is no image or video that can be read here"),
        (("--input-video", "a.png"), "a.png has 1 frame, the clip is made of 25"),
        (("--input-video", "v.mp4", "--input_media_path", "v.mp4"), "leave one of them out"),
        (("--image-cond-noise-scale", "-1"), "image_cond_noise_scale must be 0 or more, not -1"),
        (
            ("--conditioning_media_paths", "a.png", "b.png"),
            "--conditioning-media-paths names 2, --conditioning-start-frames 0; give one for each",
        ),
        (
            (
                *("--conditioning_media_paths", "a.png", "b.png"),
                *("--conditioning_start_frames", "0", "8", "--conditioning_strengths", "1"),
            ),
            "--conditioning-media-paths names 2, --conditioning-strengths 1; give one for each",
        ),
        (("--conditioning_start_frames", "8"), "--conditioning-media-paths names 0"),
        (
            ("--conditioning_media_paths", "v.mp4", "--conditioning_start_frames", "7"),
            "v.mp4@7: a video begins at a multiple of 8",
        ),
    ],
)
def test_what_cannot_be_meant_costs_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    before = sorted(here.iterdir())
    size = ("--width", "64", "--height", "64", "--num-frames", "25")
    assert cli.main(["run", "--prompt", "a fox", "-o", "o.mp4", *size, *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert sorted(here.iterdir()) == before


def test_a_wrong_file_is_said_before_the_bundle_is_opened(here: Path) -> None:
    from ltx_trt.job import Job, execute

    job = Job(Wishes("a fox", image=("no.png",)), Path("no-bundle"), Path("o.mp4"), choice=Choice())
    with pytest.raises(UserError, match=r"no\.png is no image"):
        execute(job)


def test_the_originals_names_and_ours_say_the_same() -> None:
    theirs = input_media.media(
        Wishes(
            "a fox",
            conditioning_media_paths=("a.png", "b.png"),
            conditioning_strengths=(1.0, 0.5),
            conditioning_start_frames=(0, 24),
        )
    )
    ours = input_media.media(Wishes("a fox", image=("a.png", "b.png@24:0.5")))
    assert [(i.path, i.frame, i.strength) for i in theirs.items] == [
        (i.path, i.frame, i.strength) for i in ours.items
    ]


def test_a_command_line_of_the_original_makes_a_clip_that_shows_its_images(here: Path) -> None:
    pytest.importorskip("onnxruntime")
    size = ("--width", "64", "--height", "64", "--num_frames", "9", "--num_inference_steps", "2")
    line = ["run", "--prompt", "a red circle", "--output", "frames", *size]
    line += ["--conditioning_media_paths", "a.png", "odd@3:name.png"]
    line += ["--conditioning_start_frames", "0", "8", "--image_cond_noise_scale", "0"]
    assert cli.main(line) == 0
    assert cli.main(["run", "--prompt", "a red circle", "--output", "free", *size]) == 0

    def away(folder: str) -> float:
        shown = np.asarray(image.open(f"{folder}/0000.png"), np.float64)
        return float(np.abs(shown - np.asarray(image.open("a.png"))).mean())

    assert away("frames") < 0.7 * away("free")
