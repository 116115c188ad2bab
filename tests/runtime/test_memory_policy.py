"""Who stays in memory: staged, resident or what fits; on engines as on ONNX Runtime."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from ltx_engines import host
from ltx_engines.bundle import Bundle, open_bundle, tensor_entries
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.stages import ltx_video
from ltx_engines.targets import Flavour
from ltx_trt import cli
from ltx_trt.backend import Backend, Choice, Memory, Providers, TextEncoderDevice
from ltx_trt.options import memory_policy
from ltx_trt.pipeline import frames_of, generate, plan
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import host_room, tensorrt_adapter
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.session.graph_stages import Graphs
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from tests.runtime import engine_bundles, upsampling
from tests.runtime.conftest import SIZES
from tests.runtime.engine_bundles import Engines
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

MakeBundle = Callable[..., Path]

CLIP = VideoShape(9, 32, 64)
WISHES = Wishes(prompt="w5 w9", num_inference_steps=2)
STAGES = ("text_encoder", "transformer", "vae_decoder")


def on_graphs(memory: Memory) -> Choice:
    return Choice(Backend.onnxruntime, 1, memory, provider=Providers.cpu)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What ONNX Runtime opened and closed."""
    found: list[tuple[str, str]] = []
    real, end = OnnxRuntimeSession.open.__func__, OnnxRuntimeSession.__exit__  # type: ignore[attr-defined]

    def opened(cls: Any, /, bundle: Bundle, stage: str, **options: Any) -> Any:
        found.append(("open", stage))
        return real(cls, bundle, stage, **options)

    def closed(self: OnnxRuntimeSession, *why: Any) -> None:
        found.append(("close", self._name))
        end(self, *why)

    monkeypatch.setattr(OnnxRuntimeSession, "open", classmethod(opened))
    monkeypatch.setattr(OnnxRuntimeSession, "__exit__", closed)
    return found


def clips(folder: Path, choice: Choice, gpu: FakeGpu | None = None) -> tuple[list[bytes], set[str]]:
    """Two clips of one process, and what was said of them."""

    def device(flavour: Flavour) -> Device:
        assert gpu is not None
        return Device.of(gpu, FakeLibrary(gpu, flavour))

    def each() -> Iterator[bytes]:
        for _ in range(2):
            request, _ = resolve(WISHES, stages.bundle, None)
            notes.update(stages.prepare(plan(request, stages.bundle.manifest)))
            yield frames_of(generate(request, stages.bundle, stages)).tobytes()

    notes: set[str] = set()
    with open_stages(folder, choice, open_device=device) as stages:
        return [*each()], notes


def test_staged_graphs_are_there_one_after_the_other(
    make_bundle: MakeBundle, sessions: list[tuple[str, str]]
) -> None:
    clips(make_bundle(), on_graphs(Memory.staged))
    assert sessions == 2 * [(what, stage) for stage in STAGES for what in ("open", "close")]


def test_resident_graphs_are_opened_once_and_closed_at_the_end(
    make_bundle: MakeBundle, sessions: list[tuple[str, str]]
) -> None:
    folder = make_bundle()
    (first, second), notes = clips(folder, on_graphs(Memory.resident))
    assert sessions == [(what, stage) for what in ("open", "close") for stage in STAGES]
    assert notes == set()
    (staged, _), _ = clips(folder, on_graphs(Memory.staged))
    assert first == second == staged


def test_resident_graphs_are_closed_by_a_failure_too(
    make_bundle: MakeBundle, sessions: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    folder = make_bundle()
    monkeypatch.setattr("ltx_trt.decoder.decode", broken)
    with pytest.raises(KeyboardInterrupt):
        clips(folder, on_graphs(Memory.resident))
    assert sorted(stage for what, stage in sessions if what == "close") == sorted(STAGES)


@pytest.mark.parametrize(
    ("free", "word", "opened"),
    [(1 << 40, "resident", 3), ((1 << 40) - 1, "staged", 6), (None, "staged", 6)],
)
def test_auto_keeps_graphs_where_there_is_room_and_says_so(
    make_bundle: MakeBundle,
    sessions: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    word: str,
    opened: int,
) -> None:
    monkeypatch.setattr(host, "free_memory", lambda: free)
    monkeypatch.setattr(host_room, "weight_bytes", lambda *_: 1 << 39)
    _, notes = clips(make_bundle(), on_graphs(Memory.auto))
    (note,) = notes
    assert note.startswith(f"memory: {word}, ")
    assert sum(what == "open" for what, _ in sessions) == opened


def test_auto_leaves_half_of_the_memory_for_activations() -> None:
    assert host_room.decide(100, 200).keeps
    assert not host_room.decide(101, 200).keeps


def test_workers_share_the_memory_that_is_free() -> None:
    assert host_room.decide(25, 200, 4).keeps
    assert not host_room.decide(26, 200, 4).keeps


def test_a_file_of_several_stages_counts_once(make_bundle: MakeBundle) -> None:
    bundle = open_bundle(make_bundle())
    manifest = bundle.manifest
    shared = {
        name: stage.model_copy(update={"weights": ("by-hand.safetensors",)})
        for name, stage in manifest.stages.items()
    }
    changed = Bundle(bundle.path, manifest.model_copy(update={"stages": shared}))
    graphs = sum(manifest.files[stage.file].bytes for stage in shared.values())
    wanted = graphs + manifest.files["by-hand.safetensors"].bytes
    assert host_room.weight_bytes(changed, list(shared)) == wanted


def test_on_a_gpu_that_nobody_can_ask_auto_is_staged(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_room, "provider_name", lambda _: "CUDAExecutionProvider")
    found = host_room.policy(open_bundle(make_bundle()), on_graphs(Memory.auto), STAGES)
    assert not found.keeps
    assert "of the GPU" in found.note


def with_engines(make_bundle: MakeBundle, *stages: str) -> Path:
    folder = make_bundle()
    engine_bundles.add(folder, Engines((CLIP,), stages) if stages else Engines((CLIP,)))
    return folder


@pytest.mark.parametrize(
    ("memory", "word", "loads"), [(1 << 30, "resident", 3), (5 << 19, "staged", 6)]
)
def test_auto_keeps_engines_where_there_is_room_and_says_so(
    make_bundle: MakeBundle, memory: int, word: str, loads: int
) -> None:
    """Three engines of a MiB each, and less than three of them, or more."""
    folder, gpu = make_bundle(), FakeGpu(memory=memory)
    engine_bundles.add(folder, Engines((CLIP,), weights=1 << 20))
    (first, second), notes = clips(folder, Choice(memory=Memory.auto), gpu)
    (note,) = (note for note in notes if note.startswith("memory: "))
    assert note.startswith(f"memory: {word}, all stages ")
    assert gpu.count("load") == loads
    assert gpu.leaks() == []
    assert first == second


def test_what_has_no_engine_stays_too(
    make_bundle: MakeBundle, sessions: list[tuple[str, str]]
) -> None:
    gpu = FakeGpu()
    clips(with_engines(make_bundle, "transformer"), Choice(memory=Memory.resident), gpu)
    assert [stage for what, stage in sessions if what == "open"] == ["text_encoder", "vae_decoder"]
    assert sum(what == "close" for what, _ in sessions) == 2
    assert gpu.count("load") == 1
    assert gpu.leaks() == []


def test_what_only_some_clips_need_stays_too_where_it_has_no_engine(
    make_bundle: MakeBundle, sessions: list[tuple[str, str]]
) -> None:
    folder, gpu = with_engines(make_bundle), FakeGpu()
    upsampling.add(folder)
    choice = Choice(memory=Memory.resident)
    device = Device.of(gpu, FakeLibrary(gpu))
    with open_stages(folder, choice, open_device=lambda _: device) as stages:
        for _ in range(2):
            with stages("latent_upsampler"):
                pass
        assert sessions == [("open", "latent_upsampler")]
    assert sessions == [("open", "latent_upsampler"), ("close", "latent_upsampler")]


def test_auto_says_nothing_of_graphs_that_a_clip_does_not_use(make_bundle: MakeBundle) -> None:
    folder = with_engines(make_bundle)
    upsampling.add(folder)
    _, notes = clips(folder, Choice(memory=Memory.auto), FakeGpu())
    assert sum(note.startswith("memory: ") for note in notes) == 1


def test_the_text_encoder_alone_is_opened_on_the_cpu_when_that_is_said(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str | None] = {}

    def opened(_: object, stage: str, *, provider: str | None, **others: object) -> None:
        asked[stage] = provider

    monkeypatch.setattr(OnnxRuntimeSession, "open", opened)
    bundle = open_bundle(make_bundle())
    for device, wanted in ((TextEncoderDevice.cpu, "cpu"), (TextEncoderDevice.auto, "cuda")):
        choice = Choice(provider=Providers.cuda, text_encoder=device)
        graphs = Graphs(bundle, choice, None, ())
        for stage in ("text_encoder", "transformer"):
            graphs.alone(stage)
        assert asked == {"text_encoder": wanted, "transformer": "cuda"}


def test_the_text_encoder_computes_on_the_cpu_and_the_rest_on_the_gpu(
    make_bundle: MakeBundle, sessions: list[tuple[str, str]]
) -> None:
    folder, gpu, whole = with_engines(make_bundle), FakeGpu(), FakeGpu()
    choice = Choice(text_encoder=TextEncoderDevice.cpu)
    found, notes = clips(folder, choice, gpu)
    assert found == clips(folder, Choice(), whole)[0]
    assert not any("text_encoder" in note for note in notes)
    assert {call[1] for call in gpu.calls if call[0] == "load"} == {"transformer", "vae_decoder"}
    assert sessions == 2 * [("open", "text_encoder"), ("close", "text_encoder")]


def test_a_text_encoder_that_no_cpu_computes_is_refused_before_the_gpu_is_opened(
    make_bundle: MakeBundle,
) -> None:
    entry = tensor_entries(ltx_video(SIZES)["text_encoder"].outputs, "bfloat16")
    folder = with_engines(make_bundle)
    bundle = open_bundle(folder)
    stages = dict(bundle.manifest.stages)
    stages["text_encoder"] = stages["text_encoder"].model_copy(update={"outputs": entry})
    text = bundle.manifest.model_copy(update={"stages": stages}).model_dump_json()
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"^--text-encoder-device cpu: stage text_encoder is bf"):
        clips(folder, Choice(text_encoder=TextEncoderDevice.cpu))  # `device` would fail


@pytest.mark.parametrize(
    ("command", "default"), [("run", "staged"), ("bench", "staged"), ("batch", "auto")]
)
def test_the_help_says_what_memory_is_when_nobody_says_it(
    capsys: pytest.CaptureFixture[str], command: str, default: str
) -> None:
    assert cli.main([command, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    _, _, memory = said.partition(" --memory ")
    assert f"auto: if all fit. [default: ({default})]" in memory
    _, _, steps = said.partition(" --num-inference-steps ")
    assert re.match(r"<[^>]*> \w+", steps), "it has no help"


def test_a_wrong_word_for_the_memory_points_to_the_help_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["run", "--prompt", "w5", "-o", "o.gif", "--memory", "nonsense"]) == 2
    said = capsys.readouterr().err
    assert "Value error" not in said
    assert said.endswith("(ltx-trt run --help)\n")


def test_the_older_word_is_one_of_the_three() -> None:
    assert memory_policy(None, keep_loaded=True) is Memory.resident
    assert memory_policy(Memory.resident, keep_loaded=True) is Memory.resident
    assert memory_policy(None, keep_loaded=False) is Memory.staged
    with pytest.raises(UserError, match="leave one of them out"):
        memory_policy(Memory.staged, keep_loaded=True)


def test_a_run_says_its_peaks_and_finds_its_texts_the_second_time(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    folder = make_bundle()
    words = ("run", "--bundle", str(folder), "--prompt", "w5", "--num-inference-steps", "1")

    def report(*more: str) -> dict[str, Any]:
        output = tmp_path / "o.gif"
        assert cli.main([*words, "-o", str(output), "--json", *more]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    first, second, third = report(), report("--memory", "resident"), report("--no-prompt-cache")
    assert [row["cached_prompts"] for row in (first, second, third)] == [0, 2, 0]
    assert first["sha256"] == second["sha256"] == third["sha256"]
    assert first["host_memory"] > first["host_anonymous"] > 1_000_000
    assert cli.main([*words, "-o", str(tmp_path / "p.gif")]) == 0
    assert " of memory (" in capsys.readouterr().out
    refused = (*words, "-o", str(tmp_path / "q.gif"), "--memory", "all")
    assert cli.main([*refused]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "q.gif").exists()
