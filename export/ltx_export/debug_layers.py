"""ltx-export debug-layers: why an engine is not built, or which part of it gives wrong numbers.

refused_nodes.py    halves the graph until the builder takes both halves (no GPU is needed)
wrong_numbers.py    bisects ONNX Runtime against the engine, block by block (on the GPU)
"""

from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnx_ir as ir

from ltx_engines import targets
from ltx_engines.bundle import Bundle, StageEntry, open_bundle
from ltx_engines.cache_key import Profile
from ltx_engines.errors import UserError
from ltx_engines.targets import Flavour
from ltx_export import build, build_process, card, engine_profiles, engine_refusals, refused_nodes
from ltx_export.build_job import Job, Shapes
from ltx_export.engine_profiles import Buckets
from ltx_export.onnx_transformer import STAGE
from ltx_export.refused_nodes import Cuts, Refused


@dataclass(frozen=True, slots=True)
class Order:
    """Without `gpus` for the one at hand; `branches` are the rows of a batch."""

    bundle: Path
    stage: str = STAGE
    gpus: tuple[str, ...] = ()
    shape: str = "1216x704x121"
    branches: int = 1
    backend: Flavour | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What is built of a stage, and for what."""

    bundle: Bundle
    stage: str
    flavour: Flavour
    version: str
    capabilities: tuple[int, ...]
    profile: Profile

    @property
    def entry(self) -> StageEntry:
        return self.bundle.stage(self.stage)

    def job(self, graph: Path, profiles: tuple[Mapping[str, Shapes], ...] = ()) -> Job:
        return Job(
            graph=graph,
            engine=graph.with_suffix(".engine"),
            layers=graph.with_suffix(".layers.json"),
            flavour=self.flavour,
            version=self.version,
            targets=self.capabilities,
            profiles=profiles,
            types={},
            weights=weights(graph, self.bundle, self.entry),
        )


@dataclass(frozen=True, slots=True)
class Findings:
    """`numbers` is what was found of those, or why they were not looked at."""

    target: str
    refused: Refused | None
    numbers: str
    wrong: bool = False

    @property
    def passed(self) -> bool:
        return self.refused is None and not self.wrong

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def run(order: Order) -> Generator[str, None, Findings]:
    """Yields what is being done; what follows a colon is how far that is.

    Raises:
        UserError: no such bundle, stage, GPU or builder.
    """
    yield "reading"
    target = of(order)
    cards = ", ".join(f"SM{capability}" for capability in target.capabilities)
    name = f"{order.stage} by {target.flavour} {target.version} for {cards}, {order.shape}"
    with TemporaryDirectory(prefix="ltx-debug-") as scratch:
        refused = yield from _refused(target, Path(scratch))
        if refused is not None:
            return Findings(name, refused, "what is not built gives no numbers")
        if reason := no_numbers(target):
            return Findings(name, None, reason)
        from ltx_export import wrong_numbers

        found = yield from wrong_numbers.find(target, Path(scratch))
    return Findings(name, None, found.sentence(), wrong=found.culprit is not None)


def of(order: Order) -> Target:
    bundle = open_bundle(order.bundle)
    gpus = order.gpus
    if not gpus:
        if (here := card.at_hand()) is None:
            raise UserError("no NVIDIA GPU is here; say for which one, as in --gpu sm89")
        gpus = (f"sm{here.capability}",)
    cards = tuple(map(targets.find, gpus))
    flavour = engine_refusals.flavour(cards, order.backend)
    text = engine_profiles.text_tokens(bundle.manifest)
    buckets = Buckets((order.shape,), order.branches, text, passes=1)
    bundle.stage(order.stage)
    profile, *_ = engine_profiles.profiles(order.stage, bundle.manifest, buckets)
    numbers = tuple(sorted({one.capability for one in cards}))
    return Target(bundle, order.stage, flavour, build.version(flavour), numbers, profile)


def _refused(target: Target, scratch: Path) -> Generator[str, None, Refused | None]:
    proto = onnx.load(target.bundle.file(target.entry.file), load_external_data=False)
    axes = {name: sizes[1] for name, sizes in target.profile.items()}
    try:
        cuts = Cuts.of(ir.from_proto(proto), axes)
    except (AssertionError, ValueError, ir.serde.SerdeError) as error:
        file, said = target.bundle.file(target.entry.file), " ".join(str(error).split())
        raise UserError(f"{file} cannot be cut: {said}") from None

    def judge(model: ir.Model, what: str) -> Generator[str, None, str | None]:
        graph = scratch / "cut.onnx"
        onnx.save(ir.to_proto(model), graph)
        try:
            for _ in build_process.run(target.job(graph), what):
                yield f"building: {what}"
        except build_process.RefusalError as error:
            return str(error).removeprefix(f"{graph.name} was not built by ")
        return None

    return (yield from refused_nodes.find(cuts, judge))


def no_numbers(target: Target) -> str | None:
    """Why an engine that is built here cannot run here."""
    cards = ", ".join(f"SM{capability}" for capability in target.capabilities)
    if target.stage != STAGE:
        return f"numbers are looked at of the {STAGE} alone"
    if (here := card.at_hand()) is None:
        return f"numbers: not looked at, no NVIDIA GPU is here; give the same command on {cards}"
    if here.capability not in target.capabilities:
        return f"numbers: not looked at, the GPU here is SM{here.capability}, not {cards}"
    return None


def weights(graph: Path, bundle: Bundle, entry: StageEntry) -> dict[str, str]:
    """The graph's words for the files that it points into, and where the bundle has them."""
    proto = onnx.load(graph, load_external_data=False)
    words = {
        said.value
        for tensor in proto.graph.initializer
        for said in tensor.external_data
        if said.key == "location"
    }
    homes = {Path(name).name: str(bundle.file(name).resolve()) for name in entry.weights}
    return {word: homes[Path(word).name] for word in words}
