"""Command lines of the original, word by word."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from ltx_engines.errors import UserError
from ltx_trt import cli
from ltx_trt.backend import Memory
from ltx_trt.options import memory_policy
from ltx_trt.original_flags import Named, destination, in_our_words, place


def test_lists_after_one_flag_get_a_flag_each() -> None:
    line = ["run", "--conditioning_media_paths", "a.png", "b.png", "--seed", "3"]
    line += ["--conditioning-start-frames", "0", "-1", "-o", "x.mp4"]
    assert in_our_words(line) == [
        *("run", "--conditioning_media_paths", "a.png", "--conditioning-media-paths", "b.png"),
        *("--seed", "3", "--conditioning-start-frames", "0", "--conditioning-start-frames", "-1"),
        *("-o", "x.mp4"),
    ]
    assert in_our_words(["--conditioning_media_paths"]) == ["--conditioning_media_paths"]


def test_a_switch_may_have_a_value() -> None:
    assert in_our_words(["--offload_to_cpu", "True", "--seed", "1"]) == [
        *("--offload_to_cpu", "--seed", "1")
    ]
    assert in_our_words(["--offload_to_cpu", "false", "--seed", "1"]) == ["--seed", "1"]
    assert in_our_words(["--offload_to_cpu", "--seed", "1"]) == ["--offload_to_cpu", "--seed", "1"]


def test_all_other_words_stay_as_they_are() -> None:
    line = ["run", "--prompt", "a fox, -1 degrees", "--lora", "a", "--lora", "b", "--eta", "-0.5"]
    assert in_our_words(line) == line


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


FOX = Named("a fox", 1, 64, 96, 9)


@contextmanager
def made_in(folder: Path | None, named: Named) -> Iterator[Path]:
    with place(destination(None, folder), named) as path:
        yield path


def test_a_clip_without_a_name_gets_the_originals() -> None:
    """`get_unique_filename` of the original: the first 30 letters, seed and size."""
    circle = Named("A red circle, 3 times, moves about", 7, 64, 96, 25)
    with made_in(Path("a/b"), circle) as first:
        first.write_bytes(b"1")
    with made_in(Path("a/b"), circle) as second:
        pass
    stem = "video_output_0_a-red-circle-times-moves-about_7_64x96x25"
    assert (first, second) == (Path(f"a/b/{stem}_0.mp4"), Path(f"a/b/{stem}_1.mp4"))
    with made_in(None, replace(FOX, prompt="42", frames=1)) as still:
        folder = Path("outputs") / date.today().isoformat()
        assert still == folder / "image_output_0__1_64x96x1_0.png"
    with made_in(Path("a"), replace(FOX, prompt="Ein Fuchs im Gr\u00fcnen")) as path:
        assert path.name == "video_output_0_ein-fuchs-im-gr\u00fcnen_1_64x96x9_0.mp4"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("\u00c4rger, it's 2 o'clock", "\u00e4rger-its-oclock"),
        ("a b-c d_e", "a-bc-de"),
        ("x" * 30 + " y", "x" * 30),
        ("x" * 29 + " yz z", "x" * 29),
        ("x" * 31, ""),
    ],
)
def test_words_of_a_name_are_those_of_the_original(prompt: str, words: str) -> None:
    """As its `convert_prompt_to_filename` has them."""
    with made_in(Path("a"), replace(FOX, prompt=prompt)) as ours:
        assert ours.name == f"video_output_0_{words}_1_64x96x9_0.mp4"


def test_two_runs_at_once_get_two_names(here: Path) -> None:
    with made_in(Path("a"), FOX) as one, made_in(Path("a"), FOX) as other:
        assert one != other
        one.write_bytes(b"1")
    assert list((here / "a").iterdir()) == [here / one]


def test_a_name_that_is_taken_is_free_again_after_a_failure(here: Path) -> None:
    with pytest.raises(UserError), made_in(Path("a/b"), FOX):
        raise UserError("no")
    assert list(here.iterdir()) == []


def test_a_folder_that_is_a_file_is_one_line_with_advice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("f").write_text("a text")
    for folder in ("f", "f/g"):
        assert cli.main(["run", "--prompt", "a fox", "--output_path", folder]) == 2
        assert capsys.readouterr().err == (
            "ltx-trt: --output-path is a folder, and f is a file; name another one, or the clip "
            "itself: --output FILE\n"
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--memory", "resident"), "but --memory is resident"),
        (("--memory", "auto"), "but --memory is auto"),
        (("--keep-loaded",), "but --keep-loaded is --memory resident"),
    ],
)
def test_offload_to_cpu_is_not_ignored_beside_another_word_for_memory(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--prompt", "a fox", "--offload_to_cpu", *words]) == 2
    assert capsys.readouterr().err == (
        f"ltx-trt: --offload-to-cpu is --memory staged, {said}; leave one of them out\n"
    )
    assert memory_policy(Memory.staged, False, offload=True) is Memory.staged
    assert memory_policy(None, False, offload=True) is Memory.staged


def test_a_run_that_fails_leaves_no_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["run", "--prompt", "a fox", "--image", "no.png"]
    assert cli.main(line) == 2
    assert cli.main([*line, "--output_path", "a/b/c"]) == 2
    assert list(here.iterdir()) == []
    assert capsys.readouterr().err.count("\n") == 2


def test_a_folder_that_was_there_stays(here: Path) -> None:
    (here / "a").mkdir()
    with pytest.raises(UserError), made_in(Path("a/b"), FOX):
        raise UserError("no")
    assert [path.name for path in here.iterdir()] == ["a"]
    assert list((here / "a").iterdir()) == []


def test_a_name_and_a_folder_are_one_too_many() -> None:
    with pytest.raises(UserError, match="--output-path a is the original's way to say --output"):
        destination(Path("x.mp4"), Path("a"))


def test_a_whole_line_of_the_original_makes_a_clip(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    line = ["run", "--prompt", "a red circle", "--height", "64", "--width", "64", "--num_frames"]
    line += ["9", "--seed", "3", "--frame_rate", "24", "--offload_to_cpu", "True"]
    Path("c.yaml").write_text("num_inference_steps: 1\n")
    assert cli.main([*line, "--pipeline_config", "c.yaml", "--output_path", "o"]) == 0
    name = "video_output_0_a-red-circle_3_64x64x9_0.mp4"
    assert [path.name for path in Path("o").iterdir()] == [name]
    assert f"o/{name}: 9 frames" in capsys.readouterr().out
