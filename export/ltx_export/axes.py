"""The free axes of the stages, and the sizes at which they are traced.

Every named axis of the stage table stays an axis: it is traced at a large prime, so that a size
which was baked into the graph is a number that nothing else in a model explains
(`invariants.py` looks for it).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

EXAMPLE = MappingProxyType(
    {
        "batch": 1009,
        "tokens": 10007,
        "text": 1013,
        "latent_frames": 1019,
        "latent_height": 1021,
        "latent_width": 1031,
    }
)
"""The axes that are free, and the size at which each is traced: primes, above any model's widths'
odd factors."""


@dataclass(frozen=True, slots=True)
class Derived:
    """An axis that follows another one: factor * root + offset."""

    root: str
    factor: int = 1
    offset: int = 0

    @property
    def example(self) -> int:
        return self.factor * EXAMPLE[self.root] + self.offset


DERIVED: Mapping[str, Derived] = MappingProxyType(
    {
        # At run time this axis is 1 or `tokens`. The model never reshapes it, so a graph traced
        # with one timestep for each token also broadcasts a single one.
        "timesteps": Derived("tokens"),
        "frames": Derived("latent_frames", 8, -7),
        "height": Derived("latent_height", 32),
        "width": Derived("latent_width", 32),
        "upsampled_frames": Derived("latent_frames", 2, -1),
        "upsampled_height": Derived("latent_height", 2),
        "upsampled_width": Derived("latent_width", 2),
        "stream_frames": Derived("latent_frames", 8),
        **{
            f"latent_{side}_x{scale}": Derived(f"latent_{side}", scale)
            for side in ("height", "width")
            for scale in (2, 4, 8, 16, 32)
        },
    }
)


def root(axis: str) -> str:
    """The axis of the latent grid that this one follows, else nothing. A timestep for each token
    is a choice, not a size that follows."""
    side, _, block = axis.partition("_")
    if side in ("height", "width") and block.isdecimal():
        return f"latent_{side}"
    return DERIVED[axis].root if axis in DERIVED and axis != "timesteps" else ""


def noise_axes(scales: Mapping[int, int]) -> dict[str, Derived]:
    """The axes of a noise input, `scales[block]` times the latent grid's."""
    return {
        f"{side}_{block}": Derived(f"latent_{side}", scale)
        for block, scale in scales.items()
        for side in ("height", "width")
    }
