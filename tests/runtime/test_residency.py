"""The plan of what is on the card: never more than there is, never more traffic than need be."""

import random
from fractions import Fraction
from itertools import combinations

import pytest

from ltx_engines.errors import UserError
from ltx_trt.session.residency import Need, Residency, Rotation, budget, notes, plan

CASES = [
    (parts, places, overlaps)
    for parts in range(1, 6)
    for places in range(1, parts + 1)
    for overlaps in (False, True)
    if not overlaps or 2 <= places < parts
]


def one(need: Need, memory: int) -> Residency:
    (found,) = plan([need], memory)
    return found


@pytest.mark.parametrize(("parts", "places", "overlaps"), CASES)
def test_no_order_of_loading_undercuts_the_rotation(
    parts: int, places: int, overlaps: bool
) -> None:
    steps = 6
    best = {frozenset(range(places)): 0}
    for turn in range(steps * parts):
        running, wanted = turn % parts, (turn + 1) % parts
        needed = {wanted} | ({running} if overlaps else set())
        choices = [s for s in map(frozenset, combinations(range(parts), places)) if needed <= s]
        best = {
            after: min(cost + len(after - before) for before, cost in best.items())
            for after in choices
        }
    rotation = Rotation(parts, places, overlaps)
    assert sum(len(list(rotation.step())) for _ in range(steps)) == min(best.values())


@pytest.mark.parametrize(("parts", "places", "overlaps"), CASES)
def test_loads_are_as_the_formula_says(parts: int, places: int, overlaps: bool) -> None:
    rotation, steps = Rotation(parts, places, overlaps), 1000
    loads = sum(len(list(rotation.step())) for _ in range(steps))
    expected = steps * Fraction(parts * (parts - places), max(1, parts - 1 - overlaps))
    assert abs(loads - expected) <= parts  # the first step finds some there


def test_the_part_that_runs_stays_while_another_comes() -> None:
    rotation = Rotation(7, 3, True)
    for step in range(40):
        running, wanted = step % 7, (step + 1) % 7
        swap = rotation.toward(wanted, running)
        assert {running, wanted} <= rotation.held
        assert len(rotation.held) == 3
        assert swap is None or swap[1] == wanted


def test_one_place_cannot_hold_what_runs_and_what_comes() -> None:
    with pytest.raises(ValueError, match="1 places for 3 parts"):
        Rotation(3, 1, True)
    with pytest.raises(ValueError, match="4 places for 3 parts"):
        Rotation(3, 4, False)


def test_more_memory_never_streams_more_and_the_sum_never_exceeds_it() -> None:
    dice = random.Random(5)
    for _ in range(60):
        weights = tuple(dice.randint(1, 100) for _ in range(dice.randint(1, 8)))
        need = Need("transformer", weights, dice.randint(0, 50), dice.randint(0, 20))
        before = None
        for memory in range(0, sum(weights) + 90, 7):
            try:
                found = one(need, memory)
            except UserError:
                assert before is None, "more memory, and it does not fit any more"
                assert memory < max(weights) + need.activations + need.buffers or len(weights) == 1
                continue
            assert found.total <= found.budget == memory
            if before is not None:
                assert found.streamed <= before.streamed
                assert found.places >= before.places
            before = found
        assert before is not None
        assert before.resident
        assert before.streamed == 0


def test_what_is_planned_with_grows_with_what_is_wished_and_what_is_free() -> None:
    assert [budget(None, free) for free in (0, 100, 2000)] == [0, 95, 1900]
    assert [budget(wished, 100) for wished in (1, 94, 96, 1000)] == [1, 94, 95, 95]


def test_an_engine_that_streams_gets_what_is_left() -> None:
    need = Need("transformer", (1000,), activations=200, buffers=50, streams=True)
    assert one(need, 1250).resident
    found = one(need, 600)
    assert (found.allowance, found.total, found.resident) == (350, 600, False)
    with pytest.raises(UserError, match="make the clip smaller"):
        one(need, 250)


def test_stages_share_the_arena_and_nothing_else() -> None:
    encoder, transformer = Need("text_encoder", (500,), 10), Need("transformer", (300,), 100)
    assert [found.total for found in plan([encoder, transformer], 600)] == [600, 400]
    with pytest.raises(
        UserError, match=r"^text_encoder needs at least 600 .*--text-encoder-device cpu$"
    ):
        plan([encoder, transformer], 599)


def test_a_stage_that_is_kept_takes_its_room_from_all_others() -> None:
    encoder, transformer = Need("text_encoder", (500,), 10, 5), Need("transformer", (300,), 100)
    totals = [found.total for found in plan([encoder, transformer], 905, kept={"text_encoder"})]
    assert totals == [605, 905]
    with pytest.raises(
        UserError, match=r"^transformer needs at least 905 .*; choose --memory staged$"
    ):
        plan([encoder, transformer], 904, kept={"text_encoder"})


@pytest.mark.parametrize(
    ("need", "memory", "advice"),
    [
        (Need("transformer", (90,), 20), 100, "--split or --weight-streaming"),
        (Need("transformer", (90, 90), 20), 100, "in more parts .*--split"),
        (Need("transformer", (90, 90), 200), 100, "; make the clip smaller or shorter$"),
        (Need("vae_decoder", (90,), 200), 100, "; build it for smaller tiles .*--vae-tile WxHxF"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(need: Need, memory: int, advice: str) -> None:
    with pytest.raises(UserError, match=advice) as caught:
        one(need, memory)
    assert str(caught.value).startswith(
        f"{need.stage} needs at least {90 + need.activations} bytes of the GPU's memory"
    )
    assert "there are 100 bytes" in str(caught.value)


def test_the_note_says_what_is_streamed() -> None:
    gib = 2**30
    need = Need("transformer", (2 * gib,) * 4, activations=gib // 10)
    assert notes([one(Need("vae_decoder", (gib,)), 9 * gib), one(need, 9 * gib)]) == (
        one(need, 9 * gib).note(),
    )
    assert one(need, 9 * gib).note() == (
        "transformer: all 4 parts are resident, 8.10 GiB of 9.00 GiB"
    )
    assert one(need, 8 * gib).note() == (
        "transformer: 3 of 4 parts fit at once, 4.00 GiB are loaded in each step while others "
        "run, 6.10 GiB of 8.00 GiB"
    )
    assert "8.00 GiB are loaded in each step while nothing runs" in one(need, 3 * gib).note()
    whole = Need("transformer", (8 * gib,), gib // 10, streams=True)
    assert one(whole, 6 * gib).note() == (
        "transformer: streams from 8.00 GiB of weights, in 6.00 GiB of 6.00 GiB"
    )
