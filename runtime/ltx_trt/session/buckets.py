"""Which clips the engines of a bundle take, by the manifest: before one is opened."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

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
    tokens = {one["tokens"][2] for one in known if one["timesteps"][2] == 1}
    grids = [tuple(one[axis][2] for axis in GRID) for one in stream[0].key.profiles]
    lengths = _lengths(tokens, {rows * columns for _, rows, columns in grids})
    for frames, rows, columns in grids:
        longest = lengths.get(rows * columns) if known else frames
        if longest is not None:
            yield VideoShape(TIME * (longest - 1) + 1, SPACE * rows, SPACE * columns)


def _lengths(tokens: Collection[int], sizes: Collection[int]) -> dict[int, int]:
    """The longest clip in latent frames of each size, which is in cells. Tokens may be those of a
    few large frames, or of many small ones: of the length that most clips have then, or else the
    shorter one. A size of which no tokens are left has the shortest that it may have."""
    readings = [{size: t // size for size in sizes if t % size == 0} for t in tokens]
    common = Counter(length for reading in readings for length in reading.values())
    taken = dict[int, int]()
    for reading in filter(None, readings):
        length = max(reading.values(), key=lambda one: (common[one], -one))
        size = next(size for size, one in reading.items() if one == length)
        taken[size] = max(length, taken.get(size, 0))
    shortest = {size: min(r[size] for r in readings if size in r) for r in readings for size in r}
    return shortest | taken


def word(clip: VideoShape) -> str:
    """As `--shape` has it."""
    return f"{clip.width}x{clip.height}x{clip.frames}"


def _distance(profile: Profile, wanted: Sizes) -> float:
    """0 for a profile that takes them; else how many times too small or too large they are, once
    for each axis."""
    pairs = [(wanted[axis], ends) for axis, ends in profile.items() if axis in wanted]
    return sum(max(low / size, size / high, 1.0) - 1.0 for size, (low, _, high) in pairs)
