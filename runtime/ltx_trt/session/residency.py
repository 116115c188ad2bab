"""Which weights are on the card at once, and which come and go: a plan without a GPU.

A stage is one engine, or a chain of parts that are computed in order, once in each step. Where
they do not all fit there are `places` for some of them. The next part takes the place of the one
that is needed last; that is the part that ran last, so "least recently used" would be the worst
choice. N parts with P places, each step: N (N - P) / (N - 1) loads, which no other order undercuts;
N (N - P) / (N - 2) where a part is loaded while the one before it runs.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ltx_engines.byte_sizes import said
from ltx_engines.errors import UserError
from ltx_engines.stages import DECODER, STREAM

ALLOWANCE = 20
"""One part in so many. A choice, not a measurement."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a stage takes of a card, in bytes: the weights of each part, the activations of the part
    that has most, and buffers for what goes in and out. `streams`: the engine can fetch weights
    while it runs."""

    stage: str
    weights: tuple[int, ...]
    activations: int = 0
    buffers: int = 0
    streams: bool = False


@dataclass(frozen=True, slots=True)
class Residency:
    """`places` parts are on the card at once; with `overlaps`, one is loaded while another runs.

    `fixed` bytes are not weights; `allowance` is for the weights of one engine and what it takes to
    stream them, None if all of them stay.
    """

    need: Need
    places: int
    overlaps: bool
    fixed: int
    budget: int
    allowance: int | None = None

    @property
    def parts(self) -> int:
        return len(self.need.weights)

    @property
    def room(self) -> tuple[int, int | None]:
        """What an engine is opened with."""
        return self.places, self.allowance

    @property
    def resident(self) -> bool:
        """Nothing is streamed."""
        return self.places == self.parts and self.allowance is None

    @property
    def total(self) -> int:
        """Bytes at most."""
        if self.allowance is not None:
            return self.fixed + self.allowance
        return self.fixed + most(self.need.weights, self.places)

    @property
    def streamed(self) -> int:
        """Bytes of weights that are loaded again in each step, on average. What an engine streams
        by itself is known when it is open."""
        if self.resident or self.allowance is not None:
            return 0
        seen: dict[frozenset[int], tuple[int, int]] = {}
        rotation, loaded = self.rotation(), 0
        while (state := frozenset(rotation.held)) not in seen:
            seen[state] = len(seen), loaded
            loaded += sum(self.need.weights[load] for _, load in rotation.step())
        since, before = seen[state]
        return (loaded - before) // (len(seen) - since)

    def rotation(self) -> "Rotation":
        return Rotation(self.parts, self.places, self.overlaps)

    def note(self) -> str:
        """For people, before the run."""
        size = f"{said(self.total)} of {said(self.budget)}"
        if self.allowance is not None:
            weights = sum(self.need.weights)
            return f"{self.need.stage}: streams from {said(weights)} of weights, in {size}"
        if self.resident:
            number = f"all {self.parts} parts are " * (self.parts > 1)
            return f"{self.need.stage}: {number}resident, {size}"
        when = "while others run" if self.overlaps else "while nothing runs"
        return (
            f"{self.need.stage}: {self.places} of {self.parts} parts fit at once, "
            f"{said(self.streamed)} are loaded in each step {when}, {size}"
        )


class Rotation:
    """Which parts are on the card, and which one gives way to the next."""

    def __init__(self, parts: int, places: int, overlaps: bool) -> None:
        if not 1 + (overlaps and places < parts) <= places <= parts:
            raise ValueError(f"{places} places for {parts} parts, overlapping: {overlaps}")
        self.parts, self.places, self.overlaps = parts, places, overlaps
        self.held = set(range(places))

    def toward(self, wanted: int, running: int | None) -> tuple[int, int] | None:
        """What goes and what comes, for `wanted` to be there next; None if it is there."""
        if wanted in self.held:
            return None
        free = self.held - ({running} if self.overlaps else set())
        last = max(free, key=lambda part: (part - wanted) % self.parts)
        self.held = self.held - {last} | {wanted}
        return last, wanted

    def step(self) -> Iterator[tuple[int, int]]:
        """What goes and what comes in one pass through all parts."""
        for part in range(self.parts):
            if swap := self.toward((part + 1) % self.parts, part):
                yield swap


def plan(needs: Sequence[Need], budget: int, *, kept: Collection[str] = ()) -> list[Residency]:
    """One for each stage. They run one after the other in one arena; those `kept` stay.

    Raises:
        UserError: a stage does not fit.
    """
    arena = max((need.activations for need in needs), default=0)
    found = []
    for need in needs:
        others = (n for n in needs if n.stage in kept and n.stage != need.stage)
        held = sum(sum(other.weights) + other.buffers for other in others)
        fixed, stays = arena + need.buffers + held, need.stage in kept
        found.append(_stage(need, fixed, budget, held=held, kept=stays))
    return found


def budget(wished: int | None, free: int) -> int:
    """What may be planned with: an allowance of what is free is left for kernels that are loaded
    or compiled, and for pages that are not full."""
    usable = free - free // ALLOWANCE
    return usable if wished is None else min(wished, usable)


def notes(found: Sequence[Residency]) -> tuple[str, ...]:
    """Of the stages that are in parts or do not fit; of the others there is nothing to say."""
    return tuple(one.note() for one in found if one.parts > 1 or not one.resident)


def most(weights: Sequence[int], places: int) -> int:
    """The bytes of the heaviest `places` parts."""
    return sum(sorted(weights, reverse=True)[:places])


def _stage(need: Need, fixed: int, budget: int, *, held: int, kept: bool) -> Residency:
    room, parts = budget - fixed, len(need.weights)
    heaviest_first = accumulate(sorted(need.weights, reverse=True))
    places = sum(size <= room for size in heaviest_first)
    if places == parts:
        return Residency(need, places, False, fixed, budget)
    if need.streams and room > 0 and not kept:
        return Residency(need, parts, False, fixed, budget, allowance=room)
    if places == 0 or parts == 1 or kept:
        weights = sum(need.weights) if kept else max(need.weights)
        advice = "choose --memory staged" if held or kept else _advice(need, room)
        raise UserError(_refusal(need, fixed, weights, budget, advice))
    return Residency(need, places, places > 1, fixed, budget)


def _advice(need: Need, room: int) -> str:
    if need.stage == "text_encoder":  # no clip makes it smaller
        return "compute it on the CPU: --text-encoder-device cpu"
    smaller = "make the clip smaller or shorter"
    if need.stage.startswith("vae_"):
        fewer = "to go on a few frames at a time (ltx-export build-engine --vae-stream FRAMES)"
        tiles = "build it for smaller tiles (ltx-export build-engine --vae-tile WxHxF)"
        if need.stage == STREAM:
            return f"build it {fewer}, fewer than now, or make the clip smaller"
        return f"{tiles}, or {fewer}" if need.stage == DECODER else tiles
    if room <= 0:
        return smaller
    if len(need.weights) > 1:
        return f"build it in more parts (ltx-export build-engine --split), or {smaller}"
    return f"build it again (ltx-export build-engine --split or --weight-streaming), or {smaller}"


def _refusal(need: Need, fixed: int, weights: int, budget: int, advice: str) -> str:
    return (
        f"{need.stage} needs at least {said(fixed + weights)} of the GPU's memory "
        f"({said(weights)} of weights at once, {said(fixed)} beside them), there are "
        f"{said(budget)}; {advice}"
    )
