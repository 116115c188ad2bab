"""The files a bundle is made from, read and found good before anything is traced or written."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from ltx_engines.bundle import Precision
from ltx_engines.errors import UserError
from ltx_engines.stages import NoiseInput, Sizes
from ltx_export import convert
from ltx_export.weights import Weight, weights_of
from ltx_ref import text
from ltx_ref.checkpoint import Header, difference, read_header
from ltx_ref.ltx_video.config import ModelConfig, read_config
from ltx_ref.ltx_video.model import UNUSED, LTXVideo
from ltx_ref.ltx_video.vae import NoiseBlock, noise_blocks

if TYPE_CHECKING:
    from transformers import T5Config

PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)
"""Element types of safetensors in which a stage can run."""

TEXT_FOLDER = "text_encoder"
TOKENIZER = f"{TEXT_FOLDER}/tokenizer.json"


@dataclass(frozen=True, slots=True)
class Sources:
    checkpoint: Header
    config: ModelConfig
    text_home: Path
    text_headers: tuple[Header, ...]
    text_config: "T5Config"
    origins: Mapping[Path, Header] = field(default_factory=dict)
    """By the path of a file that is still to be converted: the one it is converted from."""

    def origin(self, header: Header) -> Header:
        """The file that is there, for one that will be in the bundle."""
        return self.origins.get(header.path, header)

    def converted(self, precision: Precision) -> "Sources":
        """As if all files already had their float tensors in this type.

        Raises:
            UserError: a file cannot be converted.
        """
        before = (self.checkpoint, *self.text_headers)
        after = tuple(convert.planned(header, precision) for header in before)
        changed = {new.path: old for old, new in zip(before, after, strict=True) if new is not old}
        return replace(self, checkpoint=after[0], text_headers=after[1:], origins=changed)

    def weights(self, stage: str) -> dict[str, Weight]:
        """The tensors of the stage's files, by name, where they will lie in the bundle."""
        if stage != "text_encoder":
            return weights_of(self.checkpoint, self.checkpoint.path.name)
        found: dict[str, Weight] = {}
        for header in self.text_headers:
            found |= weights_of(header, f"{TEXT_FOLDER}/{header.path.name}")
        return found

    def noise_blocks(self) -> tuple[NoiseBlock, ...]:
        return noise_blocks(self.config.vae)

    def sizes(self) -> Sizes:
        transformer, vae = self.config.transformer, self.config.vae
        return Sizes(
            transformer.in_channels,
            transformer.out_channels,
            transformer.caption_channels,
            transformer.num_layers,
            vae.latent_channels,
            vae.timestep_conditioning,
            tuple(NoiseInput(block.block, block.maps) for block in self.noise_blocks()),
        )


def read(checkpoint: Path, text_encoder: Path, ignore: Collection[str]) -> Sources:
    """
    Raises:
        UserError, CheckpointError: a file is damaged, or they do not fit each other.
    """
    header = read_header(checkpoint)
    config = read_config(header, ignore)
    with torch.device("meta"):
        wanted = LTXVideo(config).state_dict()
    _check_fit(checkpoint, header.shapes(), wanted, UNUSED)
    home = text.encoder_folder(text_encoder)
    headers = text.weight_headers(home)
    text_config = _text_config(home, headers, config.transformer.caption_channels)
    return Sources(header, config, home, headers, text_config)


def tokenizer(folder: Path, config: "T5Config", max_length: int) -> text.PromptTokenizer:
    """
    Raises:
        UserError, CheckpointError: there is none, or it is not the encoder's.
    """
    found = text.load_tokenizer(folder, max_length)
    words = found.tokenizer.get_vocab_size()
    if words > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {words} words, the encoder {config.vocab_size}; "
            "take both from one model"
        )
    return found


def precision(names: Iterable[str], weights: Mapping[str, Weight], stage: str) -> Precision:
    """The one element type of these weights.

    Raises:
        UserError: there are several, or it is one in which nothing can be computed.
    """
    by_type: dict[str, list[str]] = {}
    for name in names:
        if name in weights:
            by_type.setdefault(weights[name].info.dtype, []).append(name)
    counts = Counter({dtype: len(members) for dtype, members in by_type.items()})
    (most, _), *fewer = counts.most_common()
    if fewer:
        odd = by_type[fewer[-1][0]][0]
        listed = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
        raise UserError(
            f"the weights of the {stage} are of several element types ({listed}; {odd} is "
            f"{fewer[-1][0]}); make them one with --precision"
        )
    if most not in PRECISIONS:
        raise UserError(
            f"the weights of the {stage} are {most}, wanted {', '.join(PRECISIONS)}; "
            "quantized checkpoints cannot be exported yet, take the float one"
        )
    return PRECISIONS[most]


def _text_config(home: Path, headers: tuple[Header, ...], caption_channels: int) -> "T5Config":
    from transformers import T5Config, T5EncoderModel

    try:
        table = json.loads((home / "config.json").read_bytes())
        config = T5Config.from_dict(table)
    except (ValueError, TypeError) as error:
        raise UserError(f"{home}/config.json: {' '.join(str(error).split())}") from None
    if table.get("model_type") != "t5":
        raise UserError(
            f"{home}/config.json: model_type is {table.get('model_type')!r}, wanted 't5'"
        )
    if config.d_model != caption_channels:
        raise UserError(
            f"{home} has width {config.d_model}, the checkpoint reads text of width "
            f"{caption_channels}; use the text encoder that the checkpoint was trained with"
        )
    config.is_decoder = config.use_cache = False
    config._attn_implementation = "eager"
    shapes = {name: shape for header in headers for name, shape in header.shapes().items()}
    for name, twin in ((text.SHARED, text.EMBED), (text.EMBED, text.SHARED)):
        if twin in shapes:
            shapes.setdefault(name, shapes[twin])
    with torch.device("meta"):
        wanted = T5EncoderModel(config).state_dict()
    _check_fit(home, shapes, wanted, ())
    return config


def _check_fit(
    where: Path,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, torch.Tensor],
    ignored: Iterable[str],
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if wrong := difference(found, shapes, ignored):
        raise UserError(f"{where} does not fit its configuration: {wrong}")
