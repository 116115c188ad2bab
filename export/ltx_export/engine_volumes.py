"""Convolutions of more elements than a builder counts, which it builds without a word: the engine
would read and write in the wrong places. The VAE takes smaller tiles instead."""

import logging
from collections.abc import Iterable

import onnx
import onnx_ir as ir

from ltx_engines.bundle import Bundle
from ltx_engines.cache_key import EngineKey, Profile
from ltx_engines.errors import UserError
from ltx_engines.shapes import SPACE, TIME, VideoShape
from ltx_engines.stages import STREAM
from ltx_export import engine_needs, engine_profiles, fitting, graph_costs
from ltx_export.engine_order import Order
from ltx_export.engine_profiles import VAE, Buckets
from ltx_export.graph_costs import INT32_MAX

log = logging.getLogger(__name__)


def check(opened: Bundle, keys: Iterable[EngineKey], order: Order) -> None:
    """
    Raises:
        UserError: a convolution is too large, and that is not to be ignored.
    """
    for key in keys:
        if key.part is not None:
            continue  # of the transformer, which has no convolutions
        if (problem := _problem(opened, key, order)) is None:
            continue
        if not order.ignore_limits:
            raise UserError(f"{problem}; {engine_needs.GIVE_WAY}")
        log.warning("%s", problem)


def _problem(opened: Bundle, key: EngineKey, order: Order) -> str | None:
    file = opened.file(opened.stage(key.stage).file)
    proto = onnx.load(file, load_external_data=False)
    if all(node.op_type != "Conv" for node in proto.graph.node):
        return None
    model = ir.from_proto(proto)
    most = max(_elements(model, profile) for profile in key.profiles)
    if most <= INT32_MAX:
        return None
    cure = "give smaller clips"
    if key.stage in VAE and (tile := _tile(opened, key.stage, model, order)) is not None:
        cure = f"give --vae-tile {tile}"
    if key.stage == STREAM and (frames := _stream(model, key)) is not None:
        cure = f"give --vae-stream {frames}"
    return (
        f"{key.stage}: a convolution of {most:,} elements, and a builder counts to {INT32_MAX:,}; "
        f"{cure}"
    )


def _elements(model: ir.Model, profile: Profile) -> int:
    """Of the largest end of a convolution in the largest call."""
    axes = {name: sizes[2] for name, sizes in profile.items()}
    return max(one.elements for one in graph_costs.convolutions(model, axes))


def _stream(model: ir.Model, key: EngineKey) -> int | None:
    """The most frames at a time that can be counted."""
    asked = max(profile["latent_frames"][2] for profile in key.profiles)
    for frames in range(asked - 1, 0, -1):
        fewer = [profile | {"latent_frames": (frames,) * 3} for profile in key.profiles]
        if all(_elements(model, profile) <= INT32_MAX for profile in fewer):
            return TIME * frames
    return None


def _tile(opened: Bundle, stage: str, model: ir.Model, order: Order) -> str | None:
    """The largest that the plan tries, and that can be counted."""
    words = Buckets(order.shapes, 1, 1, vae_tile=order.vae_tile).words(stage)
    clips: list[VideoShape] = [engine_profiles.ends(word)[1] for word in words]
    for tile in fitting.tiles(max(clips, key=lambda clip: clip.tokens).latent):
        frames, rows, columns = tile
        word = f"{SPACE * columns}x{SPACE * rows}x{TIME * (frames - 1) + 1}"
        profiles = engine_profiles.profiles(
            stage, opened.manifest, Buckets((word,), 1, 1, vae_tile=word)
        )
        if all(_elements(model, profile) <= INT32_MAX for profile in profiles):
            return word
    return None
