"""Halving finds the part that costs most; parts of one model stand in another."""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from ltx_export import bisection
from ltx_export.bisection import Mixture, Parts, in_float32, steepest, swapped
from ltx_export.ladder import Culprit, distance
from ltx_ref.ltx_video.config import TransformerConfig
from ltx_ref.ltx_video.transformer import Transformer
from tests.ref.oracles import normals, randomize

T = TypeVar("T")

BLOCKS = 3


def ended(work: Generator[str, None, T]) -> tuple[T, list[str]]:
    said = []
    while True:
        try:
            said.append(next(work))
        except StopIteration as end:
            result: T = end.value
            return result, said


def grown(costs: Sequence[float]) -> Callable[[int], float]:
    """The error after the first k parts, whose errors add up in squares."""
    sums = [0.0, *accumulate(cost * cost for cost in costs)]
    return lambda count: math.sqrt(sums[count])


@pytest.mark.parametrize("count", [1, 2, 5, 48])
def test_a_part_that_costs_more_than_all_others_is_found_wherever_it_is(count: int) -> None:
    for worst in range(count):
        costs = [0.01] * count
        costs[worst] = 0.1
        assert ended(steepest("parts", count, grown(costs)))[0] == worst + 1


def test_many_small_errors_that_break_the_bound_together_do_not_hide_the_large_one() -> None:
    """The error exceeds 0.104 only with the last part, which costs next to nothing."""
    costs = [0.01, 0.01, 0.01, 0.1, 0.01, 0.01, 0.01, 0.01]
    assert ended(steepest("parts", 8, grown(costs)))[0] == 4


def test_what_the_parts_before_have_cost_does_not_count_for_the_next_ones() -> None:
    """Behind a first half that costs 5, a quarter of 1 and then one of 5."""
    costs = [math.sqrt(cost) for cost in (1.25, 1.25, 1.25, 1.25, 0.5, 0.5, 0.1, 4.9)]
    assert ended(steepest("parts", 8, grown(costs)))[0] == 8


def test_halving_asks_for_few_of_the_places() -> None:
    asked: set[int] = set()
    error = grown([0.01] * 21 + [1.0] + [0.01] * 26)

    def asking(place: int) -> float:
        asked.add(place)
        return error(place)

    assert ended(steepest("parts", 48, asking))[0] == 22
    assert len(asked) <= 8


@pytest.mark.parametrize("worst", [1, 4, 7])
@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_the_part_that_makes_nan_is_found(worst: int, damage: float) -> None:
    def error(count: int) -> float:
        return damage if count >= worst else 0.1 * count

    assert ended(steepest("parts", 7, error))[0] == worst


def test_progress_says_how_many_are_left() -> None:
    assert ended(steepest("parts", 8, grown([1] * 8)))[1] == [
        f"bisecting parts: {left} left" for left in (8, 4, 2)
    ]


CONFIG = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=20,
    num_layers=BLOCKS,
    in_channels=12,
    out_channels=12,
    caption_channels=24,
    cross_attention_dim=40,
)


def transformer() -> Transformer:
    model = Transformer(CONFIG)
    randomize(model, seed=5)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Two:
    """The same model twice, one of which is about to be damaged."""

    reference: Transformer
    candidate: Transformer

    def velocity(self, model: Transformer, dtype: torch.dtype = torch.float32) -> Tensor:
        floats = (
            normals(2, 7, 12, seed=1).to(dtype),
            normals(2, 3, 7, seed=2).abs() * 100,
            torch.full((2, 1), 0.7),
            normals(2, 5, 24, seed=3).to(dtype),
            torch.ones(2, 5, dtype=dtype),
            torch.ones(BLOCKS, 2, dtype=dtype),
        )
        velocity: Tensor = model(*floats).float()
        return velocity

    def culprit(self, limit: float = 1e-3) -> Culprit:
        wanted = self.velocity(self.reference).numpy()

        def measure(parts: Parts) -> float:
            with swapped(self.reference, parts):
                return distance(self.velocity(self.reference).numpy(), wanted)

        found = distance(self.velocity(self.candidate).numpy(), wanted)
        assert not found <= limit, "the damage does not show"
        mixture = Mixture(
            self.reference,
            self.candidate,
            measure,
            limit,
            found,
            lambda model, index: model.transformer_blocks[index],
        )
        culprit = ended(mixture.culprit())[0]
        assert distance(self.velocity(self.reference).numpy(), wanted) == 0, "it was not put back"
        return culprit


@pytest.fixture
def two() -> Two:
    return Two(transformer(), transformer())


PLACES = [
    "patchify_proj",
    "adaln_single.linear",
    "caption_projection.linear_2",
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.attn1.q_norm",
    "transformer_blocks.1.attn1.to_out.0",
    "transformer_blocks.1.attn2.to_v",
    "transformer_blocks.2.ff.net.0.proj",
    "transformer_blocks.2.ff.net.2",
    "proj_out",
]


def weight_of(model: nn.Module, place: str) -> Tensor:
    return model.get_parameter(f"{place}.weight")


@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_weight_is_named(two: Two, place: str) -> None:
    weight_of(two.candidate, place)[0] += 1.0
    found = two.culprit()
    shown = place if place.startswith("transformer_blocks") else place.split(".")[0]
    assert found.place == shown
    assert found.before == 0.0
    assert found.alone == pytest.approx(found.after)


def test_nan_in_a_weight_is_named(two: Two) -> None:
    weight_of(two.candidate, "transformer_blocks.1.ff.net.2")[3, 3] = math.nan
    assert two.culprit().place == "transformer_blocks.1.ff.net.2"


def test_what_is_in_a_block_and_in_none_of_its_layers_is_said_to_be(two: Two) -> None:
    two.candidate.get_parameter("transformer_blocks.1.scale_shift_table").add_(1)
    found = two.culprit()
    assert found.place == "transformer_blocks.1, outside its layers"
    assert found.alone is None


def test_what_is_in_no_module_is_the_table_at_the_end(two: Two) -> None:
    two.candidate.scale_shift_table.add_(1)
    assert two.culprit().place == bisection.OUTSIDE


def test_a_part_in_bfloat16_does_in_float32_what_it_does_among_its_own(two: Two) -> None:
    """Bit for bit, up to the last block."""
    half, last = two.candidate.bfloat16(), f"transformer_blocks.{BLOCKS - 1}"
    chosen = {name: in_float32(half.get_submodule(name)) for name in bisection.parts(half)}
    seen: list[Tensor] = []
    half.get_submodule(last).register_forward_hook(lambda *call: seen.append(call[-1].float()))
    two.velocity(half, torch.bfloat16)
    with swapped(two.reference, chosen):
        two.velocity(two.reference)
    among_its_own, mixed = seen
    assert torch.equal(among_its_own, mixed)


def test_a_part_in_float32_is_taken_as_it_is() -> None:
    layer = nn.Linear(2, 2)
    assert in_float32(layer) is layer


def test_parts_come_back_even_if_what_happened_between_failed(two: Two) -> None:
    before = two.velocity(two.reference)
    other = {"transformer_blocks.1": two.candidate.transformer_blocks[0]}
    inner = {**other, "transformer_blocks.1.attn1.to_q": nn.Linear(40, 40)}
    with pytest.raises(KeyError), swapped(two.reference, inner):
        assert not torch.equal(two.velocity(two.reference), before)
        raise KeyError
    assert torch.equal(two.velocity(two.reference), before)


def test_all_parts_of_a_model_are_listed_in_their_order() -> None:
    found = bisection.parts(transformer())
    assert found == [
        *("patchify_proj", "adaln_single", "caption_projection"),
        *(f"transformer_blocks.{index}" for index in range(BLOCKS)),
        "proj_out",
    ]
    assert {name for name, _ in transformer().named_children()} == {
        name.split(".")[0] for name in found
    }


def test_the_layers_of_a_block_are_listed_in_their_order() -> None:
    attention = ["to_q", "to_k", "to_v", "q_norm", "k_norm", "to_out.0"]
    assert bisection.layers(transformer().transformer_blocks[0]) == [
        *(f"attn1.{name}" for name in attention),
        *(f"attn2.{name}" for name in attention),
        *("ff.net.0.proj", "ff.net.2"),
    ]
