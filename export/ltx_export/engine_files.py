"""Files that builds leave in a bundle: which are the bundle's own, and whether they are whole."""

import re
from pathlib import Path

from platformdirs import user_cache_dir

from ltx_engines import bundle, hashes
from ltx_engines.bundle import Bundle, EngineEntry
from ltx_engines.errors import UserError
from ltx_engines.stages import OPTIONAL, SAMPLER_STEP, STAGES, STREAM

HASH = "[0-9a-f]{8}"
OURS = re.compile(
    rf"(?:{'|'.join((*STAGES, STREAM, *OPTIONAL, SAMPLER_STEP))})(?:-\d+-of-\d+)?"
    rf"(?:\.sm\d+(?:-sm\d+)*)\.{HASH}\.(?:engine|layers\.json)"
    rf"|\.?{SAMPLER_STEP}\.{HASH}\.onnx|\.{re.escape(bundle.MANIFEST)}\.{HASH}"
)
"""Names that only a build gives (`engine_work.Work.name`, `step_graph`, `bundle.update`)."""


def remove_strays(path: Path) -> None:
    """What a killed build has left, and engines that were replaced."""
    named = bundle.read(path).files
    for file in list(path.iterdir()):
        if OURS.fullmatch(file.name) and file.name not in named and not file.is_dir():
            file.unlink()


def harm(opened: Bundle, engine: EngineEntry) -> str:
    """What is wrong with an engine's files, or an empty string.

    Raises:
        UserError: the system does not let them be read.
    """
    cache = Path(user_cache_dir("ltx-trt"))
    for name in (engine.file, engine.layers):
        file, wanted = opened.file(name), opened.manifest.files[name]
        if not file.is_file():
            return "its file is missing"
        try:
            whole = file.stat().st_size == wanted.bytes
            if not whole or hashes.verify(file, wanted.sha256 or "", cache) != wanted.sha256:
                return "its file is damaged"
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from error
    return ""
