"""How a command ends: what the user can mend is one line on stderr and exit code 2."""

import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from ltx_engines.errors import UserError

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130
"""As a shell reports a process that Ctrl-C ended. SIGTERM ends a command in the same way: it
cleans up first."""


def invoke(
    app: "typer.Typer",
    name: str,
    arguments: Sequence[str] | None,
    *,
    mendable: tuple[type[Exception], ...] = (),
) -> int:
    """Run the command line and return its exit code: 0, 2 for what the user can mend, 130.

    `mendable` errors are treated as UserError is. Everything else is a bug and keeps its traceback.
    """
    import typer

    # click's UsageError; typer has carried a click of its own since 0.2x, and does not export it.
    usage_error = cast(Any, typer.BadParameter.__mro__[1])
    errors: tuple[type[Exception], ...] = (UserError, OSError, *mendable)
    logging.basicConfig(format=f"{name}: %(message)s", stream=sys.stderr)
    before = _on_termination(_interrupt)
    try:
        code = app(arguments, prog_name=name, standalone_mode=False) or 0
    except MemoryError as error:
        return _complain(name, f"out of memory; ask for less at once ({error})", 2)
    except errors as error:
        return _complain(name, said(error), 2)
    except usage_error as error:
        return _complain(name, _misused(error, name), 2)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    finally:
        _on_termination(before)
    if code == INTERRUPTED:
        return _complain(name, "interrupted; nothing is half-written", INTERRUPTED)
    return int(code)


Handler = Callable[[int, FrameType | None], Any] | int | None


def _on_termination(handler: Handler) -> Handler:
    """What SIGTERM does from now on; returns what it did. Only a main thread may say."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def said(error: Exception) -> str:
    """An OSError's own text begins with its number."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _misused(error: Any, name: str) -> str:
    """With the help of the command that was meant. Of a word that a type of ours refused, click
    quotes the exception's kind as well."""
    said = error.format_message().replace("Value error, ", "")
    return f"{said} ({name if error.ctx is None else error.ctx.command_path} --help)"


def _complain(name: str, message: str, code: int) -> int:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return code
