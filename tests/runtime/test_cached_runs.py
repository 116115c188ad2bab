"""Step caching from the command line, with ltx-tiny and on engines."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from ltx_engines.bundle import Bundle, FileEntry, open_bundle
from ltx_engines.shapes import VideoShape
from ltx_trt import cache_table, cli, job, media, pipeline
from ltx_trt.backend import Choice
from ltx_trt.conditioning import Item
from ltx_trt.frame_spool import FrameSpool
from ltx_trt.pipeline import StepDone, frames_of, generate, plan
from ltx_trt.request import Request, SecondPass, Wishes, resolve
from ltx_trt.session import Feeds, Session, tensorrt_adapter
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages
from ltx_trt.session.device import Device
from ltx_trt.step_caching import Caching, Method
from tests.runtime import engine_bundles
from tests.runtime.fake_engines import FakeLibrary
from tests.runtime.fake_gpu import FakeGpu

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
PROMPT = "a red circle moves right on a blue background"
SIZE = ("--width", "64", "--height", "64", "--num-frames", "9", "--threads", "1")
STEPS = ("--num-inference-steps", "12")

Frames = Any


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of ltx-tiny at SIZE."""
    folder = tmp_path_factory.mktemp("calibration")
    prompts, out = folder / "prompts.txt", folder / "table.json"
    prompts.write_text(f"{PROMPT}\na green square moves up, white background\n")
    words = ["calibrate-cache", "--prompts", str(prompts), "--out", str(out), "--seeds", "1"]
    assert cli.main([*words, *SIZE, *STEPS]) == 0
    return out


def run(out: Path, *options: object) -> int:
    words = ["run", "--prompt", PROMPT, "-o", str(out), "--seed", "3", *SIZE, *STEPS]
    return cli.main([*words, *map(str, options)])


@pytest.fixture
def report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def of(*options: object) -> Any:
        capsys.readouterr()
        assert run(tmp_path / "clip.gif", "--json", *options) == 0
        return json.loads(capsys.readouterr().out)

    return of


@pytest.mark.parametrize("method", ["magcache", "easycache", "teacache"])
def test_a_cached_run_reports_its_hits_and_what_they_cost(
    measured: Path, report: Callable[..., Any], method: str
) -> None:
    table = () if method == "easycache" else ("--cache-table", measured)
    found = report("--cache-steps", f"{method}:0.4", "--compare", *table)
    hits, loss = found["caching"], found["compared"]
    assert (hits["method"], hits["threshold"]) == (method, 0.4)
    assert hits["computed"] + hits["reused"] == 12
    assert hits["reused"] == len(hits["reused_steps"]) > 0
    assert hits["hit_rate"] == pytest.approx(hits["reused"] / 12, abs=1e-4)
    assert min(hits["reused_steps"]) > 1
    assert max(hits["reused_steps"]) < 12
    assert 20 < loss["psnr"] < 60
    assert 0.5 < loss["ssim"] < 1
    ours, theirs = found["seconds"]["transformer"], loss["seconds"]["transformer"]
    assert loss["transformer_speed_up"] == pytest.approx(theirs / ours, rel=0.05)
    rest = sum(loss["seconds"][stage] for stage in ("vae_decoder",))
    wanted = (theirs + rest) / (ours + rest)
    assert loss["speed_up"] == pytest.approx(wanted, rel=0.05)


class Clock:
    """In place of the system's: only calls of a session take time, the first one of a stage most,
    as where weights are read and kernels are chosen."""

    def __init__(self, stages: Stages) -> None:
        self.stages, self.now = stages, 0.0
        self.called: set[str] = set()

    def __call__(self) -> float:
        return self.now

    @contextmanager
    def session(self, stage: str) -> Iterator[Session]:
        with self.stages(stage) as real:
            yield Timed(real, stage, self)


class Timed:
    """A session by a Clock."""

    def __init__(self, real: Session, stage: str, clock: Clock) -> None:
        self.real, self.stage, self.clock = real, stage, clock

    def __call__(self, feeds: Feeds) -> dict[str, Any]:
        self.clock.now += 1.0 if self.stage in self.clock.called else 100.0
        self.clock.called.add(self.stage)
        return self.real(feeds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(("threshold", "faster"), [(0.0, False), (0.3, True)])
def test_a_comparison_does_not_count_what_is_slow_at_its_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float, faster: bool
) -> None:
    """Where nothing is reused, caching gains nothing: it was 0.5 times as fast, since it went
    first."""
    with open_stages(TINY, Choice(threads=1)) as stages:
        clock = Clock(stages)
        monkeypatch.setattr(pipeline, "perf_counter", clock)
        monkeypatch.setattr(job, "generate", lambda r, b, _: generate(r, b, clock.session))
        request = replace(small(stages.bundle), caching=Caching(Method.easycache, threshold))
        size = {"count": 9, "height": 64, "width": 64}
        clip = job.Clip(request, media.check(tmp_path / "clip.gif", **size))
        report = job.make_and_compare(clip, stages, job.Voice())
    assert report.caching is not None
    assert report.compared is not None
    computed, decoded = report.caching.computed, report.compared.seconds["vae_decoder"]
    assert report.compared.transformer_speed_up == round(12 / computed, 3)
    assert report.compared.speed_up == round((12 + decoded) / (computed + decoded), 3)
    assert (report.compared.speed_up > 1) == faster


def test_a_threshold_of_zero_gives_exactly_the_clip_without_a_cache(measured: Path) -> None:
    with open_stages(TINY, Choice(threads=1)) as stages:
        request = small(stages.bundle)
        plain = frames_of(generate(request, stages.bundle, stages))
        for method in Method:
            table = None if method is Method.easycache else cache_table.read(measured)
            cached = replace(request, caching=Caching(method, 0.0, table=table))
            events = list(generate(cached, stages.bundle, stages))
            assert np.array_equal(frames_of(events), plain)
            assert not any(steps(events))


def small(bundle: Bundle, seed: int = 1) -> Request:
    wishes = Wishes(
        prompt=PROMPT, seed=seed, width=64, height=64, num_frames=9, num_inference_steps=12
    )
    return resolve(wishes, bundle)[0]


def test_people_read_a_line_of_hits_and_a_line_of_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "clip.gif", "--cache-steps", "easycache:0.3", "--compare") == 0
    _, hits, loss = capsys.readouterr().out.splitlines()
    assert hits.startswith("easycache:0.3 computed ")
    assert "times as fast" in loss
    assert "SSIM" in loss


def test_a_bundles_own_table_needs_no_name_and_another_checkpoints_is_refused(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(TINY, folder)
    (folder / cache_table.FILE).unlink(missing_ok=True)
    options = ("--bundle", folder, "--cache-steps", "magcache")
    assert run(tmp_path / "clip.gif", *options) == 2
    assert "magcache needs a table" in capsys.readouterr().err
    shutil.copy(measured, folder / cache_table.FILE)
    assert run(tmp_path / "clip.gif", *options) == 0
    other = cache_table.read(measured).model_copy(
        update={"checkpoint": FileEntry(bytes=1, sha256="0" * 64)}
    )
    cache_table.write(other, folder / cache_table.FILE)
    (tmp_path / "clip.gif").unlink()
    capsys.readouterr()
    assert run(tmp_path / "clip.gif", *options) == 2
    told = capsys.readouterr().err
    assert "this cache table is of another checkpoint" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "clip.gif").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cache-steps", "easycash"), "did you mean 'easycache'?"),
        (("--cache-steps", "easycache:-0.1"), "the threshold must be a number from 0"),
        (("--cache-steps", "easycache", "--num-inference-steps", "9"), "this run has 9"),
        (("--cache-steps", "easycache", "--sampler", "stochastic"), "choose --sampler euler"),
        (("--cache-steps", "magcache", "--cache-table", "no.json"), "no.json: No such file"),
        (("--cache-steps", "easycache", "--cache-first", "-1"), "--cache-first"),
        (("--cache-longest", "2"), "--cache-longest has no use without --cache-steps"),
        (("--compare",), "--compare has no use without --cache-steps"),
        (("--cache-steps", "easycache", "--compare", "--width", "8"), "in windows of 11 pixels"),
    ],
)
def test_what_a_user_mistypes_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert run(tmp_path / "clip.gif", *options) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_table_of_other_steps_is_refused_in_one_line(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--cache-steps", "teacache", "--cache-table", measured, "--guidance-scale", "1")
    assert run(tmp_path / "clip.gif", *options) == 2
    assert capsys.readouterr().err.count("\n") == 1
    options = ("--cache-steps", "teacache", "--cache-table", measured, "--guidance-scale", "2")
    assert run(tmp_path / "clip.gif", *options) == 0
    assert "measured with guidance_scale 3.0" in capsys.readouterr().err


def test_the_shipped_table_is_of_the_shipped_checkpoint(tmp_path: Path) -> None:
    words = ["run", "--prompt", PROMPT, "-o", str(tmp_path / "clip.gif")]
    assert cli.main([*words, *SIZE, "--cache-steps", "magcache"]) == 0


def steps(events: Iterable[Any]) -> list[bool]:
    return [event.reused for event in events if isinstance(event, StepDone)]


def test_nothing_is_reused_of_another_request() -> None:
    """Two requests of one process, the second of which must not know the first one's latents."""
    wish = Caching(Method.easycache, 0.3)
    with open_stages(TINY, Choice(threads=1)) as stages:
        request, other = (replace(small(stages.bundle, s), caching=wish) for s in (1, 2))
        alone = frames_of(generate(other, stages.bundle, stages))
        list(generate(request, stages.bundle, stages))
        events = list(generate(other, stages.bundle, stages))
    assert np.array_equal(frames_of(events), alone)
    assert any(steps(events))


def test_a_clip_whose_tokens_have_noise_levels_of_their_own_is_cached_too() -> None:
    pixels = np.zeros((1, 3, 1, 64, 64), np.float32)
    with open_stages(TINY, Choice(threads=1)) as stages:
        request = small(stages.bundle)
        request = replace(request, conditioning=(Item(pixels, 0, 1.0), Item(pixels, 8, 0.5)))
        never, often = (replace(request, caching=Caching(Method.easycache, t)) for t in (0, 0.2))
        plain = frames_of(generate(request, stages.bundle, stages))
        assert np.array_equal(frames_of(generate(never, stages.bundle, stages)), plain)
        events = list(generate(often, stages.bundle, stages))
    assert any(steps(events))
    assert np.abs(frames_of(events).astype(int) - plain).mean() < 5


def test_only_the_first_pass_of_a_run_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_bundle(TINY).manifest
    monkeypatch.setattr("ltx_trt.passes._check_upsampler", lambda _: None)
    words: dict[str, Any] = {"width": 128, "height": 128, "num_frames": 9, "frame_rate": 24.0}
    request = Request(PROMPT, "", **words, caching=Caching(Method.easycache, 0.1))
    second = SecondPass(steps=replace(request.steps, skip_initial=30))
    first, other = plan(replace(request, second=second), manifest).passes
    assert (first.cached, other.cached) == (True, False)
    assert (first.loops, other.loops) == (False, True)
    assert plan(replace(request, caching=None), manifest).passes[0].loops


def test_on_engines_each_step_comes_back_to_the_host_and_says_so(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ltx_export import step_graph

    monkeypatch.setattr(tensorrt_adapter, "version", {"tensorrt-rtx": "1.7.1.116"}.get)
    folder = make_bundle()
    step_graph.add(open_bundle(folder))
    names = (*engine_bundles.STAGES, "sampler_step")
    engine_bundles.add(folder, engine_bundles.Engines((VideoShape(9, 32, 64),), names))
    gpu = FakeGpu()
    wishes = Wishes(prompt="w5 w9", num_inference_steps=12)
    with open_stages(
        folder, Choice(), open_device=lambda flavour: Device.of(gpu, FakeLibrary(gpu, flavour))
    ) as stages:
        plain, _ = resolve(wishes, stages.bundle, None)
        request = replace(plain, caching=Caching(Method.easycache, 0.0))
        notes = stages.prepare(plan(request, stages.bundle.manifest))
        assert "with step caching, each step comes back to the host" in notes
        cached = frames_of(generate(request, stages.bundle, stages))
        assert gpu.count("launch") == 0, "no step was captured"
        assert not [n for n in stages.prepare(plan(plain, stages.bundle.manifest)) if "cach" in n]
        looped = frames_of(generate(plain, stages.bundle, stages))
        assert gpu.count("launch") > 0
        eager = replace(plain, caching=Caching(Method.easycache, 9.0))
        reused = steps(generate(eager, stages.bundle, stages))
    assert any(reused)
    assert gpu.leaks() == []
    assert np.abs(cached.astype(int) - looped.astype(int)).max() <= 1


def test_spooled_frames_come_back_in_order() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    with FrameSpool() as spool:
        spool.add(clip[:2])
        spool.add(clip[2:, :, :, :])
        assert np.array_equal(spool.clip(), clip)
    assert pipeline.StepDone(1, 1, 0.0, 0.0).reused is False
