"""Stages that are models of the same server: the pipeline calls them instead of opening them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ltx_engines.bundle import Bundle, StageEntry, open_bundle
from ltx_engines.errors import UserError
from ltx_engines.triton_plans import plans
from ltx_trt.pipeline import Planned
from ltx_trt.prompt_cache import PromptCache
from ltx_trt.session import FLOATS, Array, Feeds, check_feeds
from ltx_trt.session.memory import Watch
from ltx_trt.session.sizes import outputs

Call = Callable[[str, Mapping[str, tuple[Array, str]], Mapping[str, str]], dict[str, Array]]
"""Of a model's name, its feeds with their element types, and the element types of its results."""


@dataclass(frozen=True, slots=True)
class Models:
    """The others of the same server; `ready` is asked with a model's name."""

    call: Call
    ready: Callable[[str], bool]


class CalledStages:
    """Implements Stages. The models have their weights, and say themselves what they take."""

    def __init__(self, bundle: Path, models: Models) -> None:
        self.bundle: Bundle = open_bundle(bundle)
        self._models = models
        self.watch: Watch | None = None
        self.loras: tuple[str, ...] = ()
        self.prompts: PromptCache | None = None

    def prepare(self, planned: Planned, /) -> tuple[str, ...]:
        """Each of them is asked first: the last one is called when all steps are done."""
        if away := [stage for stage in planned.stages if not self._models.ready(stage)]:
            raise UserError(
                f"the server has no {', '.join(away)} that is ready, and makes no clips without; "
                "its log says why"
            )
        return ()

    def __call__(self, stage: str) -> "CalledSession":
        entry = self.bundle.stage(stage)
        for plan in plans(self.bundle.manifest, stage).values():  # all have the same edges
            entry = entry.model_copy(update={"inputs": plan.inputs, "outputs": plan.outputs})
        return CalledSession(stage, entry, self._models.call)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class CalledSession:
    """Implements Session. What comes back is held against the table: nobody else does."""

    def __init__(self, stage: str, entry: StageEntry, call: Call) -> None:
        self._stage, self._entry, self._call = stage, entry, call

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        check_feeds(self._stage, self._entry, feeds)
        dtypes = {tensor.name: tensor.dtype for tensor in self._entry.inputs}
        typed = {name: (feed, dtypes[name]) for name, feed in feeds.items()}
        wanted = {tensor.name: tensor.dtype for tensor in self._entry.outputs}
        found = self._call(self._stage, typed, wanted)
        self._check(found, feeds)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def _check(self, found: Mapping[str, Array], feeds: Feeds) -> None:
        shapes = outputs(self._entry, {name: feed.shape for name, feed in feeds.items()})
        kinds = {t.name: "float32" if t.dtype in FLOATS else t.dtype for t in self._entry.outputs}
        wanted = {name: (shape, np.dtype(kinds[name])) for name, shape in shapes.items()}
        if (given := {name: (array.shape, array.dtype) for name, array in found.items()}) != wanted:
            raise UserError(f"model {self._stage} answers {given}, the bundle says {wanted}")
