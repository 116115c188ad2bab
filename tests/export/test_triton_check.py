"""ltx-export triton --check: what a server would say, hide or hang on is said before it starts."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ltx_engines.bundle import MANIFEST
from ltx_engines.errors import UserError
from ltx_engines.shapes import VideoShape
from ltx_engines.triton_settings import Settings

pytest.importorskip("tritonclient.grpc")

from ltx_export.triton import check, inventory, repository
from tests.runtime import engine_bundles

TINY = Path(__file__).parents[2] / "runtime/ltx_trt/ltx_tiny"
BUNDLE = "ltx_video/1/bundle"

Edit = Callable[[Any], object]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "repository"
    repository.write(TINY, folder, repository.Order(settings=Settings(layout="stages")))
    return folder


@pytest.fixture
def repo(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil; the bundle's files are links."""

    def copy(source: str, target: str) -> None:
        (os.link if BUNDLE in source else shutil.copy2)(source, target)

    shutil.copytree(written, tmp_path / "repo", copy_function=copy)
    return tmp_path / "repo"


def edit(repo: Path, model: str, change: Edit, name: str = "config.pbtxt") -> None:
    """Change a configuration as if it had been written so."""
    from google.protobuf import text_format

    path = repo / model / name
    config = check.parse(path)
    change(config)
    path.write_text(text_format.MessageToString(config), encoding="utf-8")
    inventory.seal(repo, "stages", BUNDLE)


def edit_both(repo: Path, model: str, change: Edit) -> None:
    for name in ("config.pbtxt", "configs/cpu.pbtxt"):
        edit(repo, model, change, name)


def problem(repo: Path) -> str:
    with pytest.raises(UserError) as caught:
        check.check(repo)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_is_written_is_right(repo: Path) -> None:
    checked = check.check(repo)
    assert checked.lines()[-1].endswith("files as they were written, configurations for cpu")
    assert [model.name for model in checked.models] == [
        "ltx_video",
        "text_encoder",
        "transformer",
        "vae_decoder",
    ]


def test_a_single_model_is_right_too(tmp_path: Path) -> None:
    repository.write(TINY, tmp_path / "repo", repository.Order())
    assert len(check.check(tmp_path / "repo").models) == 1


def test_a_folder_of_something_else_is_no_repository(tmp_path: Path) -> None:
    assert "it has no repository.json" in problem(tmp_path)
    assert "it has no repository.json" in problem(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "is not JSON"),
        ("[]", "format version None"),
        ('{"format_version": 2}', "format version 2, this program reads 1"),
        ('{"format_version": 1, "layuot": "single"}', "unknown key layuot; did you mean 'layout'?"),
    ],
)
def test_an_inventory_is_read_strictly(text: str, wanted: str, repo: Path) -> None:
    (repo / "repository.json").write_text(text)
    assert wanted in problem(repo)


def test_a_changed_byte_is_found(repo: Path) -> None:
    path = repo / "transformer" / "1" / "model.py"
    path.write_bytes(path.read_bytes().replace(b"stage_model", b"stage_modex"))
    assert "transformer/1/model.py has changed since it was written" in problem(repo)


def test_a_changed_byte_of_the_bundle_is_found(repo: Path) -> None:
    path = repo / BUNDLE / "transformer.onnx"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink()  # it is a link
    path.write_bytes(raw)
    assert "transformer.onnx has sha256" in problem(repo)


def test_a_bundle_that_is_gone_is_named(repo: Path) -> None:
    (repo / BUNDLE / MANIFEST).unlink()
    assert "is not a bundle" in problem(repo)


def test_a_bundle_outside_of_the_repository_is_refused(repo: Path) -> None:
    path = repo / "repository.json"
    path.write_text(path.read_text().replace(BUNDLE, "../elsewhere"))
    assert "leads out of it" in problem(repo)


def test_a_missing_file_and_one_too_many_are_named(repo: Path) -> None:
    (repo / "vae_decoder" / "config.pbtxt").rename(repo / "vae_decoder" / "old.pbtxt")
    text = problem(repo)
    assert "vae_decoder/config.pbtxt is missing" in text
    assert "vae_decoder/old.pbtxt is not in repository.json" in text
    assert "vae_decoder/ has no config.pbtxt; the server takes it for a model" in text


def test_what_lies_at_the_top_is_a_teams_to_change(repo: Path) -> None:
    (repo / "ltx_trt-0.1.0-py3-none-any.whl").write_bytes(b"x")
    (repo / "Dockerfile").write_text("FROM nvcr.io/nvidia/tritonserver:26.09-py3\n")
    (repo / "compose.yaml").unlink()
    check.check(repo)


def test_compiled_python_is_no_matter(repo: Path) -> None:
    (repo / "ltx_video" / "1" / "__pycache__").mkdir()
    (repo / "ltx_video" / "1" / "__pycache__" / "model.cpython-312.pyc").write_bytes(b"x")
    check.check(repo)


def test_a_missing_stage_is_named(repo: Path) -> None:
    shutil.rmtree(repo / "vae_decoder")
    inventory.seal(repo, "stages", BUNDLE)
    assert "the model vae_decoder is missing" in problem(repo)


def test_a_stage_in_the_layout_of_one_model_is_named(repo: Path) -> None:
    inventory.seal(repo, "single", BUNDLE)
    assert "here are text_encoder, transformer, vae_decoder" in problem(repo)


def test_another_version_is_named(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "__version__", "9.9.9")
    assert "written by ltx-export 0.1.0, this is 9.9.9" in problem(repo)


def test_what_tritons_schema_does_not_know_has_a_line_number(repo: Path) -> None:
    path = repo / "transformer" / "config.pbtxt"
    path.write_text("max_batch_sise: 4\n" + path.read_text())
    inventory.seal(repo, "stages", BUNDLE)
    text = problem(repo)
    assert "transformer/config.pbtxt is no model configuration: 1:1 : " in text
    assert "max_batch_sise" in text


def _dtype(config: Any) -> None:
    config.input[0].data_type = config.input[0].data_type + 1


def _plan(config: Any) -> None:
    config.backend, config.platform = "tensorrt", "tensorrt_plan"


def _reorder(config: Any) -> None:
    config.instance_group[0].kind = config.instance_group[0].KIND_CPU
    config.instance_group[0].gpus.append(0)


CONFIGS: dict[str, tuple[str, Edit, str]] = {
    "another name": (
        "transformer",
        lambda c: setattr(c, "name", "denoiser"),
        "its name is 'denoiser', its folder's is 'transformer'",
    ),
    "a wrong type": ("transformer", _dtype, "input latents has data_type FP64, wanted FP32"),
    "a wrong size": (
        "transformer",
        lambda c: c.input[0].dims.__setitem__(2, 33),
        "input latents has dims (-1, -1, 33), wanted (-1, -1, 32)",
    ),
    "a size of none": (
        "transformer",
        lambda c: c.input[0].dims.__setitem__(1, 0),
        "a size is from 1, or -1",
    ),
    "an input too few": (
        "transformer",
        lambda c: c.input.pop(),
        "input skip_layer_mask is missing",
    ),
    "an input too many": (
        "text_encoder",
        lambda c: c.input.add(name="more", data_type=9, dims=[1]),
        "input more is unknown",
    ),
    "an input twice": (
        "text_encoder",
        lambda c: c.input.add().CopyFrom(c.input[0]),
        "input input_ids is there twice",
    ),
    "no type": (
        "vae_decoder",
        lambda c: c.output[0].ClearField("data_type"),
        "output pixels has no data_type",
    ),
    "no sizes": (
        "vae_decoder",
        lambda c: c.output[0].ClearField("dims"),
        "output pixels has no dims",
    ),
    "a wish that is an order": (
        "ltx_video",
        lambda c: setattr(c.input[2], "optional", False),
        "input seed is optional: False, wanted True",
    ),
    "one answer only": (
        "ltx_video",
        lambda c: setattr(c.model_transaction_policy, "decoupled", False),
        "decoupled is False",
    ),
    "answers from a cache": (
        "ltx_video",
        lambda c: setattr(c.response_cache, "enable", True),
        "response_cache is on",
    ),
    "a version that is not there": (
        "transformer",
        lambda c: c.version_policy.specific.versions.append(2),
        "versions [1, 2] are wanted, there are [1]",
    ),
    "a backend of others": (
        "transformer",
        lambda c: setattr(c, "backend", "onnxruntime"),
        "backend 'onnxruntime' with platform '' is none of ours",
    ),
    "a plan that is not there": (
        "transformer",
        _plan,
        "1/model.plan is missing",
    ),
    "a batch that is too large": (
        "transformer",
        lambda c: c.dynamic_batching.preferred_batch_size.append(8),
        "preferred_batch_size [8] is more than max_batch_size 0",
    ),
    "a profile by name": (
        "transformer",
        lambda c: c.instance_group[0].profile.append("fast"),
        "profile 'fast' is not the number of a TensorRT profile",
    ),
    "a processor with a GPU": ("transformer", _reorder, "is KIND_CPU and names GPUs"),
    "a graph for no batch": (
        "transformer",
        lambda c: c.optimization.cuda.graph_spec.add(batch_size=3),
        "a CUDA graph is of batch size 3, legal are [0]",
    ),
    "a warm-up that Triton ignores": (
        "transformer",
        lambda c: c.model_warmup.add(name="cold").inputs["latent"].dims.append(1),
        "warm-up 'cold' has no batch_size, and is ignored without it",
    ),
    "a warm-up of no input": (
        "transformer",
        lambda c: c.model_warmup.add(name="w", batch_size=1).inputs["latent"].dims.append(1),
        "warm-up 'w' names latent, which is no input",
    ),
    "an unknown parameter": (
        "ltx_video",
        lambda c: setattr(c.parameters["at_one"], "string_value", "4"),
        "unknown parameter 'at_one' of the model; did you mean 'at_once'?",
    ),
    "a parameter of another kind": (
        "ltx_video",
        lambda c: setattr(c.parameters["at_once"], "string_value", "many"),
        "parameter at_once of the model is 'many', not a number",
    ),
    "another bundle": (
        "transformer",
        lambda c: setattr(c.parameters["bundle"], "string_value", "bundle"),
        "its bundle is 'bundle', which is not the one of repository.json",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_is_held_against_the_tables(case: str, repo: Path) -> None:
    model, change, wanted = CONFIGS[case]
    edit_both(repo, model, change)
    _, problems = check.look(repo)
    assert any(wanted in text for text in problems), problems
    assert all(text.startswith(f"{model}: ") for text in problems)
    assert str(repo) in problem(repo)


def test_twins_differ_in_nothing_but_the_machine(repo: Path) -> None:
    edit(repo, "transformer", lambda c: c.input.pop(), "configs/cpu.pbtxt")
    assert "configs/cpu.pbtxt: tensors, batch size or parameters are not those of" in problem(repo)


def test_the_twin_for_a_processor_is_for_a_processor(repo: Path) -> None:
    edit(
        repo,
        "transformer",
        lambda c: setattr(c.instance_group[0], "kind", c.instance_group[0].KIND_GPU),
        "configs/cpu.pbtxt",
    )
    assert "configs/cpu.pbtxt: an instance is not KIND_CPU" in problem(repo)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (None, "1/model.py is missing"),
        ("def (", "1/model.py is not Python: "),
        ("import numpy\n", "1/model.py has no TritonPythonModel"),
    ],
)
def test_a_program_that_would_hang_the_server_is_found(
    source: str | None, wanted: str, repo: Path
) -> None:
    path = repo / "ltx_video" / "1" / "model.py"
    path.unlink()
    if source is not None:
        path.write_text(source)
    inventory.seal(repo, "stages", BUNDLE)
    assert wanted in problem(repo)


def test_many_problems_are_one_line_and_counted(repo: Path) -> None:
    for model in ("text_encoder", "transformer", "vae_decoder"):
        shutil.rmtree(repo / model)
    text = problem(repo)
    assert text.count("; ") == 4
    assert " more; write it again (ltx-export triton)" in text


@pytest.fixture(scope="module")
def with_plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository for Triton's own backend, of engines that no GPU made."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("plans")
    shutil.copytree(TINY, folder / "bundle")
    engine_bundles.add(
        folder / "bundle",
        engine_bundles.Engines(
            (VideoShape(25, 128, 128), VideoShape(9, 64, 96)),
            flavour="tensorrt",
            version="10.14.1",
            targets=(89, 90),
        ),
    )
    order = repository.Order(settings=Settings(layout="stages"))
    repository.write(folder / "bundle", folder / "repository", order)
    return folder / "repository"


@pytest.fixture
def planned(with_plans: Path, tmp_path: Path) -> Path:
    shutil.copytree(with_plans, tmp_path / "repo")
    return tmp_path / "repo"


def test_plans_of_the_bundle_are_right_and_their_version_is_known(planned: Path) -> None:
    checked = check.check(planned)
    assert checked.inventory.tensorrt == "10.14.1"
    assert "transformer: tensorrt_plan, 1 instance" in checked.lines()


def test_a_plan_that_is_not_the_bundles_is_found(planned: Path) -> None:
    plan = planned / "transformer/1/model.plan"
    raw = plan.read_bytes()
    plan.unlink()
    plan.write_bytes(raw + b"x")
    inventory.seal(planned, "stages", BUNDLE)
    assert "transformer: model.plan is not one of the bundle's engines" in problem(planned)


def test_a_plan_of_another_stage_is_found(planned: Path) -> None:
    plan = planned / "transformer/1/model.plan"
    plan.unlink()
    shutil.copy(planned / "vae_decoder/1/model.plan", plan)
    inventory.seal(planned, "stages", BUNDLE)
    assert "transformer: model.plan is an engine of vae_decoder" in problem(planned)


def test_another_version_of_tensorrt_than_the_plans_is_found(planned: Path) -> None:
    path = planned / "repository.json"
    path.write_text(path.read_text().replace('"10.14.1"', '"10.13.0"'))
    assert "says plans of TensorRT 10.13.0, the bundle's are 10.14.1" in problem(planned)


PLANS: dict[str, tuple[Edit, str]] = {
    "a profile too many": (
        lambda c: c.instance_group[0].profile.append("2"),
        "profile 2 is not there, the engine has 2",
    ),
    "a card of others": (
        lambda c: c.cc_model_filenames.update({"12.0": "model.plan"}),
        "model.plan is for 12.0, it was built for 89, 90",
    ),
    "a graph of no profile": (
        lambda c: c.optimization.cuda.graph_spec[0].input["latents"].dim.__setitem__(1, 7),
        "a CUDA graph is of sizes that no profile takes",
    ),
    "a warm-up of no profile": (
        lambda c: c.model_warmup[1].inputs["latents"].dims.__setitem__(1, 70000),
        "warm-up 'profile 1' is of sizes that no profile takes",
    ),
    "a file that is not there": (
        lambda c: c.cc_model_filenames.update({"8.9": "other.plan"}),
        "1/other.plan is missing",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_configuration_is_held_against_its_engine(case: str, planned: Path) -> None:
    change, wanted = PLANS[case]
    edit_both(planned, "transformer", change)
    assert f"transformer: {wanted}" in " ".join(check.look(planned)[1])
