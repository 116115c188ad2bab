"""The same jobs on a Ray cluster: Ray Data hands them to actors, each of which is a Maker.

Its machines must see the bundle and the folder of the results under the same paths. An actor that
is killed is started again by Ray, and the job begins anew.
"""

import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ltx_engines.errors import UserError
from ltx_trt.backend import Providers
from ltx_trt.batch.maker import Maker, Order, Outcome, Task
from ltx_trt.voice import Voice

LOCAL = "local"
"""In place of an address: a cluster of this machine alone, which ends with the command."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nobody was asked
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # lost actors are no errors here
    "RAY_DATA_LOG_LEVEL": "ERROR",
}
"""Unless the environment says otherwise."""

Row = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Cluster:
    """`count`: of actors. `on_gpu`: each has a GPU to itself, else `threads` cores."""

    address: str
    count: int
    on_gpu: bool
    threads: int = 1


class RayCrew:
    """Implements Crew."""

    def __init__(self, order: Order, cluster: Cluster, voice: Voice) -> None:
        self._order, self._cluster, self._voice = _settled(order, cluster), cluster, voice
        self._chosen = order.choice.provider is not None

    def __enter__(self) -> Self:
        if find_spec("ray") is None:
            raise UserError("--ray wants Ray, which is not installed; pip install 'ltx-trt[ray]'")
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        import ray

        address = self._cluster.address
        try:
            ray.init(
                address=address,
                include_dashboard=None if address != LOCAL else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"--ray {address}: there is no such cluster ({said}); start it with `ray start "
                "--head`, or leave the address out"
            ) from error
        try:
            self._say_of_gpus(int(ray.cluster_resources().get("GPU", 0)))
        except BaseException:
            ray.shutdown()
            raise
        return self

    def _say_of_gpus(self, count: int) -> None:
        """
        Raises:
            UserError: this machine has none, and nothing else will.
        """
        cluster = self._cluster
        if count and not (cluster.on_gpu or self._chosen):
            self._voice.say(
                f"ONNX Runtime is on the CPU of each machine, the cluster's GPUs "
                f"({count}) are not used; --provider cuda gives one to each worker"
            )
        if count or not cluster.on_gpu:
            return
        if cluster.address == LOCAL:
            raise UserError(
                "--ray: Ray finds no GPU on this machine, and each worker wants one; use "
                "--backend onnxruntime --provider cpu, or the address of a cluster that has"
            )
        self._voice.say("the cluster has no GPU now; jobs wait until it has one for each worker")

    def make(self, tasks: Sequence[Task], /) -> Iterator[Outcome]:
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"task": pickle.dumps(task)} for task in tasks]
        cluster = self._cluster
        # A block for each job: an actor that is lost costs the one that it was at.
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Actor,
            fn_constructor_args=(pickle.dumps(self._order), str(Path.cwd())),
            compute=ray.data.ActorPoolStrategy(size=cluster.count, max_tasks_in_flight_per_actor=1),
            num_cpus=0 if cluster.on_gpu else cluster.threads,
            num_gpus=1 if cluster.on_gpu else 0,
        )
        for row in made.iter_rows():
            outcome = pickle.loads(row["outcome"])
            if not isinstance(outcome, Outcome):
                raise AssertionError(f"an actor said {outcome!r}")
            yield outcome

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import ray

        ray.shutdown()


def _settled(order: Order, cluster: Cluster) -> Order:
    """Without a wish each actor would take what it finds: CUDA where ONNX Runtime has it. Machines
    differ, and Ray has set no GPU aside."""
    if cluster.on_gpu:
        return order
    return replace(order, choice=replace(order.choice, provider=Providers.cpu))


class Actor:
    """Lives in a process of Ray's. `home` is the folder that relative paths begin at."""

    def __init__(self, given: bytes, home: str) -> None:
        if not Path(home).is_dir():
            raise UserError(f"{home} is not there on this machine; use a folder that all share")
        os.chdir(home)
        self._maker = Maker(pickle.loads(given))

    def __call__(self, row: Row) -> dict[str, Any]:
        return {"outcome": pickle.dumps(self._maker.one(pickle.loads(row["task"])))}
