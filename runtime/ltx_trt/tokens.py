"""A prompt as token numbers, padded and cut to the length that the bundle was made for."""

from collections.abc import Callable
from dataclasses import dataclass

from ltx_engines.bundle import Bundle, TokenizerEntry
from ltx_engines.errors import UserError


@dataclass(frozen=True, slots=True)
class Tokens:
    """`found` is how many the prompt has; beyond the bundle's length they are cut off."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]
    found: int

    def notes(self, name: str) -> tuple[str, ...]:
        length = len(self.ids)
        if self.found <= length:
            return ()
        return (f"the {name} has {self.found} tokens, the last {self.found - length} are cut off",)


def tokenizer_entry(bundle: Bundle) -> TokenizerEntry:
    """
    Raises:
        UserError: the bundle was made without a text encoder.
    """
    if (entry := bundle.manifest.tokenizer) is None:
        raise UserError(
            f"{bundle.path} has no text encoder; export it with one: "
            "ltx-export onnx ... --text-encoder FOLDER"
        )
    return entry


def load_tokenizer(bundle: Bundle) -> Callable[[str], Tokens]:
    from tokenizers import Tokenizer

    entry = tokenizer_entry(bundle)
    file = bundle.file(entry.file)
    try:
        tokenizer = Tokenizer.from_buffer(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not a tokenizer.json: {error}") from None
    tokenizer.no_padding()

    def tokenize(text: str) -> Tokens:
        """With the special tokens, which survive the cut."""
        tokenizer.no_truncation()
        found = len(tokenizer.encode(text.strip()).ids)
        tokenizer.enable_truncation(entry.max_length)
        ids = tokenizer.encode(text.strip()).ids
        missing = entry.max_length - len(ids)
        return Tokens(
            ids=(*ids, *[entry.pad_token_id] * missing),
            mask=(*[1] * len(ids), *[0] * missing),
            found=found,
        )

    return tokenize
