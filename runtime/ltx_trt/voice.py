"""What a command says of its work while it works: on stderr, and none of it twice."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Voice:
    """Notes go to stderr, each of them once however many clips it is true of."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._said: set[str] = set()

    def say(self, *notes: str) -> None:
        for note in notes:
            if note not in self._said:
                self._said.add(note)
                self.console.print(
                    f"ltx-trt: {note}", markup=False, highlight=False, soft_wrap=True
                )

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
