"""A malformed header costs one line that names the tensor; whatever the format allows is read."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ltx_ref.checkpoint import CheckpointError, Header, TensorInfo, read_header
from ltx_ref.ltx_video.config import read_config
from ltx_ref.ltx_video.upsampler_config import read_upsampler_config

TraceFunction = Callable[[FrameType, str, Any], Any]

DEEP = "[" * 100_000 + "]" * 100_000


def written(path: Path, table: dict[str, Any] | str, data: int = 64) -> Path:
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def entry(begin: object, end: object, shape: object = None, dtype: object = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [8], "data_offsets": [begin, end]}


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as said:
        read_header(path)
    assert str(said.value).startswith(str(path))
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 4000
    return str(said.value)


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        f'{{"x": {DEEP}}}',
        f'{{"__metadata__": {{"config": {DEEP}}}}}',
    ],
)
def test_a_deeply_nested_header_was_a_recursion_error(tmp_path: Path, text: str) -> None:
    assert "nested too deeply" in refused(written(tmp_path / "a", text))


@pytest.mark.parametrize("size", ["1e400", "-1e400", "NaN", "8.0", "true", '"8"', "-8", "null"])
def test_a_size_that_is_no_size_was_an_overflow_error_or_rounded(tmp_path: Path, size: str) -> None:
    text = f'{{"x.weight": {{"dtype": "U8", "shape": [{size}], "data_offsets": [0, 8]}}}}'
    assert "entry of 'x.weight' is malformed" in refused(written(tmp_path / "a", text))


@pytest.mark.parametrize("shape", [[10**4000], [2**63], [1] * 65, [-2, -4], "8", {"8": 8}])
def test_a_shape_that_is_no_list_of_sizes_is_named(tmp_path: Path, shape: object) -> None:
    path = written(tmp_path / "a", {"x.weight": entry(0, 8, shape)})
    assert "entry of 'x.weight' is malformed" in refused(path)


def test_a_shape_of_astronomic_size_is_one_line(tmp_path: Path) -> None:
    path = written(tmp_path / "a", {"x.weight": entry(0, 8, [2**62] * 64)})
    assert "'x.weight' has 8 bytes" in refused(path)


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (-8, 0),
        (-16, -8),
        (8, 0),
        (0.0, 8),
        (0, 8.0),
        (False, 8),
        (0, float("inf")),
        (None, 8),
        (0, 2**70),
    ],
)
def test_a_range_that_points_into_the_header_or_backwards_was_read(
    tmp_path: Path, begin: object, end: object
) -> None:
    path = written(tmp_path / "a", {"x.weight": entry(begin, end)})
    assert "entry of 'x.weight' is malformed" in refused(path)


@pytest.mark.parametrize("shape", [[0], [3, 0]])
def test_an_empty_tensor_before_the_data_is_named_too(tmp_path: Path, shape: list[int]) -> None:
    path = written(tmp_path / "a", {"x.weight": entry(-4, -4, shape)})
    assert "entry of 'x.weight' is malformed" in refused(path)


@pytest.mark.parametrize(
    "found",
    [
        [],
        3,
        None,
        {"dtype": "U8", "shape": [8]},
        {"dtype": "U8", "shape": 8, "data_offsets": [0, 8]},
        {"dtype": "U8", "shape": [8], "data_offsets": [0]},
        {"dtype": "U8", "shape": [8], "data_offsets": {"begin": 0, "end": 8}},
    ],
)
def test_an_entry_of_another_form_is_named(tmp_path: Path, found: object) -> None:
    path = written(tmp_path / "a", {"x.weight": found})
    assert "entry of 'x.weight' is malformed" in refused(path)


@pytest.mark.parametrize("dtype", ["F4", None, ["U8"], {}, 8])
def test_an_element_type_that_is_not_known_is_named(tmp_path: Path, dtype: object) -> None:
    path = written(tmp_path / "a", {"x.weight": entry(0, 8, dtype=dtype)})
    assert f"'x.weight' has element type {dtype!r}" in refused(path)


@pytest.mark.parametrize("second", [(0, 8), (7, 15), (0, 64), (2, 4)])
def test_two_tensors_on_the_same_bytes_were_read(tmp_path: Path, second: tuple[int, int]) -> None:
    begin, end = second
    table = {"y.weight": entry(begin, end, [end - begin]), "x.weight": entry(0, 8)}
    said = refused(written(tmp_path / "a", table))
    assert "'x.weight'" in said
    assert "'y.weight'" in said
    assert "lie on the same bytes" in said


@pytest.mark.parametrize("value", [3, None, True, ["a"], {"a": "b"}])
def test_metadata_that_are_no_strings_were_a_type_error_later(
    tmp_path: Path, value: object
) -> None:
    path = written(tmp_path / "a", {"__metadata__": {"ok": "a", "config": value}})
    assert "metadata 'config' is a " in refused(path)


@pytest.mark.parametrize("text", [DEEP, "{", "[1"])
def test_metadata_too_deep_for_json_were_a_recursion_error(tmp_path: Path, text: str) -> None:
    header = read_header(written(tmp_path / "a", {"__metadata__": {"config": text}}))
    for read in (read_config, read_upsampler_config):
        with pytest.raises(CheckpointError, match="metadata 'config' is not JSON") as said:
            read(header)
        assert "\n" not in str(said.value)


def test_a_name_of_several_lines_is_still_one_line(tmp_path: Path) -> None:
    for bad in (entry(-8, 0), entry(0, 4), entry(0, 8, dtype="a\nb")):
        refused(written(tmp_path / "a", {"x\ny": bad}))


def test_tensors_may_lie_in_any_order_and_empty_ones_anywhere(tmp_path: Path) -> None:
    table = {
        "last": entry(8, 16),
        "empty": entry(4, 4, [0, 3]),
        "first": entry(0, 8, [2], "F32"),
        "end": entry(16, 16, [0]),
        "__metadata__": {"format": "pt"},
    }
    path = written(tmp_path / "a", table, data=16)
    start = path.stat().st_size - 16
    assert read_header(path) == Header(
        path,
        {
            "last": TensorInfo("U8", (8,), start + 8, start + 16),
            "empty": TensorInfo("U8", (0, 3), start + 4, start + 4),
            "first": TensorInfo("F32", (2,), start, start + 8),
            "end": TensorInfo("U8", (0,), start + 16, start + 16),
        },
        {"format": "pt"},
    )


def test_a_scalar_has_no_axes(tmp_path: Path) -> None:
    text = '{"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}'
    assert read_header(written(tmp_path / "a", text)).shapes() == {"x": ()}


def test_the_header_of_a_large_model_is_read_once_and_not_once_for_each_tensor(
    tmp_path: Path,
) -> None:
    """Ten times the tensors cost ten times the work, not a hundred times."""
    few, many = (_work(_of(tmp_path, tensors)) for tensors in (150, 1500))
    assert few > 150, "the interpreter's steps were not counted"
    assert many < 11 * few, f"{many} steps of the interpreter, and {few} for a tenth"


def _of(folder: Path, tensors: int) -> Path:
    table = {f"blocks.{n}.weight": entry(8 * n, 8 * n + 8, [2, 2, 2]) for n in range(tensors)}
    return written(folder / str(tensors), table, data=8 * tensors)


def _work(path: Path) -> int:
    """Instructions of the interpreter that reading takes: the same on any machine, however busy."""
    steps = 0

    def count(frame: FrameType, event: str, arg: object) -> TraceFunction:
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        read_header(path)
    finally:
        sys.settrace(before)
    return steps
