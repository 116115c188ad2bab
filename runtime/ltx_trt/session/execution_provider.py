"""How ONNX Runtime is asked for a GPU: built in, or as a plugin in a package of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_dir

from ltx_engines.cache_key import Profile
from ltx_engines.errors import UserError
from ltx_engines.providers import NAMES, Provider

if TYPE_CHECKING:
    from ltx_engines.bundle import StageEntry

PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
"""The module that brings TensorRT-RTX to an ONNX Runtime that was built without it."""

COMMANDS: Mapping[Provider, str] = {
    "cpu": "pip install 'ltx-trt[onnxruntime]'",
    "cuda": "pip uninstall onnxruntime; pip install 'ltx-trt[onnxruntime-gpu]'",
    "tensorrt-rtx": "pip install onnxruntime-ep-nv-tensorrt-rtx",
}

PROFILE_INDEX = "nv_profile_index"
"""The entry of a run's options that says which profile it takes."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a session is made with: a provider that is built in, or the `devices` of a plugin.
    `shapes` are of each profile's inputs, smallest and largest."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    shapes: tuple[Mapping[str, tuple[Shape, Shape]], ...] = ()
    devices: tuple[Any, ...] = ()

    def give(self, options: Any) -> None:
        """Devices are an option of the session."""
        if self.devices:
            options.add_provider_for_devices(self.devices[:1], dict(self.options))

    def arguments(self) -> dict[str, Any]:
        """Others are an argument of its constructor; CPU is always the last."""
        return {} if self.devices else {"providers": [(self.name, dict(self.options))]}

    def run_entries(self, found: Mapping[str, Shape]) -> dict[str, str]:
        """Which profile takes these shapes.

        Raises:
            UserError: none does.
        """
        for index, profile in enumerate(self.shapes):
            if all(_within(found[name], *ends) for name, ends in profile.items()):
                return {PROFILE_INDEX: str(index)} if len(self.shapes) > 1 else {}
        if not self.shapes:
            return {}
        raise UserError(
            f"no profile of the bundle takes inputs of {dict(found)}; build for this clip: "
            "ltx-export build-engine --backend onnxruntime --shape WxHxF"
        )


Shape = tuple[int, ...]


def ask(ort: Any, provider: Provider, entry: StageEntry, profiles: Sequence[Profile]) -> Asked:
    """
    Raises:
        UserError: this ONNX Runtime has not got it, or there is no GPU for it.
    """
    name = NAMES[provider]
    if provider != "tensorrt-rtx":
        if name not in ort.get_available_providers():
            raise _missing(ort, provider)
        return Asked(name)
    told = rtx_options(entry, profiles)
    shapes = tuple(
        {t.name: (_shape(t.axes, profile, 0), _shape(t.axes, profile, 2)) for t in entry.inputs}
        for profile in profiles
    )
    if name in ort.get_available_providers():
        return Asked(name, told, shapes)
    return Asked(name, told, shapes, tuple(_plugin_devices(ort, name)))


def rtx_options(entry: StageEntry, profiles: Sequence[Profile]) -> dict[str, str]:
    """Kernels that were compiled here are kept for the next start; profiles are those for which the
    bundle was made, or without any, whatever the first clip is."""
    found = {"nv_runtime_cache_path": str(Path(user_cache_dir("ltx-trt")) / "onnxruntime-rtx")}
    for word, end in (("min", 0), ("opt", 1), ("max", 2)):
        rows = [
            f"{tensor.name}:{'x'.join(map(str, _shape(tensor.axes, profile, end)))}"
            for profile in profiles
            for tensor in entry.inputs
        ]
        if rows:
            found[f"nv_profile_{word}_shapes"] = ",".join(rows)
    if len(profiles) > 1:
        found["nv_multi_profile_enable"] = "1"
    return found


def _shape(axes: Sequence[int | str], profile: Profile, end: int) -> Shape:
    return tuple(axis if isinstance(axis, int) else profile[axis][end] for axis in axes)


def _within(shape: Shape, least: Shape, most: Shape) -> bool:
    return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))


def _plugin_devices(ort: Any, name: str) -> list[Any]:
    """Those of the plugin, which is registered the first time."""
    if not hasattr(ort, "register_execution_provider_library"):
        raise UserError(
            f"onnxruntime {ort.__version__} takes no plugins, wanted 1.23 or later; "
            "pip install --upgrade onnxruntime"
        )
    found = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not found:
        try:
            from importlib import import_module

            plugin = import_module(PLUGIN)
        except ImportError:
            raise _missing(ort, "tensorrt-rtx") from None
        try:
            ort.register_execution_provider_library(name, plugin.get_library_path())
        except (OSError, RuntimeError) as error:
            raise UserError(f"{PLUGIN} does not load: {' '.join(str(error).split())}") from error
        found = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not found:
        raise UserError(
            f"{PLUGIN} finds no GPU here that it can use (SM86 or newer, with the vendor's "
            "driver); choose --provider cuda or cpu"
        )
    return found


def _missing(ort: Any, provider: Provider) -> UserError:
    available = ", ".join(ort.get_available_providers())
    return UserError(
        f"this onnxruntime has no {NAMES[provider]}, only {available}; {COMMANDS[provider]}"
    )
