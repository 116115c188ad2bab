"""A device is said as torch says it, and is one that is here."""

import pytest
import torch

from ltx_engines.errors import UserError
from ltx_export import devices


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_chosen_by_number() -> None:
    assert devices.choose(None) == devices.choose("cuda") == torch.device("cuda")
    assert devices.choose("cuda:1") == torch.device("cuda", 1)
    assert devices.choose("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:2: the last GPU here is cuda:1"):
        devices.choose("cuda:2")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("word", ["meta", "", "CPU", "cuda:", "cuda:-1", "cpu:0", "mps", "cuda:1 "])
def test_anything_else_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="is none of cpu, cuda and cuda:N"):
        devices.choose(word)


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.choose(None) == torch.device("cpu")
    with pytest.raises(UserError, match="torch sees no CUDA GPU here; try cpu"):
        devices.choose("cuda:0")


def test_the_cpus_threads_are_in_its_name() -> None:
    assert devices.name(torch.device("cpu")) == f"cpu, {torch.get_num_threads()} threads"
