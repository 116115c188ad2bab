"""Which CPUs add products of codes wrongly, and what ONNX Runtime is told then."""

import platform
from pathlib import Path

import pytest

from ltx_engines import cpu

CASCADE = "flags\t\t: fpu sse4_1 avx2 avx512f avx512_vnni"
ALDER = "flags\t\t: fpu sse4_1 avx2 avx_vnni"
HASWELL = "flags\t\t: fpu sse4_1 avx2"


@pytest.mark.parametrize(
    ("machine", "cores", "wanted"),
    [
        ("x86_64", [CASCADE, CASCADE], False),
        ("AMD64", [ALDER], False),
        ("x86_64", [HASWELL], True),
        ("x86_64", [ALDER, HASWELL], True),
        ("x86_64", ["model name: avx_vnni"], True),
        ("aarch64", ["Features : fp asimd"], False),
    ],
)
def test_an_x86_without_vnni_on_each_core_saturates(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    cores: list[str],
    wanted: bool,
) -> None:
    (tmp_path / "cpuinfo").write_text("processor: 0\n" + "\n\n".join(cores) + "\nvmx flags: none\n")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert cpu.saturates() == wanted


def test_an_x86_that_does_not_tell_may_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    for machine, wanted in (("AMD64", True), ("arm64", False)):
        monkeypatch.setattr(platform, "machine", lambda name=machine: name)
        assert cpu.saturates() == wanted


UNFUSED, AS_THEY_LIE = {"session.disable_quant_qdq": "1"}, {"session.disable_prepacking": "1"}


@pytest.mark.parametrize("saturating", [False, True])
def test_only_int8_products_get_a_private_copy_and_nothing_quantized_is_fused(
    monkeypatch: pytest.MonkeyPatch, saturating: bool
) -> None:
    monkeypatch.setattr(cpu, "saturates", lambda: saturating)
    precise = {"session.x64quantprecision": "1"} if saturating else {}
    assert cpu.session_options(()) == AS_THEY_LIE
    assert cpu.session_options(("fp8", "int8-wo")) == UNFUSED | AS_THEY_LIE
    assert cpu.session_options({"int8": 4, "fp8": 3}) == UNFUSED | precise
