"""A SentencePiece unigram model (spiece.model) as a tokenizer of the `tokenizers` library.

The file is a protocol buffer; the few fields that matter are read here by number, so that neither
sentencepiece nor protobuf has to be installed. Numbers: google/sentencepiece
src/sentencepiece_model.proto. The chain of normalizers: transformers' convert_slow_tokenizer.py.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing

from ltx_ref.checkpoint import CheckpointError

SPACE = "\u2581"
"""SentencePiece's visible space, in front of each word."""

END = "</s>"

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Types of pieces; a normal one is 1."""

UNIGRAM = 1
"""The model type; 2 is BPE, 3 words, 4 characters."""

Field = tuple[int, int | bytes]


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    charsmap: bytes
    """The normalizer's compiled table of character replacements."""
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def convert(path: Path) -> Tokenizer:
    """The tokenizer of a spiece.model, closing each text with </s> as T5 wants it.

    T5's sentinels <extra_id_N> are left out: prompts have no use for them.

    Raises:
        CheckpointError: the file is no SentencePiece model, or not of the unigram kind.
    """
    model = read_model(path)
    if model.model_type != UNIGRAM:
        raise CheckpointError(f"{path}: model type {model.model_type}, wanted 1 (unigram)")
    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    unknown = [index for index, piece in enumerate(model.pieces) if piece.kind == UNKNOWN]
    if END not in ids or len(unknown) != 1:
        raise CheckpointError(f"{path}: wanted a piece {END} and one unknown piece, as in T5")
    vocabulary = [(piece.text, piece.score) for piece in model.pieces]
    tokenizer = Tokenizer(Unigram(vocabulary, unknown[0], model.byte_fallback))
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL)
            for piece in model.pieces
            if piece.kind in (CONTROL, USER_DEFINED)
        ]
    )
    scheme = "always" if model.add_dummy_prefix else "never"
    tokenizer.normalizer = _normalizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, ids[END])]
    )
    return tokenizer


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    return normalizers.Sequence(steps)


def read_model(path: Path) -> SentencePieceModel:
    """Raises CheckpointError when the file is no SentencePiece model."""
    try:
        return _model(path.read_bytes())
    except (IndexError, ValueError, TypeError, struct.error):
        raise CheckpointError(f"{path} is not a SentencePiece model; download it again") from None


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(dict(_fields(_bytes(value)))))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("no pieces")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=int(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, False)),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
    )


def _piece(fields: dict[int, int | bytes]) -> Piece:
    score: float = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))[0]
    return Piece(_bytes(fields[1]).decode(), score, int(fields.get(3, 1)))


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number where bytes were wanted")
    return value


def _fields(data: bytes) -> Iterator[Field]:
    """Number and raw value of each field, in the file's order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("cut short")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, lowest first, and where the next field begins."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
