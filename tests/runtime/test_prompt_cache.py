"""Texts that were encoded before: found again, known apart, mended, bounded, never in the way."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from ltx_engines.bundle import Bundle, open_bundle
from ltx_trt import prompt_cache
from ltx_trt.backend import Backend, Choice, Memory, Providers, TextEncoderDevice
from ltx_trt.pipeline import frames_of, generate, plan
from ltx_trt.prompt_cache import Encoder, PromptCache, RememberingEncoder
from ltx_trt.request import Wishes, resolve
from ltx_trt.session import Array, Feeds
from ltx_trt.session.choice import open_stages
from ltx_trt.session.graph_stages import Graphs
from tests.runtime import conftest

pytest.importorskip("onnxruntime")

MakeBundle = Callable[..., Path]

EMBEDS = np.linspace(-1, 1, 24, dtype=np.float32).reshape(1, 4, 6)


def tokens(*ids: int) -> dict[str, Array]:
    return {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}


def cache(folder: Path, **options: Any) -> PromptCache:
    return PromptCache(folder / "prompts", Encoder("of a test"), **options)


class FakeEncoder:
    """Counts how often it was opened and what it was asked."""

    def __init__(self, answer: Array = EMBEDS) -> None:
        self.answer, self.opened, self.asked, self.closed = answer, 0, 0, 0

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        self.asked += len(feeds["input_ids"])
        return {"prompt_embeds": self.answer}

    def __enter__(self) -> Self:
        self.opened += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.closed += 1


def encode(found: PromptCache, encoder: FakeEncoder, *prompts: dict[str, Array]) -> list[Array]:
    with RememberingEncoder(found, lambda: encoder) as session:
        return [session(feeds)["prompt_embeds"] for feeds in prompts]


def test_a_text_that_was_seen_is_not_encoded_again_and_is_the_same_bit_for_bit(
    tmp_path: Path,
) -> None:
    encoder = FakeEncoder()
    encode(cache(tmp_path), encoder, tokens(1, 2), tokens(3, 4))
    assert (encoder.opened, encoder.asked, encoder.closed) == (1, 2, 1)
    later = cache(tmp_path)
    first, second = encode(later, encoder, tokens(1, 2), tokens(3, 4))
    assert (encoder.opened, encoder.asked, later.hits) == (1, 2, 2)
    np.testing.assert_array_equal(first, EMBEDS)
    assert first.dtype == np.float32
    assert first.flags.writeable
    np.testing.assert_array_equal(second, EMBEDS)


def test_a_new_text_beside_one_that_was_seen_opens_the_encoder_for_it_alone(
    tmp_path: Path,
) -> None:
    encoder = FakeEncoder()
    encode(cache(tmp_path), encoder, tokens(1, 2))
    encode(cache(tmp_path), encoder, tokens(1, 2), tokens(1, 5))
    assert (encoder.opened, encoder.asked) == (2, 2)


@pytest.mark.parametrize(
    "other",
    [
        tokens(1, 3),
        tokens(2, 1),
        tokens(1, 2, 0),
        {**tokens(1, 2), "attention_mask": np.array([[1, 0]])},
    ],
    ids=["a token", "their order", "their number", "the mask"],
)
def test_texts_that_differ_are_known_apart(tmp_path: Path, other: dict[str, Array]) -> None:
    found = cache(tmp_path)
    found.keep(tokens(1, 2), EMBEDS)
    assert found.find(tokens(1, 2)) is not None
    assert found.find(other) is None


def spoil_length(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def spoil_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def spoil_all(path: Path) -> None:
    path.write_bytes(b"")


def spoil_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def another_text(path: Path) -> None:
    other = PromptCache(path.parent, Encoder("of a test"))
    other.keep(tokens(8, 8), -EMBEDS)
    shutil.copy(other.place(tokens(8, 8)), path)


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def test_a_folder_in_the_place_of_a_text_costs_one_line_without_numbers_of_errors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encode(cache(tmp_path), FakeEncoder(), tokens(1, 2))
    folder_in_its_place(cache(tmp_path).place(tokens(1, 2)))
    (again,) = encode(cache(tmp_path), FakeEncoder(), tokens(1, 2))
    np.testing.assert_array_equal(again, EMBEDS)
    read, written = caplog.messages
    assert read.endswith("Is a directory")
    assert "not kept" in written
    assert "Errno" not in caplog.text


def test_a_text_of_another_shape_is_encoded_again_and_not_given_to_the_transformer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def found(shape: tuple[int, int]) -> PromptCache:
        return PromptCache(tmp_path / "prompts", Encoder("of a test", shape))

    others = [EMBEDS.reshape(shape) for shape in ((4, 6), (1, 6, 4), (1, 24), (2, 2, 6))]
    for other in others:
        found((4, 6)).keep(tokens(1, 2), other)
        (again,) = encode(found((4, 6)), FakeEncoder(), tokens(1, 2))
        np.testing.assert_array_equal(again, EMBEDS)
    assert len(caplog.messages) == len(others)
    assert found((4, 6)).find(tokens(1, 2)) is not None


def test_the_encoder_says_what_shape_its_texts_have(make_bundle: MakeBundle) -> None:
    bundle = open_bundle(make_bundle())
    entry = bundle.stage("text_encoder")
    encoder = Encoder.of(bundle, (entry.file,), {})
    assert encoder is not None
    assert encoder.shape == (conftest.LENGTH, conftest.SIZES.caption_channels)


@pytest.mark.parametrize("spoil", [spoil_length, spoil_byte, spoil_all, spoil_header, another_text])
def test_a_spoilt_file_costs_a_warning_and_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    encoder = FakeEncoder()
    encode(cache(tmp_path), encoder, tokens(1, 2))
    spoil(cache(tmp_path).place(tokens(1, 2)))
    (again,) = encode(cache(tmp_path), encoder, tokens(1, 2))
    np.testing.assert_array_equal(again, EMBEDS)
    (warning,) = caplog.messages
    assert "encoded again" in warning
    assert "\n" not in warning
    assert "download" not in warning
    assert "convert" not in warning
    assert encoder.opened == 2
    assert cache(tmp_path).find(tokens(1, 2)) is not None


def test_what_is_not_a_number_is_not_kept(tmp_path: Path) -> None:
    encode(cache(tmp_path), FakeEncoder(np.full_like(EMBEDS, np.nan)), tokens(1, 2))
    assert cache(tmp_path).find(tokens(1, 2)) is None


def test_those_that_were_not_used_for_longest_go_first(tmp_path: Path) -> None:
    found = cache(tmp_path)
    for second, token in enumerate((1, 2, 3)):
        found.keep(tokens(token), EMBEDS)
        os.utime(found.place(tokens(token)), (second, second))
    size = found.place(tokens(1)).stat().st_size
    assert found.find(tokens(1)) is not None  # used now, so the second is the oldest
    small = cache(tmp_path, limit=3 * size)
    small.keep(tokens(4), EMBEDS)
    there = [token for token in (1, 2, 3, 4) if found.place(tokens(token)).exists()]
    assert there == [1, 3, 4]


def test_what_a_killed_process_left_is_cleared_and_what_is_being_written_stays(
    tmp_path: Path,
) -> None:
    found = cache(tmp_path)
    found.keep(tokens(1), EMBEDS)
    folder = found.place(tokens(1)).parent
    old, young = folder / ".a.0.partial", folder / ".b.1.partial"
    for path, age in ((old, 2 * prompt_cache.ABANDONED), (young, 0)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    cache(tmp_path).keep(tokens(2), EMBEDS)
    assert (old.exists(), young.exists()) == (False, True)


def test_the_folder_is_not_looked_through_for_each_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []
    monkeypatch.setattr(prompt_cache, "_prune", lambda folder, _: looked.append(folder))
    found = cache(tmp_path)
    for token in range(prompt_cache.TIDY_EVERY + 1):
        found.keep(tokens(token), EMBEDS)
    assert len(looked) == 2


def test_a_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts").write_text("a file")
    for found in encode(cache(tmp_path), FakeEncoder(), tokens(1, 2), tokens(3, 4)):
        np.testing.assert_array_equal(found, EMBEDS)
    (warning,) = caplog.messages
    assert "not kept" in warning


def test_nothing_half_written_is_found_after_a_write_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache(tmp_path).keep(tokens(1), EMBEDS)
    assert "No space left" in caplog.text
    assert [*(tmp_path / "prompts").iterdir()] == []


def identity(bundle: Bundle, **computed_by: str) -> str:
    entry = bundle.stage("text_encoder")
    found = Encoder.of(bundle, (entry.file, *entry.weights), {"library": "x", **computed_by})
    assert found is not None
    return found.identity


def test_the_encoder_is_its_files_its_length_and_what_computes_it(make_bundle: MakeBundle) -> None:
    folder = make_bundle()
    one = open_bundle(folder)
    manifest = one.manifest
    assert manifest.tokenizer is not None
    file = one.stage("text_encoder").file
    other_graph = manifest.files[file].model_copy(update={"sha256": "0" * 64})
    other_words = manifest.files[manifest.tokenizer.file].model_copy(update={"sha256": "1" * 64})
    changes: list[dict[str, Any]] = [
        {"files": {**manifest.files, file: other_graph}},
        {"files": {**manifest.files, manifest.tokenizer.file: other_words}},
        {"tokenizer": manifest.tokenizer.model_copy(update={"max_length": 77})},
        {"tokenizer": manifest.tokenizer.model_copy(update={"pad_token_id": 3})},
        {"precision": "float16"},
    ]
    found = {identity(one), identity(one, provider="CUDA"), identity(one, version="2")}
    for change in changes:
        found.add(identity(Bundle(folder, manifest.model_copy(update=change))))
    assert len(found) == 3 + len(changes)
    assert identity(one) == identity(open_bundle(folder))


def test_other_threads_and_another_device_make_other_texts(make_bundle: MakeBundle) -> None:
    """Sums of floats are of the order in which they are added."""
    bundle = open_bundle(make_bundle())

    def identity(**said: Any) -> str:
        encoder = Graphs(bundle, Choice(**said), None, ()).encoder()
        assert encoder is not None
        return encoder.identity

    on_cpu = {"provider": Providers.cuda, "text_encoder": TextEncoderDevice.cpu}
    assert len({identity(threads=1), identity(threads=2), identity()}) == 3
    assert identity(threads=2) == identity(threads=2)
    assert identity(provider=Providers.cuda) != identity(provider=Providers.cpu)
    assert identity(**on_cpu) == identity(provider=Providers.cpu)


def test_a_file_that_nobody_looked_into_is_known_by_its_sample_or_not_at_all(
    make_bundle: MakeBundle, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = open_bundle(make_bundle())
    file = bundle.stage("text_encoder").file
    entry = bundle.manifest.files[file]

    def without_hash(sample: str | None) -> Encoder | None:
        changed = entry.model_copy(update={"sha256": None, "sample": sample})
        files = {**bundle.manifest.files, file: changed}
        manifest = bundle.manifest.model_copy(update={"files": files})
        return Encoder.of(Bundle(bundle.path, manifest), (file,), {})

    assert without_hash("2" * 64) != without_hash("3" * 64) is not None
    assert without_hash(None) is None
    assert "texts are not kept" in caplog.text


def test_with_all_texts_seen_the_text_encoder_is_never_opened_and_the_clip_is_the_same(
    make_bundle: MakeBundle, tmp_path: Path, opened: list[str]
) -> None:
    folder = make_bundle()

    def clip(prompt: str, kept: Path | None, memory: Memory = Memory.staged) -> bytes:
        choice = Choice(Backend.onnxruntime, 1, memory, provider=Providers.cpu, prompt_cache=kept)
        with open_stages(folder, choice) as stages:
            request, _ = resolve(Wishes(prompt, num_inference_steps=2), stages.bundle, None)
            stages.prepare(plan(request, stages.bundle.manifest))
            return frames_of(generate(request, stages.bundle, stages)).tobytes()

    plain = clip("w5 w9", None)
    assert opened.count("text_encoder") == 1
    assert clip("w5 w9", tmp_path / "kept") == plain
    assert opened.count("text_encoder") == 2
    assert clip(" w5  w9", tmp_path / "kept") == plain  # the same tokens
    assert clip("w5 w9", tmp_path / "kept", Memory.resident) == plain
    assert opened.count("text_encoder") == 2
    assert clip("w7", tmp_path / "kept") != plain
    assert opened.count("text_encoder") == 3
