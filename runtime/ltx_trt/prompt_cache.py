"""What the text encoder makes of prompts, kept on disk: a text that was seen is not encoded again.

Where all texts were seen the encoder, which is larger than most denoisers, is never opened.

    NAME.safetensors     NAME = sha256 of what encodes (files, sizes, library) and of the tokens

A file holds no words of the prompt. It appears in one rename, so that processes may share a folder.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import time
from types import TracebackType
from typing import Self
from uuid import uuid4

import numpy as np

from ltx_engines.bundle import Bundle
from ltx_ref.checkpoint import CheckpointError, read_header
from ltx_trt.session import Array, Feeds, Opened, Session
from ltx_trt.tokens import tokenizer_entry

LIMIT = 1 << 30
"""Bytes: 256 prompts of T5-XXL at 256 tokens. Those that were not used for longest go first."""

ABANDONED = 3600
"""Seconds after which a file that is not finished belongs to a process that was killed."""

EMBEDS, SUFFIX, PARTIAL = "prompt_embeds", ".safetensors", ".partial"

TIDY_EVERY = 16
"""Texts that are kept before the folder is looked through again, for that takes longer the more
there are. It may hold so many beyond its limit."""

FORMAT = 1
"""Of the files; part of their names."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Encoder:
    """All that embeddings depend on beside the tokens, as a hash, and the `shape` of one text's,
    which is tokens and width; None is any."""

    identity: str
    shape: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, bundle: Bundle, files: Iterable[str], computed_by: Mapping[str, str]
    ) -> Self | None:
        """`files` hold graph and weights, or engines. None if one of them was never looked into, so
        that nobody could know it again."""
        tokenizer, known = tokenizer_entry(bundle), []
        for name in (*files, tokenizer.file):
            entry = bundle.manifest.files[name]
            if entry.sha256 is not None:
                known.append([entry.sha256])
            elif entry.sample is not None:
                known.append([str(entry.bytes), entry.sample, str(entry.modified_ns)])
            else:
                log.warning("texts are not kept: the manifest has no hash of %s", name)
                return None
        facts = {
            "format": FORMAT,
            "files": known,
            "length": tokenizer.max_length,
            "padding": tokenizer.pad_token_id,
            "precision": bundle.manifest.precision,
            "computed_by": dict(computed_by),
        }
        return cls(_sha256(json.dumps(facts, sort_keys=True).encode()), _shape(bundle))


class PromptCache:
    """`hits` counts texts that were found."""

    def __init__(self, folder: Path, encoder: Encoder, *, limit: int = LIMIT) -> None:
        self._folder, self._encoder, self._limit = folder, encoder, limit
        self._writes, self._kept = True, 0
        self.hits = 0

    def find(self, feeds: Feeds) -> Array | None:
        """What was made of these tokens; None if it is not there or is spoilt."""
        path = self.place(feeds)
        try:
            embeds = _read(path, self._encoder.shape)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except CheckpointError as error:
            # Its words are of a checkpoint that somebody downloaded.
            log.info("%s", error)
            _warn(path, "it is not as it was written")
            return None
        except OSError as error:
            _warn(path, _reason(error))
            return None
        with suppress(OSError):  # a folder that is only read has no order of use
            os.utime(path)
        self.hits += 1
        return embeds

    def keep(self, feeds: Feeds, embeds: Array) -> None:
        """A disk that is full or closed costs the next run its time, not this one its clip; that is
        said once."""
        if not self._writes:
            return
        path = self.place(feeds)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(path, embeds)
            if self._kept % TIDY_EVERY == 0:
                _prune(self._folder, self._limit)
            self._kept += 1
        except OSError as error:
            self._writes = False
            log.warning("texts are not kept for the next run in %s: %s", path, _reason(error))

    def place(self, feeds: Feeds) -> Path:
        parts = [self._encoder.identity]
        for name in sorted(feeds):
            parts.append(f"{name} {feeds[name].dtype} {feeds[name].shape}")
            parts.append(_sha256(np.ascontiguousarray(feeds[name]).tobytes()))
        return self._folder / f"{_sha256(' '.join(parts).encode())}{SUFFIX}"


class RememberingEncoder:
    """Implements Session: the text encoder, which is opened when a text is new."""

    def __init__(self, cache: PromptCache, open_encoder: Callable[[], Opened]) -> None:
        self._cache, self._open = cache, open_encoder
        self._held = ExitStack()
        self._session: Session | None = None

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        if (found := self._cache.find(feeds)) is not None:
            return {EMBEDS: found}
        if self._session is None:
            self._session = self._held.enter_context(self._open())
        made = self._session(feeds)
        if np.isfinite(made[EMBEDS]).all():
            self._cache.keep(feeds, made[EMBEDS])
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session = None
        self._held.__exit__(kind, error, trace)


def _shape(bundle: Bundle) -> tuple[int, int] | None:
    """Of what the text encoder makes of one text, where the manifest says it."""
    for tensor in bundle.stage("text_encoder").outputs:
        if tensor.name == EMBEDS and isinstance(width := tensor.axes[-1], int):
            return tokenizer_entry(bundle).max_length, width
    return None


def _warn(path: Path, why: str) -> None:
    log.warning("a text that was kept cannot be read, it is encoded again: %s: %s", path, why)


def _reason(error: OSError) -> str:
    """Its own text begins with its number."""
    return error.strerror or str(error)


def _read(path: Path, shape: tuple[int, int] | None) -> Array:
    """
    Raises:
        CheckpointError: it is not what was written.
        OSError: it cannot be read.
    """
    header = read_header(path)
    info = header.tensors.get(EMBEDS)
    if info is None or info.dtype != "F32" or header.metadata.get("name") != path.stem:
        raise CheckpointError(f"{path} is not of this text")
    if shape is not None and info.shape != (1, *shape):
        raise CheckpointError(f"{path} has shape {info.shape}, wanted {(1, *shape)}")
    data = path.read_bytes()[info.begin : info.end]
    if _sha256(data) != header.metadata.get("sha256"):
        raise CheckpointError(f"{path}: its bytes have changed since it was written")
    return np.frombuffer(data, "<f4").reshape(info.shape).copy()


def _write(path: Path, embeds: Array) -> None:
    data = np.ascontiguousarray(embeds, "<f4").tobytes()
    header = {
        "__metadata__": {"name": path.stem, "sha256": _sha256(data)},
        EMBEDS: {"dtype": "F32", "shape": list(embeds.shape), "data_offsets": [0, len(data)]},
    }
    text = json.dumps(header).encode()
    temporary = path.with_name(f".{path.stem}.{uuid4().hex[:8]}{PARTIAL}")
    try:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _prune(folder: Path, limit: int) -> None:
    """Others may do the same at the same time."""
    kept = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            found = path.stat()
            if path.name.endswith(PARTIAL) and found.st_mtime < time() - ABANDONED:
                path.unlink()
            elif path.suffix == SUFFIX:
                kept.append((found.st_mtime_ns, found.st_size, path))
    total = sum(size for _, size, _ in kept)
    for _, size, path in sorted(kept):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size


def _sha256(data: bytes) -> str:
    return sha256(data).hexdigest()
