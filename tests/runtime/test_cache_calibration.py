"""Measuring a checkpoint for step caching: each number against its formula in float64."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.errors import UserError
from ltx_trt import cache_calibration, cache_table, timestep_embedding
from ltx_trt.cache_calibration import Calibration, Recorder, averaged, calibrate, fit, walk_of
from ltx_trt.guidance import Guidance
from ltx_trt.request import Request
from ltx_trt.schedule import Steps
from tests.runtime.test_pipeline import Fake, FakeSession
from tests.runtime.test_step_caching import feeds, table

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"

REQUEST = Request(
    prompt="w5",
    negative_prompt="w3",
    width=64,
    height=32,
    num_frames=9,
    frame_rate=25.0,
    steps=Steps(12),
    guidance=Guidance((3.0, 1.0), 0.0, 1.0, None, (0.9, 0.0)),
)


class Answers:
    """A transformer that has known what it will be asked."""

    def __init__(self, velocities: list[Any]) -> None:
        self._velocities = iter(velocities)

    def __call__(self, _: Any) -> dict[str, Any]:
        return {"velocity": next(self._velocities)}

    __enter__ = __exit__ = None


def test_steps_are_compared_with_the_one_before_in_size_and_in_change() -> None:
    random = np.random.default_rng(100)
    given = [feeds(0.9 - 0.1 * step, seed=step) for step in range(3)]
    given += [feeds(0.5, seed=9, branches=1), feeds(0.4, seed=10, branches=1)]
    answers = [random.normal(size=f["latents"].shape).astype(np.float32) for f in given]
    recorder: Any = Recorder(Answers(answers))  # type: ignore[arg-type]
    for one, answer in zip(given, answers, strict=True):
        assert recorder(one)["velocity"] is answer
    found = recorder.measured()
    ratios, changes = [], []
    for step in (1, 2, 4):
        now, then = answers[step].astype(float), answers[step - 1].astype(float)
        residuals = now - given[step]["latents"], then - given[step - 1]["latents"]
        sizes = [np.sqrt(np.square(residual).sum(axis=2)) for residual in residuals]
        ratios.append((sizes[0] / sizes[1]).mean())
        changes.append(np.abs(now - then).sum() / np.abs(then).sum())
    np.testing.assert_allclose(found.ratios[[1, 2, 4]], ratios, rtol=1e-6)
    np.testing.assert_allclose(found.changes[[1, 2, 4]], changes, rtol=1e-12)
    assert np.isnan(found.ratios[[0, 3]]).all(), "other branches than before"
    assert np.isnan(found.changes[[0, 3]]).all()


def test_ratios_are_averaged_over_clips_and_are_1_where_there_are_none() -> None:
    found = averaged([np.array([np.nan, 1.0, 0.8]), np.array([np.nan, 1.2, 0.8])])
    np.testing.assert_allclose(found.ratios, (1.0, 1.1, 0.8))
    np.testing.assert_allclose(found.deviations, (0.0, 0.1, 0.0), atol=1e-12)


def test_a_polynomial_of_degree_4_is_found_again() -> None:
    distances = np.linspace(0.002, 0.12, 40)
    wanted = np.array([4000.0, -700.0, 40.0, 0.3, 0.01])
    clean = np.polyval(wanted, distances)
    noise = np.random.default_rng(1).normal(0, 1e-9, (3, 40))
    noise[:, 0] = np.nan
    found = fit(distances.tolist(), list(clean + noise))
    np.testing.assert_allclose(found.changes()[1:], clean[1:], rtol=1e-5)
    np.testing.assert_allclose(found.coefficients, wanted, rtol=1e-3)
    assert found.points == 3 * 39
    assert found.r2 == pytest.approx(1)
    assert found.pearson == pytest.approx(np.corrcoef(distances[1:], clean[1:])[0, 1])


def test_a_fit_is_numpys_and_says_how_much_it_explains() -> None:
    random = np.random.default_rng(2)
    distances = random.uniform(0.01, 0.1, 30)
    changes = 0.5 * distances + random.normal(0, 0.02, 30)
    found = fit(distances.tolist(), [changes])
    wanted = np.polyfit(distances, changes, 4)
    np.testing.assert_allclose(found.coefficients, wanted, rtol=1e-6)
    left = np.square(changes - np.polyval(wanted, distances)).sum()
    assert found.r2 == pytest.approx(1 - left / np.square(changes - changes.mean()).sum())


@pytest.mark.parametrize(
    ("distances", "changes", "degree"), [((0.0,) * 5, (0.1, 0.3) * 2, 0), ((0.1, 0.2), (1.0,), 0)]
)
def test_where_nothing_varies_the_mean_is_fitted_and_no_correlation_claimed(
    distances: tuple[float, ...], changes: tuple[float, ...], degree: int
) -> None:
    found = fit(distances, [np.array([np.nan, *changes])])
    assert len(found.coefficients) == degree + 1
    assert found.changes()[1] == pytest.approx(np.mean(changes))
    assert found.pearson is None
    assert "R2" in found.doubt() or "no correlation" in found.doubt()


def test_the_embedding_of_a_noise_level_is_the_reference_models() -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from ltx_ref.ltx_video.transformer import TimestepEmbedding

    path, prefix = TINY / "ltx-tiny.safetensors", "model.diffusion_model.adaln_single.emb."
    weights = {k.removeprefix(prefix): v for k, v in load_file(path).items() if prefix in k}
    module = TimestepEmbedding(128)
    module.load_state_dict(weights)
    sigmas = (1.0, 0.9937, 0.5, 0.03)
    with torch.no_grad():
        wanted = module.double()(1000 * torch.tensor(sigmas, dtype=torch.float64), torch.float64)
    found = timestep_embedding.embeddings(path, sigmas)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_embeddings_change_relative_to_what_they_were() -> None:
    embedded = np.array([[1.0, -1.0], [2.0, -1.0], [2.0, -4.0]])
    assert timestep_embedding.changes(embedded) == (0.0, 0.5, 1.0)


def test_a_checkpoint_without_an_embedding_is_one_line(bundle: Bundle) -> None:
    with pytest.raises(UserError, match=r"has 0 tensors .*linear_1.weight.*use easycache"):
        timestep_embedding.embeddings(bundle.path / "by-hand.safetensors", (1.0, 0.5))
    with pytest.raises(UserError, match=r"no.safetensors"):
        timestep_embedding.embeddings(bundle.path / "no.safetensors", (1.0, 0.5))


def test_a_calibration_asks_for_each_prompt_and_seed_up_to_the_last_step_and_decodes_none(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        timestep_embedding, "embeddings", lambda _, sigmas: np.array([[1 + s] for s in sigmas])
    )
    fake = Fake(bundle)

    @contextmanager
    def opened(stage: str) -> Any:
        with fake.open(stage) as session:
            assert isinstance(session, FakeSession)
            yield session

    order = Calibration(REQUEST, ("w5", "w7"), (3, 4, 5), ("a.st",))
    steps, seen = calibrate(order, bundle, opened), 0
    while True:
        try:
            assert next(steps).total == 12
            seen += 1
        except StopIteration as end:
            table = end.value
            break
    assert seen == 2 * 3 * 12
    assert "open vae_decoder" not in fake.log
    assert fake.log.count("open transformer") == fake.log.count("close transformer") == 6
    assert (table.clips.prompts, table.clips.seeds, table.clips.loras) == (2, (3, 4, 5), ("a.st",))
    assert (len(table.sigmas), table.sampler) == (12, "euler")
    assert set(table.layouts) == {"uncond text", "text"}
    changed = table.layouts.index("text")
    assert table.magcache.ratios[0] == table.magcache.ratios[changed] == 1.0
    assert table.teacache.points == 6 * 10
    assert table.check(walk_of(REQUEST, bundle.manifest), bundle.manifest) is None
    begun = {float(feeds["latents"].sum()) for feeds in fake.of("transformer")[::12]}
    assert len(begun) == 3, "one noise for each seed"


@pytest.mark.parametrize(
    ("change", "said"),
    [({"steps": Steps(9)}, "needs 10 steps"), ({"sampler": "stochastic"}, "fresh noise")],
)
def test_what_cannot_be_cached_is_not_calibrated(
    bundle: Bundle, change: dict[str, Any], said: str
) -> None:
    order = Calibration(replace(REQUEST, **change), ("w5",), (1,))
    with pytest.raises(UserError, match=said):
        next(calibrate(order, bundle, Fake(bundle).open))


@pytest.mark.parametrize(
    ("name", "said"), [("table", "name it table.json"), ("no/table.json", "there is no folder")]
)
def test_where_the_table_goes_is_checked_before_the_work(
    make_bundle: Callable[..., Path], tmp_path: Path, name: str, said: str
) -> None:
    from ltx_trt.request import Wishes

    folder = make_bundle()
    assert open_bundle(folder)
    order = cache_calibration.Order(Wishes(""), ("w5",), 1, folder, tmp_path / name)
    with pytest.raises(UserError, match=said):
        next(cache_calibration.execute(order))


def test_a_polynomial_that_meets_all_of_few_points_is_doubted() -> None:
    distances = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    found = fit(distances, [np.array([np.nan, 0.3, 0.1, 0.9, 0.2, 0.5])])
    assert found.r2 is None
    assert "hardly explains" in found.doubt()


def test_a_file_that_is_no_table_is_not_overwritten(bundle: Bundle, tmp_path: Path) -> None:
    from ltx_trt.request import Wishes

    other = tmp_path / "package.json"
    other.write_text("{}")
    order = cache_calibration.Order(Wishes(""), ("w5",), 1, bundle.path, other)
    with pytest.raises(UserError, match=r"package.json is there and is no cache table"):
        next(cache_calibration.execute(order))
    assert other.read_text() == "{}"


def test_a_table_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    cache_table.write(table(), out)
    cache_calibration._check_writable(out)


def test_too_few_steps_to_calibrate_is_said_in_words_of_this_command(bundle: Bundle) -> None:
    order = Calibration(replace(REQUEST, steps=Steps(9)), ("w5",), (1,))
    with pytest.raises(UserError, match="this run has 9") as told:
        next(calibrate(order, bundle, Fake(bundle).open))
    assert "--cache-steps" not in str(told.value)
