"""The files a bundle is made from, read and found good before anything is written.

Headers are read, never weights, and torch is not needed.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from ltx_engines.bundle import Precision, StgMode
from ltx_engines.errors import UserError
from ltx_engines.stages import STREAM
from ltx_export import convert, derive, foreign
from ltx_export.graphs import Graphs, Model
from ltx_export.weight_cache import Derivation
from ltx_export.weights import PLAIN, Weight, weights_of
from ltx_ref import quantization, text
from ltx_ref.checkpoint import Header, difference, read_header
from ltx_ref.lora import Adapter
from ltx_ref.ltx_video.config import (
    TRANSFORMER_PREFIX,
    UNUSED,
    VAE_PREFIX,
    ModelConfig,
    read_config,
)
from ltx_ref.ltx_video.upsampler_config import (
    UpsamplerConfig,
    check_latent_channels,
    read_upsampler_config,
)
from ltx_ref.text import TextConfig

PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)
"""Element types of safetensors in which a stage can run."""

STATISTICS = f"{VAE_PREFIX}per_channel_statistics."
PREFIXES = MappingProxyType(
    {
        "transformer": TRANSFORMER_PREFIX,
        "vae_encoder": f"{VAE_PREFIX}encoder.",
        "vae_decoder": f"{VAE_PREFIX}decoder.",
        STREAM: f"{VAE_PREFIX}decoder.",
    }
)
"""How the names of a stage's own weights begin in the checkpoint."""

UPSAMPLER_TENSOR = "initial_conv.weight"
"""Only an upscaler's file has it: its names have no prefix."""

TEXT_FOLDER = "text_encoder"
TOKENIZER = f"{TEXT_FOLDER}/tokenizer.json"


@dataclass(frozen=True, slots=True)
class TextFiles:
    """A text encoder's folder."""

    home: Path
    headers: tuple[Header, ...]
    config: TextConfig


@dataclass(frozen=True, slots=True)
class UpsamplerFile:
    header: Header
    config: UpsamplerConfig


@dataclass(frozen=True, slots=True)
class Derived:
    """What is made of the files: another element type, fused LoRAs, and of that only what is
    `read` by a stage."""

    precision: Precision | None
    adapters: Sequence[Adapter]
    read: frozenset[str]


@dataclass(frozen=True, slots=True)
class Sources:
    checkpoint: Header
    config: ModelConfig
    text: TextFiles | None = None
    upsampler: UpsamplerFile | None = None
    derivations: Mapping[Path, Derivation] = field(default_factory=dict)
    """By the path of a file that is still to be made: what it is made from."""
    in_place: bool = False
    """Files that are there already stay where they are."""

    def model(self, stg_mode: StgMode = "attention_values") -> Model:
        return Model(
            self.config,
            self.text.config if self.text else TextConfig(),
            stg_mode,
            self.upsampler.config if self.upsampler else None,
        )

    def derived(self, wanted: "Derived") -> "Sources":
        """As if all files already had their float tensors in this type, and the LoRAs.

        Raises:
            UserError: a file cannot be converted, or a LoRA cannot be fused into it.
        """
        made: dict[Path, Derivation] = {}

        def planned(header: Header, fused: Sequence[Adapter] = ()) -> Header:
            target = derive.planned(header, wanted.precision, fused, wanted.read | {text.EMBED})
            if target is not header:
                made[target.path] = Derivation(header, target, tuple(fused))
            return target

        checkpoint = planned(self.checkpoint, wanted.adapters)
        words = self.text and replace(self.text, headers=tuple(map(planned, self.text.headers)))
        upsampler = self.upsampler and replace(
            self.upsampler, header=planned(self.upsampler.header)
        )
        return replace(
            self, checkpoint=checkpoint, text=words, upsampler=upsampler, derivations=made
        )

    def staying(self) -> "Sources":
        """As if the files that are there stayed where they are."""
        return replace(self, in_place=True)

    def headers(self, stage: str) -> tuple[Header, ...]:
        """The files that have the stage's weights.

        Raises:
            UserError: none were given.
        """
        if stage == "text_encoder":
            if self.text is None:
                raise UserError(
                    "the stage text_encoder needs --text-encoder FOLDER; give it, or choose other "
                    "stages with --stages"
                )
            return self.text.headers
        if stage == "latent_upsampler":
            if self.upsampler is None:
                raise UserError("the stage latent_upsampler needs --upsampler FILE")
            return self.upsampler.header, self.checkpoint
        return (self.checkpoint,)

    def key(self, header: Header) -> str:
        """Under which the manifest will know the file."""
        if self.in_place and header.path not in self.derivations:
            return os.path.realpath(header.path)
        inside = self.text is not None and header in self.text.headers
        return f"{TEXT_FOLDER}/{header.path.name}" if inside else header.path.name

    def weights(self, stage: str) -> dict[str, Weight]:
        """The tensors of the stage's files, by name, where they will lie."""
        found: dict[str, Weight] = {}
        for header in reversed(self.headers(stage)):
            found |= weights_of(header, self.key(header))
        if stage == "text_encoder" and text.EMBED in found:
            found.setdefault(text.SHARED, found[text.EMBED])
        return found


def read(
    checkpoint: Path,
    text_encoder: Path | None = None,
    upsampler: Path | None = None,
    ignore: Collection[str] = (),
) -> Sources:
    """
    Raises:
        UserError, CheckpointError: a file is damaged, or they are of different models.
    """
    header = _checkpoint(checkpoint)
    config = read_config(header, ignore)
    words = None if text_encoder is None else _text(text_encoder, config)
    if upsampler is None:
        return Sources(header, config, words)
    found = read_header(upsampler)
    table = read_upsampler_config(found, ignore)
    check_latent_channels(table, config.vae.latent_channels)
    return Sources(header, config, words, UpsamplerFile(found, table))


def _checkpoint(path: Path) -> Header:
    if path.name.endswith(".index.json"):
        raise UserError(
            f"{path} is an index of shards; LTX-Video's checkpoints are one file, take the original"
        )
    foreign.check_gguf(path)
    header = read_header(path)
    if UPSAMPLER_TENSOR in header.tensors:
        raise UserError(f"{path} is a latent upscaler; give it with --upsampler")
    return header


def check_fit(found: Sources, stages: Collection[str], graphs: Graphs) -> None:
    """Every weight that the stages want is there, in its shape, and nothing else.

    Raises:
        UserError: the first file that does not fit.
    """
    for stage in stages:
        found.headers(stage)
    if own := [stage for stage in stages if stage in PREFIXES]:
        _check_checkpoint(found.checkpoint, own, graphs)
    if "text_encoder" in stages and found.text is not None:
        words = {name: w.info.shape for name, w in found.weights("text_encoder").items()}
        _compare(found.text.home, words, graphs.weights("text_encoder"), {text.EMBED})
    if "latent_upsampler" in stages and found.upsampler is not None:
        header = found.upsampler.header
        statistics = {n: s for n, s in found.checkpoint.shapes().items() if _is_statistic(n)}
        wanted = graphs.weights("latent_upsampler")
        _compare(header.path, header.shapes() | statistics, wanted, UNUSED)


def _is_statistic(name: str) -> bool:
    return name.startswith(STATISTICS)


def _check_checkpoint(header: Header, stages: Sequence[str], graphs: Graphs) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for stage in stages:
        if not any(name.startswith(PREFIXES[stage]) for name in header.tensors):
            raise UserError(
                f"{header.path} has no {stage}: none of its {len(header.tensors):,} tensors begins "
                f"with {PREFIXES[stage]}; choose other stages with --stages"
            )
        wanted |= graphs.weights(stage)
    ours = {PREFIXES[stage] for stage in stages}
    others = tuple(prefix for prefix in PREFIXES.values() if prefix not in ours)
    convert.check_read(header, "cannot be exported")
    found = quantization.shapes(header)
    shapes = {name: s for name, s in found.items() if not name.startswith(others)}
    statistics = {name for name in shapes if _is_statistic(name)}
    _compare(header.path, shapes, wanted, {*UNUSED, *statistics})


def _compare(
    path: Path,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str],
) -> None:
    if wrong := difference(found, wanted, ignored):
        raise UserError(f"{path} does not fit its configuration: {wrong}")


def tokenizer(files: TextFiles, max_length: int) -> text.PromptTokenizer:
    """
    Raises:
        UserError, CheckpointError: there is none, or it is not the encoder's.
    """
    found = text.load_tokenizer(files.home, max_length)
    words = found.tokenizer.get_vocab_size()
    if words > files.config.vocab_size:
        raise UserError(
            f"{files.home}: the tokenizer has {words} words, the encoder "
            f"{files.config.vocab_size}; take both from one model"
        )
    return found


def precision(found: Sources, stage: str, names: Iterable[str]) -> Precision:
    """The one element type of these weights; quantized ones become it in the graph.

    Raises:
        UserError: there are several, or it is one in which nothing can be computed.
    """
    weights = found.weights(stage)
    coded: set[str] = set()
    for header in found.headers(stage):
        convert.check_read(header, "cannot be exported")
        coded |= {f"{path}.weight" for path in quantization.layers(header)}
    by_type: dict[str, list[str]] = {}
    for name in names:
        by_type.setdefault(weights[name].info.dtype, []).append(name)
    floats = {d: [name for name in by_type[d] if name not in coded] for d in by_type}
    counts = Counter({d: len(floats[d]) for d in by_type if floats[d] and d not in PLAIN})
    if not counts:
        raise UserError(
            f"the weights of the {stage} are {', '.join(by_type)}, wanted "
            f"{', '.join(PRECISIONS)}; convert them with --precision"
        )
    (most, _), *fewer = counts.most_common()
    if fewer:
        odd = floats[fewer[-1][0]][0]
        listed = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
        raise UserError(
            f"the weights of the {stage} are of several element types ({listed}; {odd} is "
            f"{fewer[-1][0]}); make them one with --precision"
        )
    if most not in PRECISIONS:
        raise UserError(
            f"the weights of the {stage} are {most}, wanted {', '.join(PRECISIONS)}; "
            "make them one of these with --precision"
        )
    return PRECISIONS[most]


def _text(folder: Path, config: ModelConfig) -> TextFiles:
    home = text.encoder_folder(folder)
    headers = text.weight_headers(home)
    found = text.read_text_config(home)
    wanted = config.transformer.caption_channels
    if found.d_model != wanted:
        raise UserError(
            f"{home} has width {found.d_model}, the checkpoint reads text of width {wanted}; "
            "use the text encoder that the checkpoint was trained with"
        )
    return TextFiles(home, headers, found)
