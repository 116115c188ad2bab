"""What a bundle's stages run on: engines where it has them, else ONNX Runtime; never in silence.

    manifest -> the library that is installed -> the GPU -> the files' hashes -> the plans

Whatever is missing is said in this order, so that nobody waits for gigabytes to hear that the card
is another one. Of two libraries the first is taken that is installed and has engines for this card.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ltx_engines import engine_entry
from ltx_engines.bundle import Manifest, open_bundle, read
from ltx_engines.cache_key import targets
from ltx_engines.engine_entry import Chain, EngineEntry
from ltx_engines.errors import UserError
from ltx_engines.libraries import COMMANDS
from ltx_engines.stages import DECODERS, SAMPLER_STEP, STREAM
from ltx_engines.targets import Flavour
from ltx_trt.backend import Backend, Choice, TextEncoderDevice
from ltx_trt.session import onnxruntime_session, tensorrt_adapter
from ltx_trt.session.bundle_stages import SOMETIMES, USED, EngineStages, Stages, computed
from ltx_trt.session.device import Device
from ltx_trt.session.driver import DeviceError
from ltx_trt.session.engine_api import EngineError
from ltx_trt.session.graph_stages import TEXT_ENCODER, OnnxRuntimeStages

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")

log = logging.getLogger(__name__)

OpenDevice = Callable[[Flavour], Device]


class _MisfitError(Exception):
    """Why engines of one library cannot be used here, in the middle of a sentence that begins with
    the bundle; `advice` ends it."""

    def __init__(self, said: str, advice: str = "") -> None:
        super().__init__(said)
        self.advice = advice


def open_stages(folder: Path, choice: Choice, *, open_device: OpenDevice | None = None) -> Stages:
    """The bundle's stages, none of which is loaded yet.

    Raises:
        UserError: no bundle, or it cannot be run here in the way that was chosen.
    """
    manifest = read(folder)
    aside = _aside(manifest, choice)
    if not (flavours := _flavours(folder, manifest, choice.backend)):
        _check_flags(folder, choice)
        return OnnxRuntimeStages(open_bundle(folder), choice)
    found = _first(_Built(folder, manifest, aside), flavours, open_device or Device.open)
    try:
        if choice.threads is not None and all(computed(stage, found.chains) for stage in USED):
            raise UserError(
                f"every stage of {folder} runs on the GPU; leave out --threads, which are of the "
                f"CPU{_otherwise(manifest)}"
            )
        return EngineStages(open_bundle(folder), choice, found.device, found.chains)
    except BaseException as error:
        found.device.close(error)
        raise


def _aside(manifest: Manifest, choice: Choice) -> frozenset[str]:
    """
    Raises:
        UserError: the CPU cannot compute the text encoder, which is wished.
    """
    if choice.text_encoder is not TextEncoderDevice.cpu:
        return frozenset()
    if (entry := manifest.stages.get(TEXT_ENCODER)) is not None:
        try:
            onnxruntime_session.check_cpu(TEXT_ENCODER, entry)
        except UserError as error:
            raise UserError(f"--text-encoder-device cpu: {error}") from None
    return frozenset({TEXT_ENCODER})


def _check_flags(folder: Path, choice: Choice) -> None:
    """
    Raises:
        UserError: something was wished that only engines have.
    """
    here = f"{folder} runs on ONNX Runtime"
    build = "or build engines: ltx-export build-engine"
    if choice.device_memory is not None:
        raise UserError(f"{here}, which takes what it needs; leave out --device-memory, {build}")
    if not choice.cuda_graphs:
        raise UserError(f"{here}, which has no CUDA graphs; leave out --no-cuda-graphs, {build}")


def _flavours(folder: Path, manifest: Manifest, backend: Backend) -> Sequence[Flavour]:
    """Those to try; none for ONNX Runtime."""
    built = dict.fromkeys(engine.key.flavour for engine in manifest.engines)
    if backend is Backend.onnxruntime:
        return ()
    if backend is Backend.auto:
        return [flavour for flavour in FLAVOURS if flavour in built]
    flavour: Flavour = "tensorrt" if backend is Backend.tensorrt else "tensorrt-rtx"
    if flavour not in built:
        raise UserError(
            f"{folder} has no engine of {flavour}, only {', '.join(built) or 'graphs'}; build it: "
            f"ltx-export build-engine {folder} --backend {flavour} --gpu GPU --shape WxHxF"
        )
    return (flavour,)


@dataclass(frozen=True, slots=True)
class _Built:
    """`aside` are stages whose engines are not used."""

    folder: Path
    manifest: Manifest
    aside: frozenset[str] = frozenset()

    def engines(self, flavour: Flavour) -> list[EngineEntry]:
        return [engine for engine in self.manifest.engines if engine.key.flavour == flavour]

    def again(self, gpu: str) -> str:
        return f"; build them: ltx-export build-engine {self.folder} --gpu {gpu} --shape WxHxF"


@dataclass(frozen=True, slots=True)
class _Found:
    """The GPU, and the engines that it runs."""

    device: Device
    chains: dict[str, Chain]


def _first(built: _Built, flavours: Sequence[Flavour], open_device: OpenDevice) -> _Found:
    """
    Raises:
        UserError: engines of none of them run here; with all that there is and all that is wanted.
    """
    misfits = []
    for flavour in flavours:
        try:
            _check_library(built, flavour)
            return _on_device(built, flavour, open_device)
        except _MisfitError as misfit:
            misfits.append(misfit)
    said = " and ".join(map(str, misfits))
    advice = misfits[0].advice + _otherwise(built.manifest)
    raise UserError(f"{built.folder} has {said}{advice}") from misfits[0].__cause__


def _check_library(built: _Built, flavour: Flavour) -> None:
    engines = built.engines(flavour)
    versions = dict.fromkeys(engine.key.version for engine in engines)
    here = tensorrt_adapter.version(flavour)
    said = f"engines of {flavour} {', '.join(versions)} for {_cards(engines)}"
    if here is None:
        raise _MisfitError(f"{said}, which is not installed", f"; {COMMANDS[flavour]}")
    if here not in versions:
        raise _MisfitError(f"{said}, installed is {here}", built.again("GPU"))


def _on_device(built: _Built, flavour: Flavour, open_device: OpenDevice) -> _Found:
    try:
        device = open_device(flavour)
    except (UserError, DeviceError, EngineError) as error:
        cards = _cards(built.engines(flavour))
        raise _MisfitError(f"engines of {flavour} for {cards}, but {error}") from error
    try:
        return _Found(device, _chains(built, device))
    except BaseException as error:
        device.close(error)
        raise


def _chains(built: _Built, device: Device) -> dict[str, Chain]:
    """Of every stage that has engines of this library, those that this GPU runs."""
    capability, flavour = device.driver.capability, device.library.flavour
    engines = built.engines(flavour)
    again = built.again(f"sm{capability}")
    said = f"engines of {flavour} for {_cards(engines)}"
    if not any(capability in engine.key.targets for engine in engines):
        here = f"this GPU is SM{capability} ({device.driver.name})"
        raise _MisfitError(f"{said}, {here}", again)
    chains, unusable = dict[str, Chain](), dict[str, _MisfitError]()
    for stage in (*USED, *SOMETIMES, STREAM, SAMPLER_STEP):
        if stage not in built.aside and any(engine.key.stage == stage for engine in engines):
            try:
                chains[stage] = _chain(built, stage, device)
            except _MisfitError as misfit:
                if stage not in DECODERS:
                    raise
                unusable[stage] = misfit
    _check_decoders(built, chains, unusable)
    return chains


def _chain(built: _Built, stage: str, device: Device) -> Chain:
    capability, flavour = device.driver.capability, device.library.flavour
    said = f"engines of {flavour} for {_cards(built.engines(flavour))}"
    try:
        chain = engine_entry.choose(built.folder, built.manifest, stage, capability, flavour)
    except UserError as error:
        raise _MisfitError(f"{said}, but {error}") from error
    if (version := chain[0].key.version) != device.library.version:
        raise _MisfitError(
            f"{said}, of which that of {stage} is of {version}, installed is "
            f"{device.library.version}",
            built.again(f"sm{capability}"),
        )
    return chain


def _check_decoders(
    built: _Built, chains: Mapping[str, Chain], unusable: Mapping[str, _MisfitError]
) -> None:
    """One is enough: cards may have different ones, and a build may leave one as it was."""
    usable = [stage for stage in DECODERS if stage in chains]
    for stage, misfit in unusable.items():
        if not usable:
            raise misfit
        words = usable[0], stage, built.folder, misfit, misfit.advice
        log.warning("%s decodes without %s: %s has %s%s", *words)


def _cards(engines: Sequence[EngineEntry]) -> str:
    return targets(sorted({target for engine in engines for target in engine.key.targets}))


def _otherwise(manifest: Manifest) -> str:
    """The way without engines, where there is one."""
    try:
        for stage in USED:
            if stage in manifest.stages:
                onnxruntime_session.check_cpu(stage, manifest.stages[stage])
    except UserError:
        return ""
    return ", or run it on the CPU with --backend onnxruntime"
