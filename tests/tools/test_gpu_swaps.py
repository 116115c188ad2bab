"""What gpu_swaps.py does on a GPU, on one whose times mean nothing."""

from pathlib import Path

import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import gpu_swaps
from ltx_engines.bundle import open_bundle
from ltx_trt.session.device import Device
from tests.runtime import split_engines
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu


def test_one_engine_is_woken_while_another_one_is_at_work(tmp_path: Path) -> None:
    split_engines.make(tmp_path / "bundle", 2)
    gpu = FakeGpu()
    with Device.of(gpu, FakeLibrary(gpu)) as device:
        found = gpu_swaps.measure(device, open_bundle(tmp_path / "bundle"))
    names = [call[0] for call in gpu.calls]
    last = len(names) - 1 - names[::-1].index("wake")
    assert names[last - 1 : last + 2] == ["enqueue", "wake", "synchronize"]
    assert gpu.count("sleep") == gpu.count("wake") == gpu_swaps.TRIES + 2
    assert found.keys() == {"runs", "wake_s", "work_s", "woken_after_s", "both_s", "hidden"}
    assert gpu.leaks() == []
