"""Each rule of step caching against its formula, written out for one step at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ltx_trt.cache_rules import EasyCache, Given, magcache, teacache

STEPS = 40


def drifting(seed: int) -> list[float]:
    """Ratios as MagCache finds them: near 1, lower at the end."""
    noise = np.random.default_rng(seed).normal(0, 0.01, STEPS)
    ratios: list[float] = (np.linspace(1.01, 0.86, STEPS) + noise).tolist()
    return ratios


def ends(first: int, last: int) -> list[bool]:
    return [step < first or step >= STEPS - last for step in range(STEPS)]


def last_computed(reused: Sequence[bool], step: int) -> int:
    return max(i for i in range(step) if not reused[i])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("threshold", "longest"), [(0.04, 5), (0.06, 3), (0.24, 2), (9.0, 4)])
def test_magcache_reuses_while_the_drifts_since_the_last_computed_step_add_up_to_less(
    seed: int, threshold: float, longest: int
) -> None:
    ratios, forced = drifting(seed), ends(8, 1)
    reused = magcache(ratios, forced, threshold, longest)
    assert any(reused)
    for step in range(1, STEPS):
        since = ratios[last_computed(reused, step) + 1 : step + 1]
        error = sum(abs(1 - np.prod(since[:n])) for n in range(1, len(since) + 1))
        wished = error < threshold and len(since) <= longest
        assert reused[step] == (wished and not forced[step])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.5])
def test_teacache_reuses_while_the_changes_since_the_last_computed_step_add_up_to_less(
    seed: int, threshold: float
) -> None:
    changes = np.abs(np.random.default_rng(seed).normal(0.05, 0.04, STEPS)).tolist()
    forced = ends(1, 1)
    reused = teacache(changes, forced, threshold)
    for step in range(1, STEPS):
        since = sum(changes[last_computed(reused, step) + 1 : step + 1])
        assert reused[step] == (since < threshold and not forced[step])


@pytest.mark.parametrize("threshold", [0.02, 0.06, 0.12, 0.4])
@pytest.mark.parametrize("longest", [1, 3, 5])
@pytest.mark.parametrize("retention", [0.0, 0.1, 0.2])
def test_magcache_chooses_the_steps_that_diffusers_hook_chooses(
    threshold: float, longest: int, retention: float
) -> None:
    ratios = drifting(3)
    forced = ends(max(1, int(retention * STEPS + 0.5)), 0)
    theirs = by_diffusers(
        mag_ratios=ratios,
        threshold=threshold,
        max_skip_steps=longest,
        retention_ratio=retention,
        num_inference_steps=STEPS,
    )
    assert list(magcache(ratios, forced, threshold, longest)) == theirs


def by_diffusers(**words: Any) -> list[bool]:
    """Of each step, whether the blocks were left out. There are two: with one, the hook's own
    count of steps stands still while it skips."""
    torch = pytest.importorskip("torch")
    hook = pytest.importorskip("diffusers.hooks.mag_cache")
    registry = pytest.importorskip("diffusers.hooks._helpers")
    runs: list[int] = []

    class Block(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        def forward(self, hidden_states: Any) -> Any:
            runs.append(step)
            return hidden_states + 1

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = torch.nn.ModuleList([Block(), Block()])

    words["mag_ratios"] = torch.tensor(words["mag_ratios"], dtype=torch.float64)
    metadata = registry.TransformerBlockMetadata(return_hidden_states_index=0)
    registry.TransformerBlockRegistry.register(Block, metadata)
    model = Model()
    hook.apply_mag_cache(model, hook.MagCacheConfig(**words))
    for step in range(STEPS):  # noqa: B007 - the block reads it
        hidden = torch.zeros(1, 2, 3)
        for block in model.transformer_blocks:
            hidden = block(hidden)
    return [step not in runs for step in range(STEPS)]


def moving(latents: Any, count: int) -> Given:
    """The last `count` tokens are not conditions."""
    mask = np.zeros(latents.shape[:2], np.bool_)
    mask[:, -count:] = True
    return Given(latents, mask)


def easycache_reference(
    latents: Any, velocities: Any, forced: Sequence[bool], threshold: float
) -> list[bool]:
    """In float64, step by step; indices of the last two computed steps are all the memory."""
    x, v = ([np.asarray(a, np.float64) for a in row] for row in (latents, velocities))
    computed: list[int] = []
    reused, change = [], 0.0
    for step in range(len(x)):
        ready = len(computed) >= 2 and not forced[step]
        if ready:
            a, b = computed[-2:]
            slope = np.abs(v[b] - v[a]).mean() / np.abs(x[b] - x[a]).mean()
            change += slope * np.abs(x[step] - x[step - 1]).mean() / np.abs(v[b]).mean()
        reused.append(bool(ready and change < threshold))
        if not reused[-1]:
            change = 0.0
            computed.append(step)
    return reused


@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.1, 0.4])
@pytest.mark.parametrize("held", [0, 2])
def test_easycache_predicts_from_the_last_two_computed_steps(threshold: float, held: int) -> None:
    """Whatever tokens that are held as conditions do."""
    shape, forced = (2, 5, 4), ends(5, 1)
    random = np.random.default_rng(7)
    walk = 1 + random.normal(0, 0.02, (STEPS, *shape)).cumsum(axis=0).astype(np.float32)
    answers = (walk * 0.4 + random.normal(0, 0.005, walk.shape)).astype(np.float32)
    seen = slice(held, None)
    wanted = easycache_reference(walk[:, :, seen], answers[:, :, seen], forced, threshold)
    assert (threshold == 0) != any(wanted)
    rule, found = EasyCache(forced, threshold), []
    for step in range(STEPS):
        given = moving(walk[step], shape[1] - held)
        found.append(rule.reuses(step, given))
        if not found[-1]:
            rule.computed(given, answers[step])
    assert found == wanted


def test_easycache_computes_where_it_cannot_divide() -> None:
    """Latents that did not move, and velocities of 0."""
    still = moving(np.ones((1, 2, 3), np.float32), 2)
    for answer in (np.ones((1, 2, 3), np.float32), np.zeros((1, 2, 3), np.float32)):
        rule = EasyCache([False] * 9, 1e9)
        for step in range(3):
            assert not rule.reuses(step, still)
            rule.computed(still, answer)
    rule = EasyCache([False] * 9, 1e9)
    for step, size in enumerate((0, 1)):
        rule.reuses(step, moving(np.full((1, 2, 3), size, np.float32), 2))
        rule.computed(moving(np.full((1, 2, 3), size, np.float32), 2), still.latents * 0)
    assert not rule.reuses(2, still)


def test_what_was_forgotten_predicts_nothing() -> None:
    rule = EasyCache([False] * 9, 1e9)
    given = [moving(np.full((1, 2, 3), step, np.float32), 2) for step in range(4)]
    for step in range(2):
        assert not rule.reuses(step, given[step])
        rule.computed(given[step], given[step].latents + 1)
    assert rule.reuses(2, given[2])
    rule.forget()
    assert not rule.reuses(3, given[3])


@pytest.mark.parametrize("forced", [[False] * STEPS, ends(3, 3)])
def test_a_threshold_of_zero_reuses_nothing_even_if_nothing_changes(forced: list[bool]) -> None:
    assert not any(magcache([1.0] * STEPS, forced, 0.0, 9))
    assert not any(teacache([0.0] * STEPS, forced, 0.0))
