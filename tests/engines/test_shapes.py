import pytest

from ltx_engines.errors import UserError
from ltx_engines.shapes import SPACE, TIME, VideoShape, parse, snap


def original(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """The padding of the original's inference.py, as it stands there."""
    return (
        ((frames - 2) // 8 + 1) * 8 + 1,
        ((height - 1) // 32 + 1) * 32,
        ((width - 1) // 32 + 1) * 32,
    )


def test_snapping_is_the_originals_padding() -> None:
    for frames in range(1, 40):
        for side in (*range(1, 100), 480, 704, 720, 1216, 1280):
            shape = snap(frames, side, side + 5)
            expected = original(frames, side, side + 5)
            assert (shape.frames, shape.height, shape.width) == expected


def test_snapping_never_cuts_and_adds_less_than_one_latent_cell() -> None:
    for frames in range(1, 40):
        for side in range(1, 100):
            shape = snap(frames, side, side)
            assert 0 <= shape.frames - frames < TIME
            assert 0 <= shape.height - side < SPACE
            assert shape.height == shape.width


def test_a_legal_clip_is_its_own_snap() -> None:
    for frames in range(1, 200, TIME):
        for side in range(SPACE, 300, SPACE):
            shape = VideoShape(frames, side, 2 * side)
            assert snap(shape.frames, shape.height, shape.width) == shape


def test_tokens_are_the_cells_of_the_latent_grid() -> None:
    assert VideoShape(1, 32, 32).latent == (1, 1, 1)
    shape = VideoShape(frames=121, height=704, width=1216)
    assert shape.latent == (16, 22, 38)
    assert shape.tokens == 16 * 22 * 38


def test_eight_frames_more_are_one_latent_frame_more() -> None:
    for frames in range(1, 100, TIME):
        rows, columns = 2, 3
        shape = VideoShape(frames, rows * SPACE, columns * SPACE)
        longer = VideoShape(frames + TIME, shape.height, shape.width)
        assert longer.tokens - shape.tokens == rows * columns


@pytest.mark.parametrize(("frames", "hint"), [(120, 121), (8, 9), (2, 1), (0, 1), (-7, 1)])
def test_an_illegal_number_of_frames_names_the_nearest_legal_one(frames: int, hint: int) -> None:
    with pytest.raises(UserError, match=rf"frames must be 8k \+ 1, not {frames}; try {hint}$"):
        VideoShape(frames, 64, 64)
    VideoShape(hint, 64, 64)


@pytest.mark.parametrize(("pixels", "hint"), [(720, 704), (31, 32), (65, 64), (0, 32), (-32, 32)])
def test_an_illegal_side_names_itself_and_the_nearest_legal_one(pixels: int, hint: int) -> None:
    said = f"must be a multiple of 32, not {pixels}; try {hint}$"
    with pytest.raises(UserError, match=f"height {said}"):
        VideoShape(9, pixels, 64)
    with pytest.raises(UserError, match=f"width {said}"):
        VideoShape(9, 64, pixels)
    VideoShape(9, hint, hint)


@pytest.mark.parametrize("wish", [0, -1, -7, -31])
def test_nothing_is_snapped_out_of_nothing(wish: int) -> None:
    for name in ("frames", "height", "width"):
        sizes = {"frames": 9, "height": 64, "width": 64, name: wish}
        with pytest.raises(UserError, match=f"{name} must be at least 1, not {wish}$"):
            snap(**sizes)


def test_a_shape_is_written_as_width_height_and_frames() -> None:
    assert parse(" 1216x704x121 ") == VideoShape(121, 704, 1216)


@pytest.mark.parametrize("word", ["", "64x64", "64*64*9", "64x64x9x1", "-64x64x9", "6\u0664x64x9"])
def test_what_is_no_shape_is_said_with_an_example(word: str) -> None:
    with pytest.raises(UserError, match=r"is not WIDTHxHEIGHTxFRAMES; .* 1216x704x121$"):
        parse(word)
