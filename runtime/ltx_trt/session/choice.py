"""What a bundle's stages run on: engines where it has them, else ONNX Runtime; never in silence.

    manifest -> the library that is installed -> the GPU -> the files' hashes -> the plans

Whatever is missing is said in this order, so that nobody waits for gigabytes to hear that the card
is another one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ltx_engines import engine_entry
from ltx_engines.bundle import Manifest, open_bundle, read
from ltx_engines.cache_key import targets
from ltx_engines.engine_entry import Chain, EngineEntry
from ltx_engines.errors import UserError
from ltx_engines.libraries import COMMANDS
from ltx_engines.stages import SAMPLER_STEP
from ltx_engines.targets import Flavour
from ltx_trt.backend import Backend, Choice
from ltx_trt.session import onnxruntime_session, tensorrt_adapter
from ltx_trt.session.bundle_stages import EngineStages, OnnxRuntimeStages, Stages
from ltx_trt.session.device import Device
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.engine_api import EngineError

USED = ("text_encoder", "transformer", "vae_decoder")
"""The stages of a clip, in order of use."""

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")

OpenDevice = Callable[[Flavour], Device]


def open_stages(folder: Path, choice: Choice, *, open_device: OpenDevice | None = None) -> Stages:
    """The bundle's stages, none of which is loaded yet.

    Raises:
        UserError: no bundle, or it cannot be run here in the way that was chosen.
    """
    manifest = read(folder)
    if (flavour := _flavour(folder, manifest, choice.backend)) is None:
        if choice.device_memory is not None:
            raise UserError(
                f"{folder} runs on ONNX Runtime, which takes what it needs; leave out "
                "--device-memory, or build engines: ltx-export build-engine"
            )
        return OnnxRuntimeStages(open_bundle(folder), choice)
    engines = [e for e in manifest.engines if e.key.flavour == flavour]
    otherwise = _otherwise(manifest)
    _check_library(folder, flavour, engines, otherwise)
    try:
        device = (open_device or Device.open)(flavour)
    except (UserError, DeviceError, EngineError) as error:
        raise UserError(
            f"{folder} has engines of {flavour} for {_cards(engines)}, but {error}{otherwise}"
        ) from error
    try:
        chains = _chains(folder, manifest, device, otherwise)
        return EngineStages(open_bundle(folder), choice, device, chains)
    except BaseException as error:
        device.close(error)
        raise


def _flavour(folder: Path, manifest: Manifest, backend: Backend) -> Flavour | None:
    """None for ONNX Runtime. Of two, the one whose library is here in the right version."""
    built = dict.fromkeys(engine.key.flavour for engine in manifest.engines)
    if backend is Backend.onnxruntime or (backend is Backend.auto and not built):
        return None
    if backend is Backend.auto:
        found = {f: tensorrt_adapter.version(f) for f in FLAVOURS if f in built}
        fitting = (e.key.flavour for e in manifest.engines if found[e.key.flavour] == e.key.version)
        return min(fitting, key=FLAVOURS.index, default=min(found, key=FLAVOURS.index))
    flavour: Flavour = "tensorrt" if backend is Backend.tensorrt else "tensorrt-rtx"
    if flavour not in built:
        raise UserError(
            f"{folder} has no engine of {flavour}, only {', '.join(built) or 'graphs'}; build it: "
            f"ltx-export build-engine {folder} --backend {flavour} --gpu GPU --shape WxHxF"
        )
    return flavour


def _check_library(
    folder: Path, flavour: Flavour, engines: Sequence[EngineEntry], otherwise: str
) -> None:
    built = dict.fromkeys(engine.key.version for engine in engines)
    here = tensorrt_adapter.version(flavour)
    said = f"{folder} has engines of {flavour} {', '.join(built)} for {_cards(engines)}"
    if here is None:
        command = COMMANDS[flavour]
        raise UserError(f"{said}, which is not installed; {command}{otherwise}")
    if here not in built:
        raise UserError(f"{said}, installed is {here}; {_again(folder, 'GPU')}{otherwise}")


def _chains(folder: Path, manifest: Manifest, device: Device, otherwise: str) -> dict[str, Chain]:
    """Of every stage that has engines of this library, those that this GPU runs."""
    capability, flavour = device.driver.capability, device.library.flavour
    engines = [e for e in manifest.engines if e.key.flavour == flavour]
    again = _again(folder, f"sm{capability}")
    here = f"this GPU is SM{capability} ({device.driver.name})"
    if not any(capability in engine.key.targets for engine in engines):
        raise UserError(
            f"{folder} has engines of {flavour} for {_cards(engines)}, {here}; {again}{otherwise}"
        )
    chains = {}
    for stage in (*USED, SAMPLER_STEP):
        if any(engine.key.stage == stage for engine in engines):
            chains[stage] = chain = engine_entry.choose(
                folder, manifest, stage, capability, flavour
            )
            if (version := chain[0].key.version) != device.library.version:
                raise UserError(
                    f"{folder}: the engine of {stage} is of {flavour} {version}, installed is "
                    f"{device.library.version}; {again}{otherwise}"
                )
    return chains


def _cards(engines: Sequence[EngineEntry]) -> str:
    return targets(sorted({target for engine in engines for target in engine.key.targets}))


def _again(folder: Path, gpu: str) -> str:
    return f"build them: ltx-export build-engine {folder} --gpu {gpu} --shape WxHxF"


def _otherwise(manifest: Manifest) -> str:
    """The way without engines, where there is one."""
    try:
        for stage in USED:
            if stage in manifest.stages:
                onnxruntime_session.check_cpu(stage, manifest.stages[stage])
    except UserError:
        return ""
    return ", or run it on the CPU with --backend onnxruntime"
