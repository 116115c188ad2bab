"""An engine that streams its weights stays within what the plan allows it."""

from collections.abc import Callable

import pytest

from ltx_engines.errors import UserError
from ltx_trt.session import weight_streaming
from ltx_trt.session.engine_api import Engine
from ltx_trt.session.residency import Need, plan


class Streaming:
    """As much of an Engine as is asked; `scratch` by the budget."""

    def __init__(self, streamable: int, scratch: Callable[[int], int]) -> None:
        self.streamable, self.scratch = streamable, scratch
        self.budget: int | None = None
        self.asked: list[int] = []

    def set_streaming_budget(self, size: int) -> int:
        self.budget = size
        self.asked.append(size)
        return 0 if size >= self.streamable else self.scratch(size)


def constant(size: int) -> Callable[[int], int]:
    return lambda _: size


def limit(engine: Streaming, room: int) -> int:
    need = Need("transformer", (1000,), activations=100, streams=True)
    (found,) = plan([need], room + 100)
    asked: Engine = engine  # type: ignore[assignment]
    return weight_streaming.limit(asked, found)


def test_what_fits_is_not_streamed() -> None:
    engine = Streaming(900, constant(10))
    assert limit(engine, 1000) == 0
    assert engine.budget is None
    assert limit(engine, 5000) == 0


@pytest.mark.parametrize("scratch", [constant(0), constant(50), lambda size: (900 - size) // 9])
@pytest.mark.parametrize("room", [999, 700, 201])
def test_all_of_the_room_is_used_and_no_more(scratch: Callable[[int], int], room: int) -> None:
    engine = Streaming(900, scratch)
    streamed = limit(engine, room)
    assert engine.budget == 900 - streamed
    assert all(0 <= asked <= room - 100 for asked in engine.asked), "a budget is memory"
    taken = 100 + engine.budget + scratch(engine.budget)
    assert taken <= room
    fitting = (size for size in range(900) if 100 + size + scratch(size) <= room)
    assert max(fitting) - engine.budget <= 2


def test_too_little_for_what_cannot_be_streamed_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        limit(Streaming(900, constant(50)), 149)
    assert str(caught.value) == (
        "transformer streams weights and still needs 150 bytes for them, there are 149 bytes; "
        "make the clip smaller or shorter"
    )
