"""From a prompt to what the denoiser reads: a T5 encoder and its tokenizer, from a folder.

The folder is laid out as on Hugging Face: `config.json` and safetensors, whole or in shards, with
the tokenizer beside them. Nothing is downloaded and nothing pickled is opened.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tokenizers import Tokenizer

from ltx_ref.checkpoint import CheckpointError, Header, TensorInfo, difference, read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import T5Config, T5EncoderModel

T = TypeVar("T")

log = logging.getLogger(__name__)

MAX_LENGTH = 256
"""Tokens of a prompt: `text_encoder_max_tokens` of the original pipeline, which asks for this many
whatever model_max_length the tokenizer's own configuration states."""

SHARED, EMBED = "shared.weight", "encoder.embed_tokens.weight"
"""Two names of one tensor; files carry either or both."""


@dataclass(frozen=True, slots=True)
class TextConfig:
    """What of config.json shows in the encoder; the defaults are T5Config's of transformers."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    def for_transformers(self) -> T5Config:
        from transformers import T5Config

        config = T5Config(**asdict(self), is_decoder=False, use_cache=False)
        config._attn_implementation = "eager"
        return config


def read_text_config(home: Path) -> TextConfig:
    """
    Raises:
        CheckpointError: config.json is not that of a T5, or a value is not of its kind.
    """
    table = _read_config(home)
    known: dict[str, Any] = {}
    for field in fields(TextConfig):
        default: Any = field.default
        value, kind = table.get(field.name, default), type(default)
        if type(value) is not kind or (kind is not str and not value > 0):
            what = "a string" if kind is str else f"a positive {kind.__name__}"
            raise CheckpointError(f"{home}/config.json: {field.name} is {value!r}, wanted {what}")
        known[field.name] = value
    return TextConfig(**known)


@dataclass(frozen=True, slots=True)
class PromptTokenizer:
    """Text to token numbers, cut or padded to `max_length`; </s> is the last before the padding."""

    tokenizer: Tokenizer
    max_length: int
    pad_token_id: int

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token numbers and mask (1 text, 0 padding), both int64 [prompts, max_length]."""
        import torch

        encodings = self.tokenizer.encode_batch([prompt.strip() for prompt in prompts])
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if encoding.overflowing:
                log.warning("prompt cut to %d tokens: %.40s...", self.max_length, prompt.strip())
        return (
            torch.tensor([encoding.ids for encoding in encodings]),
            torch.tensor([encoding.attention_mask for encoding in encodings]),
        )


def encode(
    encoder: T5EncoderModel, tokenizer: PromptTokenizer, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Prompt embeddings [prompts, max_length, width] and mask int64 [prompts, max_length].

    T5 is given the mask: padding is invisible to the text, as in the original pipeline.
    """
    import torch

    input_ids, mask = tokenizer(prompts)
    with torch.no_grad():
        embeds: Tensor = encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
    return embeds, mask


def load_tokenizer(folder: Path, max_length: int = MAX_LENGTH) -> PromptTokenizer:
    """The tokenizer in the folder, its `tokenizer` subfolder, or a `tokenizer` folder beside it.

    Raises:
        CheckpointError: there is none, or it is not one of T5.
    """
    if max_length < 2:
        raise ValueError(f"max_length must leave room for a token and </s>, not {max_length}")
    path = _tokenizer_file(folder)
    tokenizer = _read_tokenizer(path)
    ends, pad = tokenizer.encode("").ids, tokenizer.token_to_id("<pad>")
    if ends != [tokenizer.token_to_id("</s>")] or pad is None:
        raise CheckpointError(f"{path} is not a tokenizer of T5: it lacks </s> at the end or <pad>")
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length, pad_id=pad, pad_token="<pad>")
    return PromptTokenizer(tokenizer, max_length, pad)


def _tokenizer_file(folder: Path) -> Path:
    homes = (folder, folder / "tokenizer", folder.absolute().parent / "tokenizer")
    for name in ("tokenizer.json", "spiece.model"):
        for home in homes:
            if (home / name).is_file():
                return home / name
    places = ", ".join(str(home) for home in homes)
    raise CheckpointError(f"no tokenizer.json or spiece.model in {places}; put one there")


def _read_tokenizer(path: Path) -> Tokenizer:
    if path.name == "spiece.model":
        from ltx_ref import unigram

        return unigram.convert(path)
    if not isinstance(_read_json(path).get("model"), dict):
        raise CheckpointError(f"{path} has no tokenizer model; download it again")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_text_encoder(folder: Path, dtype: torch.dtype | None = None) -> T5EncoderModel:
    """The T5 encoder in the folder or its `text_encoder` subfolder, in evaluation mode.

    Without `dtype` the weights keep the files' types and share the mapped files' memory.

    Raises:
        CheckpointError: no encoder there, or the files do not fit its config.json exactly.
    """
    import torch
    from transformers import T5Config, T5EncoderModel

    home = encoder_folder(folder)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict(_read_config(home)))
    weights = _gather(weight_headers(home))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: info.shape for name, (_, info) in weights.items()}
    _name_twice(found)
    if wrong := difference(found, wanted):
        raise CheckpointError(f"{home} does not fit its config.json: {wrong}")
    tensors = _read_tensors(weights)
    _name_twice(tensors)
    if not torch.equal(tensors[SHARED], tensors[EMBED]):
        raise CheckpointError(f"{home}: {SHARED} and {EMBED} differ, T5 has one table for both")
    model.load_state_dict(tensors, assign=True)
    model.set_input_embeddings(model.shared)  # makes one parameter of the two names again
    if dtype is not None:
        torch.nn.Module.to(model, dtype)  # transformers' own `to` has another signature
    model.eval().requires_grad_(False)
    return model


def _name_twice(table: dict[str, T]) -> None:
    """Give the embedding, where a file has it once, its second name."""
    for name, twin in ((SHARED, EMBED), (EMBED, SHARED)):
        if twin in table:
            table.setdefault(name, table[twin])


def encoder_folder(folder: Path) -> Path:
    """Where config.json is: the folder itself or its `text_encoder` subfolder."""
    for home in (folder, folder / "text_encoder"):
        if (home / "config.json").is_file():
            return home
    raise CheckpointError(f"no config.json in {folder} or its text_encoder subfolder")


def _read_config(home: Path) -> dict[str, Any]:
    config = _read_json(home / "config.json")
    if config.get("model_type") != "t5":
        raise CheckpointError(
            f"{home}/config.json: model_type is {config.get('model_type')!r}, wanted 't5'"
        )
    return config


def weight_headers(home: Path) -> tuple[Header, ...]:
    """The safetensors files of the encoder, each promised tensor in the file that should have it.

    Raises:
        CheckpointError: there are none, or index and files disagree.
    """
    index, single = home / "model.safetensors.index.json", home / "model.safetensors"
    if single.is_file():
        return (read_header(single),)
    if not index.is_file():
        if pickles := sorted(path.name for path in home.glob("*.bin")):
            raise CheckpointError(
                f"{home} has only pickled weights ({pickles[0]}), which are not opened; "
                "convert them to safetensors first"
            )
        raise CheckpointError(f"{home} has neither model.safetensors nor an index of shards")
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map")
    for shard in set(places.values()):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: {shard!r} is not the name of a file beside it")
        if not (home / shard).is_file():
            raise CheckpointError(f"{index} names {shard}, which is not there; download it again")
    headers = tuple(read_header(home / shard) for shard in sorted(set(places.values())))
    found = {name: header.path.name for header in headers for name in header.tensors}
    for name in sorted(found.keys() ^ places.keys()) or (n for n in found if found[n] != places[n]):
        raise CheckpointError(
            f"{index}: {name} should be in {places.get(name, 'no shard')}, "
            f"is in {found.get(name, 'none')}"
        )
    return headers


def _gather(headers: Sequence[Header]) -> dict[str, tuple[Path, TensorInfo]]:
    """Which file has which tensor; in two files at once is an error."""
    weights: dict[str, tuple[Path, TensorInfo]] = {}
    for header in headers:
        for name, info in header.tensors.items():
            if name in weights:
                raise CheckpointError(f"{name} is in {weights[name][0]} and in {header.path}")
            weights[name] = header.path, info
    return weights


def _read_tensors(weights: dict[str, tuple[Path, TensorInfo]]) -> dict[str, Tensor]:
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for path in {path for path, _ in weights.values()}:
        with safe_open(path, framework="pt") as file:
            tensors |= {
                name: file.get_tensor(name) for name, (at, _) in weights.items() if at == path
            }
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{path} is not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
