"""A bundle with an engine that nobody built: its plan is a few bytes, its table is a true one."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from ltx_engines import bundle
from ltx_engines.bundle import EngineEntry, FileEntry
from ltx_engines.cache_key import EngineKey, Profile
from ltx_export import layer_table
from ltx_export.layer_table import Layer, Operand

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
PLAN, LAYERS = "transformer.sm89.0123abcd.engine", "transformer.sm89.0123abcd.layers.json"
PROFILE: Profile = {"batch": (1, 3, 3), "tokens": (8, 8, 8), "text": (1, 16, 256)} | {
    "timesteps": (1, 1, 1)
}


def _layer(name: str, kind: str, *dtypes: str) -> Layer:
    """The types of what it reads, of its constants, if any, and of what it writes."""
    read, *constants, written = (Operand(t, (1, 8, 64), t) for t in dtypes)
    return Layer(name, kind, (read,), tuple(constants), (written,), frozenset({f"node of {name}"}))


TABLE = (
    _layer("fc_myl0_1", "gemm", "FP8", "FP8", "BFloat16"),
    _layer("fc_myl0_2", "gemm", "BFloat16", "BFloat16", "BFloat16"),
    _layer("__myl_FcAdd_myl0_3", "runtime_fusion", "BFloat16", "BFloat16"),
    _layer("_gemm_mha_v2_myl0_4", "kgen", "BFloat16", "BFloat16"),
    _layer("__myl_MoveReshTran_myl0_5", "kgen", "BFloat16", "BFloat16"),
    _layer("__myl_MoveReshCast_myl0_6", "kgen", "BFloat16", "Float"),
)


def add(folder: Path, profile: Profile = PROFILE, options: Mapping[str, int] | None = None) -> Path:
    """The shipped bundle, with an engine of its transformer for SM89."""
    shutil.copytree(TINY, folder)
    (folder / PLAN).write_bytes(b"a plan")
    (folder / LAYERS).write_text(layer_table.to_json(TABLE), encoding="utf-8")
    manifest = bundle.read(folder)
    entry = manifest.stages["transformer"]
    key = EngineKey(
        stage="transformer",
        graph=str(manifest.files[entry.file].sha256),
        weights={name: manifest.files[name] for name in entry.weights},
        profiles=(profile,),
        flavour="tensorrt-rtx",
        version="1.7.1.116",
        targets=(89,),
        options=dict(options or {}),
    )
    engine = EngineEntry(
        file=PLAN,
        layers=LAYERS,
        key=key,
        inputs=entry.inputs,
        outputs=entry.outputs,
        activations=123,
        counts={"kernels": len(TABLE), "score kernels": 2},
    )
    files = {name: _file(folder / name) for name in (PLAN, LAYERS)}
    added = {"engines": (engine,), "files": manifest.files | files}
    bundle.update(folder, manifest.model_copy(update=added))
    return folder


def _file(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
