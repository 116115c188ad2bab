"""The transformer behind a cache: what it answers, when it must compute, what it refuses."""

from dataclasses import replace
from typing import Any, Self

import numpy as np
import pytest

from ltx_engines.bundle import FileEntry
from ltx_engines.errors import UserError
from ltx_trt import sampler, step_caching
from ltx_trt.cache_calibration import Recorder
from ltx_trt.cache_table import CacheTable, Clips, Polynomial, Ratios
from ltx_trt.cache_walk import Walk, layout
from ltx_trt.guidance import StepGuidance
from ltx_trt.step_caching import (
    CachedTransformer,
    Caching,
    Method,
    cached,
    must_compute,
    parse,
    without_effect,
)
from tests.runtime.conftest import manifest

STEPS = 20

SIGMAS = tuple(float(s) for s in np.linspace(1, 0.05, STEPS, dtype=np.float32))

WALK = Walk(SIGMAS, ("uncond text",) * STEPS, "euler", draws_noise=False)

CHECKPOINT = FileEntry(bytes=4, sha256="a" * 64)

MANIFEST = manifest(files={"by-hand.safetensors": CHECKPOINT})

Feeds = dict[str, Any]


def table(**changes: Any) -> CacheTable:
    facts: dict[str, Any] = {
        "checkpoint": CHECKPOINT,
        "checkpoint_name": "by-hand.safetensors",
        "sigmas": SIGMAS,
        "layouts": WALK.layouts,
        "sampler": "euler",
        "scheduler": MANIFEST.scheduler,
        "clips": Clips(
            width=64,
            height=32,
            num_frames=9,
            frame_rate=24,
            guidance_scale=2.0,
            stg_scale=0.0,
            prompts=1,
            seeds=(1,),
        ),
        "magcache": Ratios(ratios=(1.0,) * STEPS, deviations=(0.0,) * STEPS),
        "teacache": Polynomial(
            distances=(0.0,) * STEPS, coefficients=(1.0, 0.0), pearson=1.0, r2=1.0, points=9
        ),
    }
    return CacheTable(**(facts | changes))


def caching(method: Method, threshold: float = 1e9, **words: Any) -> Caching:
    words.setdefault("table", None if method is Method.easycache else table())
    return Caching(method, threshold, **words)


class Model:
    """A transformer as a formula; `calls` counts."""

    def __init__(self, residual: Any = 1.0) -> None:
        self.residual, self.calls = residual, 0

    def __call__(self, feeds: Any) -> dict[str, Any]:
        self.calls += 1
        return {"velocity": feeds["latents"] + np.float32(self.residual)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls = -1


def feeds(sigma: float, seed: int = 0, *, branches: int = 2, perturbed: bool = False) -> Feeds:
    one = np.random.default_rng(seed).normal(size=(1, 6, 4)).astype(np.float32)
    mask = np.ones((3, branches), np.float32)
    mask[1, -1] = 0 if perturbed else 1
    return {
        "latents": np.repeat(one, branches, axis=0),
        "timestep": np.full((branches, 1), sigma, np.float32),
        "skip_layer_mask": mask,
    }


@pytest.mark.parametrize("method", Method)
def test_a_model_of_constant_residual_is_never_wrong(method: Method) -> None:
    model = Model(0.75)
    transformer = cached(model, caching(method), WALK)
    for step, sigma in enumerate(SIGMAS):
        given = feeds(sigma, seed=step)
        found = transformer(given)["velocity"]
        np.testing.assert_allclose(found, given["latents"] + 0.75, atol=1e-6)
    assert model.calls == STEPS - sum(transformer.reused)
    assert sum(transformer.reused) > STEPS // 3


@pytest.mark.parametrize("method", Method)
def test_a_threshold_of_zero_computes_every_step(method: Method) -> None:
    transformer = cached(Model(), caching(method, 0.0), WALK)
    for step, sigma in enumerate(SIGMAS):
        transformer(feeds(sigma, seed=step))
    assert transformer.reused == [False] * STEPS


@pytest.mark.parametrize("method", Method)
def test_first_and_last_steps_are_computed_whatever_the_threshold(method: Method) -> None:
    transformer = cached(Model(), caching(method, first=6, last=3), WALK)
    for step, sigma in enumerate(SIGMAS):
        transformer(feeds(sigma, seed=step))
    reused = transformer.reused
    assert not any(reused[:6])
    assert not any(reused[-3:])
    assert any(reused)


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ({"method": Method.magcache}, 4),
        ({"method": Method.magcache, "retention": 0.33}, 7),
        ({"method": Method.magcache, "retention": 0.0}, 1),
        ({"method": Method.magcache, "first": 9}, 9),
        ({"method": Method.easycache}, 4),
        ({"method": Method.easycache, "first": 0}, 1),
        ({"method": Method.teacache}, 1),
    ],
)
def test_each_method_begins_where_its_authors_begin(words: dict[str, Any], first: int) -> None:
    forced = must_compute(Caching(threshold=1.0, **words), WALK)
    assert forced == (True,) * first + (False,) * (STEPS - first - 1) + (True,)


@pytest.mark.parametrize("method", [Method.magcache, Method.teacache])
def test_the_plan_is_known_before_the_first_step(method: Method) -> None:
    ratios = tuple(np.random.default_rng(1).normal(1, 0.05, STEPS))
    changes = tuple(np.random.default_rng(2).uniform(0, 0.1, STEPS))
    measured = table(
        magcache=Ratios(ratios=ratios, deviations=(0.0,) * STEPS),
        teacache=Polynomial(
            distances=changes, coefficients=(1.0, 0.0), pearson=1.0, r2=1.0, points=9
        ),
    )
    wish = caching(method, 0.12, table=measured)
    planned = step_caching.plan(wish, WALK)
    transformer = cached(Model(), wish, WALK)
    for sigma in SIGMAS:
        transformer(feeds(sigma))
    assert planned == tuple(transformer.reused)
    assert any(planned)
    assert step_caching.plan(caching(Method.easycache), WALK) is None


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize(
    "other", [{"branches": 1}, {"branches": 3}, {"branches": 2, "perturbed": True}]
)
def test_other_branches_are_computed_and_do_not_reuse_what_was_before(
    method: Method, other: dict[str, Any]
) -> None:
    """A schedule of guidance changes the batch in the middle."""
    change = 12
    names = ("uncond text",) * change + ("other",) * (STEPS - change)
    walk = replace(WALK, layouts=names)
    measured = None if method is Method.easycache else table(layouts=names)
    wish = caching(method, table=measured)
    transformer = cached(Model(), wish, walk)
    for step, sigma in enumerate(SIGMAS):
        more = other if step >= change else {}
        given = feeds(sigma, seed=step, **more)
        assert transformer(given)["velocity"].shape == given["latents"].shape
    assert any(transformer.reused[:change])
    assert not transformer.reused[change]
    assert step_caching.plan(wish, walk) in (None, tuple(transformer.reused))


def test_a_batch_that_the_plan_did_not_expect_is_computed_too() -> None:
    transformer = cached(Model(), caching(Method.teacache), WALK)
    for step, sigma in enumerate(SIGMAS[:9]):
        transformer(feeds(sigma, branches=2 + step % 2))
    assert not any(transformer.reused)


def test_a_call_of_another_pass_is_computed_and_ends_nothing() -> None:
    transformer = cached(Model(), caching(Method.teacache), WALK)
    for sigma in SIGMAS[:5]:
        transformer(feeds(sigma))
    assert transformer.reused == [False, True, True, True, True]
    larger = feeds(SIGMAS[5])
    larger["latents"] = np.zeros((2, 24, 4), np.float32)
    transformer(larger)
    transformer(feeds(0.5))
    assert transformer.reused[5:] == [False, False]
    for sigma in SIGMAS[5:8]:
        transformer(feeds(sigma))
    assert transformer.reused[7:] == [False, True, True]


def test_after_the_walk_everything_is_computed() -> None:
    model = Model()
    transformer = cached(model, caching(Method.teacache), WALK)
    for sigma in SIGMAS:
        transformer(feeds(sigma))
    before = model.calls
    for sigma in SIGMAS[-4:]:
        transformer(feeds(sigma))
    assert model.calls == before + 4


@pytest.mark.parametrize("method", Method)
def test_tokens_that_are_held_neither_hide_a_step_nor_decide_of_it(method: Method) -> None:
    """A token of strength 1 is at level 0; the step's level is that of the others."""

    def held(noise: float) -> list[bool]:
        transformer = cached(Model(), caching(method, 0.3), WALK)
        for step, sigma in enumerate(SIGMAS):
            given = feeds(sigma, seed=0)
            given["latents"] += np.float32(sigma)
            given["latents"][:, :2] = noise * np.random.default_rng(step).normal(size=(2, 2, 4))
            given["timestep"] = np.repeat(given["timestep"], 6, axis=1)
            given["timestep"][:, :2] = 0
            transformer(given)
        return transformer.reused

    assert held(0.0) == held(100.0)
    assert any(held(0.0))


def test_a_session_may_write_its_next_answer_where_the_last_one_was() -> None:
    buffer = np.zeros((2, 6, 4), np.float32)

    class Reusing(Model):
        def __call__(self, feeds: Any) -> dict[str, Any]:
            np.copyto(buffer, super().__call__(feeds)["velocity"])
            return {"velocity": buffer}

    wish = caching(Method.easycache, 0.4)
    ours, theirs = cached(Reusing(), wish, WALK), cached(Model(), wish, WALK)
    for step, sigma in enumerate(SIGMAS):
        given = feeds(sigma, seed=step)
        assert np.array_equal(ours(given)["velocity"], theirs(given)["velocity"])
    assert ours.reused == theirs.reused


def test_a_wrapped_session_begins_and_ends_with_its_wrapper() -> None:
    model = Model()
    with cached(model, caching(Method.easycache), WALK) as transformer:
        assert isinstance(transformer, CachedTransformer)
    assert model.calls == -1


@pytest.mark.parametrize(
    "wrapped", [lambda model: cached(model, caching(Method.easycache), WALK), Recorder]
)
def test_a_wrapper_is_entered_once_and_ends_once_what_it_has_begun(wrapped: Any) -> None:
    model = Counted()
    wrapper = wrapped(model)
    wrapper.__exit__(None, None, None)
    assert (model.begun, model.ended) == (0, 0)
    with wrapper:
        with pytest.raises(ValueError, match="is entered once; make another"):
            wrapper.__enter__()
        assert (model.begun, model.ended) == (1, 0)
    wrapper.__exit__(None, None, None)
    assert (model.begun, model.ended) == (1, 1)


class Counted(Model):
    begun = 0
    ended = 0

    def __enter__(self) -> Self:
        self.begun += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.ended += 1


def test_a_walk_names_the_branches_of_each_step() -> None:
    plain, guided = StepGuidance(1.0, 0.0, 1.0), StepGuidance(3.0, 1.0, 0.7, (2, 3))
    assert (layout(plain), layout(guided)) == ("text", "uncond text perturbed:2,3")
    for name, noisy in (("euler", False), ("dpmpp-2m", False), ("stochastic", True)):
        found = Walk.of(sampler.table(name, (1.0, 0.5, 0.0)), (plain, guided), name)
        assert found == Walk((1.0, 0.5), (layout(plain), layout(guided)), name, draws_noise=noisy)
    assert Walk.of(sampler.ddim((1.0, 0.5, 0.0), 0.3), (plain,) * 2, "ddim").draws_noise


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("magcache", ("magcache", 0.06)), ("easycache:0.2", ("easycache", 0.2))],
)
def test_a_method_has_a_threshold_of_its_own_or_the_wished(
    text: str, wanted: tuple[str, float]
) -> None:
    assert parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("magcash", "unknown method 'magcash', known are magcache, easycache, teacache; did you"),
        ("teacache:", "'' is no number; write teacache:0.05"),
        ("easycache:much", "'much' is no number; write easycache:0.05"),
    ],
)
def test_a_mistyped_method_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match="--cache-steps") as told:
        parse(text)
    assert said in str(told.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"method": Method.easycache, "threshold": -1.0}, "a number from 0, such as easycache:0"),
        ({"method": Method.easycache, "threshold": float("nan")}, "a number from 0"),
        ({"method": Method.teacache, "longest": 2}, "--cache-longest is of magcache"),
        ({"method": Method.teacache, "retention": 0.2}, "--cache-retention is of magcache"),
        ({"method": Method.magcache, "retention": 1.5}, "from 0 to 1, not 1.5"),
        ({"method": Method.easycache, "table": table()}, "easycache needs no table"),
    ],
)
def test_an_option_that_does_nothing_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Caching(**({"threshold": 0.1} | words))


def walk_of(steps: int) -> Walk:
    return replace(WALK, sigmas=SIGMAS[:steps], layouts=WALK.layouts[:steps])


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize(
    ("walk", "facts", "said"),
    [
        (walk_of(9), {}, "needs 10 steps, this run has 9"),
        (replace(WALK, sampler="stochastic", draws_noise=True), {}, "not for the sampler stoch"),
        (WALK, {"allowed_inference_steps": SIGMAS}, "not for a distilled checkpoint"),
    ],
)
def test_a_run_without_like_steps_is_refused(
    method: Method, walk: Walk, facts: dict[str, Any], said: str
) -> None:
    bundle = MANIFEST.model_copy(update=facts)
    with pytest.raises(UserError, match=f"{said}.*leave --cache-steps out"):
        step_caching.check(caching(method), walk, bundle)


@pytest.mark.parametrize("method", [Method.magcache, Method.teacache])
def test_a_method_that_needs_a_table_says_how_to_get_one(method: Method) -> None:
    with pytest.raises(UserError, match=f"{method} needs a table.*calibrate-cache.*easycache"):
        step_caching.check(caching(method, table=None), WALK, MANIFEST)
    step_caching.check(caching(Method.easycache), walk_of(10), MANIFEST)
    step_caching.check(caching(method), WALK, MANIFEST)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"first": -1}, "--cache-first must be 0 or more, not -1"),
        ({"last": -1}, "--cache-last must be 0 or more, not -1"),
        ({"longest": 0}, "--cache-longest must be 1 or more, not 0"),
    ],
)
def test_a_negative_number_of_steps_is_refused_from_a_job_too(
    words: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        caching(Method.magcache, **words)


def test_options_that_change_nothing_are_said() -> None:
    assert without_effect(caching(Method.magcache, first=5), WALK) == ()
    (below,) = without_effect(caching(Method.magcache, first=1, retention=0.5), WALK)
    assert below.startswith("--cache-first 1 has no effect: --cache-retention computes the first ")
    for words in ({"first": STEPS}, {"last": STEPS}):
        (none,) = without_effect(caching(Method.easycache, **words), WALK)
        assert f"leave none of {STEPS} to reuse" in none
