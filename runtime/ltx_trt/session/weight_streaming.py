"""TensorRT's own streaming: how many of an engine's weights stay on the card."""

from ltx_engines.byte_sizes import said
from ltx_engines.errors import UserError
from ltx_trt.session.engine_api import Engine
from ltx_trt.session.residency import Residency


def limit(engine: Engine, residency: Residency) -> int:
    """Let as many weights stay as the plan allows, the rest is fetched in each run; returns how
    many bytes that are. To be called before any context is made.

    Raises:
        UserError: not even none of them leaves room enough.
    """
    if residency.allowance is None:
        return 0
    streamable = engine.streamable
    fixed = max(0, sum(residency.need.weights) - streamable)
    # Each budget is memory that is taken: begin with no more than there is.
    budget = min(streamable, max(0, residency.allowance - fixed))
    while (over := fixed + budget + engine.set_streaming_budget(budget) - residency.allowance) > 0:
        if budget == 0:
            raise UserError(
                f"{residency.need.stage} streams weights and still needs "
                f"{said(residency.allowance + over)} for them, there are "
                f"{said(residency.allowance)}; make the clip smaller or shorter"
            )
        budget = max(0, budget - over)
    return streamable - budget
