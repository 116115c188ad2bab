"""Which stages are to have engines: the decoder has one for whole clips or tiles, or, with
`--vae-stream`, one that goes on a few frames at a time, or both."""

from ltx_engines.bundle import Bundle
from ltx_engines.errors import UserError
from ltx_engines.stages import DECODER, DECODERS, SAMPLER_STEP, STREAM
from ltx_export.engine_order import Order
from ltx_export.engine_profiles import VAE

NO_DECODER = "--vae-stream is for the VAE's decoder, which is not among the stages; leave it out"


def check_named(order: Order) -> None:
    """What the order alone shows, if it names stages: before a graph is made.

    Raises:
        UserError: an option or a stage wants another one that is not there.
    """
    if order.stages is None:
        return
    if order.vae_stream is None and STREAM in order.stages:
        raise UserError(
            f"{STREAM} takes so many frames at a time as are said; give --vae-stream 16, or leave "
            "the stage out"
        )
    if order.vae_stream is not None and not set(DECODERS) & set(order.stages):
        raise UserError(NO_DECODER)
    check_vae(graphs(order) or (), order)


def beside(opened: Bundle, order: Order) -> tuple[str, ...]:
    """Of graphs, which take no room: the decoder that goes on is not in the other's place."""
    found = of(opened, order)
    whole = order.stages is None and DECODER in opened.manifest.stages and DECODER not in found
    return (*found, DECODER) if whole else found


def of(opened: Bundle, order: Order) -> tuple[str, ...]:
    """As they were asked for, without the step that goes with the transformer.

    Raises:
        UserError: the bundle has not got one of them, or they do not go together.
    """
    check_named(order)
    known = opened.manifest.stages if order.stages is None else order.stages
    wanted = [stage for stage in known if stage not in (SAMPLER_STEP, STREAM)]
    if order.vae_stream is not None:
        _check_stream(opened)
        if order.stages is None:  # an engine of both would hold the weights twice
            wanted = [stage for stage in wanted if stage != DECODER]
        wanted.append(STREAM)
    for stage in wanted:
        opened.stage(stage)
    return tuple(wanted)


def graphs(order: Order) -> tuple[str, ...] | None:
    """The stages whose graphs that takes, of a checkpoint; None for all."""
    if order.stages is None or order.vae_stream is None or STREAM in order.stages:
        return order.stages
    return (*order.stages, STREAM) if DECODER in order.stages else order.stages


def check_vae(stages: tuple[str, ...], order: Order) -> None:
    """
    Raises:
        UserError: tiles were asked for, and nothing is to be built that takes them.
    """
    if order.vae_tile is None or VAE & set(stages):
        return
    if STREAM in stages:
        raise UserError(
            f"--vae-tile is for the encoder and for a decoder of tiles, and {STREAM} takes whole "
            "rows and columns; leave it out, or name vae_encoder or vae_decoder too (--stages)"
        )
    raise UserError("--vae-tile is for the VAE, which is not among the stages; leave it out")


def _check_stream(opened: Bundle) -> None:
    if not set(DECODERS) & opened.manifest.stages.keys():
        raise UserError(NO_DECODER)
    if STREAM not in opened.manifest.stages:
        raise UserError(
            f"--vae-stream: {opened.path} has no stage {STREAM}; export it again (ltx-export onnx),"
            " or leave the option out"
        )
