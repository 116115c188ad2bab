"""What a command says of its work while it works: on stderr, and none of it twice."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

NAMED = 5
"""Clips at most, where a note is of many."""


class Voice:
    """Notes go to stderr, each of them once however many clips it is true of."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._said: set[str] = set()
        self._others: dict[str, list[str]] = {}

    def say(self, *notes: str) -> None:
        for note in notes:
            if note not in self._said:
                self._said.add(note)
                self.console.print(
                    f"ltx-trt: {note}", markup=False, highlight=False, soft_wrap=True
                )

    def say_of(self, name: str, *notes: str) -> None:
        """What is true of one clip of many, and was not said of all."""
        for note in notes:
            if (others := self._others.get(note)) is not None:
                others.append(name)
            elif note not in self._said:
                self._others[note] = []
                self.say(f"{name}: {note}")

    def say_of_others(self) -> None:
        """For what else it was true, note by note."""
        for note, names in self._others.items():
            if names:
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                self.say(f"the same of {', '.join(names[:NAMED])}{more}: {note}")
        self._others = {}

    def progress(self) -> Progress:
        """A bar, where somebody sees it; it goes when it is done."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
