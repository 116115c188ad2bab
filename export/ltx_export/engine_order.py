"""What a user asks of `build-engine`, and what can be wrong with it whatever the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ltx_engines import targets
from ltx_engines.errors import UserError
from ltx_engines.targets import Flavour, Target
from ltx_export import engine_profiles, engine_refusals, refittable
from ltx_export.block_groups import Split


@dataclass(frozen=True, slots=True)
class Order:
    """None leaves a choice to the bundle or to the builder. Without `split` the transformer stays
    as it is split in the bundle. `conditioning` are keyframes at most, `passes` those of a clip,
    `vae_stream` frames of pixels: see `engine_profiles`. `workspace` and `host_memory` are in
    bytes."""

    gpus: tuple[str, ...]
    shapes: tuple[str, ...]
    stages: tuple[str, ...] | None = None
    backend: Flavour | None = None
    branches: int | None = None
    conditioning: int | None = None
    passes: int | None = None
    optimization_level: int | None = None
    workspace: int | None = None
    allow_fallback: bool = False
    vae_tile: str | None = None
    vae_stream: int | None = None
    weight_streaming: bool = False
    refittable: bool = False
    cache: Path | None = None
    ignore_limits: bool = False
    split: Split | None = None
    engine_weights: Literal["embedded", "inputs"] = "embedded"
    host_memory: int | None = None


def check_early(order: Order) -> tuple[Target, ...]:
    """The GPUs of an order, if nothing is wrong with it whatever the model.

    Raises:
        UserError: a GPU or a clip that there is not, or no builder for them.
    """
    found = cards(order)
    engine_refusals.check_machine(engine_refusals.flavour(found, order.backend), found)
    for word in (*order.shapes, *filter(None, [order.vae_tile])):
        engine_profiles.ends(word)
    if order.vae_stream is not None:
        engine_profiles.check_stream(order.vae_stream)
    if order.host_memory is not None and order.split != "auto":
        raise UserError("--host-memory is for --split auto; give both, or leave it out")
    if order.engine_weights == "inputs":
        check_inputs(order)
    if order.refittable:
        refittable.check(order.engine_weights)
    return found


def check_inputs(order: Order) -> None:
    """
    Raises:
        UserError: an option does not go with weights that are inputs.
    """
    for option, value in (
        ("--split", order.split),
        ("--weight-streaming", order.weight_streaming),
    ):
        if value:
            raise UserError(
                f"{option} is for engines that hold their weights; leave it out with "
                "--engine-weights inputs, where weights that do not fit are streamed anyway"
            )


def cards(order: Order) -> tuple[Target, ...]:
    if not order.gpus:
        raise UserError("an engine is for a GPU; give --gpu rtx4090, --gpu sm89, ...")
    return tuple(map(targets.find, order.gpus))
