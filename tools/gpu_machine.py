"""What a machine has of what engines need: the card, the driver, and which packages import.

Each package is imported in a process of its own: one that crashes, or that loads another's
libraries first, says nothing of the others.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from shutil import which
from typing import Any

MODULES = {
    "tensorrt": "tensorrt.__version__",
    "tensorrt_rtx": "tensorrt_rtx.__version__",
    "cuda.bindings": "cuda.bindings.__version__",
    "onnxruntime": "[onnxruntime.__version__, *onnxruntime.get_available_providers()]",
    "torch": "[torch.__version__, torch.version.cuda, torch.cuda.is_available()]",
    "diffusers": "diffusers.__version__",
    "polygraphy": "polygraphy.__version__",
    "onnx": "onnx.__version__",
}
"""Package -> what of it is worth knowing."""

QUERY = ("name", "driver_version", "memory.total", "memory.free", "power.limit", "clocks.max.sm")
PATIENCE = 120
"""Seconds for an import from a slow disk."""


def look() -> dict[str, Any]:
    """Everything, as JSON has it."""
    packages = {name: package(name, what) for name, what in MODULES.items()}
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "card": card(),
        "nvidia_smi": smi(),
        "packages": packages,
    }


def card() -> dict[str, Any] | None:
    """The first visible GPU, by the driver's own library."""
    from ltx_export import card

    found = card.at_hand()
    if found is None:
        return None
    return {"name": found.name, "capability": found.capability, "free": found.free}


def smi() -> dict[str, str] | str:
    """The vendor's own words, or why there are none."""
    if which("nvidia-smi") is None:
        return "there is no nvidia-smi"
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        return f"nvidia-smi ended with {done.returncode}: {last(done.stderr + done.stdout)}"
    words = done.stdout.splitlines()[0].split(", ")
    return dict(zip(QUERY, words, strict=False))


def package(name: str, what: str) -> dict[str, Any]:
    """`imports` with what is worth knowing, or why not."""
    try:
        there = find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        there = False
    if not there:
        return {"imports": False, "why": "it is not installed"}
    code = f"import json, {name}; print(json.dumps({what}))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return {"imports": False, "why": f"it took more than {PATIENCE} s"}
    if done.returncode:
        said = last(done.stderr) or f"it ended with {done.returncode}"
        return {"imports": False, "why": said}
    return {"imports": True, "found": json.loads(done.stdout.splitlines()[-1])}


def last(text: str) -> str:
    """The line that says what went wrong."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:400]


def imports(machine: Mapping[str, Any], name: str) -> bool:
    return bool(machine["packages"][name]["imports"])


def flavour(machine: Mapping[str, Any]) -> str | None:
    """The builder for this card that imports: TensorRT-RTX where it knows the card."""
    from ltx_engines.targets import RTX_CAPABILITIES

    if machine["card"] is None:
        return None
    if machine["card"]["capability"] in RTX_CAPABILITIES and imports(machine, "tensorrt_rtx"):
        return "tensorrt-rtx"
    return "tensorrt" if imports(machine, "tensorrt") else None
