"""How a stage comes to the GPU: one engine, a chain of parts, or engines that take their weights
as inputs."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ltx_engines.bundle import Bundle, Manifest
from ltx_engines.engine_entry import Chain, EngineEntry
from ltx_engines.errors import UserError
from ltx_trt.session import compiled_kernels
from ltx_trt.session.chain_runner import ChainRunner, Link
from ltx_trt.session.checkpoint_weights import CheckpointWeights
from ltx_trt.session.device import Device
from ltx_trt.session.engine_api import Engine
from ltx_trt.session.engine_runner import EngineRunner
from ltx_trt.session.lora_weights import FUSE, Plan
from ltx_trt.session.needs import need
from ltx_trt.session.refit import Refit
from ltx_trt.session.residency import Need, Residency
from ltx_trt.session.runner import Runner
from ltx_trt.session.weight_inputs_runner import (
    Loading,
    WeightInputsRunner,
    needs,
    without_weights,
)
from ltx_trt.session.weight_streaming import limit


@dataclass(frozen=True, slots=True)
class Opening:
    """Where engines come from and where they go."""

    bundle: Bundle
    device: Device
    lora: Plan | None = None

    def runner(self, chain: Chain, residency: Residency) -> Runner:
        """`residency` says how much of it is on the GPU at once."""
        first = chain[0]
        if first.weights == "inputs":
            return self._of_inputs(chain, residency)
        if len(chain) == 1:
            return self._whole(first, residency)
        links = [
            Link(
                f"part {number} of {len(chain)}",
                entry.inputs,
                entry.outputs,
                partial(self._part, entry, swaps=not residency.resident),
            )
            for number, entry in enumerate(chain, 1)
        ]
        return ChainRunner(self.device.driver, links, residency.rotation())

    def step(self, chain: Chain) -> Runner:
        """The sampler's, which has hardly any weights."""
        return self._part(chain[0], swaps=False)

    def _whole(self, entry: EngineEntry, residency: Residency) -> EngineRunner:
        engine = self.engine(entry, streams=residency.allowance is not None)
        with ExitStack() as undo:
            undo.callback(engine.close)
            streamed = limit(engine, residency)
            runner = EngineRunner(engine, self.device.arena, entry, streamed=streamed > 0)
            undo.pop_all()
        return runner

    def _part(self, entry: EngineEntry, *, swaps: bool) -> EngineRunner:
        engine = self.engine(entry, swaps=swaps)
        with ExitStack() as undo:
            undo.callback(engine.close)
            runner = EngineRunner(engine, self.device.arena, entry)
            undo.pop_all()
        return runner

    def _of_inputs(self, chain: Chain, residency: Residency) -> WeightInputsRunner:
        """The weights are those of the checkpoint, which the engines do not know."""
        stage = self.bundle.stage(chain[0].key.stage)
        source = CheckpointWeights(self.bundle.file(name) for name in stage.weights)
        patch = None if self.lora is None else self.lora.patch()
        device, loading = self.device, Loading(source, residency.rotation(), patch)
        with ExitStack() as undo:
            engines = []
            for entry in chain:
                engines.append((self.engine(entry), entry))
                undo.callback(engines[-1][0].close)
            undo.pop_all()  # it closes them, also when it fails
        return WeightInputsRunner(device.driver, device.arena, engines, loading)

    def engine(self, entry: EngineEntry, *, swaps: bool = False, streams: bool = False) -> Engine:
        """Only what the manifest names is opened: `open_bundle` has seen that its bytes are those
        that were built."""
        file = self.bundle.file(entry.file)
        cache = self._cache(entry)
        engine = self.device.library.load(file, cache=cache, swaps=swaps, streams=streams)
        if not self._takes_lora(entry):
            return engine
        with ExitStack() as undo:
            undo.callback(engine.close)
            Refit(self.bundle, entry, engine).replace(self.lora)
            undo.pop_all()
        return engine

    def _takes_lora(self, entry: EngineEntry) -> bool:
        stage = None if self.lora is None else self.lora.stage
        return entry.key.stage == stage and entry.weights == "embedded"

    def check_lora(self, chain: Chain, residency: Residency) -> tuple[str, ...]:
        """What there is to say of it, before anything is loaded.

        Raises:
            UserError: weights that were set in an engine would have to be set in each step.
        """
        if self.lora is None or chain[0].key.stage != self.lora.stage or residency.resident:
            return ()
        if chain[0].weights == "inputs":
            return ("the LoRA is added again to the weights that are streamed, in each step",)
        raise UserError(
            f"a LoRA at run time wants all weights of {self.lora.stage} on the GPU at once, "
            f"here they come and go; give more --device-memory, or {FUSE}"
        )

    def _cache(self, entry: EngineEntry) -> Path | None:
        if self.device.library.flavour != "tensorrt-rtx":
            return None
        sha256 = self.bundle.manifest.files[entry.file].sha256
        if sha256 is None:
            raise AssertionError(f"{entry.file} has no hash, but its manifest was read")
        driver, version = self.device.driver, self.device.library.version
        return compiled_kernels.place(sha256, driver.name, version)


def needed(manifest: Manifest, chain: Chain, beside: Chain = ()) -> Need:
    """What a stage takes of the GPU, with `beside`, which is open at the same time."""
    if chain[0].weights != "inputs":
        return need(manifest, chain, beside)
    found = need(manifest, tuple(map(without_weights, chain)), beside)
    sizes, stay = needs(chain)
    plans = sum(manifest.files[entry.file].bytes for entry in chain)
    return replace(found, weights=sizes, buffers=found.buffers + stay + plans, streams=False)
