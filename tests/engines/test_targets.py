"""The table of GPUs against the laws of its architectures, and names as people write them."""

import subprocess
import sys

import pytest

from ltx_engines.errors import UserError
from ltx_engines.targets import ADA, AMPERE, BLACKWELL, PRECISIONS, TARGETS, Target, find

GEFORCE = (AMPERE, ADA, BLACKWELL)
EVERY_CARD = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)


@EVERY_CARD
def test_every_card_is_found_however_its_name_is_spelled(target: Target) -> None:
    for spelled in (
        target.name,
        target.name.lower().replace(" ", ""),
        target.name.upper().replace(" ", "-"),
        f"NVIDIA GeForce {target.name}",
        target.name.removeprefix("RTX "),
        target.name.removesuffix("GB"),
    ):
        assert find(spelled) is target


def test_a_beginning_that_only_one_name_has_is_enough() -> None:
    assert find("rtx pro 6000").name == "RTX PRO 6000 Blackwell"
    assert find("RTX 6000").name == "RTX 6000 Ada"
    assert find("rtx4060").name == "RTX 4060"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("A100", "several: A100 40GB, A100 80GB; name one"),
        ("4060 ti", "several: RTX 4060 Ti 8GB, RTX 4060 Ti 16GB"),
        ("rtx 4099", "unknown GPU 'rtx 4099'; did you mean 'RTX 4090'?"),
        ("teapot", "unknown GPU 'teapot'; known are RTX 2080 Ti, "),
        ("", "unknown GPU ''; known are"),
        ("sm70", "no GPU of compute capability sm70 is known; known are sm75, sm80, sm86, sm89"),
    ],
)
def test_a_name_that_is_not_one_card_costs_one_line(name: str, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        find(name)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_capability_stands_for_the_card_that_all_others_surpass() -> None:
    assert find("sm89").name == find("SM_89").name == "RTX 4060"
    for capability in {t.capability for t in TARGETS}:
        least = find(f"sm{capability}")
        assert least.capability == capability
        for card in TARGETS:
            if card.capability == capability:
                assert card.memory >= least.memory


@EVERY_CARD
def test_rates_follow_from_the_cards_architecture(target: Target) -> None:
    """With float32 accumulation a GeForce from Ampere on does two fp16 FLOP for one of fp32; what
    halves the bits doubles the rate."""
    if target.architecture in GEFORCE:
        assert target.fp16 == pytest.approx(2 * target.fp32, rel=0.01)
    legal = [p for p in PRECISIONS if target.refusal(p) is None]
    assert all(target.rate(p) > 0 for p in legal)
    if "bf16" in legal:
        assert target.rate("bf16") == target.rate("int4") == target.fp16
    if "fp8" in legal:
        assert target.rate("fp8") == 2 * target.fp16
    if "nvfp4" in legal:
        assert target.rate("nvfp4") >= 2 * target.rate("fp8")


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("rtx 3090", "int8", 284),  # the vendor's own dense figures, from the papers named there
        ("rtx 4090", "fp8", 330.3),
        ("rtx 4090", "int8", 660.6),
        ("rtx 5090", "nvfp4", 1676),
        ("rtx 5090", "fp8", 419),
        ("rtx pro 6000", "nvfp4", 2015.2),
        ("l40s", "fp8", 733),
        ("l4", "int8", 242.5),
        ("a100 80gb", "int8", 624),
        ("h100 sxm", "fp8", 1978.9),
        ("b200", "nvfp4", 9000),
    ],
)
def test_rates_are_the_vendors(name: str, precision: str, teraflops: float) -> None:
    rate = find(name).rate(precision)  # type: ignore[arg-type]
    assert rate == pytest.approx(teraflops * 1e12, rel=0.015)


def test_turing_computes_elementwise_kernels_in_fp32_though_no_products() -> None:
    card = find("rtx 2080 ti")
    assert card.refusal("fp32") == (
        "fp32 needs SM80 or newer, RTX 2080 Ti is SM75 (Turing); use fp16, int8"
    )
    assert card.rate("fp32") == card.fp32


def test_fp8_on_ampere_is_refused_with_what_can_be_done() -> None:
    card = find("rtx 3090")
    reason = card.refusal("fp8")
    assert reason == (
        "fp8 needs SM89 or newer, RTX 3090 is SM86 (Ampere); use fp32, fp16, bf16, int8, int4"
    )
    with pytest.raises(ValueError, match="fp8 needs SM89"):
        card.rate("fp8")


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("rtx 2080 ti", {"fp32", "bf16", "fp8", "int4", "nvfp4"}),
        ("a100 40gb", {"fp8", "nvfp4"}),
        ("rtx 3060", {"fp8", "nvfp4"}),
        ("rtx 4090", {"nvfp4"}),
        ("h200", {"nvfp4"}),
        ("rtx 5090", set()),
        ("b200", set()),
    ],
)
def test_what_is_legal_depends_on_the_capability(name: str, refused: set[str]) -> None:
    assert {p for p in PRECISIONS if find(name).refusal(p)} == refused


def test_tensorrt_rtx_knows_no_hopper_and_no_b200() -> None:
    without = {t.name for t in TARGETS if "tensorrt-rtx" not in t.flavours}
    assert without == {"H100 SXM", "H100 PCIe", "H200", "B200"}
    assert all("tensorrt" in t.flavours for t in TARGETS)


@EVERY_CARD
def test_every_row_names_its_source_and_holds_sane_numbers(target: Target) -> None:
    assert len(target.source) > 10
    assert 8 * 2**30 <= target.memory < 200 * 2**30
    assert 200e9 < target.bandwidth < 10e12
    assert 10e12 < target.fp32 < target.fp16


def test_the_table_needs_neither_torch_nor_onnx() -> None:
    code = "import sys, ltx_engines.targets; print({'torch', 'onnx', 'onnx_ir'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
