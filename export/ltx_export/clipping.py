"""Where to clip the weights of a row: ModelOpt's search for the smallest squared error."""

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ltx_engines.errors import UserError
from ltx_ref import codes
from ltx_ref.codes import Rows, Vector
from ltx_ref.quantization import Format

if TYPE_CHECKING:
    import torch

LEAST, STEP = 0.25, 0.05
"""Clips that are tried: from this share of the row's largest weight to the whole of it. ModelOpt
goes on to four times that, where fewer codes are left for the same weights."""


def check_packages() -> None:
    """
    Raises:
        UserError: ModelOpt, or the torch that it works with, is missing.
    """
    if missing := [name for name in ("torch", "modelopt") if find_spec(name) is None]:
        raise UserError(
            f"the algorithm mse needs {', '.join(missing)}; pip install 'ltx-trt[quantize]'"
        )


def best(rows: Rows, form: Format) -> Vector:
    """The clip of each row with which its codes are nearest to it.

    Raises:
        UserError: ModelOpt is missing.
    """
    check_packages()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions of packages that are not used here
        import torch
        from modelopt.torch.quantization.calib import MseCalibrator

    def coded(x: "torch.Tensor", amax: "torch.Tensor") -> "torch.Tensor":
        made = codes.encode(x.numpy(), form, amax.numpy().reshape(-1))
        return torch.from_numpy(codes.decode(made, form))

    weights = torch.from_numpy(rows)
    search = MseCalibrator(
        weights.abs().amax(dim=1, keepdim=True),
        axis=0,
        step_size=STEP,
        start_multiplier=LEAST,
        stop_multiplier=1.0,
        quant_func=coded,
    )
    search.collect(weights)
    found: Vector = search.compute_amax().numpy().reshape(-1)
    return found
