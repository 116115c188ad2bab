"""README, image, compose file and Kubernetes manifest of a Triton repository."""

import copy
import re
import shlex
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from ltx_engines import bundle
from ltx_engines.cache_key import EngineKey
from ltx_engines.engine_entry import EngineEntry
from ltx_engines.errors import UserError
from ltx_engines.file_entry import FileEntry
from ltx_engines.manifest import Manifest, OnnxRuntimeEntry
from ltx_engines.targets import Flavour
from ltx_engines.triton_model import INPUTS, METRICS, OUTPUTS
from ltx_engines.triton_settings import Settings
from ltx_export.triton import images, inventory, manifests, operations, readme

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
GIB = 2**30


@pytest.fixture
def manifest() -> Manifest:
    return bundle.read(TINY)


def built(manifest: Manifest, flavour: Flavour, version: str, plan: bytes = b"plan") -> Manifest:
    """As if an engine of the transformer had been built."""
    digest = sha256(plan).hexdigest()
    stage = manifest.stages["transformer"]
    key = EngineKey(
        stage="transformer",
        graph="0" * 64,
        weights={},
        profiles=(),
        flavour=flavour,
        version=version,
        targets=(89,),
    )
    entry = EngineEntry(
        file="t.engine",
        layers="t.json",
        key=key,
        inputs=stage.inputs,
        outputs=stage.outputs,
        activations=0,
    )
    files = {**manifest.files, "t.engine": FileEntry(bytes=4, sha256=digest)}
    return manifest.model_copy(update={"engines": (entry,), "files": files})


def service(
    manifest: Manifest, folder: Path, layout: Any = "single", **settings: Any
) -> operations.Service:
    made = Settings(layout=layout, **settings)
    facts = operations.Facts(layout, manifest, ("ltx_video",), "ltx_video/1/bundle", made)
    return operations.plan(folder, facts)


def with_plan(folder: Path, content: bytes = b"plan") -> Path:
    (folder / "transformer" / "1").mkdir(parents=True)
    (folder / "transformer" / "1" / "model.plan").write_bytes(content)
    return folder


Variant = Callable[[Manifest, Path], operations.Service]

VARIANTS: dict[str, Variant] = {
    "cpu": service,
    "stages": lambda m, f: service(m, f, "stages"),
    "rtx": lambda m, f: service(built(m, "tensorrt-rtx", "1.7.1.116"), f),
    "plans": lambda m, f: service(built(m, "tensorrt", "11.2.1.2"), with_plan(f), "stages"),
    "elsewhere": lambda m, f: service(
        m.model_copy(update={"files": {**m.files, "/hub/ltx.safetensors": FileEntry(bytes=9)}}), f
    ),
}


@pytest.fixture(params=VARIANTS)
def variant(
    request: pytest.FixtureRequest, manifest: Manifest, tmp_path: Path
) -> operations.Service:
    return VARIANTS[request.param](manifest, tmp_path)


def documents(text: str) -> list[Any]:
    return list(yaml.safe_load_all(text))


def test_kubernetes_accepts_each_document(variant: operations.Service) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    found = documents(operations.documents(variant)["kubernetes.yaml"])
    assert [d["kind"] for d in found] == ["Deployment", "Service", "HorizontalPodAutoscaler"]
    for document in found:
        validate(document, "1.30", strict=True)


def test_the_schema_of_kubernetes_would_refuse_a_typo(manifest: Manifest, tmp_path: Path) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    deployment = copy.deepcopy(manifests.kubernetes(service(manifest, tmp_path))[0])
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(deployment, "1.30", strict=True)


def test_compose_accepts_the_file(variant: operations.Service) -> None:
    compose = pytest.importorskip("compose_spec").PyCompose
    found = compose.from_yaml(operations.documents(variant)["compose.yaml"])
    found.validate()
    assert found.service_names() == ["ltx-triton"]


def test_the_schema_of_compose_would_refuse_a_typo(manifest: Manifest, tmp_path: Path) -> None:
    compose = pytest.importorskip("compose_spec").PyCompose
    text = operations.documents(service(manifest, tmp_path))["compose.yaml"]
    with pytest.raises(ValueError, match="shm_sise"):
        compose.from_yaml(text.replace("shm_size", "shm_sise"))


def test_nothing_is_published_beyond_loopback(variant: operations.Service) -> None:
    found = documents(operations.documents(variant)["compose.yaml"])[0]["services"]["ltx-triton"]
    assert found["ports"]
    for port in (*found["ports"], *re.findall(r"-p (\S+)", readme.docker_run(variant))):
        assert port.startswith("127.0.0.1:"), port
    cluster = manifests.kubernetes(variant)[1]
    assert cluster["spec"]["type"] == "ClusterIP"


def test_all_three_start_the_server_with_the_same_words(variant: operations.Service) -> None:
    found = operations.documents(variant)
    composed = documents(found["compose.yaml"])[0]["services"]["ltx-triton"]["command"]
    container = documents(found["kubernetes.yaml"])[0]["spec"]["template"]["spec"]["containers"][0]
    run = shlex.split(readme.docker_run(variant).replace("\\\n", ""))
    assert composed == container["args"] == run[run.index("tritonserver") :]
    assert "--model-control-mode=none" in composed
    assert readme.docker_run(variant) in found["README.md"]


def test_the_pod_is_probed_bounded_and_reads_only(variant: operations.Service) -> None:
    deployment, _, scaler = manifests.kubernetes(variant)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/models/ltx_video/ready"
    assert container["startupProbe"]["failureThreshold"] * 10 >= 600
    limits = container["resources"]["limits"]
    assert limits["memory"] == f"{variant.memory // GIB}Gi"
    assert ("nvidia.com/gpu" in limits) == variant.gpu
    assert container["securityContext"]["readOnlyRootFilesystem"]
    shared = next(v for v in pod["volumes"] if v["name"] == "shared-memory")
    assert shared["emptyDir"]["sizeLimit"] == f"{variant.shared_memory // GIB}Gi"
    metric = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert metric in {m.name for m in METRICS}


def test_memory_between_processes_holds_the_largest_requests(
    manifest: Manifest, tmp_path: Path
) -> None:
    single = service(manifest, tmp_path, at_once=2, most_pixels=GIB).shared_memory
    stages = service(manifest, tmp_path, "stages", at_once=2, most_pixels=GIB).shared_memory
    assert single == 2 * GIB * 3  # frames, a byte for each of three colours
    assert stages == single + 2 * GIB * 12  # and the decoder's float32
    small = service(manifest, tmp_path, at_once=1, most_pixels=32 * 32)
    assert small.shared_memory == GIB
    assert small.memory > GIB + operations.ROOM


def test_a_processor_has_its_configuration_and_no_gpu(manifest: Manifest, tmp_path: Path) -> None:
    found = service(manifest, tmp_path)
    assert found.command[-1] == "--model-config-name=cpu"
    assert "--gpus" not in readme.docker_run(found)
    assert "deploy" not in manifests.compose(found)["services"]["ltx-triton"]
    assert "[onnxruntime]" in operations.dockerfile(found)


def test_providers_on_a_gpu_want_the_other_package(manifest: Manifest, tmp_path: Path) -> None:
    on_cuda = manifest.model_copy(
        update={"onnxruntime": {"transformer": OnnxRuntimeEntry(providers=("cuda",))}}
    )
    assert "[onnxruntime-gpu]" in operations.dockerfile(service(on_cuda, tmp_path))


def test_engines_are_read_by_the_version_that_built_them(
    manifest: Manifest, tmp_path: Path
) -> None:
    rtx = service(built(manifest, "tensorrt-rtx", "1.7.1.116"), tmp_path)
    assert "tensorrt-rtx-cu13==1.7.1.116" in operations.dockerfile(rtx)
    assert rtx.image.tag == images.LATEST  # Triton's own TensorRT reads none of them
    alone = service(built(manifest, "tensorrt", "10.14.1.48"), tmp_path)
    assert "tensorrt==10.14.1.48 --extra-index-url https://pypi.nvidia.com" in (
        operations.dockerfile(alone)
    )
    assert alone.image.tag == images.LATEST


@pytest.mark.parametrize(
    ("version", "tag"),
    [
        ("10.13.3.9", "25.10-py3"),
        ("10.16.1.11", "26.05-py3"),
        ("11.2.1.2", "26.08-py3"),
        ("11.2.1.3", images.UNKNOWN),
        ("10.160.1", images.UNKNOWN),
        ("10.15.1.29", images.UNKNOWN),
    ],
)
def test_plans_want_the_image_of_their_version(
    version: str, tag: str, manifest: Manifest, tmp_path: Path
) -> None:
    found = service(built(manifest, "tensorrt", version), with_plan(tmp_path), "stages")
    assert found.image.tag == tag
    text = readme.text(found)
    assert version in text
    assert "dpkg -l | grep nvinfer" in text
    if tag == images.UNKNOWN:
        assert "we know no image that has it: look it up in" in text
        assert images.MATRIX in text
        assert f"FROM {images.IMAGE}:{images.UNKNOWN}\n" in operations.dockerfile(found)


def test_plans_of_two_versions_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    one = built(manifest, "tensorrt", "10.16.0")
    two = built(manifest, "tensorrt", "11.1.0", b"other")
    engine = two.engines[0].model_copy(update={"file": "u.engine"})
    files = {**one.files, "u.engine": two.files["t.engine"]}
    both = one.model_copy(update={"engines": (*one.engines, engine), "files": files})
    folder = with_plan(tmp_path)
    (folder / "transformer" / "1" / "other.plan").write_bytes(b"other")
    assert inventory.plan_versions(folder, both) == {"10.16.0", "11.1.0"}
    with pytest.raises(UserError, match=r"TensorRT 10\.16\.0, 11\.1\.0, and a server has one"):
        inventory.one_version(inventory.plan_versions(folder, both))


def test_weights_that_stay_elsewhere_are_mounted_where_they_are(
    manifest: Manifest, tmp_path: Path
) -> None:
    found = VARIANTS["elsewhere"](manifest, tmp_path)
    assert "-v '/hub':'/hub':ro" in readme.docker_run(found)
    mounts = manifests.compose(found)["services"]["ltx-triton"]["volumes"]
    assert {"type": "bind", "source": "/hub", "target": "/hub", "read_only": True} in mounts
    pod = manifests.kubernetes(found)[0]["spec"]["template"]["spec"]
    assert {"name": "weights-0", "hostPath": {"path": "/hub"}} in pod["volumes"]


def test_the_readme_names_what_the_tables_have(variant: operations.Service) -> None:
    text = readme.text(variant)
    for name in (*(m.name for m in METRICS), *(wire.name for wire in (*INPUTS, *OUTPUTS))):
        assert f"| `{name}` |" in text
    prose = [
        line for line in text.splitlines() if "|" not in line and not line.startswith("    --")
    ]
    assert all(len(line) <= 100 for line in prose)


def test_what_is_written_is_what_is_planned(manifest: Manifest, tmp_path: Path) -> None:
    facts = operations.Facts("single", manifest, ("ltx_video",), "ltx_video/1/bundle")
    operations.write(tmp_path, facts)
    wanted = operations.documents(operations.plan(tmp_path, facts))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == wanted
    assert all(path.is_file() for path in tmp_path.iterdir())  # a folder would be a model


def test_the_example_is_thirty_lines_of_python() -> None:
    source = operations.EXAMPLE.read_text()
    assert len(source.splitlines()) <= 30
    compile(source, "client.py", "exec")


def test_every_known_image_has_a_source() -> None:
    for known in images.KNOWN:
        assert re.fullmatch(r"\d\d\.\d\d-py3", known.tag)
        assert known.source
        assert images.choose(known.tensorrt).tag == known.tag
        assert "not by a table of NVIDIA's" in images.choose(known.tensorrt).why
