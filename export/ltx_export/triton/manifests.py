"""The server as a compose file and as Kubernetes documents, which say the same."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ltx_engines.triton_model import VIDEO
from ltx_export.triton.operations import GIB, NAME, PORTS, Service

USER = 1000
"""`triton-server` in NVIDIA's images."""


def text(*documents: Mapping[str, Any]) -> str:
    return yaml.safe_dump_all(documents, sort_keys=False, default_flow_style=False)


def compose(service: Service) -> dict[str, Any]:
    """Published on loopback only; whoever wants more says so here."""
    server: dict[str, Any] = {
        "build": ".",
        "image": service.built,
        "command": service.command,
        "ports": [f"127.0.0.1:{port}:{port}" for port in PORTS.values()],
        "volumes": [
            {"type": "bind", "source": source, "target": target, "read_only": True}
            for source, target in _mounts(service)
        ],
        "shm_size": service.shared_memory,
        "environment": {"XDG_CACHE_HOME": "/tmp/cache"},
        "restart": "unless-stopped",
        "stop_grace_period": "150s",
        "healthcheck": {
            "test": ["CMD", "curl", "--fail", f"http://127.0.0.1:{PORTS['http']}/v2/health/ready"],
            "interval": "15s",
            "timeout": "5s",
            "start_period": "20m",
        },
    }
    if service.gpu:
        device = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        server["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return {"services": {NAME: server}}


def kubernetes(service: Service) -> tuple[dict[str, Any], ...]:
    return (_deployment(service), _service(), _autoscaler())


def _deployment(service: Service) -> dict[str, Any]:
    mounts = [
        {"name": "models", "mountPath": "/models", "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "temporary", "mountPath": "/tmp"},
    ]
    memory = _quantity(service.memory)
    limits = {"memory": memory, **({"nvidia.com/gpu": 1} if service.gpu else {})}
    container = {
        "name": "triton",
        "image": service.built,
        "args": service.command,
        "ports": [{"name": name, "containerPort": port} for name, port in PORTS.items()],
        "env": [{"name": "XDG_CACHE_HOME", "value": "/tmp/cache"}],
        # Weights are read and checked before the first answer.
        "startupProbe": _probe("/v2/health/ready", period=10, failures=180),
        "readinessProbe": _probe("/v2/health/ready", period=10, failures=3),
        # Of the model: a server whose model's process has died is alive.
        "livenessProbe": _probe(f"/v2/models/{VIDEO}/ready", period=20, failures=3),
        "resources": {"requests": {"cpu": "2", **limits}, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": USER,
        },
        "volumeMounts": [*mounts, *_host_mounts(service)],
    }
    volumes: list[dict[str, Any]] = [
        {"name": "models", "persistentVolumeClaim": {"claimName": f"{NAME}-models"}},
        {
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory", "sizeLimit": _quantity(service.shared_memory)},
        },
        {"name": "temporary", "emptyDir": {}},
    ]
    for index, place in enumerate(service.elsewhere):
        volumes.append({"name": f"weights-{index}", "hostPath": {"path": place}})
    pod = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 150,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": volumes,
    }
    labels = {"app": NAME}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": NAME, "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels, "annotations": _scraped()}, "spec": pod},
        },
    }


def _service() -> dict[str, Any]:
    ports = [{"name": name, "port": port, "targetPort": name} for name, port in PORTS.items()]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME, "labels": {"app": NAME}},
        "spec": {"type": "ClusterIP", "selector": {"app": NAME}, "ports": ports},
    }


def _autoscaler() -> dict[str, Any]:
    """A pod more for each two requests that wait; a clip takes minutes, so it goes down slowly."""
    waiting = {
        "type": "Pods",
        "pods": {
            "metric": {"name": "ltx_requests_waiting"},
            "target": {"type": "AverageValue", "averageValue": "2"},
        },
    }
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": NAME},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME},
            "minReplicas": 1,
            "maxReplicas": 4,
            "metrics": [waiting],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 900}},
        },
    }


def _probe(path: str, *, period: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _scraped() -> dict[str, str]:
    return {"prometheus.io/scrape": "true", "prometheus.io/port": str(PORTS["metrics"])}


def _host_mounts(service: Service) -> Iterator[dict[str, Any]]:
    for index, place in enumerate(service.elsewhere):
        yield {"name": f"weights-{index}", "mountPath": place, "readOnly": True}


def _mounts(service: Service) -> Iterator[tuple[str, str]]:
    yield ".", "/models"
    yield from ((place, place) for place in service.elsewhere)


def _quantity(size: int) -> str:
    return f"{size // GIB}Gi"
