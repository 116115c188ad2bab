"""A build that does not fit this machine is refused with numbers, unless that is to be ignored."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from ltx_engines import host
from ltx_engines.errors import UserError
from ltx_export import engine_needs, stage_plan
from ltx_export.build_job import Built, Job
from ltx_export.engine_needs import Needs

WEIGHTS = 2_000_000_000


def graph(folder: Path, *operators: str) -> Path:
    """Of one weight that lies in a file; how large, its `length` says."""
    weight = TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=[1])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.safetensors"), ("length", str(WEIGHTS))):
        weight.external_data.add(key=key, value=value)
    nodes = [helper.make_node(operator, ["x"], ["y"]) for operator in operators]
    small = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    proto = helper.make_model(helper.make_graph(nodes, "g", [], [], [weight, small]))
    path = folder / f"{'-'.join(operators)}.onnx"
    onnx.save(proto, path)
    return path


def job(path: Path) -> Job:
    engine, layers = path.with_suffix(".engine"), path.with_suffix(".json")
    return Job(path, engine, layers, "tensorrt-rtx", "1", (89,), (), {}, weight_bytes=WEIGHTS)


@pytest.mark.parametrize(
    ("operators", "kind"),
    [(("MatMul", "Add"), "float"), (("Conv",), "conv"), (("DequantizeLinear",), "small")],
)
def test_needs_are_those_of_the_plan(operators: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    memory = stage_plan.BUILD_BASE + int(WEIGHTS * stage_plan.BUILD_FACTOR[kind])
    engine = WEIGHTS + len(operators) * stage_plan.KERNEL_BYTES
    path = graph(tmp_path, *operators)
    assert engine_needs.of(path) == Needs(WEIGHTS, memory, engine)
    assert engine_needs.weight_bytes(path) == WEIGHTS


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None, int], None]:
    def has(memory: int | None, disk: int) -> None:
        monkeypatch.setattr(host, "free_memory", lambda: memory)
        monkeypatch.setattr(host, "free_disk", lambda _: disk)

    return has


def test_the_largest_build_decides_about_memory_and_all_of_them_about_the_disk(
    tmp_path: Path,
    machine: Callable[[int | None, int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    jobs = [job(graph(tmp_path, "Conv")), job(graph(tmp_path, "MatMul"))]
    memory = max(engine_needs.of(one.graph).memory for one in jobs)
    disk = sum(engine_needs.of(one.graph).engine for one in jobs)
    machine(memory, disk)
    engine_needs.check(jobs, ignored=False)
    machine(None, disk)
    engine_needs.check(jobs, ignored=False)
    for free, said in (
        ((memory - 1, disk), f"Conv.engine takes {memory:,} bytes of memory to build, "),
        ((memory, disk - 1), f"the engines take {disk:,} bytes, .* has {disk - 1:,} left; "),
    ):
        machine(*free)
        with pytest.raises(UserError, match=said + ".*--ignore-limits builds all the same"):
            engine_needs.check(jobs, ignored=False)
        engine_needs.check(jobs, ignored=True)
    assert len(caplog.messages) == 2
    engine_needs.check([], ignored=False)


def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "meminfo": "MemTotal: 9 kB\nMemAvailable:     5 kB\n",
        "memory.max": "4000\n",
        "memory.current": "3000\n",
        "memory.stat": "anon 1500\ninactive_file 1400\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(host, "GROUP", tmp_path)
    assert host.free_memory() == 2400
    (tmp_path / "memory.max").write_text("max\n")
    assert host.free_memory() == 5 * 1024
    (tmp_path / "meminfo").unlink()
    assert host.free_memory() is None


def test_room_on_a_disk_is_that_of_the_nearest_folder_that_there_is(tmp_path: Path) -> None:
    assert host.free_disk(tmp_path / "not" / "there") > 0


@pytest.mark.parametrize(
    ("size", "warned"), [(WEIGHTS, False), (WEIGHTS * 3 // 2, False), (WEIGHTS * 2, True)]
)
def test_an_engine_much_larger_than_its_weights_is_told_with_the_likely_cause(
    size: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine_needs.warn_of_bloat(job(tmp_path / "x.onnx"), Built(size, "", 0))
    assert ("TensorRT 11.2.1, issue 4841" in caplog.text) is warned


def test_kernels_alone_are_no_bloat(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = replace(job(tmp_path / "x.onnx"), weight_bytes=0)
    engine_needs.warn_of_bloat(small, Built(engine_needs.KERNELS, "", 0))
    assert not caplog.text
