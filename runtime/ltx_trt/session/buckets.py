"""Which clips the engines of a bundle take, by the manifest: before one is opened."""

from collections.abc import Iterator, Mapping, Sequence

from ltx_engines.cache_key import Profile
from ltx_engines.engine_entry import Chain
from ltx_engines.shapes import SPACE, TIME, VideoShape
from ltx_trt.session.sizes import GRID

Sizes = Mapping[str, int]
"""By the names of the axes."""


def refusal(profiles: Sequence[Profile], wanted: Sizes) -> str:
    """What is not as the nearest profile takes it; nothing if one takes these sizes."""
    nearest = min(profiles, key=lambda profile: _distance(profile, wanted))
    return ", ".join(
        f"{axis} {low if low == high else f'{low} to {high}'}, not {wanted[axis]}"
        for axis, (low, _, high) in nearest.items()
        if axis in wanted and not low <= wanted[axis] <= high
    )


def clips(chain: Chain) -> Iterator[VideoShape]:
    """The largest of each profile, for a stage that has the latent grid."""
    for profile in chain[0].key.profiles if chain else ():
        if all(axis in profile for axis in GRID):
            frames, rows, columns = (profile[axis][2] for axis in GRID)
            yield VideoShape(TIME * (frames - 1) + 1, SPACE * rows, SPACE * columns)


def endless(stream: Chain, transformer: Chain) -> Iterator[VideoShape]:
    """Of a decoder that takes clips of any length: the longest of each size that the transformer's
    engines were built for."""
    known = transformer[0].key.profiles if transformer else ()
    tokens = [one["tokens"][2] for one in known if one["timesteps"][2] == 1]
    for profile in stream[0].key.profiles:
        frames, rows, columns = (profile[axis][2] for axis in GRID)
        lengths = [t // (rows * columns) for t in tokens if t % (rows * columns) == 0]
        if lengths or not known:
            longest = max(lengths, default=frames)
            yield VideoShape(TIME * (longest - 1) + 1, SPACE * rows, SPACE * columns)


def word(clip: VideoShape) -> str:
    """As `--shape` has it."""
    return f"{clip.width}x{clip.height}x{clip.frames}"


def _distance(profile: Profile, wanted: Sizes) -> float:
    """0 for a profile that takes them; else how many times too small or too large they are, once
    for each axis."""
    pairs = [(wanted[axis], ends) for axis, ends in profile.items() if axis in wanted]
    return sum(max(low / size, size / high, 1.0) - 1.0 for size, (low, _, high) in pairs)
