"""How far away a VAE's decoder looks: what tiles of a clip would have to share to be exact.

Every convolution is 3 x 3 x 3 and reaches one cell of its own level, in space and, since edge
frames are repeated on both sides, in both directions of time. A level is 1, 2, 4 or 8 times as fine
as the latents.
"""

from fractions import Fraction

from ltx_ref.ltx_video.config import STRIDES, VAEConfig


def reach(config: VAEConfig) -> tuple[Fraction, ...]:
    """Latent cells that each level's convolutions reach together, the coarsest first."""
    found, scale = [Fraction(1)], 1  # conv_in
    for name, options in reversed(config.decoder_blocks):
        convolutions = 2 * options["num_layers"] if name == "res_x" else 2
        if name in STRIDES:
            found[-1] += Fraction(1, scale)
            scale *= STRIDES[name][1]
            found.append(Fraction(0))
        else:
            found[-1] += Fraction(convolutions, scale)
    found[-1] += Fraction(1, scale)  # conv_out
    return tuple(found)
