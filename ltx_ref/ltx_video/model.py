"""A whole LTX-Video checkpoint as one module, whose parameters are named as in the file."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from ltx_ref.checkpoint import load_weights, read_header
from ltx_ref.ltx_video.config import UNUSED, ModelConfig, read_config
from ltx_ref.ltx_video.transformer import Transformer
from ltx_ref.ltx_video.vae import VideoVAE


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


def load(path: Path, ignore_config_keys: Collection[str] = ()) -> LTXVideo:
    """The model with the file's weights, in the file's element types, ready for inference.

    Raises:
        CheckpointError: the file is no LTX-Video checkpoint or does not fit its configuration.
    """
    header = read_header(path)
    with torch.device("meta"):
        model = LTXVideo(read_config(header, ignore_config_keys))
    load_weights(model, header, UNUSED)
    return model.eval().requires_grad_(False)
