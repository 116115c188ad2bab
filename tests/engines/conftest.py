from collections.abc import Callable
from pathlib import Path

import pytest

from ltx_engines.bundle import (
    Manifest,
    ModelFacts,
    SchedulerFacts,
    StageEntry,
    TokenizerEntry,
    create,
    seal,
    tensor_entries,
)
from ltx_engines.stages import Sizes, ltx_video

CONTENT = {
    "transformer.onnx": b"graph",
    "ltx.safetensors": b"weights",
    "text_encoder/tokenizer.json": b"{}",
}

TRANSFORMER = ltx_video(Sizes(12, 12, 20, 3, 12, timestep_conditioning=True))["transformer"]


@pytest.fixture
def manifest() -> Manifest:
    """As an exporter makes it, before it is sealed."""
    return Manifest(
        family="ltx_video",
        name="tiny",
        model_version="0.9.6",
        precision="float16",
        stages={
            "transformer": StageEntry(
                file="transformer.onnx",
                inputs=tensor_entries(TRANSFORMER.inputs, "float16"),
                outputs=tensor_entries(TRANSFORMER.outputs, "float16"),
                weights=("ltx.safetensors",),
            )
        },
        checkpoint="ltx.safetensors",
        tokenizer=TokenizerEntry(
            file="text_encoder/tokenizer.json", max_length=128, pad_token_id=0
        ),
        model=ModelFacts(
            latent_channels=12,
            num_layers=3,
            causal_temporal_positioning=True,
            timestep_conditioning=True,
            stg_mode="attention_values",
        ),
        scheduler=SchedulerFacts(),
    )


@pytest.fixture
def content() -> dict[str, bytes]:
    """The files of the bundle at `folder`."""
    return CONTENT


@pytest.fixture
def fill(manifest: Manifest) -> Callable[..., Manifest]:
    """Writes the files into a folder and seals it, under the name that is given."""

    def write(folder: Path, name: str = "tiny") -> Manifest:
        for file, content in CONTENT.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
        return seal(folder, manifest.model_copy(update={"name": name}))

    return write


@pytest.fixture
def folder(tmp_path: Path, fill: Callable[..., Manifest]) -> Path:
    """A bundle."""
    with create(tmp_path / "bundle") as temporary:
        fill(temporary)
    return tmp_path / "bundle"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
