"""Ray in this process: what of it a batch uses, with one actor that can be lost."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

Row = Mapping[str, Any]


@dataclass
class Cluster:
    """`loses`: after so many rows the actor is lost, with what it was about to say."""

    loses: int | None = None
    gpus: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    started: int = 0
    stopped: int = 0

    def module(self) -> ModuleType:
        ray = ModuleType("ray")
        ray.__dict__.update(init=self._init, shutdown=self._shutdown, data=self)
        ray.__dict__.update(cluster_resources=lambda: {"CPU": 2.0, "GPU": float(self.gpus)})
        return ray

    def _init(self, **options: Any) -> None:
        if options["address"] == "nowhere:1":
            raise ConnectionError("nobody\nanswers")
        self.asked.append(options)

    def _shutdown(self) -> None:
        self.stopped += 1

    class DataContext:
        enable_progress_bars = True

        @classmethod
        def get_current(cls) -> "type[Cluster.DataContext]":
            return cls

    def ActorPoolStrategy(self, **options: int) -> dict[str, int]:  # noqa: N802 - Ray's name
        return options

    def from_items(self, rows: Sequence[Row], override_num_blocks: int) -> "Dataset":
        assert override_num_blocks == len(rows)
        return Dataset(self, rows)


@dataclass
class Dataset:
    cluster: Cluster
    rows: Sequence[Row]
    start: Callable[[], Callable[[Row], Row]] | None = None

    def map(
        self,
        actor: Callable[..., Callable[[Row], Row]],
        fn_constructor_args: tuple[Any, ...],
        **options: Any,
    ) -> "Dataset":
        self.cluster.asked.append(options)
        return Dataset(self.cluster, self.rows, lambda: actor(*fn_constructor_args))

    def iter_rows(self) -> Iterator[Row]:
        assert self.start is not None
        cluster, work = self.cluster, self.start()
        cluster.started += 1
        for count, row in enumerate(self.rows, 1):
            said = work(row)
            if count == cluster.loses:
                work = self.start()
                cluster.started += 1
                said = work(row)
            yield said
