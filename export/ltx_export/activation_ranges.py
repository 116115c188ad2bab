"""ModelOpt as what watches a model's activations: the largest value of each input of each layer."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

from torch import Tensor, nn

from ltx_engines.errors import UserError
from ltx_export.calibration import Ranges
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX
from ltx_ref.ltx_video.model import LTXVideo
from ltx_ref.quantized import linears


class NotFiniteError(Exception):
    """Numbers that are not finite: the message says which."""


@contextmanager
def watched(model: LTXVideo) -> Iterator[Callable[[], Ranges]]:
    """Within it, the inputs of all linear layers of the blocks are watched by ModelOpt; what it
    gives says the largest so far. The model's layers remain ModelOpt's afterwards.

    Raises, when it is asked:
        UserError: a layer has seen nothing.
    """
    layers = dict(linears(model))
    quantization, calibrating = _modelopt()
    with redirect_stdout(StringIO()):  # "Inserted 840 quantizers"
        quantization.quantize(model.transformer, _watch_list(layers))
    calibrating.enable_stats_collection(model.transformer)
    with ExitStack() as stack:
        for path, layer in layers.items():
            handle = layer.register_forward_pre_hook(partial(_check_finite, path))
            stack.callback(handle.remove)
        yield partial(_maxima, layers)


def _watch_list(paths: Iterable[str]) -> dict[str, Any]:
    """ModelOpt's configuration: nothing but these layers' inputs, in float meanwhile; the last
    entry that matches a quantizer counts."""
    inputs = [
        {
            "quantizer_name": f"{path.removeprefix(TRANSFORMER_PREFIX)}.input_quantizer",
            "cfg": {"num_bits": 8, "axis": -1},
            "enable": True,
        }
        for path in paths
    ]
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *inputs], "algorithm": None}


def _maxima(layers: Mapping[str, nn.Module]) -> Ranges:
    found = {}
    for path, layer in layers.items():
        quantizer: Any = layer.input_quantizer
        amax = quantizer._calibrator.compute_amax()
        if amax is None:
            raise UserError(f"{path} has not been reached by any run, so that it has no range")
        found[path] = amax.flatten().float().cpu().numpy()
    return found


def _check_finite(path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if not inputs[0].isfinite().all():
        raise NotFiniteError(f"NaN or infinity in the input of {path}, from something before it")


def _modelopt() -> tuple[Any, Any]:
    """It takes seconds, and warns about whatever else is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch import quantization
        from modelopt.torch.quantization import model_calib
    return quantization, model_calib
