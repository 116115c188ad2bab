"""What each flavour of the builder is told, by a module that records it in the builder's place."""

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ltx_engines.errors import UserError
from ltx_engines.targets import Flavour
from ltx_export import build, layer_table
from ltx_export.build import BuildError, Job

SHAPES = ((1, 8), (2, 8), (3, 8))


@dataclass
class Config:
    """Attributes that are not set here are recorded all the same."""

    capabilities: dict[int, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    profiles: list[dict[str, Any]] = field(default_factory=list)

    def set_compute_capability(self, capability: str, index: int) -> None:
        self.capabilities[index] = capability

    def set_memory_pool_limit(self, pool: str, limit: int) -> None:
        self.limits[pool] = limit

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile.shapes)


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *ends: tuple[int, ...]) -> None:
        self.shapes[name] = ends


@dataclass
class Recorder:
    """A builder's module."""

    dtype: str = "bf16"
    parses: bool = True
    builds: bool = True
    typed: bool = True
    version: str = "11.0"
    config: Config = field(default_factory=Config)
    flags: list[int] = field(default_factory=list)

    def module(self) -> SimpleNamespace:
        base = type("Base", (), {"ERROR": 1})
        flags = SimpleNamespace(STRONGLY_TYPED=1) if self.typed else SimpleNamespace()
        return SimpleNamespace(
            __version__=self.version,
            ILogger=base,
            IStreamWriter=base,
            IProgressMonitor=base,
            Builder=self.builder,
            OnnxParser=self.parser,
            NetworkDefinitionCreationFlag=flags,
            ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
            ComputeCapability=SimpleNamespace(SM86="SM86", SM89="SM89"),
            MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
            DataType=SimpleNamespace(BF16="bf16", HALF="f16", FLOAT="f32", INT64="i64"),
        )

    def builder(self, log: Any) -> SimpleNamespace:
        def write(network: Any, config: Any, writer: Any) -> bool:
            config.progress_monitor.phase_start("Building", None, 2)
            assert config.progress_monitor.step_complete("Building", 0)
            writer.write(b"pl")
            writer.write(b"an")
            log.log(4, "Total Activation Memory: 123 bytes")
            log.log(4, "Layers:\nName: k, LayerType: kgen, Inputs: [], Constants: [], Outputs: []")
            if not self.builds:
                log.log(0, "no kernel\nfor this")
            return self.builds

        def network(flags: int) -> SimpleNamespace:
            self.flags.append(flags)
            tensor = SimpleNamespace(name="latents", dtype=self.dtype)
            return SimpleNamespace(num_inputs=1, num_outputs=0, get_input=lambda _: tensor)

        return SimpleNamespace(
            create_network=network,
            create_builder_config=lambda: self.config,
            create_optimization_profile=Profile,
            build_serialized_network_to_stream=write,
        )

    def parser(self, *_: Any) -> SimpleNamespace:
        error = SimpleNamespace(node_name=lambda: "to_q", desc=lambda: "bad axes")
        return SimpleNamespace(
            parse_from_file=lambda _: self.parses, num_errors=1, get_error=lambda _: error
        )


def job(folder: Path, flavour: Flavour, targets: tuple[int, ...], **options: int) -> Job:
    return Job(
        folder / "x.onnx",
        folder / "x.engine",
        folder / "x.layers.json",
        flavour,
        "11.0",
        targets,
        ({"latents": SHAPES},),
        {"latents": "bfloat16"},
        **options,  # type: ignore[arg-type]
    )


def run(recorder: Recorder, order: Job, monkeypatch: pytest.MonkeyPatch) -> build.Built:
    monkeypatch.setitem(sys.modules, build.MODULES[order.flavour], recorder.module())
    monkeypatch.setattr(build, "card", lambda: 90)
    told: list[dict[str, object]] = []
    built = build.build(order, told.append)
    assert told == [
        {"phase": "Building", "done": 0, "of": 2},
        {"phase": "Building", "done": 1, "of": 2},
    ]
    return built


def test_rtx_is_told_its_targets_and_tensorrt_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx, classic = Recorder(), Recorder()
    run(rtx, job(tmp_path, "tensorrt-rtx", (86, 89)), monkeypatch)
    run(classic, job(tmp_path, "tensorrt", (90,)), monkeypatch)
    assert rtx.config.capabilities == {0: "SM86", 1: "SM89"}
    assert rtx.config.num_compute_capabilities == 2  # type: ignore[attr-defined]
    assert classic.config.capabilities == {}
    assert rtx.config.profiles == classic.config.profiles == [{"latents": SHAPES}]


@pytest.mark.parametrize(("typed", "flags"), [(True, 2), (False, 0)])
def test_networks_are_strongly_typed_also_where_that_is_no_choice(
    typed: bool, flags: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(typed=typed)
    run(recorder, job(tmp_path, "tensorrt", (90,)), monkeypatch)
    assert recorder.flags == [flags]


def test_what_is_not_asked_for_is_left_to_the_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, told = Recorder(), Recorder()
    run(silent, job(tmp_path, "tensorrt", (90,)), monkeypatch)
    options = {"optimization_level": 0, "workspace": 64}
    run(told, job(tmp_path, "tensorrt", (90,), **options), monkeypatch)
    assert silent.config.limits == {}
    assert not hasattr(silent.config, "builder_optimization_level")
    assert told.config.limits == {"workspace": 64}
    assert told.config.builder_optimization_level == 0  # type: ignore[attr-defined]


def test_the_engine_is_written_and_hashed_on_the_way_and_its_table_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = job(tmp_path, "tensorrt", (90,))
    built = run(Recorder(), order, monkeypatch)
    assert order.engine.read_bytes() == b"plan"
    assert built == build.Built(4, hashlib.sha256(b"plan").hexdigest(), 123)
    assert [layer.name for layer in layer_table.read(order.layers)] == ["k"]


@pytest.mark.parametrize(
    ("recorder", "said"),
    [
        (Recorder(parses=False), "^to_q: bad axes$"),
        (Recorder(builds=False), "^no kernel for this$"),
        (Recorder(dtype="f32"), "^latents is float32, the table says bfloat16$"),
        (Recorder(dtype="other"), "^latents is other, the table says bfloat16$"),
    ],
)
def test_a_refusal_is_the_builders_first_complaint(
    recorder: Recorder, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BuildError, match=said):
        run(recorder, job(tmp_path, "tensorrt", (90,)), monkeypatch)


def test_another_version_than_the_one_of_the_key_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"tensorrt 10\.15 was loaded, 11\.0 is installed"):
        run(Recorder(version="10.15"), job(tmp_path, "tensorrt", (90,)), monkeypatch)
    assert not (tmp_path / "x.engine").exists()
