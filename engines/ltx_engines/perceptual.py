"""LPIPS where the package `lpips` and the weights of its network are already there; else why not.

Nothing is downloaded. The package reads its weights with torch's restricted loader.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ltx_engines.metrics import Frames

NETWORK = "alex"
"""The package's default, and its authors' advice for measuring."""

PACKAGES = ("lpips", "torchvision")


@dataclass(frozen=True, slots=True)
class Lpips:
    """`distance` is None where `words` say why."""

    words: str
    distance: Callable[[Frames, Frames], float] | None = None


def find() -> Lpips:
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        return Lpips(f"not measured: {' and '.join(missing)} not installed")
    try:
        file = _weights()
    except (ImportError, RuntimeError) as error:  # the second: a torchvision of another torch
        return Lpips(f"not measured: torchvision cannot be imported ({error})")
    if not file.is_file():
        return Lpips(f"not measured: {file.name} is not in {file.parent}")
    from importlib.metadata import version

    return Lpips(f"lpips {version('lpips')}, {NETWORK}", _distance(_model()))


def _weights() -> Path:
    """Where torchvision keeps the network that LPIPS looks through."""
    import torch

    weights = import_module("torchvision.models").AlexNet_Weights.DEFAULT
    return Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)


def _model() -> Any:
    import warnings

    with warnings.catch_warnings():  # it calls torchvision by parameters that are deprecated
        warnings.simplefilter("ignore")
        return import_module("lpips").LPIPS(net=NETWORK, verbose=False).eval()


def _distance(model: Any) -> Callable[[Frames, Frames], float]:
    """The mean over frames; the network wants [1, 3, H, W] in -1..1."""
    import torch

    def tensor(frame: Frames) -> torch.Tensor:
        return torch.from_numpy(frame.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]

    def distance(clip: Frames, reference: Frames) -> float:
        with torch.inference_mode():
            pairs = zip(clip, reference, strict=True)
            return float(np.mean([float(model(tensor(x), tensor(y))) for x, y in pairs]))

    return distance
