"""The commands that make a model smaller and prove that it is still the same model."""

from collections.abc import Callable

COMMANDS: tuple[Callable[..., None], ...] = ()
"""In the order of the help."""
