"""Which provider of ONNX Runtime a session asks for, and what is said when it is not there."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from ltx_engines.bundle import Bundle
from ltx_engines.cache_key import Profile
from ltx_engines.errors import UserError
from ltx_engines.manifest import OnnxRuntimeEntry
from ltx_engines.providers import NAMES, Provider
from ltx_trt.session import onnxruntime_session as module
from ltx_trt.session.execution_provider import Asked
from ltx_trt.session.onnxruntime_session import OnnxRuntimeSession
from tests.runtime.test_onnxruntime_session import feeds, quantized


class FakeRuntime:
    """What is asked of the package when a provider is chosen."""

    __version__ = "1.31.1"

    def __init__(self, *built_in: str, gpus: int = 0) -> None:
        self.built_in, self.gpus = [*built_in, module.CPU], gpus
        self.registered: list[tuple[str, str]] = []

    def get_available_providers(self) -> list[str]:
        return self.built_in

    def get_ep_devices(self) -> list[Any]:
        found = self.gpus if self.registered else 0
        names = [module.CPU, *found * [NAMES["tensorrt-rtx"]]]
        return [SimpleNamespace(ep_name=name) for name in names]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.registered.append((name, path))


def asked(bundle: Bundle, ort: FakeRuntime, provider: Provider | None) -> Asked:
    return module._asked(ort, bundle, "transformer", provider)


def test_cuda_comes_first_where_it_exists(bundle: Bundle) -> None:
    assert asked(bundle, FakeRuntime("Azure", module.CUDA), None).name == module.CUDA
    assert asked(bundle, FakeRuntime(), None).name == module.CPU
    chosen = asked(bundle, FakeRuntime(module.CUDA), "cpu")
    assert chosen.arguments() == {"providers": [(module.CPU, {})]}


@pytest.mark.parametrize(
    ("provider", "words"),
    [
        ("cuda", r"no CUDAExecutionProvider, only .*CPU.*ltx-trt\[onnxruntime-gpu\]"),
        ("tensorrt-rtx", r"no NvTensorRTRTX.*pip install onnxruntime-ep-nv-tensorrt-rtx$"),
    ],
)
def test_a_provider_that_is_not_installed_is_named_with_its_package(
    bundle: Bundle, provider: Provider, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        OnnxRuntimeSession.open(bundle, "transformer", provider=provider)


def test_a_provider_that_was_chosen_and_cannot_start_is_refused() -> None:
    module._check_chosen("transformer", module.CUDA, module.CUDA)
    with pytest.raises(UserError, match=r"transformer: CUDA.* could not start.*--provider cpu"):
        module._check_chosen("transformer", module.CUDA, module.CPU)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(get_library_path=lambda: "/plugin.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", fake)


def profiled(bundle: Bundle, *tokens: int) -> Bundle:
    """As if it was made for clips of so many tokens."""
    rows: list[Profile] = [
        {"batch": (1, 3, 3), "tokens": (n, n, n), "timesteps": (1, 1, 1), "text": (7, 7, 7)}
        for n in tokens
    ]
    entry = OnnxRuntimeEntry(providers=("tensorrt-rtx",), profiles=tuple(rows))
    found = bundle.manifest.model_copy(update={"onnxruntime": {"transformer": entry}})
    return Bundle(bundle.path, found)


def test_the_plugin_is_registered_once_and_told_the_bundles_profiles(
    bundle: Bundle, plugin: None
) -> None:
    ort = FakeRuntime(gpus=2)
    for _ in range(2):
        chosen = asked(profiled(bundle, 5), ort, "tensorrt-rtx")
    assert ort.registered == [(NAMES["tensorrt-rtx"], "/plugin.so")]
    assert chosen.arguments() == {}
    given: list[tuple[Any, ...]] = []
    chosen.give(SimpleNamespace(add_provider_for_devices=lambda *told: given.append(told)))
    ((devices, options),) = given
    assert len(devices) == 1
    assert options["nv_profile_min_shapes"].startswith("latents:1x5x4,coords:1x3x5,")
    assert options["nv_profile_max_shapes"].startswith("latents:3x5x4,coords:3x3x5,")
    assert options["nv_runtime_cache_path"].endswith("onnxruntime-rtx")
    assert "nv_multi_profile_enable" not in options


def test_each_run_says_which_of_several_profiles_it_takes(bundle: Bundle) -> None:
    chosen = asked(profiled(bundle, 5, 9), FakeRuntime(NAMES["tensorrt-rtx"]), "tensorrt-rtx")
    assert chosen.options["nv_multi_profile_enable"] == "1"
    assert "latents:1x5x4," in chosen.options["nv_profile_min_shapes"]
    assert "latents:1x9x4," in chosen.options["nv_profile_min_shapes"]
    shapes = {name: feed.shape for name, feed in feeds().items()}
    assert chosen.run_entries(shapes) == {"nv_profile_index": "0"}
    nine = shapes | {"latents": (2, 9, 4), "coords": (2, 3, 9)}
    assert chosen.run_entries(nine) == {"nv_profile_index": "1"}
    with pytest.raises(UserError, match=r"no profile of the bundle takes.*--shape"):
        chosen.run_entries(shapes | {"latents": (2, 6, 4), "coords": (2, 3, 6)})
    assert module._run_options({"nv_profile_index": "1"}) is not None


def test_a_plugin_without_a_gpu_says_so(bundle: Bundle, plugin: None) -> None:
    with pytest.raises(UserError, match=r"finds no GPU.*--provider cuda or cpu"):
        asked(bundle, FakeRuntime(), "tensorrt-rtx")


def test_a_graph_that_a_provider_lacks_kernels_for_is_refused(bundle: Bundle) -> None:
    entry = quantized(bundle.stage("transformer"), int8=4)
    stages = bundle.manifest.stages | {"transformer": entry}
    changed = Bundle(bundle.path, bundle.manifest.model_copy(update={"stages": stages}))
    with pytest.raises(UserError, match="is int8, whose products ONNX Runtime has not for CUDA"):
        asked(changed, FakeRuntime(module.CUDA), "cuda")
