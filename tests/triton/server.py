"""The real tritonserver on loopback, as `make triton` installs it; no Docker, no GPU."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from tests.waiting import HANG

HOME = Path(__file__).resolve().parents[2] / ".triton"

DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; it outlives exec
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A process's beginning. `preexec_fn` would fork this one, whose threads may be in the middle of
gRPC."""

PORTS = range(20000, 30000)
"""Below those that the system gives to whoever asks for any, clients among them."""


def missing() -> str:
    """Why there is no server here, or an empty string."""
    return "" if (HOME / ".ready").is_file() else "no Triton server here: make triton"


class Server:
    """A process from `with` to its end. `backends` are folders of stand-ins by backend."""

    def __init__(
        self,
        repository: Path,
        *flags: str,
        backends: Mapping[str, Path] | None = None,
        seconds: float = HANG,
    ) -> None:
        self._repository, self._flags, self._seconds = repository, flags, seconds
        self._backends = backends or {}
        self._prefix = f"ltx{secrets.token_hex(4)}"

    def __enter__(self) -> Self:
        with ExitStack() as held:
            self._folder = Path(held.enter_context(TemporaryDirectory(prefix="triton-")))
            self.log = self._folder / "server.log"
            self.http, self.grpc, self.metrics = (_port(held) for _ in range(3))
            held.callback(self._stop)
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-ISc", DIE_WITH_PARENT, *self._command()],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    start_new_session=True,
                )
            self._wait()
            self._held = held.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def is_ready(self) -> bool:
        return _answers(self.url("v2/health/ready"))

    def is_live(self) -> bool:
        """Also with models that it could not load."""
        return _answers(self.url("v2/health/live"))

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http}/{path}"

    def told(self) -> str:
        """All of /metrics."""
        return self.read(self._metrics)

    def figures(self) -> dict[str, float]:
        """Of /metrics, ours: series with labels -> value."""
        lines = self.told().splitlines()
        rows = (line.rpartition(" ") for line in lines if line.startswith("ltx_"))
        return {series: float(value) for series, _, value in rows}

    def read(self, page: str | urllib.request.Request) -> str:
        """What it answers, also when it refuses. The log of one that does not is in the error."""
        try:
            with urllib.request.urlopen(page, timeout=HANG) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError as error:
            ended = self.process.poll()
            state = "lives" if ended is None else f"ended with {ended}"
            raise RuntimeError(f"{error}; tritonserver {state}\n{self._end()}") from error

    @property
    def _metrics(self) -> str:
        return f"http://127.0.0.1:{self.metrics}/metrics"

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def leftovers(self) -> list[str]:
        """Shared memory of this server, by its prefix."""
        return sorted(path.name for path in Path("/dev/shm").glob(f"{self._prefix}*"))

    def stubs(self) -> list[int]:
        """The processes of its Python models."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid and int(entry.name) != self.process.pid:
                    found.append(int(entry.name))
        return sorted(found)

    def _command(self) -> list[str]:
        server = HOME / "dist/pytriton/tritonserver"
        backends = self._folder / "backends"
        backends.mkdir()
        (backends / "python").symlink_to((server / "backends/python").resolve())
        for name, folder in self._backends.items():
            (backends / name).symlink_to(folder.resolve())
        return [
            str(server / "bin/tritonserver"),
            f"--model-repository={self._repository}",
            f"--backend-directory={backends}",
            f"--cache-directory={server / 'caches'}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
            f"--http-port={self.http}",
            f"--grpc-port={self.grpc}",
            f"--metrics-port={self.metrics}",
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=5",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            "--disable-auto-complete-config",
            *self._flags,
        ]

    def _wait(self) -> None:
        """Bounded: a server that cannot load a model may wait for it for ever. The metrics' port is
        the last one that it opens, some time after it has said that it is ready."""
        deadline = time.monotonic() + self._seconds
        while not (self._has_begun() and _answers(self._metrics)):
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"tritonserver ended with {self.process.returncode}\n{self._end()}"
                )
            if time.monotonic() > deadline:
                raise TimeoutError(f"not ready in {self._seconds} s\n{self._end()}")
            time.sleep(0.02)

    def _has_begun(self) -> bool:
        return self.is_ready()

    def _end(self) -> str:
        return "\n".join(self.said().splitlines()[-40:])

    def _stop(self) -> None:
        if not hasattr(self, "process"):
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        with suppress(ProcessLookupError):  # the stubs are in its session
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for name in self.leftovers():
            Path("/dev/shm", name).unlink(missing_ok=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=HANG) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _port(held: ExitStack) -> int:
    """Free, and no other test's before `held` ends, in this process or another."""
    for port in PORTS:
        with ExitStack() as mark, suppress(OSError):
            # no file: gone with its process, however that ends
            mark.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0ltx-tests-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
            held.push(mark.pop_all())
            return port
    raise OSError(f"no port of {PORTS.start} to {PORTS.stop - 1} is free here")


def _environment() -> dict[str, str]:
    """The stub's interpreter is the first python3 of PATH; its libpython must be found."""
    libraries = (sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH"))
    return {
        **os.environ,
        "PATH": f"{HOME / 'stubenv/bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(library for library in libraries if library),
    }
