"""Several processes that make clips. One that is killed costs its job a new beginning, no more.

A worker that loses this process ends at once; its locks go with it.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Self

from ltx_engines.errors import UserError
from ltx_trt.batch.maker import ENDS_ALL, MOST_TRIES, Alone, Maker, Order, Outcome, Task, failed
from ltx_trt.job import Voice

GRACE = 10.0
"""Seconds in which a worker that is told to end does so; one step of a large model on the CPU
cannot be interrupted."""

MOST_STARTS = 3
"""Workers that may end one after the other before they are ready."""

READY = "ready"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Team:
    """`gpus`: the first worker sees the first of them alone, and so on around."""

    count: int
    gpus: tuple[str, ...] = ()

    def gpu(self, number: int) -> str | None:
        return self.gpus[number % len(self.gpus)] if self.gpus else None


@dataclass(slots=True, eq=False)
class _Worker:
    """Not frozen: what it is at changes."""

    process: SpawnProcess
    line: Connection
    number: int
    ready: bool = False
    task: Task | None = None
    group: str = ""

    @property
    def idle(self) -> bool:
        return self.ready and self.task is None


class Workers:
    """Implements Crew."""

    def __init__(self, order: Order, team: Team, voice: Voice) -> None:
        self._order, self._team, self._voice = order, team, voice
        self._workers: list[_Worker] = []
        self._unready = 0
        self._deaths: Counter[str] = Counter()

    def __enter__(self) -> Self:
        with Alone(self._order, self._voice):  # finds out whether it can be done
            pass
        return self

    def make(self, tasks: Sequence[Task], /) -> Iterator[Outcome]:
        queue = deque(tasks)
        while queue or any(worker.task for worker in self._workers):
            for number in range(min(self._team.count, len(queue))):
                if number not in {worker.number for worker in self._workers}:
                    self._workers.append(self._start(number))
            for worker in self._workers:
                if queue and worker.idle:
                    self._give(worker, queue)
            heard = wait([worker.line for worker in self._workers if not worker.idle])
            for worker in [worker for worker in self._workers if worker.line in heard]:
                outcome = self._hear(worker, queue)
                if outcome is not None:
                    yield outcome

    def _start(self, number: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        given = (theirs, replace(self._order, opened=True), self._team.gpu(number))
        process = context.Process(target=work, args=given, daemon=True)
        with _without_interrupts():
            process.start()
        theirs.close()  # or its end would not be heard here
        return _Worker(process, ours, number)

    def _give(self, worker: _Worker, queue: deque[Task]) -> None:
        """Of its own group, or of one that nobody else is at, or any."""
        others = {other.group for other in self._workers if other is not worker}
        task = next((t for t in queue if t.group == worker.group), None)
        task = task or next((t for t in queue if t.group not in others), None) or queue[0]
        queue.remove(task)
        worker.task, worker.group = task, task.group
        try:
            worker.line.send(task)
        except OSError:  # it has ended; `_hear` will find out
            log.debug("worker %d did not take a job", worker.number)

    def _hear(self, worker: _Worker, queue: deque[Task]) -> Outcome | None:
        try:
            message = worker.line.recv()
        except (EOFError, OSError):
            return self._bury(worker, queue)
        self._unready = 0
        if message == READY:
            worker.ready = True
            return None
        if not isinstance(message, Outcome):
            raise AssertionError(f"a worker said {message!r}")
        worker.task = None
        return message

    def _bury(self, worker: _Worker, queue: deque[Task]) -> Outcome | None:
        """Its job is the next one. Whoever begins it counts how often that was so; here they are
        counted too, for it may not come as far as that."""
        worker.line.close()
        worker.process.join()
        self._workers.remove(worker)
        code = worker.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if not worker.ready:
            self._unready += 1
            if self._unready >= MOST_STARTS:
                raise UserError(f"a worker {how} before it was ready; try --workers 1")
        if (task := worker.task) is None:
            return None
        self._deaths[task.job.name] += 1
        if self._deaths[task.job.name] > MOST_TRIES:
            return failed(task, f"{ENDS_ALL}; the last {how}")
        queue.appendleft(task)
        self._voice.say(f"worker {worker.number} {how}; {task.job.name} begins anew")
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            if error is not None:
                worker.process.terminate()
            worker.line.close()
        for worker in self._workers:
            worker.process.join(GRACE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []


def work(line: Connection, order: Order, gpu: str | None) -> None:
    """A worker's life."""
    logging.basicConfig(format="ltx-trt: %(message)s", stream=sys.stderr)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before anything has looked for GPUs
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows, where nothing was blocked
        signal.signal(signal.SIGTERM, _interrupt)
        with Maker(order) as maker:
            line.send(READY)
            while True:
                line.send(maker.one(line.recv()))
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return  # told to end, or there is nothing more to do


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started here never sees Ctrl-C, not even while it is starting: its parent
    does, and tells it to end."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # it is started with the first process, and would unblock
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
