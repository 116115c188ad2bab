"""A chain of parts computes what the whole does, in whatever room it is given."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from threading import Event, Thread, current_thread

import numpy as np
import pytest

from ltx_engines.bundle import TensorEntry
from ltx_engines.errors import UserError
from ltx_trt.session.chain_runner import ChainRunner, Link, ends, slots
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.engine_api import EngineError
from ltx_trt.session.engine_runner import EngineRunner
from ltx_trt.session.residency import Rotation
from tests.runtime.chained_engines import (
    CHANNELS,
    LATENTS,
    PARTS,
    SHARED,
    TABLE,
    VELOCITY,
    Bench,
    tensor,
    write,
)
from tests.runtime.fake_gpu import FakeGpu
from tests.waiting import HANG

ORDERED = ("enqueue", "record", "synchronize_event", "close_engine", "load")


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("onnx")
    return write(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = FakeGpu()
    yield gpu
    assert gpu.leaks() == []


@pytest.fixture
def bench(gpu: FakeGpu, plans: dict[str, Path]) -> Iterator[Bench]:
    with closing(Bench(gpu, plans)) as bench:
        yield bench


def loads(gpu: FakeGpu) -> list[str]:
    return [call[1] for call in gpu.named("load")]


@pytest.mark.parametrize(
    ("places", "overlaps"), [(4, False), (3, True), (3, False), (2, True), (2, False), (1, False)]
)
def test_a_chain_gives_the_bytes_of_the_whole(bench: Bench, places: int, overlaps: bool) -> None:
    with closing(bench.load("whole")) as whole:
        bench.bind(whole)
        wanted = [bench.step(whole, seed) for seed in range(5)]
        bench.bind(whole, 9)
        larger = bench.step(whole, 7, tokens=9)
    assert len(set(wanted)) == 5
    with closing(bench.chain(places, overlaps)) as chain:
        bench.bind(chain)
        assert [bench.step(chain, seed) for seed in range(5)] == wanted
        bench.bind(chain, 9)
        assert bench.step(chain, 7, tokens=9) == larger
        bench.bind(chain)
        assert bench.step(chain, 3) == wanted[3]


def test_a_chain_that_fits_is_loaded_once_and_may_be_captured(bench: Bench) -> None:
    gpu = bench.gpu
    with closing(bench.chain(4)) as chain:
        assert chain.capturable
        bench.bind(chain)
        wanted = bench.step(chain, 1)
        gpu.begin_capture(bench.stream)
        chain.enqueue(bench.stream)
        graph = gpu.end_capture(bench.stream)
        gpu.fill(bench.buffers.get("velocity", 1), 0, 5 * 4 * CHANNELS, bench.stream)
        gpu.launch(graph, bench.stream)
        found = np.empty((5, CHANNELS), np.float32)
        gpu.download(found, bench.buffers.get("velocity", 1), bench.stream)
        gpu.synchronize(bench.stream)
        assert found.tobytes() == wanted
        gpu.close_graph(graph)
    assert loads(gpu) == ["part0", "part1", "part2", "part3"]
    assert not gpu.named("record")
    assert not gpu.named("copy")


def swaps(places: int, passes: int, *, overlaps: bool) -> list[tuple[int, int]]:
    """What goes and what comes; after the last pass nobody wants the first part again."""
    rotation = Rotation(PARTS, places, overlaps)
    found = [swap for _ in range(passes) for swap in rotation.step()]
    return found[:-1] if found[-1][1] == 0 else found


@pytest.mark.parametrize(("places", "overlaps"), [(3, True), (3, False), (2, True), (1, False)])
def test_each_step_loads_what_the_rotation_says_and_never_more_than_fits(
    bench: Bench, places: int, overlaps: bool
) -> None:
    expected = [f"part{part}" for part in range(places)]
    expected += [f"part{load}" for _, load in swaps(places, 6, overlaps=overlaps)]
    most = 0

    def look(name: str) -> None:
        nonlocal most
        closed = bench.gpu.count("close_engine")
        most = max(most, len(loads(bench.gpu)) - closed + 1)

    bench.hold = look
    with closing(bench.chain(places, overlaps)) as chain:
        assert not chain.capturable
        bench.bind(chain)
        for seed in range(6):
            bench.step(chain, seed)
    assert loads(bench.gpu) == expected
    assert most == places
    assert not bench.gpu.named("copy")


def test_the_next_part_comes_while_the_one_before_it_runs(bench: Bench) -> None:
    """While part 2 waits on the stream, part 1 goes and part 3 comes; nobody waits for part 2."""
    gpu = bench.gpu
    with closing(bench.chain(2)) as chain:
        bench.bind(chain)
        bench.step(chain, 0)
        start = len(gpu.calls)
        bench.step(chain, 1)
        told = [(call[0], call[1]) for call in gpu.calls[start:]]
    marks = {call[1]: f"part{n}" for n, call in enumerate(gpu.named("record")[:PARTS])}
    words = [(what, marks.get(which, which)) for what, which in told if what in ORDERED]
    begin = words.index(("enqueue", "part2"))
    assert words[begin : begin + 6] == [
        ("enqueue", "part2"),
        ("record", "part2"),
        ("synchronize_event", "part1"),
        ("close_engine", "part1"),
        ("load", "part3"),
        ("enqueue", "part3"),
    ]


def test_the_next_pass_fetches_its_first_part_while_the_last_one_ends(bench: Bench) -> None:
    """The host is a step ahead: part 3 still waits on the stream when part 0 comes."""
    gpu = bench.gpu
    with closing(bench.chain(2)) as chain:
        bench.bind(chain)
        bench.step(chain, 0)
        marks = [event for _, event, _ in gpu.named("record")]
        assert loads(gpu).count("part0") == 1
        start = len(gpu.calls)
        chain.enqueue(bench.stream)
        chain.enqueue(bench.stream)
        told = [(call[0], call[1]) for call in gpu.calls[start:]]
        end = told.index(("record", marks[3]))
        between = told[end : told.index(("load", "part0"), end)]
        assert ("synchronize_event", marks[2]) in between
        assert ("synchronize_event", marks[3]) not in between
        gpu.synchronize(bench.stream)


def test_what_is_at_work_is_waited_for_before_it_is_bound_anew(bench: Bench) -> None:
    gpu = bench.gpu
    with closing(bench.chain(4)) as chain:
        bench.bind(chain)
        chain.enqueue(bench.stream)
        start = len(gpu.calls)
        bench.bind(chain, 9)
        names = [call[0] for call in gpu.calls[start:]]
    assert names[0] == "synchronize"
    assert {"free", "set_shape", "set_address"} < set(names)


def test_a_part_at_work_is_not_closed_when_it_cannot_be_waited_for(bench: Bench) -> None:
    """Until all that was enqueued is done."""
    gpu, chain = bench.gpu, bench.chain(2)
    bench.bind(chain)
    gpu.fail("synchronize_event", DeviceError("not now"))
    with pytest.raises(DeviceError, match="not now"):
        chain.enqueue(bench.stream)
    assert not gpu.count("close_engine")
    start = len(gpu.calls)
    chain.close()
    names = [call[0] for call in gpu.calls[start:]]
    assert names.index("synchronize") < names.index("close_engine")
    assert names.count("close_engine") == 2


@pytest.mark.parametrize("after", range(PARTS))
def test_events_that_cannot_all_be_made_are_given_back(bench: Bench, after: int) -> None:
    bench.gpu.fail("event", DeviceError("no more"), after=after)
    with pytest.raises(DeviceError, match="no more"):
        bench.chain(2)


def test_a_part_that_was_bound_before_is_bound_in_the_background(bench: Bench) -> None:
    seen: list[str] = []
    bind = EngineRunner.bind

    def noted(self: EngineRunner, *where: Mapping[str, object]) -> None:
        seen.append(current_thread().name)
        bind(self, *where)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineRunner, "bind", noted)
        with closing(bench.chain(2)) as chain:
            bench.bind(chain)
            bench.step(chain, 0)
            first, seen[:] = set(seen), []
            for seed in range(3):
                bench.step(chain, seed)
            again = set(seen)
            bench.bind(chain, 9)
            seen.clear()
            bench.step(chain, 3, 9)
    assert "MainThread" in first
    assert again == {"weights_0"}
    assert seen.count("MainThread") == 2  # two were there when it was bound, two came since


@pytest.mark.parametrize("places", [1, 2, 3])
def test_a_part_that_can_sleep_is_deserialized_once(bench: Bench, places: int) -> None:
    with closing(bench.load("whole")) as whole:
        bench.bind(whole)
        wanted = [bench.step(whole, seed) for seed in range(4)]
    bench.swaps, gpu = True, bench.gpu
    expected = swaps(places, len(wanted), overlaps=places > 1)
    with closing(bench.chain(places)) as chain:
        bench.bind(chain)
        assert [bench.step(chain, seed) for seed in range(4)] == wanted
    assert gpu.named("sleep") == [("sleep", f"part{going}") for going, _ in expected]
    assert sorted(loads(gpu)) == ["part0", "part1", "part2", "part3", "whole"]
    assert gpu.count("wake") == len(expected) - (PARTS - places)


def test_hidden_states_go_to_and_fro_and_what_is_shared_stays() -> None:
    links = [Link(str(n), *row, lambda: pytest.fail("loaded")) for n, row in enumerate(TABLE)]
    found = slots(links)
    assert set(found) == {"shared", "h0", "h1", "h2"}
    assert found["h0"] == found["h2"]
    assert len({found["h0"], found["h1"], found["shared"]}) == 3
    whole = ends(links)
    assert {n: t.is_input for n, t in whole.items()} == {
        "latents": True,
        "text": True,
        "coords": True,
        "velocity": False,
    }
    assert whole["latents"].shape == (-1, CHANNELS)


def test_a_chain_with_a_loose_end_is_refused() -> None:
    def link(inputs: tuple[TensorEntry, ...], outputs: tuple[TensorEntry, ...]) -> Link:
        return Link("part", inputs, outputs, lambda: pytest.fail("loaded"))

    first, second = (link(*row) for row in TABLE[:2])
    with pytest.raises(UserError, match="part reads h0, shared, written later; build it again"):
        ends([second, first])
    with pytest.raises(UserError, match="part writes h0, shared again"):
        ends([first, first])
    with pytest.raises(UserError, match="h0 is float32 tokens x 8 in one part and float16 tokens"):
        ends([first, link((tensor("h0", "tokens", CHANNELS, dtype="float16"),), (VELOCITY,))])
    with pytest.raises(UserError, match="x has an axis rows that no input has"):
        ends([link((LATENTS,), (tensor("x", "rows"),))])


def test_an_engine_that_is_not_the_manifests_is_refused(bench: Bench) -> None:
    links = bench.links()
    wrong = tensor("h1", "tokens", CHANNELS, dtype="float16")
    links[1] = Link("part 2 of 4", TABLE[1][0], (wrong,), links[1].load)
    links[2] = Link("part 3 of 4", (wrong, SHARED), TABLE[2][1], links[2].load)
    with pytest.raises(UserError, match="part 2 of 4: the manifest and the engine differ in h1"):
        ChainRunner(bench.gpu, links, Rotation(4, 4, False))


@pytest.mark.parametrize("error", [EngineError("no kernel"), DeviceError("OUT_OF_MEMORY")])
def test_what_goes_wrong_in_the_background_is_told_with_the_parts_name(
    bench: Bench, error: Exception
) -> None:
    def refuse(name: str) -> None:
        if name == "part3":
            raise error

    with closing(bench.chain(2)) as chain:
        bench.bind(chain)
        bench.hold = refuse
        for _ in range(2):  # it stays so
            with pytest.raises(type(error), match=r"^transformer, part 4 of 4: [a-zA-Z_ ]*$"):
                chain.enqueue(bench.stream)


def test_a_part_that_cannot_be_enqueued_is_named(bench: Bench) -> None:
    with closing(bench.chain(4)) as chain:
        bench.bind(chain)
        bench.gpu.fail("enqueue", EngineError("refused"), after=2)
        with pytest.raises(EngineError, match=r"^transformer, part 3 of 4: refused$"):
            chain.enqueue(bench.stream)


def test_what_was_loaded_goes_when_the_rest_cannot_be(bench: Bench) -> None:
    bench.gpu.fail("load", EngineError("broken"), after=2)
    with pytest.raises(EngineError, match="part 3 of 4: broken"):
        bench.chain(4)
    assert bench.gpu.count("close_engine") == 2


def test_closing_while_a_part_is_loaded_waits_for_it(bench: Bench) -> None:
    at_work, go_on = Event(), Event()

    def slow(name: str) -> None:
        if name == "part0":
            at_work.set()
            assert go_on.wait(HANG)

    chain = bench.chain(2)
    bench.bind(chain)
    chain.enqueue(bench.stream)
    bench.hold = slow
    chain._fetch(0, 3)  # and Ctrl-C while it is waited for
    assert at_work.wait(HANG)
    closing_one = Thread(target=chain.close)
    closing_one.start()
    closing_one.join(0.05)
    assert closing_one.is_alive()
    go_on.set()
    closing_one.join(HANG)
    assert not closing_one.is_alive()
    chain.close()


@pytest.mark.parametrize("waited", [True, False])
def test_what_nobody_was_told_of_is_logged_when_it_is_closed(
    bench: Bench, caplog: pytest.LogCaptureFixture, *, waited: bool
) -> None:
    def refuse(name: str) -> None:
        raise EngineError(f"no room for {name}")

    with closing(bench.chain(2)) as chain:
        bench.bind(chain)
        chain.enqueue(bench.stream)
        bench.hold = refuse
        if waited:
            with pytest.raises(EngineError, match="part 1 of 4: no room"):
                chain.enqueue(bench.stream)
        else:
            chain._fetch(0, 3)
    warned = [row.message for row in caplog.records if row.levelname == "WARNING"]
    assert [row.endswith("part 1 of 4: no room for part0") for row in warned] == [True] * (
        not waited
    )


def test_a_chain_must_be_bound_to_all_that_it_reads(bench: Bench) -> None:
    with closing(bench.chain(4)) as chain:
        with pytest.raises(ValueError, match="bound before"):
            chain.enqueue(bench.stream)
        with pytest.raises(ValueError, match="wanted of"):
            chain.bind({"latents": (5, CHANNELS)}, {})
        with pytest.raises(ValueError, match="coords: tokens is 4 and 5"):
            shapes = {"latents": (5, CHANNELS), "text": (1, CHANNELS), "coords": (4, 1)}
            chain.bind(shapes, {})


def test_an_arena_that_grew_for_others_is_noticed(bench: Bench) -> None:
    with closing(bench.chain(2)) as chain:
        bench.bind(chain)
        wanted = bench.step(chain, 1)
        bench.arena.reserve(2**16)
        assert bench.step(chain, 1) == wanted
