"""What a user can mend: one line, naming the thing, what was found and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Someone outside the program can mend it. Commands print it as one line and exit with 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence: `; did you mean 'x'?`, or nothing when no known word is near."""
    return "".join(f"; did you mean {match!r}?" for match in get_close_matches(word, known, n=1))
