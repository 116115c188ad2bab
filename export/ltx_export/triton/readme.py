"""The README of a model repository, in the order in which somebody needs it."""

import textwrap
from collections.abc import Iterable

from ltx_engines.triton_model import INPUTS, METRICS, OUTPUTS, VIDEO, Wire
from ltx_export import __version__
from ltx_export.triton.operations import ADMIN, CLOSED, GIB, NAME, PORTS, ROOM, Service

HTTP, GRPC, SCRAPED = PORTS["http"], PORTS["grpc"], PORTS["metrics"]

SILENCE = 30
"""Seconds: PATIENCE of the runtime's client."""


def text(service: Service) -> str:
    sections = (_head, _start, _sizes, _health, _metrics, _model)
    return "\n".join(section(service) for section in sections)


def _head(service: Service) -> str:
    facts = service.facts
    models = ", ".join(f"`{name}`" for name in facts.models)
    return f"""\
# {facts.manifest.name} in Triton Inference Server

LTX-Video {facts.manifest.model_version} in {facts.manifest.precision}; layout `{facts.layout}`,
models {models}. Written by ltx-export {__version__}.
Look it over at any time, without a server:

```sh
ltx-export triton --check .
```
"""


def _start(service: Service) -> str:
    return f"""\
## Start

{_filled(service.image.why)}
{_verify(service)}
The models import the runtime, which Triton's image lacks. Put its wheel beside the Dockerfile (in
the sources of ltx-trt: `pip wheel --no-deps --wheel-dir PATH_OF_THIS_FOLDER .`), then, here:

```sh
docker build -t {service.built} .
{docker_run(service)}
```

or `docker compose up --build`, or `kubectl apply -f kubernetes.yaml` with an image that the cluster
can pull and a claim `{NAME}-models` that holds this folder.

The server is published on loopback only; nobody may load or unload models
(`--model-control-mode=none`). What Triton tells of itself
({", ".join(CLOSED)}) wants the header `{ADMIN}`, over gRPC
`triton-grpc-protocol-{ADMIN}`, with the word above, which was drawn when this folder was written:
its index of models, for one, names files of the server.

Ask for clips with
`ltx-trt client --url grpc://localhost:{GRPC} --prompt "..." -o clip.mp4`, or as `client.py` does.
A `tritonserver` without a container listens on every address unless it is told
`--http-address=127.0.0.1 --grpc-address=127.0.0.1`; its Python needs the same packages.
"""


def _verify(service: Service) -> str:
    if not service.pins:
        return ""
    ask = f"docker run --rm {service.image.image} sh -c 'dpkg -l | grep nvinfer'"
    return f"""
Ask the image itself which TensorRT it has before you trust it:

```sh
{ask}
```

Engines that our own model plays are read by what the Dockerfile pins:
`{service.pins[0]}`.
"""


def docker_run(service: Service) -> str:
    words = [f"docker run --rm --name {NAME}"]
    if service.gpu:
        words.append("--gpus 1")
    words.append(f"--shm-size={service.shared_memory // GIB}g")
    words += [f"-p 127.0.0.1:{port}:{port}" for port in PORTS.values()]
    words.append('-v "$PWD":/models:ro')
    words += [f"-v '{place}':'{place}':ro" for place in service.elsewhere]
    words.append("-e XDG_CACHE_HOME=/tmp/cache")
    return " \\\n    ".join([*words, service.built, *service.command])


def _sizes(service: Service) -> str:
    settings = service.facts.settings
    single = service.facts.layout == "single"
    what = "frames" if single else "frames, and pixels between the stages,"
    gpu = "see `ltx-export plan`" if service.gpu else "none: ONNX Runtime on the CPU"
    return f"""\
## Sizes

| what | how much | why |
|---|---|---|
| `--shm-size` | {_gib(service.shared_memory)} | {settings.at_once} requests, whose {what} are of \
{settings.most_pixels} pixels at most; Docker's default is 64 MB |
| memory of the host | {_gib(service.memory)} | an estimate: the bundle's files, shared memory, \
{_gib(ROOM)} for programs |
| memory of the GPU | {gpu} | |
"""


def _health(_: Service) -> str:
    return f"""\
## Health

| ask | it says |
|---|---|
| `GET :{HTTP}/v2/health/live` | the server's process answers |
| `GET :{HTTP}/v2/health/ready` | every model is loaded; not ready if a stage has failed to load |
| `GET :{HTTP}/v2/models/{VIDEO}/ready` | this model is loaded |

A model's process that dies is not started again by Triton, and in 24.10 its model stays "ready".
Requests that it was computing are never answered (`ltx-trt client` notices after {SILENCE} s), new
ones are told `Stub process ... is not healthy`. Start the server again:

```sh
docker restart {NAME}
```

or `docker compose restart`, or `kubectl rollout restart deployment/{NAME}`. An alert on
`nv_inference_request_failure{{reason="BACKEND"}}` finds it. A server that was killed leaves files
in /dev/shm; in a container they go with it.
"""


def _metrics(_: Service) -> str:
    rows = "\n".join(
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '-'} | {metric.text} |"
        for metric in METRICS
    )
    return f"""\
## Metrics

`GET :{SCRAPED}/metrics`: Triton's own (`nv_inference_*`) and

| name | kind | labels | what |
|---|---|---|---|
{rows}

The autoscaler in kubernetes.yaml reads `ltx_requests_waiting`, for which the cluster needs an
adapter for Prometheus (`custom.metrics.k8s.io`); without one, delete that document.
"""


def _model(service: Service) -> str:
    return f"""\
## {VIDEO}

Decoupled: one request, many responses, over a gRPC stream (over HTTP:
`POST :{HTTP}/v2/models/{VIDEO}/generate_stream`).

| input | type | |
|---|---|---|
{_rows(INPUTS)}

| output | type | |
|---|---|---|
{_rows(OUTPUTS)}

`event` is JSON: `planned` with `steps`, `stage`, `prompt`, `step` with `index` and `total`; in the
last response `done` with the report. There `video` is an MP4, or `frames` the pixels if `format` is
"frames". A client that goes away, or cancels, ends its request before the next step.

{_filled(_seeds(service))}
"""


def _seeds(service: Service) -> str:
    if service.facts.settings.batching == "any":
        return (
            "A seed gives the bytes of `ltx-trt run` when nobody else asks; of requests that are "
            "computed together single pixels may round otherwise, by a level of 255 (`--batching "
            "exact` does not let them)."
        )
    return (
        "A seed gives the bytes of `ltx-trt run`, whoever else asks: steps of several requests go "
        "together only where that changes no bit, which the first of each size are held against. "
        "On GPUs that is seldom so; `--batching any` shares there too."
    )


def _rows(tensors: Iterable[Wire]) -> str:
    return "\n".join(
        f"| `{wire.name}` | {wire.dtype} {list(wire.dims)} | "
        f"{'may be left out' if wire.optional else 'always'} |"
        for wire in tensors
    )


def _filled(sentence: str) -> str:
    return textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False)


def _gib(size: int) -> str:
    return f"{size // GIB} GiB"
