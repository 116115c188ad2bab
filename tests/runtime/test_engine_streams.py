"""A clip that engines decode a few frames at a time: what is kept of it stays on the GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from ltx_engines import bundle as bundles
from ltx_engines.bundle import open_bundle
from ltx_engines.errors import UserError
from ltx_engines.manifest import OnnxRuntimeEntry
from ltx_engines.shapes import VideoShape, parse
from ltx_engines.stages import STREAM
from ltx_engines.targets import Flavour
from ltx_trt.backend import Backend, Choice, Memory, Providers, VaeTile
from ltx_trt.pipeline import Decoded, frames_of, generate, plan
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import Session, buckets, needs, tensorrt_adapter, vae_tiles
from ltx_trt.session import sizes as sizes_of_clips
from ltx_trt.session.bundle_stages import EngineStages, Stages
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.memory import aligned
from ltx_trt.session.opening import Opening, needed
from ltx_trt.session.residency import plan as room
from ltx_trt.session.stream_session import StreamSession
from ltx_trt.session.vae_tiles import EngineTiles
from ltx_trt.tiles import Cut, Streamed
from ltx_trt.triton.kept_stages import ExclusiveStages
from tests.runtime import engine_bundles, streams
from tests.runtime.engine_bundles import Engines
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

CLIP, PIECE = VideoShape(33, 64, 96), VideoShape(9, 64, 96)
"""Five latent frames; two of them, which are 16 frames of a stream."""
WISHES = Wishes("w5 w9", width=96, height=64, num_frames=33, num_inference_steps=2)
FIRST = ("text_encoder", "transformer", "sampler_step")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)


@pytest.fixture
def graphs(make_bundle: Callable[..., Path]) -> Path:
    folder = make_bundle()
    streams.add(folder)
    return folder


@pytest.fixture
def folder(graphs: Path) -> Path:
    """The decoder has an engine of pieces alone, the transformer one of two lengths."""
    clips = (CLIP, VideoShape(9, 64, 96))
    engine_bundles.add(graphs, Engines(clips, ("text_encoder", "transformer")))
    engine_bundles.add(graphs, Engines((PIECE,), (STREAM,), branches=1))
    return graphs


class Machine:
    """A fake GPU as `open_stages` finds it."""

    def __init__(self, gpu: FakeGpu | None = None) -> None:
        self.gpu = gpu or FakeGpu()

    def __call__(self, flavour: Flavour) -> Device:
        return Device.of(self.gpu, FakeLibrary(self.gpu, flavour))

    def made(
        self, folder: Path, choice: Choice, *wishes: Wishes
    ) -> tuple[list[list[Decoded]], list[str]]:
        """The chunks of each clip, and all that was said."""
        clips, said = list[list[Decoded]](), list[str]()
        with open_stages(folder, choice, open_device=self) as stages:
            for wish in wishes:
                chunks, notes = clip(stages, wish)
                clips.append(chunks)
                said += notes
        assert self.gpu.leaks() == []
        return clips, said


def clip(stages: Stages, wishes: Wishes) -> tuple[list[Decoded], tuple[str, ...]]:
    request, _ = resolve(wishes, stages.bundle, None)
    notes = stages.prepare(plan(request, stages.bundle.manifest))
    events = generate(request, stages.bundle, stages)
    return [event for event in events if isinstance(event, Decoded)], notes


def whole(folder: Path, *wishes: Wishes) -> list[bytes]:
    """By ONNX Runtime."""
    choice = Choice(Backend.onnxruntime, vae_tile=VaeTile.off)
    clips, _ = Machine().made(folder, choice, *wishes)
    return [frames_of(chunks).tobytes() for chunks in clips]


@pytest.mark.parametrize("memory", [Memory.staged, Memory.resident])
def test_a_stream_alone_decodes_clips_of_any_length_as_one_graph_would(
    folder: Path, memory: Memory
) -> None:
    machine = Machine()
    wishes = (WISHES, replace(WISHES, num_frames=9, seed=3), WISHES)
    clips, notes = machine.made(folder, Choice(memory=memory), *wishes)
    assert [frames_of(chunks).tobytes() for chunks in clips] == whole(folder, *wishes)
    assert [len(chunk.frames) for chunk in clips[0]] == [9, 16, 8]
    assert "vae_decoder: 16 frames at a time, as with --vae-tile stream" in notes
    assert not any("ONNX Runtime" in note for note in notes)
    loads = [name for _, name in machine.gpu.named("load")]
    assert loads.count(STREAM) == (1 if memory is Memory.resident else len(wishes))


@pytest.fixture
def decoder(folder: Path) -> Iterator[tuple[FakeGpu, StreamSession]]:
    gpu = FakeGpu()
    with opened(folder, gpu) as session:
        yield gpu, session
    assert gpu.leaks() == []


@contextmanager
def opened(folder: Path, gpu: FakeGpu) -> Iterator[StreamSession]:
    bundle = open_bundle(folder)
    with Device.of(gpu, FakeLibrary(gpu)) as device:
        chain = bundle.engines(STREAM, gpu.capability, device.library.flavour)
        (residency,) = room([needed(bundle.manifest, chain)], gpu.memory()[0])
        runner = Opening(bundle, device).runner(chain, residency)
        with StreamSession(STREAM, bundle.stage(STREAM), device, runner) as session:
            yield session


def feeds(first: int = 0, value: float = 0.5) -> dict[str, Any]:
    """A piece of a clip of seven latent frames."""
    return {
        "latents": np.full((1, 4, 2, 2, 3), value, np.float32),
        "place": np.array([first, 7], np.int64),
        "timestep": np.ones(1, np.float32),
        "noise_1": np.zeros((2, 4, 6), np.float32),
    }


def sizes(session: Session) -> dict[str, int]:
    """Bytes of what goes up and comes down for each piece, and of what is kept."""
    kept = 4 * 4 * 2 * (2 * 3) + 4 * 3 * 2 * (4 * 6)
    return {"piece": 4 * 4 * 2 * 6 + 16, "clip": 4 + 4 * 2 * 24, "kept": kept}


def test_nothing_that_is_kept_crosses_to_the_host(decoder: tuple[FakeGpu, StreamSession]) -> None:
    gpu, session = decoder
    stream, size = session.begin(), sizes(session)
    for number in range(3):
        before = len(gpu.calls)
        made = stream(feeds(2 * number))
        assert list(made) == ["pixels"]
        calls = gpu.calls[before:]
        up, down = (
            sum(call[2] for call in calls if call[0] == word) for word in ("upload", "download")
        )
        assert up == size["piece"] + (size["clip"] if number == 0 else 0)
        assert down == made["pixels"].nbytes
        filled = [call[3] for call in calls if call[0] == "fill"]
        assert sum(filled) == (size["kept"] if number == 0 else 0)
        assert not any(call[0] in ("copy", "allocate", "pinned") for call in calls if number)


def test_what_was_written_is_what_the_next_piece_reads(
    decoder: tuple[FakeGpu, StreamSession],
) -> None:
    gpu, session = decoder
    stream, found = session.begin(), []
    for number in range(3):
        stream(feeds(2 * number))
        found.append(bound(gpu))
    first, second, third = found
    for index in range(len(streams.KEPT)):
        past, following = f"past_{index}", f"next_{index}"
        assert first[past] == second[following] == third[past]
        assert first[following] == second[past] == third[following]
    same = [name for name in first if not name.startswith(("past_", "next_"))]
    assert all(first[name] == second[name] == third[name] for name in same)


def bound(gpu: FakeGpu) -> dict[str, int]:
    """The addresses that the engine was given last."""
    return {call[3]: call[4] for call in gpu.named("set_address") if call[1] == STREAM}


def test_a_clip_begins_with_nothing_of_the_one_before(
    decoder: tuple[FakeGpu, StreamSession],
) -> None:
    gpu, session = decoder

    def clip(pieces: int, value: float) -> list[np.ndarray[Any, Any]]:
        stream = session.begin()
        return [stream(feeds(2 * i, value))["pixels"] for i in range(pieces)]

    alone = clip(2, 0.5)
    clip(1, -0.9)  # an odd number of pieces: the halves are turned when the next clip begins
    again = clip(2, 0.5)
    for one, other in zip(alone, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(again[0][:, :, :8]).max() == 0, "of frames that nobody wrote"
    assert gpu.count("fill") == 3 * len(streams.KEPT)


def test_whoever_was_at_an_earlier_clip_does_not_go_on_with_it(
    decoder: tuple[FakeGpu, StreamSession],
) -> None:
    _, session = decoder
    earlier = session.begin()
    earlier(feeds())
    later = session.begin()
    with pytest.raises(ValueError, match="another clip has begun"):
        earlier(feeds(2))
    later(feeds())


def test_called_with_what_is_kept_it_gives_it_back_and_no_clip_goes_on(
    decoder: tuple[FakeGpu, StreamSession],
) -> None:
    _, session = decoder
    clip = session.begin()
    clip(feeds())
    kept = {
        f"past_{index}": np.full((1, k.channels, 2, 2 * k.scale, 3 * k.scale), 0.25, np.float32)
        for index, k in enumerate(streams.KEPT)
    }
    made = session(feeds() | kept)
    assert sorted(made) == ["next_0", "next_1", "pixels"]
    np.testing.assert_array_equal(made["next_0"], feeds()["latents"])
    with pytest.raises(ValueError, match="another clip has begun"):
        clip(feeds(2))


def test_onnx_runtimes_own_engines_stream_where_the_bundle_has_profiles_for_it(
    graphs: Path,
) -> None:
    piece = {"latent_frames": (2, 2, 2), "latent_height": (2, 2, 2), "latent_width": (3, 3, 3)}
    entry = OnnxRuntimeEntry(providers=("tensorrt-rtx",), profiles=(piece,))
    choice = Choice(provider=Providers.tensorrt_rtx)
    assert decided(graphs, choice, {}) is None, "without profiles it builds for whatever comes"
    longer = OnnxRuntimeEntry(
        providers=("tensorrt-rtx",), profiles=(piece | {"latent_frames": (3, 3, 3)},)
    )
    assert decided(graphs, choice, {"vae_decoder": longer}) == (3, 2, 3)
    assert decided(graphs, choice, {"vae_decoder": longer, STREAM: entry}) == Streamed(2)
    wished = replace(choice, vae_tile=VaeTile.stream)
    with pytest.raises(UserError, match=f"{STREAM} has no engine here"):
        decided(graphs, wished, {"vae_decoder": longer})


def decided(folder: Path, choice: Choice, made_for: dict[str, OnnxRuntimeEntry]) -> Cut:
    opened = open_bundle(folder)
    manifest = opened.manifest.model_copy(update={"onnxruntime": made_for})
    choose = vae_tiles.of_graph("vae_decoder", bundles.Bundle(folder, manifest), choice)
    return choose((5, 2, 3))


def test_a_larger_clip_after_a_smaller_one_has_larger_buffers(graphs: Path) -> None:
    engine_bundles.add(graphs, Engines((PIECE, VideoShape(9, 128, 96)), (STREAM,)))
    gpu = FakeGpu()
    with opened(graphs, gpu) as session:
        for rows in (2, 4, 2):
            given = feeds() | {
                "latents": np.full((1, 4, 2, rows, 3), 0.5, np.float32),
                "noise_1": np.zeros((2, 2 * rows, 6), np.float32),
            }
            stream = session.begin()
            stream(given)
            pixels = stream(given | {"place": np.array([2, 7], np.int64)})["pixels"]
            assert pixels.shape == (1, 3, 16, 32 * rows, 96)
            np.testing.assert_allclose(pixels, np.tanh(0.5), rtol=1e-6)
    assert gpu.leaks() == []


def test_floats_of_the_engine_are_half_as_wide_where_they_are_kept(graphs: Path) -> None:
    engine_bundles.add(graphs, Engines((PIECE,), (STREAM,), dtype="bfloat16"))
    gpu = FakeGpu()
    with opened(graphs, gpu) as session:
        stream = session.begin()
        for number in range(2):
            pixels = stream(feeds(2 * number))["pixels"]
        assert sum(call[3] for call in gpu.named("fill")) == sizes(session)["kept"] // 2
    np.testing.assert_allclose(pixels, np.tanh(0.5), rtol=2**-8)
    assert gpu.leaks() == []


def test_what_is_kept_is_planned_twice_since_it_is_read_and_written(folder: Path) -> None:
    bundle = open_bundle(folder)
    chain = bundle.engines(STREAM, 89, "tensorrt-rtx")
    need = needs.need(bundle.manifest, chain)
    latents, pixels = 4 * 4 * 2 * 6, 4 * 3 * 16 * 64 * 96
    assert need.buffers == latents + 16 + 4 + 4 * 2 * 24 + pixels + 2 * sizes_kept()
    gpu = FakeGpu()
    with opened(folder, gpu) as session:
        before = gpu.used
        session.begin()(feeds())
        taken = gpu.used - before
    tensors = (*chain[0].inputs, *chain[0].outputs)
    assert need.buffers <= taken <= need.buffers + need.activations + aligned(1) * len(tensors)


def sizes_kept() -> int:
    return sum(4 * k.channels * 2 * prod((2 * k.scale, 3 * k.scale)) for k in streams.KEPT)


def test_a_card_without_room_for_what_is_kept_says_so_before_anything_is_loaded(
    folder: Path,
) -> None:
    machine = Machine()
    choice = Choice(device_memory=200_000)
    with pytest.raises(UserError, match=rf"{STREAM} needs at least .*--vae-stream") as told:
        machine.made(folder, choice, WISHES)
    assert "\n" not in str(told.value)
    assert machine.gpu.count("load") == 0


def test_a_decoder_that_takes_the_clip_whole_goes_before_one_that_goes_on(folder: Path) -> None:
    engine_bundles.add(folder, Engines((VideoShape(9, 64, 96),), ("vae_decoder",)))
    machine = Machine()
    short, long = replace(WISHES, num_frames=9), WISHES
    clips, _ = machine.made(folder, Choice(memory=Memory.staged), short, long)
    assert [frames_of(chunks).tobytes() for chunks in clips] == whole(folder, short, long)
    decoders = [name for _, name in machine.gpu.named("load") if name.startswith("vae")]
    assert decoders == ["vae_decoder", STREAM], "and tiles come last"


def test_tiles_are_for_rows_and_columns_that_no_stream_takes(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    tile = {axis: (n, n, n) for axis, n in zip(sizes_of_clips.GRID, (3, 4, 4), strict=True)}
    piece = tile | {"latent_frames": (2, 2, 2)}
    choose = EngineTiles("vae_decoder", (tile,), manifest, VaeTile.auto, (piece,))
    assert choose((3, 4, 4)) is None
    assert choose((9, 4, 4)) == Streamed(2)
    assert choose((9, 4, 6)) == (3, 4, 4)
    larger = piece | {"latent_frames": (4, 4, 4)}
    assert replace(choose, streams=(piece, larger))((9, 4, 4)) == Streamed(4)


def test_a_stream_may_be_wished_where_the_clip_would_be_whole(folder: Path) -> None:
    engine_bundles.add(folder, Engines((CLIP,), ("vae_decoder",)))
    machine = Machine()
    clips, _ = machine.made(folder, Choice(vae_tile=VaeTile.stream), WISHES)
    assert [frames_of(chunks).tobytes() for chunks in clips] == whole(folder, WISHES)
    assert [n for _, n in machine.gpu.named("load") if n.startswith("vae")] == [STREAM]


def test_both_decoders_stay_where_there_is_room_for_both(folder: Path) -> None:
    engine_bundles.add(folder, Engines((VideoShape(9, 64, 96),), ("vae_decoder",)))
    machine = Machine()
    short = replace(WISHES, num_frames=9)
    wishes = (short, WISHES, short, WISHES)
    clips, _ = machine.made(folder, Choice(memory=Memory.resident), *wishes)
    assert [frames_of(chunks).tobytes() for chunks in clips] == whole(folder, *wishes)
    decoders = [name for _, name in machine.gpu.named("load") if name.startswith("vae")]
    assert decoders == ["vae_decoder", STREAM]


def too_large(folder: Path, stage: str, activations: int) -> None:
    """More than a small card has."""
    manifest = bundles.read(folder)
    engines = tuple(
        e.model_copy(update={"activations": activations}) if e.key.stage == stage else e
        for e in manifest.engines
    )
    bundles.update(folder, manifest.model_copy(update={"engines": engines}))


SHORT = replace(WISHES, num_frames=9)
INSTEAD = f"too little for the whole clip, {STREAM} takes its place"


@pytest.mark.parametrize("memory", list(Memory))
@pytest.mark.parametrize("wishes", [(SHORT, SHORT), (WISHES, SHORT), (SHORT, WISHES)])
def test_without_room_for_the_whole_decoder_clips_are_decoded_as_a_stream(
    folder: Path, memory: Memory, wishes: tuple[Wishes, ...]
) -> None:
    engine_bundles.add(folder, Engines((VideoShape(9, 64, 96),), ("vae_decoder",)))
    too_large(folder, "vae_decoder", 2**40)
    machine = Machine()
    clips, notes = machine.made(folder, Choice(memory=memory), *wishes)
    assert [frames_of(chunks).tobytes() for chunks in clips] == whole(folder, *wishes)
    decoders = [name for _, name in machine.gpu.named("load") if name.startswith("vae")]
    assert set(decoders) == {STREAM}
    assert sum(note.endswith(INSTEAD) for note in notes) == wishes.count(SHORT)
    assert "vae_decoder: 16 frames at a time, as with --vae-tile stream" in notes


def test_with_room_for_the_whole_decoder_nothing_takes_its_place(folder: Path) -> None:
    engine_bundles.add(folder, Engines((VideoShape(9, 64, 96),), ("vae_decoder",)))
    _, notes = Machine().made(folder, Choice(), SHORT)
    assert not any(INSTEAD in note for note in notes)


def test_a_clip_that_is_wished_whole_is_refused_without_room(folder: Path) -> None:
    engine_bundles.add(folder, Engines((VideoShape(9, 64, 96),), ("vae_decoder",)))
    too_large(folder, "vae_decoder", 2**40)
    with pytest.raises(UserError, match="of the GPU's memory"):
        Machine().made(folder, Choice(vae_tile=VaeTile.off), SHORT)


REFUSALS: dict[str, tuple[Engines, VaeTile | VideoShape, str]] = {
    "stream without one": (
        Engines((CLIP,), ("vae_decoder",)),
        VaeTile.stream,
        f"--vae-tile stream: {STREAM} has no engine here; .*build-engine --vae-stream 16 --shape "
        "96x64x9",
    ),
    "another size": (
        Engines((VideoShape(9, 96, 96),), (STREAM,)),
        VaeTile.auto,
        rf"no engine of {STREAM} takes 96x64: the nearest takes latent_height 3, not 2.*"
        "--vae-stream 16 --shape 96x64x9",
    ),
    "whole": (
        Engines((PIECE,), (STREAM,)),
        VaeTile.off,
        f"no engine of vae_decoder is here, only one of {STREAM}.*leave out --vae-tile",
    ),
    "tiles": (
        Engines((PIECE,), (STREAM,)),
        VideoShape(17, 64, 64),
        f"no engine of vae_decoder is here, only one of {STREAM}.*leave out --vae-tile",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_no_engine_does_is_refused_in_one_line(graphs: Path, case: str) -> None:
    built, wish, said = REFUSALS[case]
    engine_bundles.add(graphs, Engines((CLIP,), ("text_encoder", "transformer")))
    engine_bundles.add(graphs, built)
    machine = Machine()
    with pytest.raises(UserError, match=said) as told:
        machine.made(graphs, Choice(vae_tile=wish), WISHES)
    assert "\n" not in str(told.value)
    assert machine.gpu.count("load") == 0


def test_an_engine_that_fails_in_the_middle_of_a_clip_leaves_nothing(folder: Path) -> None:
    machine = Machine()
    machine.gpu.fail("fill", DeviceError("cuMemsetD8: CUDA_ERROR_ILLEGAL_ADDRESS"), stays=True)
    with pytest.raises(UserError, match=f"stage {STREAM}: .*ILLEGAL_ADDRESS"):
        machine.made(folder, Choice(), WISHES)


def test_a_whole_decoder_that_is_not_there_is_not_opened(folder: Path) -> None:
    with open_stages(folder, Choice(), open_device=Machine()) as stages:
        assert isinstance(stages, EngineStages)
        with pytest.raises(UserError, match=f"vae_decoder has no engine, only {STREAM} has"):
            stages.alone("vae_decoder")


def test_a_server_warms_up_with_the_longest_clip_of_the_transformer(folder: Path) -> None:
    with open_stages(folder, Choice(), open_device=Machine()) as stages:
        assert isinstance(stages, EngineStages)
        assert stages.clips() == (CLIP,)


@pytest.mark.parametrize(
    ("built", "wanted"),
    [
        ("96x64x33 192x128x33", "96x64x33 192x128x33"),
        ("192x128x33 96x64x33", "192x128x33 96x64x33"),
        ("96x64x9 96x64x33 192x128x33", "96x64x33 192x128x33"),
        ("96x64x49 192x128x33", "96x64x49 192x128x33"),
        ("96x64x57 192x128x9", "96x64x57 192x128x9"),
        ("96x64x33 64x96x33", "96x64x33 64x96x33"),
        ("192x128x33", "192x128x33"),
    ],
)
def test_tokens_are_read_as_the_clips_that_were_built(
    graphs: Path, built: str, wanted: str
) -> None:
    """A clip of four times the rows and columns has the tokens of one four times as long."""
    clips = tuple(map(parse, built.split()))
    engine_bundles.add(graphs, Engines(clips, ("text_encoder", "transformer")))
    pieces = tuple(dict.fromkeys(replace(clip, frames=9) for clip in clips))
    engine_bundles.add(graphs, Engines(pieces, (STREAM,), branches=1))
    with open_stages(graphs, Choice(), open_device=Machine()) as stages:
        assert isinstance(stages, EngineStages)
        assert " ".join(map(buckets.word, stages.clips())) == wanted


def test_a_server_of_one_model_makes_the_same_clip_again_and_again(folder: Path) -> None:
    machine, found = Machine(), []
    engines = open_stages(folder, Choice(memory=Memory.auto), open_device=machine)
    assert isinstance(engines, EngineStages)
    with ExclusiveStages(engines) as studio:
        loaded = machine.gpu.count("load")
        request, _ = resolve(WISHES, studio.bundle)
        planned = plan(request, studio.bundle.manifest)
        for _ in range(2):
            with studio.turn(planned) as open_session:
                found.append(frames_of(generate(request, studio.bundle, open_session)).tobytes())
        assert machine.gpu.count("load") == loaded, "before the server is ready"
    assert machine.gpu.leaks() == []
    assert found == whole(folder, WISHES) * 2


def test_no_stage_of_a_clip_is_left_for_the_cpu(folder: Path) -> None:
    with pytest.raises(UserError, match=r"every stage .* runs on the GPU; leave out --threads"):
        open_stages(folder, Choice(threads=2), open_device=Machine())


WHOLE, GOES_ON = Engines((CLIP,), ("vae_decoder",)), Engines((PIECE,), (STREAM,), branches=1)


@pytest.mark.parametrize("used", [WHOLE, GOES_ON], ids=["whole", "stream"])
@pytest.mark.parametrize("why", ["card", "version", "graph"])
def test_of_two_decoders_one_that_runs_here_is_enough(
    graphs: Path, caplog: pytest.LogCaptureFixture, used: Engines, why: str
) -> None:
    other = GOES_ON if used is WHOLE else WHOLE
    changes: dict[str, Any] = {"card": {"targets": (120,)}, "version": {"version": "1.6.0"}}
    engine_bundles.add(graphs, Engines((CLIP,), ("text_encoder", "transformer")))
    engine_bundles.add(graphs, used)
    engine_bundles.add(graphs, replace(other, **changes.get(why, {})))
    if why == "graph":
        make_stale(graphs, other.stages[0])
    machine = Machine()
    clips, _ = machine.made(graphs, Choice(), WISHES)
    assert [frames_of(chunks).tobytes() for chunks in clips] == whole(graphs, WISHES)
    decoders = [name for _, name in machine.gpu.named("load") if name.startswith("vae")]
    assert decoders == [*used.stages]
    said = {"card": "for SM89", "version": "is of 1.6.0, installed is", "graph": "the graph"}
    (warned,) = [m for m in caplog.messages if "decodes without" in m]
    assert warned.startswith(f"{used.stages[0]} decodes without {other.stages[0]}: ")
    assert said[why] in warned
    assert "ltx-export build-engine" in warned


def test_without_a_decoder_that_runs_here_the_first_one_says_why(graphs: Path) -> None:
    engine_bundles.add(graphs, Engines((CLIP,), ("text_encoder", "transformer")))
    for other in (WHOLE, GOES_ON):
        engine_bundles.add(graphs, replace(other, targets=(120,)))
    with pytest.raises(UserError, match="no engine of vae_decoder for SM89"):
        Machine().made(graphs, Choice(), WISHES)


def make_stale(folder: Path, stage: str) -> None:
    manifest = bundles.read(folder)
    engines = tuple(
        engine.model_copy(update={"key": engine.key.model_copy(update={"graph": "0" * 64})})
        if engine.key.stage == stage
        else engine
        for engine in manifest.engines
    )
    bundles.update(folder, manifest.model_copy(update={"engines": engines}))


def test_graphs_that_go_on_are_no_reason_to_say_that_an_engine_is_missing(graphs: Path) -> None:
    stages = ("text_encoder", "transformer", "vae_decoder")
    engine_bundles.add(graphs, Engines((CLIP,), stages))
    assert STREAM in bundles.read(graphs).stages
    _, notes = Machine().made(graphs, Choice(), WISHES)
    assert not any(STREAM in note or "vae_decoder" in note for note in notes)
