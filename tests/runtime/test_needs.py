"""What a chain needs: its heaviest moments, and each buffer once."""

from ltx_engines.bundle import FileEntry, Manifest
from ltx_trt.session.needs import need
from tests.runtime.chained_engines import CHANNELS, ENTRIES, TOKENS, WHOLE


def test_buffers_that_parts_share_count_once_and_the_arena_is_the_largest_parts() -> None:
    parts = [
        ENTRIES[f"part{n}"].model_copy(update={"activations": size})
        for n, size in enumerate((10, 40, 30, 20))
    ]
    step = ENTRIES["whole"].model_copy(update={"activations": 5})
    files = {
        entry.file: FileEntry(bytes=100 * number, sha256="0" * 64)
        for number, entry in enumerate((*parts, step), 1)
    }
    found = need(Manifest.model_construct(files=files), parts, [step])
    assert found.weights == (100, 200, 300, 400)
    assert found.activations == 40
    assert not found.streams
    most = TOKENS[-1]
    rows = {"latents": most, "text": 1, "coords": most / CHANNELS, "velocity": most}
    ends = 4 * CHANNELS * sum(rows[tensor.name] for row in WHOLE for tensor in row)
    between = 4 * CHANNELS * most * 3  # shared, and two for the hidden states
    assert found.buffers == ends + between + ends + 500


def test_one_engine_that_was_built_for_it_streams() -> None:
    whole = ENTRIES["whole"]
    manifest = Manifest.model_construct(files={whole.file: FileEntry(bytes=7, sha256="0" * 64)})
    key = whole.key.model_copy(update={"options": {"weight streaming": 1}})
    streaming = whole.model_copy(update={"key": key})
    assert [need(manifest, [entry]).streams for entry in (whole, streaming)] == [False, True]
