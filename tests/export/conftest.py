"""Three small bundles, exported once through the command line, and their checkpoints."""

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from ltx_engines.bundle import Bundle, open_bundle
from ltx_export import cli, graphs, templates
from tests.export.checkpoints import config, write_checkpoint, write_text_encoder


@pytest.fixture(autouse=True, scope="session")
def a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted weights and verified hashes do not fill the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def one_trace_for_each_configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Many tests export the same small models, and a trace takes seconds to half a minute: it is
    kept as templates are, for all workers.

    Who wants a fresh one imports `graphs.traced` by name.
    """
    base, trace = tmp_path_factory.getbasetemp(), graphs.traced
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traced"
    folder.mkdir(exist_ok=True)

    def traced(stage: str, model: graphs.Model) -> ir.Model:
        facts = graphs.facts(stage, model) | {"num_layers": model.layers(stage)}
        with (folder / f"{templates.name(stage, facts)}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (kept := templates.find(stage, facts, folder)) is None:
                path = templates.save(trace(stage, model), stage, facts, folder)
                kept = templates.find(stage, facts, folder)
                assert kept is not None, path
        return templates.from_proto(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "traced", traced)
        yield


@pytest.fixture(autouse=True)
def inference_on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class Exported:
    checkpoint: Path
    text_encoder: Path
    bundle: Bundle


@dataclass(frozen=True, slots=True)
class Files:
    """A checkpoint and a text encoder that fit each other."""

    checkpoint: Path
    text_encoder: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    return Files(
        write_checkpoint(folder / "small.safetensors", config("0.9.5")),
        write_text_encoder(folder / "t5", shards=2),
    )


@pytest.fixture(scope="session")
def exported(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """All four stages of a 0.9.5 layout, through symbolic links as in a model hub's cache."""
    folder = tmp_path_factory.mktemp("v095")
    checkpoint, text_encoder = folder / files.checkpoint.name, folder / "t5"
    checkpoint.symlink_to(files.checkpoint)
    text_encoder.mkdir()
    for file in files.text_encoder.iterdir():
        (text_encoder / file.name).symlink_to(file)
    return export(checkpoint, text_encoder, folder / "bundle", "all")


@pytest.fixture(scope="session")
def exported_09(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("v09")
    checkpoint = write_checkpoint(folder / "v09.safetensors", config("0.9"))
    return export(checkpoint, files.text_encoder, folder / "bundle", "vae_encoder,vae_decoder")


@pytest.fixture(scope="session")
def exported_091(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("v091")
    checkpoint = write_checkpoint(folder / "v091.safetensors", config("0.9.1"))
    return export(checkpoint, files.text_encoder, folder / "bundle", "vae_decoder")


def export(checkpoint: Path, text_encoder: Path, out: Path, stages: str, *options: str) -> Exported:
    arguments = ["onnx", str(checkpoint), "--text-encoder", str(text_encoder), "--out", str(out)]
    assert cli.main([*arguments, "--stages", stages, *options]) == 0
    return Exported(checkpoint, text_encoder, open_bundle(out, cache=out.parent / "cache"))
