"""A transformer is split in as few groups as host and GPU have room for, and never in fewer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltx_engines import host, targets
from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.errors import UserError
from ltx_export import block_groups, cli, engine_needs, fitting, stage_plan
from ltx_export.block_groups import STAGE, Room, evenly, number
from tests.export import quantized_files

LAYERS = 6
PROFILE = {name: (1, 1, size) for name, size in (("batch", 2), ("timesteps", 1), ("text", 16))}
CLIP = PROFILE | {"tokens": (8, 8, 8)}
CARD = targets.find("rtx4090")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """All blocks of ltx-tiny in fp8."""
    folder = tmp_path_factory.mktemp("groups")
    file = quantized_files.write(folder / "tiny.safetensors", "fp8", dtype=torch.bfloat16)
    assert cli.main(["onnx", str(file), "--stages", STAGE, "--out", str(folder / "bundle")]) == 0
    return open_bundle(folder / "bundle", cache=folder)


@pytest.fixture(scope="module")
def graph(bundle: Bundle) -> Path:
    return bundle.file(bundle.stage(STAGE).file)


@pytest.mark.parametrize(("layers", "of"), [(6, 1), (6, 4), (6, 6), (48, 5), (28, 3)])
def test_the_groups_are_of_nearly_one_size_and_hold_each_block_once(layers: int, of: int) -> None:
    parts = evenly(layers, of)
    assert [block for part in parts for block in range(part.first, part.end)] == [*range(layers)]
    sizes = [part.end - part.first for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert [(part.index, part.of) for part in parts] == [(index, of) for index in range(of)]
    assert sizes[0] <= sizes[-1]  # the first one has the prologue too


@pytest.mark.parametrize("of", [0, 7])
def test_no_group_is_empty(of: int) -> None:
    with pytest.raises(ValueError, match="6 blocks in"):
        evenly(6, of)


def test_one_engine_will_do_where_there_is_room_for_it(graph: Path) -> None:
    assert number(graph, LAYERS, Room(10**9, (CARD,), (CLIP,))) == 1
    assert number(graph, LAYERS, Room(None, (CARD,), (CLIP,))) == 1


def build_memory(sizes: block_groups._Sizes, of: int) -> int:
    """Of the largest group."""
    weights = max(sizes.weights(part) for part in evenly(LAYERS, of))
    return stage_plan.BUILD_BASE + int(weights * (1 + stage_plan.BUILD_FACTOR["small"]))


def test_the_largest_group_is_built_within_the_memory_that_is_said(graph: Path) -> None:
    sizes = block_groups._sizes(graph, (CLIP,))
    found = set()
    for of in (1, 2, 3, LAYERS):
        limit = build_memory(sizes, of)
        groups = number(graph, LAYERS, Room(limit, (), (CLIP,)))
        assert build_memory(sizes, groups) <= limit
        assert groups == 1 or build_memory(sizes, groups - 1) > limit
        found.add(groups)
    assert len(found) > 2


def test_two_groups_and_the_activations_of_the_largest_clip_fit_the_card(graph: Path) -> None:
    sizes = block_groups._sizes(graph, (CLIP,))
    engine = sum(sizes.blocks.values()) + sizes.rest + sizes.kernels
    card = replace(CARD, memory=fitting.RESERVED + sizes.activations + engine * 3 // 4)
    assert 2 < number(graph, LAYERS, Room(None, (card,), (CLIP,))) < LAYERS
    longer = CLIP | {"tokens": (8, 8, 400)}
    with pytest.raises(UserError, match=r"one block in each of 6 groups is too much: .*RTX 4090"):
        number(graph, LAYERS, Room(None, (card,), (CLIP, longer)))


def test_what_no_split_makes_fit_is_said_with_what_would_help(graph: Path) -> None:
    with pytest.raises(UserError, match=r"a build takes .* of host memory.*with --host-memory"):
        number(graph, LAYERS, Room(10**6, (), (CLIP,)))
    card = replace(CARD, memory=fitting.RESERVED)
    with pytest.raises(UserError, match=r"RTX 4090; ask for a smaller clip or fewer branches"):
        number(graph, LAYERS, Room(None, (card,), (CLIP,)))


def test_all_bytes_of_the_weights_are_counted_once(graph: Path) -> None:
    sizes = block_groups._sizes(graph, (CLIP,))
    assert sizes.blocks.keys() == set(range(LAYERS))
    assert max(sizes.blocks.values()) - min(sizes.blocks.values()) < 16  # scales that are shared
    assert sum(sizes.blocks.values()) + sizes.rest == engine_needs.weight_bytes(graph)


def test_most_of_the_free_memory_is_taken_unless_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "free_memory", lambda: 1000)
    assert block_groups.room_of_host(None) == 800
    assert block_groups.room_of_host(5000) == 5000
    monkeypatch.setattr(host, "free_memory", lambda: None)
    assert block_groups.room_of_host(None) is None


def test_a_split_is_auto_or_a_number() -> None:
    assert (block_groups.parse("auto"), block_groups.parse("3")) == ("auto", 3)
    for word in ("0", "two", "-1", "\u0663"):
        with pytest.raises(UserError, match="give auto, or in how many parts"):
            block_groups.parse(word)
