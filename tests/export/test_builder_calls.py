"""What each flavour of the builder is told, by a module that records it in the builder's place."""

import hashlib
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ltx_engines import file_lock
from ltx_engines.errors import UserError
from ltx_engines.targets import Flavour
from ltx_export import build, card, layer_table, timing_cache
from ltx_export.build_job import BuildError, Job
from ltx_export.card import Card
from tests.waiting import HANG

SHAPES = ((1, 8), (2, 8), (3, 8))
HOPPER = Card("NVIDIA H100", 90, 1000)


class Times:
    """A timing cache that knows letters; the letters of another GPU are capital."""

    def __init__(self, known: bytes) -> None:
        self.known = known

    def serialize(self) -> bytes:
        return self.known

    def combine(self, other: "Times", ignored: bool) -> bool:
        fits = not ignored and self.known == self.known.lower()
        self.known = bytes(sorted({*self.known, *other.known})) if fits else self.known
        return fits


@dataclass
class Config:
    """Attributes that are not set here are recorded all the same."""

    capabilities: dict[int, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    set: list[str] = field(default_factory=list)
    times: Times | None = None
    measured: bytes = b""

    def set_flag(self, flag: str) -> None:
        self.set.append(flag)

    def create_timing_cache(self, known: bytes) -> Times:
        return Times(known)

    def set_timing_cache(self, times: Times, ignored: bool) -> bool:
        self.times = times
        return not ignored and times.known == times.known.lower()

    def get_timing_cache(self) -> Times | None:
        return self.times and Times(self.times.known + self.measured)

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
    activations: tuple[int, ...] = (123,)
    more: dict[str, str] = field(default_factory=dict)
    config: Config = field(default_factory=Config)
    flags: list[int] = field(default_factory=list)
    marked: list[str] = field(default_factory=list)

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
            BuilderFlag=SimpleNamespace(
                REFIT="refit", REFIT_INDIVIDUAL="marked", WEIGHT_STREAMING="stream", **self.more
            ),
            DataType=SimpleNamespace(BF16="bf16", HALF="f16", FLOAT="f32", INT64="i64"),
        )

    def builder(self, log: Any) -> SimpleNamespace:
        def write(network: Any, config: Any, writer: Any) -> bool:
            config.progress_monitor.phase_start("Building", None, 2)
            assert config.progress_monitor.step_complete("Building", 0)
            writer.write(b"pl")
            writer.write(b"an")
            for size in self.activations:
                log.log(4, f"Total Activation Memory: {size} bytes")
            log.log(4, "Layers:\nName: k, LayerType: kgen, Inputs: [], Constants: [], Outputs: []")
            if not self.builds:
                log.log(0, "no kernel\nfor this")
            return self.builds

        def network(flags: int) -> SimpleNamespace:
            self.flags.append(flags)
            tensor = SimpleNamespace(name="latents", dtype=self.dtype)
            return SimpleNamespace(
                num_inputs=1,
                num_outputs=0,
                get_input=lambda _: tensor,
                mark_weights_refittable=mark,
            )

        def mark(name: str) -> bool:
            self.marked.append(name)
            return name.endswith(".weight")

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


def job(folder: Path, flavour: Flavour, targets: tuple[int, ...], **options: Any) -> Job:
    return Job(
        folder / "x.onnx",
        folder / "x.engine",
        folder / "x.layers.json",
        flavour,
        "11.0",
        targets,
        ({"latents": SHAPES},),
        {"latents": "bfloat16"},
        **options,
    )


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(recorder: Recorder, order: Job, monkeypatch: pytest.MonkeyPatch) -> build.Built:
    monkeypatch.setitem(sys.modules, build.MODULES[order.flavour], recorder.module())
    monkeypatch.setattr(card, "at_hand", lambda: HOPPER)
    told: list[dict[str, object]] = []
    built = build.build(order, told.append)
    assert [message for message in told if "note" not in message] == [
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


@pytest.mark.parametrize(
    ("flavour", "target", "set_"), [("tensorrt-rtx", 86, ["user"]), ("tensorrt", 90, [])]
)
def test_engines_of_rtx_ask_the_driver_for_no_memory_while_they_run(
    flavour: Flavour,
    target: int,
    set_: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CUDA graph could not hold that. Streamed weights are never captured."""
    plain, streams = (Recorder(more={"REQUIRE_USER_ALLOCATION": "user"}) for _ in range(2))
    run(plain, job(tmp_path, flavour, (target,)), monkeypatch)
    run(streams, job(tmp_path, flavour, (target,), weight_streaming=True), monkeypatch)
    assert plain.config.set == set_
    assert streams.config.set == ["stream"]


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
    run(silent, job(tmp_path, "tensorrt-rtx", (86,)), monkeypatch)
    options = {"optimization_level": 0, "workspace": 64}
    run(told, job(tmp_path, "tensorrt-rtx", (86,), **options), monkeypatch)
    assert silent.config.limits == {}
    assert silent.config.set == silent.marked == []
    assert not hasattr(silent.config, "builder_optimization_level")
    assert told.config.limits == {"workspace": 64}
    assert told.config.builder_optimization_level == 0  # type: ignore[attr-defined]


def test_tensorrt_leaves_room_for_the_weights_and_for_others_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, wished, full = Recorder(), Recorder(), Recorder()
    order = job(tmp_path, "tensorrt", (90,), weight_bytes=400)
    told: list[dict[str, object]] = []
    run(usual, order, monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", Recorder().module())
    build.build(order, told.append)
    run(wished, replace(order, workspace=900), monkeypatch)
    run(full, replace(order, weight_bytes=5000), monkeypatch)
    assert usual.config.limits == {"workspace": 480}
    assert "workspace of 480 bytes, of 1,000 that are free on NVIDIA H100" in str(told[0])
    assert wished.config.limits == {"workspace": 900}
    assert full.config.limits == {"workspace": 0}


@pytest.mark.parametrize(
    ("flavour", "target", "flag"), [("tensorrt", 90, "marked"), ("tensorrt-rtx", 86, "marked")]
)
def test_weights_are_marked_by_name_before_they_can_be_refitted(
    flavour: Flavour, target: int, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    order = job(tmp_path, flavour, (target,), refittable=("a.weight",), weight_streaming=True)
    run(recorder, order, monkeypatch)
    assert recorder.marked == ["a.weight"]
    assert set(recorder.config.set) == {flag, "stream"}
    with pytest.raises(BuildError, match=r"^a\.bias cannot be refitted: it is no weight"):
        run(Recorder(), replace(order, refittable=("a.bias",)), monkeypatch)


def test_what_tensorrt_measured_is_there_for_the_next_engine_on_that_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, rtx = (Recorder(config=Config(measured=b)) for b in (b"a", b"b", b"c"))
    run(first, job(tmp_path, "tensorrt", (90,)), monkeypatch)
    run(second, job(tmp_path, "tensorrt", (90,)), monkeypatch)
    run(rtx, job(tmp_path, "tensorrt-rtx", (86,)), monkeypatch)
    (file,) = (tmp_path / "cache/ltx-trt/timing").glob("*.cache")
    assert file.name == "tensorrt-11.0-nvidia-h100.cache"
    assert second.config.times is not None
    assert second.config.times.known == b"a"
    assert file.read_bytes() == b"ab"
    assert rtx.config.times is None


def test_two_builds_at_once_lose_nothing_of_what_they_measured(tmp_path: Path) -> None:
    path = tmp_path / "timing" / "x.cache"
    both = [Config(measured=letter) for letter in (b"a", b"b")]
    for config in both:
        timing_cache.use(config, path)
    for config in both:
        timing_cache.save(config, path)
    assert path.read_bytes() == b"ab"
    assert list(path.parent.iterdir()) == [path]


def test_whoever_saves_waits_for_whoever_saves(tmp_path: Path) -> None:
    path, config = tmp_path / "x.cache", Config(measured=b"a")
    timing_cache.use(config, path)
    saver = threading.Thread(target=timing_cache.save, args=(config, path))
    with file_lock.alone(tmp_path) as alone:
        assert alone
        saver.start()
        saver.join(0.1)
        assert saver.is_alive()
        path.write_bytes(b"b")
    saver.join(HANG)
    assert path.read_bytes() == b"ab"


def test_a_timing_cache_that_does_not_fit_is_left_out_and_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, config = tmp_path / "x.cache", Config(measured=b"a")
    path.write_bytes(b"XYZ")
    timing_cache.use(config, path)
    timing_cache.save(config, path)
    assert "is not a timing cache of this GPU" in caplog.text
    assert path.read_bytes() == b"a"


def test_the_engine_is_written_and_hashed_on_the_way_and_its_table_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = job(tmp_path, "tensorrt", (90,))
    built = run(Recorder(), order, monkeypatch)
    assert order.engine.read_bytes() == b"plan"
    assert built == build.Built(4, hashlib.sha256(b"plan").hexdigest(), 123)
    assert [layer.name for layer in layer_table.read(order.layers)] == ["k"]


@pytest.mark.parametrize("sizes", [(18_509_312, 8_797_696), (8_797_696, 18_509_312)])
def test_the_activations_are_those_of_the_largest_profile_wherever_it_stands(
    sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(activations=sizes)
    built = run(recorder, job(tmp_path, "tensorrt-rtx", (86,)), monkeypatch)
    assert built.activations == 18_509_312


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


def test_a_package_that_was_made_again_holds_the_same_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Recorder(version="11.0.post1"), job(tmp_path, "tensorrt", (90,)), monkeypatch)


def test_another_version_than_the_one_of_the_key_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"tensorrt 10\.15 was loaded, 11\.0 is installed"):
        run(Recorder(version="10.15"), job(tmp_path, "tensorrt", (90,)), monkeypatch)
    assert not (tmp_path / "x.engine").exists()
