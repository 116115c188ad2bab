"""TensorRT and TensorRT-RTX as packages: what they are called, and which version is installed."""

import re
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from importlib.util import find_spec
from types import MappingProxyType

from ltx_engines.targets import Flavour

MODULES: Mapping[Flavour, str] = MappingProxyType(
    {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
)
COMMANDS: Mapping[Flavour, str] = MappingProxyType(
    {
        "tensorrt": "pip install tensorrt --extra-index-url https://pypi.nvidia.com",
        "tensorrt-rtx": "pip install 'ltx-trt[tensorrt-rtx]'",
    }
)
CUDA_MAJORS = ("", "-cu13", "-cu12")
"""Ends of the distributions' names."""


def version(flavour: Flavour) -> str | None:
    """Of the library that is installed, without loading it; None if there is none."""
    module = MODULES[flavour]
    if find_spec(module) is None:
        return None
    for end in CUDA_MAJORS:
        try:
            return released(installed(f"{module}{end}"))
        except PackageNotFoundError:
            continue
    return released(str(import_module(module).__version__))  # unpacked by hand


def released(version: str) -> str:
    """10.14.1.48.post1 -> 10.14.1.48: a package that was made again holds the same library, which
    does not know of it."""
    return re.sub(r"\.post\d+$", "", version)
