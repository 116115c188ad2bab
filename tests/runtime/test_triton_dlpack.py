"""bfloat16 through DLPack, there and back, and back to whoever lent it."""

import gc

import numpy as np
import pytest

from ltx_trt.triton import dlpack


def test_what_is_lent_is_what_is_read() -> None:
    words = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    read = dlpack.words(dlpack.Lender(words).__dlpack__())
    np.testing.assert_array_equal(read, words)
    assert read.base is None or not np.shares_memory(read, words)


def test_a_view_is_lent_as_it_looks() -> None:
    words = np.arange(24, dtype=np.uint16).reshape(4, 6)[:, ::2].T
    np.testing.assert_array_equal(dlpack.words(dlpack.Lender(words).__dlpack__()), words)


def test_torch_reads_it_as_bfloat16_and_gives_it_back() -> None:
    torch = pytest.importorskip("torch")
    words = np.array([[0x3F80, 0xC000], [0x0000, 0x7F80]], np.uint16)  # 1, -2, 0, infinity
    before = len(dlpack._lent)
    tensor = torch.from_dlpack(dlpack.Lender(words))
    assert tensor.dtype == torch.bfloat16
    assert tensor.tolist() == [[1.0, -2.0], [0.0, float("inf")]]
    assert len(dlpack._lent) == before + 1
    del tensor
    gc.collect()
    assert len(dlpack._lent) == before


def test_what_torch_lends_is_read() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    words = dlpack.words(torch.utils.dlpack.to_dlpack(tensor))
    np.testing.assert_array_equal(words, tensor.view(torch.int16).numpy().view(np.uint16))


def test_other_types_and_gaps_between_values_are_refused() -> None:
    torch = pytest.importorskip("torch")
    lend = torch.utils.dlpack.to_dlpack
    with pytest.raises(ValueError, match="is not bfloat16"):
        dlpack.words(lend(torch.zeros(2)))
    with pytest.raises(ValueError, match="are not dense"):
        dlpack.words(lend(torch.zeros(4, 4, dtype=torch.bfloat16)[:, ::2]))
