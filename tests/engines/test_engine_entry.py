"""Which engines run on a GPU: all parts of one chain, of this bundle's graph, or none."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ltx_engines import bundle
from ltx_engines.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    Bundle,
    EngineEntry,
    FileEntry,
    Manifest,
    TensorEntry,
    open_bundle,
)
from ltx_engines.cache_key import EngineKey, Part
from ltx_engines.errors import UserError

Entry = Callable[..., EngineEntry]


@pytest.fixture
def entry(folder: Path) -> Entry:
    """An engine of the bundle's graph; what is given replaces fields of it or of its key."""
    manifest = bundle.read(folder)
    stage = manifest.stages["transformer"]
    key = EngineKey(
        stage="transformer",
        graph=str(manifest.files[stage.file].sha256),
        weights={name: manifest.files[name] for name in stage.weights},
        profiles=(),
        flavour="tensorrt-rtx",
        version="1.7.1",
        targets=(89,),
    )

    def made(part: tuple[int, int, int, int] | None = None, **changes: object) -> EngineEntry:
        fields = dict(zip(("index", "of", "first", "end"), part or (), strict=False))
        of_key = {name: value for name, value in changes.items() if name in EngineKey.model_fields}
        engine = EngineEntry(
            file="x.engine",
            layers="x.layers.json",
            key=key.model_copy(update={"part": Part(**fields) if part else None, **of_key}),
            inputs=stage.inputs,
            outputs=stage.outputs,
            activations=7,
        )
        rest = {name: value for name, value in changes.items() if name not in of_key}
        return engine.model_copy(update=rest)

    return made


def chosen(folder: Path, *engines: EngineEntry, capability: int = 89) -> tuple[EngineEntry, ...]:
    manifest = bundle.read(folder).model_copy(update={"engines": engines})
    return Bundle(folder, manifest).engines("transformer", capability)


def test_an_engine_for_fewer_gpus_goes_before_one_for_more(folder: Path, entry: Entry) -> None:
    one, both = entry(), entry(targets=(89, 120))
    assert chosen(folder, one, both) == chosen(folder, both, one) == (one,)
    assert chosen(folder, one, both, capability=120) == (both,)


def test_a_chain_comes_in_the_order_of_its_blocks(folder: Path, entry: Entry) -> None:
    first, last = entry((0, 2, 0, 2)), entry((1, 2, 2, 3))
    assert chosen(folder, last, first) == (first, last)


def test_parts_that_were_built_before_and_after_sealing_are_one_chain(
    folder: Path, entry: Entry
) -> None:
    """A hash that became known is no other file."""
    manifest = bundle.read(folder)
    sealed = manifest.files["ltx.safetensors"].model_copy(update={"sample": "3" * 64})
    unread = FileEntry(bytes=sealed.bytes, sample="3" * 64, modified_ns=1)
    first = entry((0, 2, 0, 2), weights={"ltx.safetensors": unread})
    last = entry((1, 2, 2, 3), weights={"ltx.safetensors": sealed})
    files = {**manifest.files, "ltx.safetensors": sealed}
    found = Bundle(folder, manifest.model_copy(update={"files": files, "engines": (first, last)}))
    assert found.engines("transformer", 89) == (first, last)


def test_a_whole_chain_stays_in_use_until_the_next_one_is_whole(folder: Path, entry: Entry) -> None:
    old, new = entry(), [entry((0, 2, 0, 2)), entry((1, 2, 2, 3))]
    assert chosen(folder, old, new[0]) == (old,)
    assert chosen(folder, old, *new) == tuple(new)


def test_parts_of_two_builds_are_no_chain(folder: Path, entry: Entry) -> None:
    first, last = entry((0, 2, 0, 2)), entry((1, 2, 2, 3), version="1.8")
    with pytest.raises(UserError, match="lacks part 1 of 2; build it"):
        chosen(folder, first, last)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(1, 3, 1, 2)], "the chain of transformer lacks part 1 and 3 of 3; build it (ltx-export"),
        ([(0, 2, 0, 1), (1, 2, 2, 3)], "lacks blocks between its parts; build it"),
        ([(0, 2, 1, 2), (1, 2, 2, 3)], "lacks blocks between its parts; build it"),
        ([(0, 2, 0, 1), (1, 2, 1, 2)], "lacks blocks, it ends at 2 of 3; build it"),
    ],
)
def test_a_chain_that_lacks_a_part_is_not_used(
    folder: Path, entry: Entry, parts: list[tuple[int, int, int, int]], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        chosen(folder, *(entry(part) for part in parts))
    assert said in str(caught.value)


def test_a_gpu_without_an_engine_is_told_which_ones_have_one(folder: Path, entry: Entry) -> None:
    with pytest.raises(UserError, match="no engine of transformer for SM86, only none; build it"):
        chosen(folder, capability=86)
    with pytest.raises(UserError, match="for SM86, only tensorrt-rtx for SM89, SM120; build it"):
        chosen(folder, entry(targets=(89, 120)), capability=86)


def test_a_flavour_that_the_machine_has_can_be_asked_for(folder: Path, entry: Entry) -> None:
    engines = rtx, classic = entry(), entry(flavour="tensorrt")
    found = Bundle(folder, bundle.read(folder).model_copy(update={"engines": engines}))
    assert found.engines("transformer", 89, "tensorrt-rtx") == (rtx,)
    assert found.engines("transformer", 89, "tensorrt") == (classic,)
    alone = Bundle(folder, bundle.read(folder).model_copy(update={"engines": (rtx,)}))
    with pytest.raises(UserError, match="for SM89 by tensorrt, only tensorrt-rtx for SM89"):
        alone.engines("transformer", 89, "tensorrt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"graph": "0" * 64}, "the graph changed since transformer was built; build it"),
        (
            {"weights": {"ltx.safetensors": FileEntry(bytes=7, sha256="0" * 64)}},
            "the weights in ltx.safetensors changed since",
        ),
    ],
)
def test_an_engine_of_another_graph_or_of_other_weights_is_not_used(
    folder: Path, entry: Entry, change: dict[str, object], said: str
) -> None:
    """A checkpoint was exported again, and the build that followed was killed."""
    with pytest.raises(UserError, match=said):
        chosen(folder, entry(**change))
    assert chosen(folder, entry(), entry(targets=(89, 120), **change)) == (entry(),)


def test_an_engine_that_takes_its_weights_as_inputs_serves_any(folder: Path, entry: Entry) -> None:
    engine = entry(graph="0" * 64).model_copy(update={"weights": "inputs"})
    assert chosen(folder, engine) == (engine,)


def changed(tensors: tuple[TensorEntry, ...], **changes: object) -> tuple[TensorEntry, ...]:
    """The first of them is another one."""
    return (tensors[0].model_copy(update=changes), *tensors[1:])


HALF = TensorEntry(name="to_q.weight", dtype="bfloat16", axes=(8, 8))


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("recipe", "the recipe was mine (1 fp8), now it is none since transformer was built"),
        ("type", "latents was bfloat16 [free, free, 12], now it is float16 [free, free, 12]"),
        ("size", "latents was float16 [free, free, 64], now it is float16 [free, free, 12]"),
        ("output", "velocity was bfloat16"),
        ("weight", "to_q.weight was bfloat16, now it is float16"),
    ],
)
def test_an_engine_that_takes_other_kinds_of_weights_is_not_used(
    folder: Path, entry: Entry, field: str, said: str
) -> None:
    """A checkpoint was exported again in another precision; what was built last runs instead."""
    plain = entry()
    changes: dict[str, dict[str, object]] = {
        "recipe": {"recipe": "mine (1 fp8)"},
        "type": {"inputs": changed(plain.inputs, dtype="bfloat16")},
        "size": {"inputs": changed(plain.inputs, axes=("batch", "tokens", 64))},
        "output": {"outputs": changed(plain.outputs, dtype="bfloat16")},
        "weight": {"inputs": (*plain.inputs, HALF), "bound": {HALF.name: "block.{block}"}},
    }
    engine = entry(graph="0" * 64, **changes[field]).model_copy(update={"weights": "inputs"})
    manifest = bundle.read(folder)
    both = entry(targets=(89, 120))
    found = Bundle(folder, manifest.model_copy(update={"engines": (both, engine)}))
    assert found.engines("transformer", 89) == (both,)
    found = Bundle(folder, manifest.model_copy(update={"engines": (engine,)}))
    with pytest.raises(UserError) as caught:
        found.engines("transformer", 89)
    assert said in str(caught.value)


def test_engines_that_serve_other_blocks_are_no_chain(folder: Path, entry: Entry) -> None:
    def pieces(*blocks: int) -> list[EngineEntry]:
        made = [entry((i, 3, i, i + 1)).model_copy(update={"weights": "inputs"}) for i in range(3)]
        return [made[0], made[1].model_copy(update={"blocks": blocks}), made[2]]

    assert chosen(folder, *pieces(0, 1, 2)) == tuple(pieces(0, 1, 2))
    for blocks in ((0, 1), (0, 1, 2, 3)):
        with pytest.raises(UserError, match="lacks blocks, it is not of these 3; build it"):
            chosen(folder, *pieces(*blocks))


def test_of_two_chains_that_is_taken_which_was_complete_last(folder: Path, entry: Entry) -> None:
    """The first part of one was built before the other, the rest after it."""
    parts, whole = [entry((0, 2, 0, 2)), entry((1, 2, 2, 3))], entry()
    assert chosen(folder, parts[0], whole, parts[1]) == tuple(parts)
    assert chosen(folder, *parts, whole) == (whole,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{"file": "ltx.safetensors"}], "engines.0.file is 'ltx.safetensors', which does not end"),
        ([{"layers": "x.engine"}], "engines.0.layers is 'x.engine', which does not end in .layers"),
        ([{}, {}], "engines.1.file is 'x.engine', as engines.0.file is"),
        ([{"targets": ()}], "engines.0.key.targets are []"),
        ([{"targets": (120, 89)}], "engines.0.key.targets are [120, 89]"),
        ([{"targets": (89, 89)}], "engines.0.key.targets are [89, 89]"),
    ],
)
def test_a_manifest_that_no_builder_writes_is_refused(
    folder: Path, entry: Entry, changes: list[dict[str, object]], said: str
) -> None:
    manifest = bundle.read(folder)
    engines = tuple(entry(**change) for change in changes)
    known = FileEntry(bytes=4, sha256=hashlib.sha256(b"plan").hexdigest())
    files = manifest.files | {"x.engine": known, "x.layers.json": known}
    written = manifest.model_copy(update={"engines": engines, "files": files})
    with pytest.raises(ValueError, match="cannot update") as caught:
        bundle.update(folder, written)
    assert said in str(caught.value)
    (folder / MANIFEST).write_text(json.dumps(written.model_dump(mode="json")), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        bundle.read(folder)
    assert said in str(refused.value)


def test_a_manifest_of_the_first_version_opens_and_is_written_as_one_of_this(
    folder: Path, cache: Path
) -> None:
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del data["engines"]
    (folder / MANIFEST).write_text(json.dumps(data | {"format_version": 1}), encoding="utf-8")
    opened = open_bundle(folder, cache=cache).manifest
    assert (opened.format_version, opened.engines) == (FORMAT_VERSION, ())
    bundle.update(folder, opened)
    assert json.loads((folder / MANIFEST).read_bytes())["format_version"] == FORMAT_VERSION


def test_an_engine_survives_the_manifest(folder: Path, cache: Path, entry: Entry) -> None:
    engine, manifest = entry((0, 1, 0, 3)), bundle.read(folder)
    files = {}
    for name in (engine.file, engine.layers):
        (folder / name).write_bytes(b"plan")
        files[name] = FileEntry(bytes=4, sha256=hashlib.sha256(b"plan").hexdigest())
    wanted: Manifest = manifest.model_copy(
        update={"engines": (engine,), "files": {**manifest.files, **files}}
    )
    bundle.update(folder, wanted)
    assert open_bundle(folder, cache=cache).engines("transformer", 89) == (engine,)
