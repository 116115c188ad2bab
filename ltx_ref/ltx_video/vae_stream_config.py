"""What a decoder that goes on keeps, and by how much it is late, by its configuration alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from ltx_ref.ltx_video.config import STRIDES, VAEConfig, multiplier


@dataclass(frozen=True, slots=True)
class State:
    """What a convolution keeps, B channels 2 H W; H and W are `scale` times the latents'."""

    channels: int
    scale: int


def states(config: VAEConfig) -> tuple[State, ...]:
    """Of a decoder, in the order of its convolutions."""
    return tuple(State(channels, scale) for channels, scale, _ in _convolutions(config))


def delay(config: VAEConfig) -> int:
    """Frames by which a decoder that goes on is late."""
    late, fine = 0, 1
    for _, _, finer in _convolutions(config):
        late += 0 if config.causal_decoder else 1
        if finer != fine:
            late, fine = 2 * late + 1, finer
    return late


def _convolutions(config: VAEConfig) -> Iterator[tuple[int, int, int]]:
    """Channels that it reads, rows for each of the latents', and frames after it for each."""
    blocks = tuple(reversed(config.decoder_blocks))
    width = config.decoder_base_channels
    for block in blocks:
        width *= multiplier(block)
    scale = fine = 1
    yield config.latent_channels, scale, fine
    for name, options in blocks:
        narrow = width // multiplier((name, options))
        if name == "res_x":
            for _ in range(2 * options["num_layers"]):
                yield width, scale, fine
        elif name in STRIDES:
            if STRIDES[name][0] == 2:
                fine *= 2
            yield width, scale, fine
            scale *= STRIDES[name][1]
        else:
            yield width, scale, fine
            yield narrow, scale, fine
        width = narrow
    yield width, scale, fine
