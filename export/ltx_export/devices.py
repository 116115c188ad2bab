"""Where the reference computes: a device as the user says it, and what its sums depend on."""

import re

import torch

from ltx_engines.errors import UserError


def choose(word: str | None) -> torch.device:
    """A GPU if there is one and nothing is said.

    Raises:
        UserError: there is no such device here.
    """
    if word is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not (match := re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", word)):
        raise UserError(f"--device {word!r} is none of cpu, cuda and cuda:N; choose one of them")
    if word != "cpu":
        if not torch.cuda.is_available():
            raise UserError(f"--device {word}: torch sees no CUDA GPU here; try cpu")
        if int(match[1] or 0) >= (count := torch.cuda.device_count()):
            raise UserError(f"--device {word}: the last GPU here is cuda:{count - 1}; choose that")
    return torch.device(word)


def name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
