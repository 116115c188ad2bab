"""What a platform team gets beside the models: README, image, compose file, Kubernetes manifest.

Numbers are derived from the bundle and from the settings of its models.
"""

import os
import secrets
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Literal

from ltx_engines.manifest import Manifest
from ltx_engines.triton_settings import Settings
from ltx_export import __version__
from ltx_export.triton import images, inventory

GIB = 2**30

PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}

ROOM = 4 * GIB
"""Of host memory, beside weights and shared memory: interpreter, server, libraries, one clip."""

NAME = "ltx-triton"

WHEELS = "ltx_trt-*.whl"
"""What the image installs; whoever builds it puts one beside the Dockerfile."""

CLOSED = ("model-repository", "logging", "trace", "shared-memory")
"""Triton's calls about itself. Its index of models says why one did not load, with paths and lines
of the source; logging and trace write files where a client wishes; none of our clients calls one.
"""

ADMIN = "ltx-admin"
"""The header whose word opens them."""

EXAMPLE = Path(__file__).with_name("example_client.py")


@dataclass(frozen=True, slots=True)
class Facts:
    """Of a repository: what of its bundle decides how it is run. `bundle` is its place in the
    repository, None if it is mounted from elsewhere; `word` is the operator's, see ADMIN."""

    layout: Literal["single", "stages"]
    manifest: Manifest
    models: tuple[str, ...]
    bundle: str | None
    settings: Settings = field(default_factory=Settings)
    word: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass(frozen=True, slots=True)
class Service:
    """What all files say, so that they say the same. Sizes in bytes."""

    facts: Facts
    image: images.Choice
    gpu: bool
    extra: str
    pins: tuple[str, ...]
    shared_memory: int
    memory: int
    elsewhere: tuple[str, ...]

    @property
    def built(self) -> str:
        return f"{NAME}:{__version__}"

    @property
    def command(self) -> list[str]:
        """Addresses are of the container; what is published of it is said elsewhere."""
        closed = f"{','.join(CLOSED)}:{ADMIN}={self.facts.word}"
        return [
            "tritonserver",
            "--model-repository=/models",
            "--model-control-mode=none",
            f"--http-restricted-api={closed}",
            f"--grpc-restricted-protocol={closed}",
            "--disable-auto-complete-config",
            "--exit-on-error=false",
            "--strict-readiness=true",
            "--exit-timeout-secs=120",
            *([] if self.gpu else ["--model-config-name=cpu"]),
        ]


def write(folder: Path, facts: Facts) -> None:
    """Into a repository whose models are complete."""
    service = plan(folder, facts)
    for name, text in documents(service).items():
        (folder / name).write_text(text, encoding="utf-8")


def plan(folder: Path, facts: Facts) -> Service:
    manifest = facts.manifest
    plans = inventory.one_version(inventory.plan_versions(folder, manifest))
    built = sorted({engine.key.version for engine in manifest.engines})
    shared = _shared_memory(facts)
    extra = _extra(manifest)
    return Service(
        facts=facts,
        image=images.choose(plans),
        gpu=extra != "onnxruntime",
        extra=extra,
        pins=_pins(extra, built),
        shared_memory=shared,
        memory=_gibibytes(sum(file.bytes for file in manifest.files.values()) + shared + ROOM),
        elsewhere=tuple(
            sorted({str(Path(name).parent) for name in manifest.files if os.path.isabs(name)})
        ),
    )


def documents(service: Service) -> dict[str, str]:
    from ltx_export.triton import manifests, readme

    return {
        "README.md": readme.text(service),
        "Dockerfile": dockerfile(service),
        ".dockerignore": f"*\n!{WHEELS}\n",
        "compose.yaml": manifests.text(manifests.compose(service)),
        "kubernetes.yaml": manifests.text(*manifests.kubernetes(service)),
        "client.py": EXAMPLE.read_text(encoding="utf-8"),
    }


def dockerfile(service: Service) -> str:
    """Triton's image knows nothing of our runtime."""
    lines = [
        f"FROM {service.image.image}",
        f"COPY {WHEELS} /tmp/",
        "ENV PIP_BREAK_SYSTEM_PACKAGES=1",
        f'RUN pip install --no-cache-dir "$(ls /tmp/{WHEELS})[{service.extra}]"'
        + "".join(f" {pin}" for pin in service.pins),
    ]
    return "\n".join(lines) + "\n"


def _shared_memory(facts: Facts) -> int:
    """Frames are bytes; between stages pixels are float32, and both are there at the same time."""
    bytes_per_pixel = 3 if facts.layout == "single" else 3 + 3 * 4
    return _gibibytes(facts.settings.at_once * facts.settings.most_pixels * bytes_per_pixel)


def _extra(manifest: Manifest) -> str:
    """Of our package: what plays the bundle's best engines."""
    flavours = {engine.key.flavour for engine in manifest.engines}
    if flavours:
        return "tensorrt" if "tensorrt" in flavours else "tensorrt-rtx"
    on_gpu = any(set(entry.providers) - {"cpu"} for entry in manifest.onnxruntime.values())
    return "onnxruntime-gpu" if on_gpu else "onnxruntime"


def _pins(extra: str, versions: list[str]) -> tuple[str, ...]:
    """Engines are read by the version that built them; the vendor's index has TensorRT."""
    if len(versions) != 1 or extra not in ("tensorrt", "tensorrt-rtx"):
        return ()
    if extra == "tensorrt":
        return (f"tensorrt=={versions[0]}", "--extra-index-url https://pypi.nvidia.com")
    return (f"tensorrt-rtx-cu13=={versions[0]}",)


def _gibibytes(size: int) -> int:
    """Up to a whole one."""
    return max(1, ceil(size / GIB)) * GIB
