"""Files of compiled kernels: whoever reads one finds all of it."""

from pathlib import Path

import pytest

from ltx_engines.file_lock import alone
from ltx_trt.session import compiled_kernels


def test_kernels_that_are_half_written_leave_those_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_kernels.write(cache := tmp_path / "x.cache", b"the old ones")

    def write_bytes(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left"):
        compiled_kernels.write(cache, b"the new ones")
    assert cache.read_bytes() == b"the old ones"
    assert list(tmp_path.iterdir()) == [cache]


def test_what_another_process_is_writing_is_left_to_it(tmp_path: Path) -> None:
    with alone(tmp_path):
        compiled_kernels.write(tmp_path / "x.cache", b"ours")
    assert list(tmp_path.iterdir()) == []


def test_each_engine_has_a_file_for_each_gpu_and_version() -> None:
    engine = "ab" * 32
    first = compiled_kernels.place(engine, "NVIDIA GeForce RTX 4090", "1.7.1")
    assert first.name == f"{engine[:32]}.nvidia-geforce-rtx-4090.1.7.1.cache"
    others = (engine[::-1], "NVIDIA L4", "1.7.1"), (engine[::-1], "NVIDIA L4", "1.8")
    assert len({first, *(compiled_kernels.place(*other) for other in others)}) == 3
