"""What all commands have in common: the packages that they need, and progress that people see."""

import time
from collections.abc import Iterator
from importlib.util import find_spec

from ltx_engines.errors import UserError

PACKAGES = ("ml_dtypes", "onnx", "onnx_ir")
"""Of the extra [export]."""


def check_packages(command: str) -> None:
    """The base install is the runtime; what exports comes with an extra."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"ltx-export {command} needs {', '.join(missing)}; pip install 'ltx-trt[export]'"
        )


def follow(steps: Iterator[str]) -> float:
    """Show each step while it runs and its seconds when it is done; returns the sum.

    What follows a colon is how far the step is.
    """
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    begin = start = time.perf_counter()
    step = ""
    with console.status("starting") as status:
        for shown in steps:
            following = shown.partition(": ")[0]
            if step and following != step:
                console.print(f"{step}: {time.perf_counter() - start:.1f} s")
            if following != step:
                step, start = following, time.perf_counter()
            status.update(shown)
        if step:
            console.print(f"{step}: {time.perf_counter() - start:.1f} s")
    return time.perf_counter() - begin
