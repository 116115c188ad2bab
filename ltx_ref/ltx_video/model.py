"""A whole LTX-Video checkpoint as one module, whose parameters are named as in the file."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from ltx_ref.checkpoint import CheckpointError, Header, difference, load_weights, read_header
from ltx_ref.ltx_video.config import UNUSED, ModelConfig, read_config
from ltx_ref.ltx_video.transformer import Transformer
from ltx_ref.ltx_video.vae import VideoVAE
from ltx_ref.quantization import Layer, layers
from ltx_ref.quantized import Cast, cast_weight, install, linears
from ltx_ref.tensor_file import TensorFile, put

FLOATS = ("F32", "BF16", "F16", "F64")


class DiffusionModel(nn.Module):
    """Only a name: the transformer's keys begin with `model.diffusion_model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.diffusion_model = Transformer(config.transformer)


class LTXVideo(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DiffusionModel(config)
        self.vae = VideoVAE(config.vae)

    @property
    def transformer(self) -> Transformer:
        return self.model.diffusion_model


def load(
    path: Path,
    ignore_config_keys: Collection[str] = (),
    *,
    device: torch.device | str = "cpu",
    cast: Cast | None = None,
) -> LTXVideo:
    """The model with the file's weights, in the file's element types, ready for inference. A
    quantized file's layers compute with its codes.

    On a CPU the weights share the mapped file's memory. `cast` makes a float file's layers those of
    a quantized one while they are read, some rows at a time: no float matrix is ever whole.

    Raises:
        CheckpointError: the file is no LTX-Video checkpoint or does not fit its configuration; or
            there is nothing to cast.
    """
    header = read_header(path)
    model = skeleton(header, ignore_config_keys)
    if cast is not None:
        _load_cast(model, header, torch.device(device), cast)
    elif torch.device(device).type == "cpu":
        load_weights(model, header, UNUSED)
    else:
        check_fit(model, header)
        with TensorFile(header) as file:
            for name in model.state_dict():
                put(model, name, file.read(name, device))
    return model.eval().requires_grad_(False)


def skeleton(header: Header, ignore_config_keys: Collection[str] = ()) -> LTXVideo:
    """The file's model on the meta device: all but its weights.

    Raises:
        CheckpointError: the file is no LTX-Video checkpoint.
    """
    with torch.device("meta"):
        model = LTXVideo(read_config(header, ignore_config_keys))
    quantized = layers(header)
    install(model, quantized)
    _check_types(model, header, quantized)
    return model.eval().requires_grad_(False)


def _load_cast(model: LTXVideo, header: Header, device: torch.device, cast: Cast) -> None:
    if quantized := layers(header):
        first = next(iter(quantized))
        raise CheckpointError(
            f"{header.path} is quantized already ({first} is {quantized[first].format}); "
            "load it without a cast"
        )
    check_fit(model, header)
    chosen = [path for path, _ in linears(model)]
    install(model, {path: Layer(path, cast, header.tensors[f"{path}.weight"]) for path in chosen})
    weights = {f"{path}.weight" for path in chosen}
    with TensorFile(header) as file:
        for name, empty in model.state_dict().items():
            if name in weights:
                codes = torch.empty_like(empty, device=device)
                begin = 0
                for rows in file.rows(name, device):
                    codes[begin : begin + len(rows)] = cast_weight(rows, cast, name)
                    begin += len(rows)
                put(model, name, codes)
            else:
                put(model, name, file.read(name, device))


def check_fit(model: LTXVideo, header: Header) -> None:
    """
    Raises:
        CheckpointError: names or shapes of the file's tensors are not the model's.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wrong := difference(header.shapes(), wanted, UNUSED):
        raise CheckpointError(f"{header.path} does not fit the model: {wrong}")


def _check_types(model: LTXVideo, header: Header, quantized: Mapping[str, Layer]) -> None:
    """Codes that belong to no layer would be taken for numbers."""
    known = {f"{path}.weight" for path in quantized}
    known |= {name for layer in quantized.values() for name, _ in layer.parts()}
    for name in model.state_dict().keys() - known:
        info = header.tensors.get(name)
        if info is not None and info.dtype not in FLOATS:
            raise CheckpointError(
                f"{header.path}: {name} is {info.dtype}, wanted one of {', '.join(FLOATS)}; only "
                "matrices of linear layers can be quantized"
            )
