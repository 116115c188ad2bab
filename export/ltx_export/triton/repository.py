"""A bundle becomes a model repository of Triton, a folder that is mounted as it is.

    REPO/ltx_video/config.pbtxt           the decoupled model that makes clips
                   configs/cpu.pbtxt      its twin for a server without a GPU
                   1/model.py             two lines: the model is in the runtime
                   1/bundle/              the bundle, hard links of its files
    REPO/STAGE/...                        with --layout stages, a model for each stage

It appears in one rename when it is complete.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from uuid import uuid4

from ltx_engines.bundle import MANIFEST, Bundle, open_bundle
from ltx_engines.errors import UserError
from ltx_engines.stages import DECODER, STREAM
from ltx_engines.triton_model import VIDEO, served
from ltx_engines.triton_plans import plans
from ltx_engines.triton_settings import Settings
from ltx_export.triton import config, tensorrt

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

BUNDLE = f"{VIDEO}/1/bundle"
"""Where it lies in a repository: a folder beside it would be taken for a model."""

INVENTORY = "repository.json"
"""What makes a folder a repository of ours."""


VIDEO_PY = "from ltx_trt.triton.video_model import TritonPythonModel as TritonPythonModel\n"
STAGE_PY = "from ltx_trt.triton.stage_model import TritonPythonModel as TritonPythonModel\n"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """What the user wants of a repository, and of the models in it."""

    settings: Settings = field(default_factory=Settings)
    queue: config.Queue = field(default_factory=config.Queue)
    overwrite: bool = False


def write(bundle: Path, out: Path, order: Order) -> tuple[str, ...]:
    """The models of the repository.

    Raises:
        UserError: no bundle, one that makes no clips, or `out` cannot be written.
    """
    found = open_bundle(bundle)
    for stage in served(found.manifest):
        found.stage(stage)
    if order.settings.layout == "stages" and order.settings.backend != "onnxruntime":
        _check_decoder(found)
    with _replacing(out, overwrite=order.overwrite) as folder:
        _link_bundle(found, folder / BUNDLE)
        models = tuple(_models(found, folder, order))
        _seal(found, folder, order, models)
    return models


def _check_decoder(bundle: Bundle) -> None:
    """
    Raises:
        UserError: the only engine of the decoder is one that keeps a clip from call to call.
    """
    built = {engine.key.stage for engine in bundle.manifest.engines}
    if STREAM in built and DECODER not in built:
        raise UserError(
            f"--layout stages has models that keep nothing from call to call, and of the decoder "
            f"there is only {STREAM}; choose --layout single, or build the other too: ltx-export "
            f"build-engine {bundle.path} --stages {DECODER} --gpu GPU"
        )


def _models(bundle: Bundle, folder: Path, order: Order) -> Iterator[str]:
    # with --layout stages it only calls the others
    place = _place(bundle) if order.settings.layout == "single" else "cpu"
    _model(folder / VIDEO, config.video(order.settings, order.queue, place), VIDEO_PY)
    yield VIDEO
    if order.settings.layout == "single":
        return
    for stage in served(bundle.manifest):
        _stage(bundle, folder, stage, order)
        yield stage


def _stage(bundle: Bundle, folder: Path, stage: str, order: Order) -> None:
    if found := plans(bundle.manifest, stage):
        _model(folder / stage, tensorrt.config_of(stage, found))
        for name, plan in found.items():
            _link(bundle.path / plan.file, folder / stage / "1" / name)
        return
    entry = bundle.stage(stage)
    up = PurePosixPath("../..") / BUNDLE  # from the stage's version folder
    settings = order.settings.with_bundle(str(up))
    tables = (entry.inputs, entry.outputs)
    made = config.python_stage(stage, tables, settings, _place(bundle))
    _model(folder / stage, made, STAGE_PY)


def _model(folder: Path, made: "ModelConfig", source: str = "") -> None:
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "configs").mkdir()
    (folder / "config.pbtxt").write_text(config.text(made), encoding="utf-8")
    (folder / "configs" / "cpu.pbtxt").write_text(
        config.text(config.on_cpu(made)), encoding="utf-8"
    )
    if source:
        (folder / "1" / "model.py").write_text(source, encoding="utf-8")


def _place(bundle: Bundle) -> config.Place:
    return "gpu" if bundle.manifest.engines else "cpu"


def _link_bundle(bundle: Bundle, target: Path) -> None:
    """Weights that are referred to stay where they are: the manifest has their absolute path."""
    for name in (MANIFEST, *bundle.manifest.files):
        if PurePosixPath(name).is_absolute():
            log.warning("%s stays where it is; mount it at the same path", name)
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _link(bundle.path / name, target / name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        log.warning("%s is copied, for it cannot be linked (%s)", source, error.strerror)
        shutil.copy2(source, target)


def _seal(bundle: Bundle, folder: Path, order: Order, models: tuple[str, ...]) -> None:
    from ltx_export.triton import inventory, operations

    settings = order.settings
    facts = operations.Facts(settings.layout, bundle.manifest, models, BUNDLE, settings)
    operations.write(folder, facts)
    inventory.seal(folder, layout=settings.layout, bundle=BUNDLE)


@contextmanager
def _replacing(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write in, which takes the place of `out` on success, else vanishes."""
    target = Path(os.path.realpath(out))
    _check_target(target, overwrite=overwrite)
    temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            old = temporary.with_suffix(".old")
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_target(target: Path, *, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / INVENTORY).is_file():
        raise UserError(f"{target} is neither empty nor a repository; choose another folder")
    if not overwrite:
        raise UserError(f"{target} holds a repository; choose another folder or pass --overwrite")
