"""Engines that are loaded take LoRAs: by name, block by block, all of it or nothing."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

pytest.importorskip("onnxruntime")

from ltx_engines import bundle as bundles
from ltx_engines.bundle import Bundle, EngineEntry
from ltx_engines.cache_key import EngineKey, Part
from ltx_engines.errors import UserError
from ltx_ref.checkpoint import CheckpointError, read_header
from ltx_ref.lora import Wish
from ltx_ref.ltx_video.config import TRANSFORMER_PREFIX as PREFIX
from ltx_trt.session import refit
from ltx_trt.session.engine_api import EngineError
from ltx_trt.session.refit import Refit
from tests.export import loras
from tests.export.loras import Factors

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
QKV = tuple(f"{PREFIX}transformer_blocks.0.attn1.to_{x}.weight" for x in "qkv")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """The one that ships: float32."""
    return bundles.open_bundle(TINY)


@pytest.fixture(scope="module")
def factors(bundle: Bundle) -> Factors:
    found = loras.factors(read_header(bundle.file(bundle.manifest.checkpoint)).shapes())
    return {name: (a, 0.1 * b) for name, (a, b) in found.items()}


@pytest.fixture(scope="module")
def adapter(factors: Factors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loras.write(tmp_path_factory.mktemp("a") / "lora.safetensors", loras.tensors(factors))


class Engine:
    """Keeps what it is given, as the refitter of an engine does; `broken` raises at this call."""

    def __init__(self, bundle: Bundle, *, first: int = 0, end: int = 99, broken: int = -1) -> None:
        header = read_header(bundle.file(bundle.manifest.checkpoint))
        data = np.fromfile(header.path, np.uint8)
        self.before: dict[str, bytes] = {}
        for name, info in header.tensors.items():
            block = refit.BLOCK.match(name)
            inside = first == 0 if block is None else first <= int(block[1]) < end
            inside = inside and name.startswith(PREFIX)
            if inside and refit.is_linear(name.removesuffix("_scale"), info.shape or (0, 0)):
                self.before[name] = data[info.begin : info.end].tobytes()
        self.weights, self.calls, self.broken = dict(self.before), list[tuple[str, ...]](), broken

    def refittable(self) -> frozenset[str]:
        return frozenset(self.before)

    def refit(self, weights: Iterable[tuple[str, str, NDArray[Any]]]) -> None:
        given = {name: values.tobytes() for name, _, values in weights}
        self.calls.append(tuple(given))
        if len(self.calls) - 1 == self.broken:
            raise EngineError("weights are missing")
        assert {n: len(b) for n, b in given.items()} == {n: len(self.before[n]) for n in given}
        self.weights |= given


def entry(bundle: Bundle, part: Part | None = None, **changes: Any) -> EngineEntry:
    stage = bundle.stage("transformer")
    key = EngineKey(
        stage="transformer",
        graph="0" * 64,
        weights={},
        profiles=(),
        flavour="tensorrt-rtx",
        version="1",
        targets=(89,),
        part=part,
    )
    facts: dict[str, Any] = {"file": "x.engine", "layers": "x.json", "key": key}
    facts |= {"inputs": stage.inputs, "outputs": stage.outputs, "activations": 1}
    return EngineEntry(**(facts | {"refittable": True} | changes))


def refitted(bundle: Bundle, engine: Engine, part: Part | None = None) -> Refit:
    return Refit(bundle, entry(bundle, part), engine)  # type: ignore[arg-type]


def test_weights_are_set_by_name_and_only_those_that_change(
    bundle: Bundle, factors: Factors, adapter: Path
) -> None:
    engine = Engine(bundle)
    found = refitted(bundle, engine)
    found.replace(refit.plan(bundle, "transformer", [entry(bundle)], [Wish(adapter, 0.5)]))
    before = load_file(bundle.file(bundle.manifest.checkpoint))
    changed = {name for name in engine.weights if engine.weights[name] != engine.before[name]}
    assert changed == {f"{PREFIX}{module}.weight" for module in factors}
    for module, (down, up) in factors.items():
        name = f"{PREFIX}{module}.weight"
        values = np.frombuffer(engine.weights[name], np.float32).reshape(before[name].shape)
        wanted = before[name] + 0.5 * up @ down
        np.testing.assert_allclose(values, wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_each_call_has_the_layers_of_one_block_and_those_that_may_be_merged(
    bundle: Bundle, adapter: Path
) -> None:
    engine = Engine(bundle)
    found = refitted(bundle, engine)
    found.replace(refit.plan(bundle, "transformer", [], [Wish(adapter)]))
    starts = [{refit._start(name) for name in call} for call in engine.calls]
    assert all(len(start) == 1 for start in starts)
    assert len(starts) == len({min(start) for start in starts}) == 3
    (call,) = (call for call in engine.calls if QKV[0] in call)
    assert set(QKV) <= set(call)
    assert found.revision == len(engine.calls)


def test_without_a_lora_the_weights_are_the_bundles_own_again(
    bundle: Bundle, adapter: Path
) -> None:
    engine = Engine(bundle)
    found = refitted(bundle, engine)
    plan = refit.plan(bundle, "transformer", [], [Wish(adapter)])
    found.replace(plan)
    assert engine.weights != engine.before
    found.replace(None)
    assert engine.weights == engine.before


def test_another_lora_takes_the_place_of_the_first_and_is_not_added(
    bundle: Bundle, factors: Factors, adapter: Path, tmp_path: Path
) -> None:
    one = {loras.MODULES[1]: factors[loras.MODULES[1]]}
    other = loras.write(tmp_path / "b.safetensors", loras.tensors(one))
    second = refit.plan(bundle, "transformer", [], [Wish(other)])
    both, alone = Engine(bundle), Engine(bundle)
    found = refitted(bundle, both)
    found.replace(refit.plan(bundle, "transformer", [], [Wish(adapter)]))
    found.replace(second)
    refitted(bundle, alone).replace(second)
    assert both.weights == alone.weights != both.before


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_an_engine_that_refuses_has_its_old_weights_back(
    bundle: Bundle, adapter: Path, broken: int
) -> None:
    engine = Engine(bundle, broken=broken)
    found = refitted(bundle, engine)
    with pytest.raises(EngineError, match="weights are missing"):
        found.replace(refit.plan(bundle, "transformer", [], [Wish(adapter)]))
    assert engine.weights == engine.before
    assert found.revision == len(engine.calls)


def test_each_part_of_a_chain_gets_its_own_weights(bundle: Bundle, adapter: Path) -> None:
    plan = refit.plan(bundle, "transformer", [], [Wish(adapter)])
    whole = Engine(bundle)
    refitted(bundle, whole).replace(plan)
    together: dict[str, bytes] = {}
    for index, (first, end) in enumerate(((0, 1), (1, 6))):
        engine = Engine(bundle, first=first, end=end)
        part = Part(index=index, of=2, first=first, end=end)
        refitted(bundle, engine, part).replace(plan)
        assert engine.weights != engine.before
        together |= engine.weights
    assert together == whole.weights


def test_a_weight_that_the_engine_lacks_is_named_and_nothing_is_set(
    bundle: Bundle, adapter: Path
) -> None:
    engine = Engine(bundle)
    del engine.before[QKV[0]]
    with pytest.raises(UserError, match=r"x\.engine has no .*attn1\.to_q\.weight .*--refittable"):
        refitted(bundle, engine).replace(refit.plan(bundle, "transformer", [], [Wish(adapter)]))
    assert not engine.calls


def test_an_engine_of_fixed_weights_says_how_to_build_it_or_to_fuse(
    bundle: Bundle, adapter: Path
) -> None:
    fixed = entry(bundle, refittable=False)
    said = r"x\.engine takes no LoRA.*build-engine --refittable, or fuse it .* ltx-export lora"
    with pytest.raises(UserError, match=said):
        refit.plan(bundle, "transformer", [fixed], [Wish(adapter)])
    inputs = entry(bundle, refittable=False, weights="inputs")
    assert refit.plan(bundle, "transformer", [inputs], [Wish(adapter)]).changed


def test_of_an_engine_only_weights_of_linear_layers_can_be_set(
    bundle: Bundle, tmp_path: Path
) -> None:
    bias = load_file(bundle.file(bundle.manifest.checkpoint))[f"{PREFIX}{loras.ATTENTION}.bias"]
    lora = tmp_path / "a"
    save_file({f"diffusion_model.{loras.ATTENTION}.diff_b": torch.ones_like(bias)}, lora)
    with pytest.raises(UserError, match=r"to_q\.bias, and of an engine only the weights of linear"):
        refit.plan(bundle, "transformer", [entry(bundle)], [Wish(lora)])
    assert refit.plan(bundle, "transformer", [], [Wish(lora)]).changed


def test_a_lora_of_another_stage_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    lora, name = tmp_path / "a", "vae.encoder.conv_in.conv"
    shape = read_header(bundle.file(bundle.manifest.checkpoint)).shapes()[f"{name}.weight"]
    save_file({f"{name}.diff": torch.ones(shape)}, lora)
    with pytest.raises(UserError, match=r"changes vae\..*, which stage transformer does not read"):
        refit.plan(bundle, "transformer", [], [Wish(lora)])


def test_a_lora_for_another_model_is_refused_as_everywhere(bundle: Bundle, tmp_path: Path) -> None:
    factors = {loras.ATTENTION: (torch.ones(2, 4096), torch.ones(4096, 2))}
    lora = loras.write(tmp_path / "a", loras.tensors(factors))
    with pytest.raises(CheckpointError, match="looks made for LTX-Video 13B"):
        refit.plan(bundle, "transformer", [], [Wish(lora)])
