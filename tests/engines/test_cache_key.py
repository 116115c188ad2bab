"""An engine is built again when something that it was made of changed, and the reason is said."""

import itertools

import pytest

from ltx_engines.cache_key import WAY_OF_BUILDING, EngineKey, Part, difference
from ltx_engines.file_entry import FileEntry

ONE, OTHER = "1" * 64, "2" * 64
CLIP = {"batch": (1, 3, 3), "tokens": (128, 128, 128)}
KEY = EngineKey(
    stage="transformer",
    graph=ONE,
    weights={"ltx.safetensors": FileEntry(bytes=9, sha256=ONE)},
    recipe="fp8 (60 fp8)",
    profiles=(CLIP,),
    flavour="tensorrt-rtx",
    version="1.7.1.116",
    targets=(86, 89),
    options={"optimization level": 3},
    part=Part(index=0, of=2, first=0, end=14),
)
CHANGES: dict[str, dict[str, object]] = {
    "the weights in ltx.safetensors changed": {
        "weights": {"ltx.safetensors": FileEntry(bytes=9, sha256=OTHER)}
    },
    "the weights in b.safetensors are new": {
        "weights": {**KEY.weights, "b.safetensors": FileEntry(bytes=1, sha256=ONE)}
    },
    "ltx.safetensors holds no weights now": {"weights": {}},
    "the graph changed": {"graph": OTHER},
    "the recipe was fp8 (60 fp8), now it is none": {"recipe": None},
    "profile 0 has tokens 128, now it is 128 to 520 for 520": {
        "profiles": ({**CLIP, "tokens": (128, 520, 520)},)
    },
    "it has 1 profile, now there are 2": {"profiles": (CLIP, CLIP)},
    "it was built by tensorrt-rtx, now by tensorrt": {"flavour": "tensorrt"},
    "it was built by tensorrt-rtx 1.7.1.116, now by 1.8": {"version": "1.8"},
    "it is not for SM120, only for SM86, SM89": {"targets": (89, 120)},
    "optimization level was 3, now it is the builder's": {"options": {}},
    "this ltx-export builds it differently": {
        "options": {"optimization level": 3, WAY_OF_BUILDING: 2}
    },
    "workspace was the builder's, now it is 64": {
        "options": {"optimization level": 3, "workspace": 64}
    },
    "it was split in 2, now in 3": {"part": Part(index=0, of=3, first=0, end=9)},
    "it was split in 2, now it is whole": {"part": None},
    "it had blocks 0 to 13, now it has blocks 0 to 11": {
        "part": Part(index=0, of=2, first=0, end=12)
    },
}


def test_an_engine_of_the_same_key_is_up_to_date() -> None:
    assert difference(KEY, EngineKey.model_validate_json(KEY.model_dump_json(), strict=True)) == []


@pytest.mark.parametrize(("reason", "change"), CHANGES.items())
def test_each_change_is_named_and_nothing_else(reason: str, change: dict[str, object]) -> None:
    assert difference(KEY, KEY.model_copy(update=change)) == [reason]


def test_an_engine_of_the_whole_stage_is_not_one_of_a_part() -> None:
    whole = KEY.model_copy(update={"part": None})
    assert difference(whole, KEY) == ["it was whole, now it is split in 2"]


def test_no_part_of_the_key_is_forgotten() -> None:
    changed = set(itertools.chain.from_iterable(change for change in CHANGES.values()))
    assert changed == EngineKey.model_fields.keys() - {"stage"}


def test_an_engine_for_more_gpus_than_are_asked_for_will_do() -> None:
    assert difference(KEY, KEY.model_copy(update={"targets": (89,)})) == []


def test_graph_and_weights_that_follow_from_the_recipe_are_not_named_beside_it() -> None:
    weights = {"ltx.safetensors": FileEntry(bytes=7, sha256=OTHER)}
    other = KEY.model_copy(update={"recipe": "int8", "graph": OTHER, "weights": weights})
    assert difference(KEY, other) == ["the recipe was fp8 (60 fp8), now it is int8"]


def test_two_changes_are_two_reasons() -> None:
    assert len(difference(KEY, KEY.model_copy(update={"graph": OTHER, "version": "2"}))) == 2


def test_engines_of_two_stages_are_not_compared() -> None:
    with pytest.raises(ValueError, match="is not one of vae_decoder"):
        difference(KEY, KEY.model_copy(update={"stage": "vae_decoder"}))


UNREAD = FileEntry(bytes=9, modified_ns=5, sample=ONE)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (UNREAD, UNREAD, True),
        (UNREAD, UNREAD.model_copy(update={"modified_ns": 6}), False),
        (UNREAD, UNREAD.model_copy(update={"sample": OTHER}), False),
        (UNREAD, UNREAD.model_copy(update={"bytes": 8}), False),
        # Sealed later: the sample says that it is the file that the engine was built of.
        (UNREAD, FileEntry(bytes=9, sha256=OTHER, sample=ONE), True),
        (UNREAD, FileEntry(bytes=9, sha256=OTHER), False),
        (FileEntry(bytes=9, sha256=ONE, sample=ONE), FileEntry(bytes=9, sha256=OTHER), False),
    ],
)
def test_files_are_the_same_by_the_best_that_is_known_of_both(
    one: FileEntry, other: FileEntry, same: bool
) -> None:
    assert one.is_same(other) is same
    assert other.is_same(one) is same
