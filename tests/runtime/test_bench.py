"""Timings: their law, what is counted, and one line for everything that is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from ltx_engines.shapes import VideoShape
from ltx_trt import bench, cli
from ltx_trt.backend import Backend, Choice, Memory
from ltx_trt.bench import Measured, Opened, Order, Timing
from ltx_trt.request import Request
from ltx_trt.voice import Voice
from tests.runtime.memory_looks import Looks, taken

MakeBundle = Callable[..., Path]

SMALL = VideoShape(9, 32, 32)


def run(*words: object) -> int:
    return cli.main(["bench", *map(str, words)])


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_one_slow_run_does_not_move_the_median() -> None:
    usual = Timing.of([0.1] * 20)
    found = Timing.of([0.1] * 19 + [9.0])
    assert (found.median, found.p90) == (usual.median, usual.p90)
    assert (found.worst, found.runs) == (9.0, 20)


def test_the_order_of_runs_does_not_matter_and_percentiles_are_of_those_that_were() -> None:
    seconds = [n / 10 for n in range(1, 11)]
    found = Timing.of(reversed(seconds))
    assert found == Timing.of(seconds)
    assert found.median == pytest.approx(0.55)
    assert (found.p90, found.worst) == (0.9, 1.0)
    with pytest.raises(ValueError, match="no runs"):
        Timing.of([])


@pytest.mark.parametrize("runs", range(1, 21))
def test_nine_in_ten_are_not_faster_than_half_of_them(runs: int) -> None:
    """Of two runs the 90th percentile was the faster one, below the median."""
    found = Timing.of(map(float, range(runs)))
    assert found.median <= found.p90 <= found.worst
    slower = runs - 1 - found.p90
    assert 10 * slower <= runs < 10 * (slower + 1)


def test_the_memory_of_each_case_is_its_own(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, real, looks = 96 << 20, bench.once, Looks(monkeypatch)

    def once(request: Request, *others: Any) -> dict[str, list[float]]:
        with taken(block if request.width == 64 else 1):
            looks.wait()
        return real(request, *others)

    monkeypatch.setattr(bench, "once", once)
    order = Order(make_bundle(), (VideoShape(9, 32, 64), SMALL), (1,), runs=1, warmup=0)
    *_, first, _, second = bench.execute(order, Voice())
    assert isinstance(first, Measured)
    assert isinstance(second, Measured)
    if first.host_memory is None or second.host_memory is None:
        pytest.skip("this system does not say what memory is taken")
    assert second.host_memory < first.host_memory - 0.5 * block


def test_every_shape_runs_with_every_number_of_steps_and_warm_up_does_not_count(
    make_bundle: MakeBundle,
) -> None:
    order = Order(
        make_bundle(),
        (SMALL, VideoShape(9, 32, 64), SMALL),
        (1, 3),
        runs=2,
        warmup=1,
        choice=Choice(Backend.onnxruntime, 1),
    )
    opened, *events = bench.execute(order, Voice())
    assert isinstance(opened, Opened)
    assert opened.runs_on == "onnxruntime"
    measured = [event for event in events if isinstance(event, Measured)]
    assert [event for event in events if isinstance(event, int)] == list(range(1, 13))
    assert [str(one.case) for one in measured] == [
        f"{size}x9, {steps} steps" for size in ("32x32", "64x32") for steps in (1, 3)
    ]
    for one, steps in zip(measured, (1, 3, 1, 3), strict=True):
        assert one.seconds["step"].runs == 2 * steps
        assert {timing.runs for name, timing in one.seconds.items() if name != "step"} == {2}
        assert one.seconds["clip"].median >= one.seconds["transformer"].median
        assert one.host_memory is None or one.host_memory > 0
        assert one.device_memory is None


def test_a_clip_takes_as_long_as_the_clock_says(make_bundle: MakeBundle) -> None:
    ticks = iter(range(100))
    order = Order(make_bundle(), (SMALL,), (1,), runs=3, warmup=0)
    events = list(bench.execute(order, Voice(), clock=lambda: 10.0 * next(ticks)))
    assert isinstance(events[0], Opened)
    assert events[0].seconds == 10
    assert isinstance(events[-1], Measured)
    assert events[-1].seconds["clip"] == Timing(10.0, 10.0, 10.0, 3)


@pytest.mark.parametrize(
    ("memory", "times"), [(Memory.resident, [1, 1, 1]), (Memory.staged, [1, 2, 3])]
)
def test_resident_stages_open_in_the_first_run_alone(
    make_bundle: MakeBundle, opened: list[str], memory: Memory, times: list[int]
) -> None:
    choice = Choice(Backend.onnxruntime, 1, memory)
    order = Order(make_bundle(), (SMALL,), (1,), runs=2, warmup=1, choice=choice)
    stages = ("text_encoder", "transformer", "vae_decoder")
    counts = [
        {opened.count(stage) for stage in stages}
        for event in bench.execute(order, Voice())
        if isinstance(event, int)
    ]
    assert counts == [{count} for count in times]


def test_the_last_line_is_json_and_with_json_the_only_one(
    make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--bundle", make_bundle(), "--num-inference-steps", 1, "--runs", 1, "--warmup", 0)
    assert run(*words) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) > 5
    assert any("vae_decoder" in line for line in out)
    found = json.loads(out[-1])
    (case,) = found["cases"]
    assert (case["width"], case["height"], case["frames"], case["steps"]) == (64, 32, 9, 1)
    assert case["seconds"]["step"]["runs"] == 1
    assert found["open"] > 0
    assert run(*words, "--json", "--memory", "auto") == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    assert json.loads(out[0])["memory"] == "auto"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--runs", 0), "runs"),
        (("--warmup", -1), "warmup"),
        (("--num-inference-steps", 0), "num-inference-steps"),
        (("--num-inference-steps", "many"), "num-inference-steps"),
        (("--shape", "large"), "is not WIDTHxHEIGHTxFRAMES"),
        (("--shape", "64x32x10"), "try 9"),
        (("--shape", "64x33x9"), "height must be a multiple of 32"),
        (("--shape", "0x32x9"), "width must be a multiple of 32"),
        (("--bundle", "nowhere"), "nowhere"),
        (("--backend", "tensorrt"), "has no engine of tensorrt"),
        (("--memory", "all"), "--memory"),
        (("--device-memory", "8GiB"), "leave out --device-memory"),
        (("--prompt", "a fox"), "No such option"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    make_bundle: MakeBundle,
    capsys: pytest.CaptureFixture[str],
    words: tuple[object, ...],
    said: str,
) -> None:
    assert run("--bundle", make_bundle(), *words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_all_cases_are_checked_before_the_first_is_measured(
    make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_bundle(allowed_inference_steps=(1.0, 0.5))
    assert run("--bundle", folder, "--num-inference-steps", 2, "--num-inference-steps", 7) == 2
    captured = capsys.readouterr()
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_a_bench_encodes_texts_that_were_encoded_before(
    make_bundle: MakeBundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    opened: list[str],
) -> None:
    folder = make_bundle()
    words = ("--bundle", str(folder), "--num-inference-steps", "1")
    seen = ("run", *words, "--prompt", bench.PROMPT, "-o", str(tmp_path / "o.gif"), "--json")
    assert [cli.main([*seen]) for _ in range(2)] == [0, 0]
    assert last_line(capsys)["cached_prompts"] == 2
    assert opened.count("text_encoder") == 1
    assert run(*words, "--runs", 1, "--warmup", 0) == 0
    assert opened.count("text_encoder") == 2


def test_a_config_decides_and_its_notes_are_said(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("num_inference_steps: 2\nprecision: bfloat16\n")
    words = ("--bundle", make_bundle(), "--pipeline-config", config, "--runs", 1, "--warmup", 0)
    assert run(*words, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["cases"][0]["steps"] == 2
    assert "without effect in the config: precision" in captured.err


def test_no_runs_are_a_programmers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 runs"):
        Order(tmp_path, runs=0)
