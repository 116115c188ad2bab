"""The sampler step as a graph: equal to the host's formulas, and built for every card."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from ltx_engines.bundle import Bundle, open_bundle
from ltx_engines.stages import BRANCHES, COEFFICIENTS, SAMPLER_STEP
from ltx_export import step_graph
from ltx_trt.guidance import StepGuidance
from ltx_trt.noise import Noise
from ltx_trt.sampler import Step
from ltx_trt.session.step_rows import coefficients
from tests.export.conftest import Exported

Floats = NDArray[np.float32]
Feeds = dict[str, Any]

CHANNELS = 128
STEP = Step(0.7, 0.4, 1.3, -0.6, previous=0.25, noise=0.1)
EVERY = [
    StepGuidance(scale, stg, rescaling, blocks, star)
    for scale, stg, rescaling, blocks, star in itertools.product(
        (0.0, 1.0, 3.0, 8.0), (0.0, 1.0, 4.0), (0.0, 0.7, 1.0), ((), (1,)), (False, True)
    )
]


@pytest.fixture(scope="module", params=step_graph.OPSETS)
def session(request: pytest.FixtureRequest) -> onnxruntime.InferenceSession:
    return opened(step_graph.model(CHANNELS, "float32", request.param))


def opened(model: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def velocities(guide: StepGuidance, tokens: int) -> Floats:
    """Branches that are much alike, as a model's are."""
    count = len(guide.branches)
    drawn = Noise(tokens).normal((count + 1, tokens, CHANNELS))
    return drawn[:1] + np.float32(0.3) + np.float32(0.2) * drawn[1:]


def clip(tokens: int, seed: int) -> Floats:
    return Noise(seed).normal((1, tokens, CHANNELS))


def feeds(guide: StepGuidance, step: Step, values: Floats) -> Feeds:
    """A branch that is not run is the text again."""
    tokens = values.shape[1]
    rows = dict(zip(guide.branches, values[:, np.newaxis], strict=True))
    tensors: Feeds = {name: clip(tokens, i) for i, name in enumerate(("latents", "previous"))}
    return {
        **tensors,
        **{branch: rows.get(branch, rows["text"]) for branch in BRANCHES},
        "noise": clip(tokens, 7),
        "coefficients": coefficients(step, guide),
    }


def on_the_host(guide: StepGuidance, step: Step, values: Floats, given: Feeds) -> list[Floats]:
    velocity, latents = guide.combine(values), given["latents"]
    moved = step.apply(latents, velocity, previous=given["previous"], noise=given["noise"])
    return [moved, step.clean(latents, velocity)]


def difference(found: Floats, wanted: Floats) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("tokens", "guides"), [(1, EVERY), (260, EVERY), (8000, EVERY[-12::5])])
def test_a_step_is_the_hosts_to_one_millionth(
    session: onnxruntime.InferenceSession, tokens: int, guides: list[StepGuidance]
) -> None:
    """The host sums in double precision."""
    for guide in guides:
        values = velocities(guide, tokens)
        given = feeds(guide, STEP, values)
        wanted = on_the_host(guide, STEP, values, given)
        for found, host in zip(session.run(None, given)[:2], wanted, strict=True):
            assert difference(found, host) <= 1e-6, guide


def test_a_branch_that_is_not_run_leaves_no_trace(session: onnxruntime.InferenceSession) -> None:
    alone = [guide for guide in EVERY if len(guide.branches) == 1 and not guide.rescales]
    for guide in alone:
        values = velocities(guide, 9)
        given = feeds(guide, STEP, values)
        wanted = on_the_host(guide, STEP, values, given)
        for found, host in zip(session.run(None, given)[:2], wanted, strict=True):
            np.testing.assert_array_equal(found, host)


def test_what_a_coefficient_of_zero_meets_must_be_finite(
    session: onnxruntime.InferenceSession,
) -> None:
    """The loop's buffers begin with zeros: there is nothing else to silence."""
    guide, step = EVERY[-1], Step(0.7, 0.4, 1.3, -0.6)
    given = feeds(guide, step, velocities(guide, 9))
    plain = session.run(None, given)[0]
    zeros = np.zeros_like(given["previous"])
    np.testing.assert_array_equal(
        plain, session.run(None, given | {"previous": zeros, "noise": zeros})[0]
    )
    given["previous"] = np.full_like(zeros, np.inf)
    assert np.isnan(session.run(None, given)[0]).all()


def test_a_rescaling_that_is_off_is_never_looked_at(session: onnxruntime.InferenceSession) -> None:
    """A velocity without deviation would divide by zero."""
    for guide in (g for g in EVERY if not g.rescales and not g.cfg_star_rescale):
        still = np.zeros((len(guide.branches), 9, CHANNELS), np.float32)
        assert all(np.isfinite(out).all() for out in session.run(None, feeds(guide, STEP, still)))


def test_an_uncond_of_zeros_is_none_of_the_text(session: onnxruntime.InferenceSession) -> None:
    guide = StepGuidance(3, 0, 1, (), cfg_star_rescale=True)
    values = velocities(guide, 9)
    values[0] = 0
    given = feeds(guide, STEP, values)
    for found, host in zip(
        session.run(None, given)[:2], on_the_host(guide, STEP, values, given), strict=True
    ):
        assert difference(found, host) <= 1e-6


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_transformer_reads_the_next_latents_in_its_own_type(precision: Any) -> None:
    run = opened(step_graph.model(CHANNELS, precision, 20))
    guide = EVERY[-1]
    values = velocities(guide, 9).astype(np.float16).astype(np.float32)
    given = feeds(guide, STEP, values)
    types = {node.name: node.type for node in run.get_inputs()}
    narrow = {name: as_type(value, types[name]) for name, value in given.items()}
    after, _, batch = run.run_with_ort_values(None, narrow)
    rows = array(batch)
    assert rows.shape == (3, 9, CHANNELS)
    np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))
    bits = {"float16": 11, "bfloat16": 8}[precision]
    np.testing.assert_allclose(rows[:1], after.numpy(), rtol=2.0**-bits)


def as_type(values: Floats, name: str) -> Any:
    from ltx_trt.session.onnxruntime_session import _to_ort

    dtype = {"tensor(float)": "float32"}.get(name, name.removeprefix("tensor(").removesuffix(")"))
    return _to_ort(values, dtype)


def array(value: Any) -> Floats:
    from ltx_trt.session.onnxruntime_session import _from_ort

    found: Floats = _from_ort(value)
    return found


def test_it_is_written_without_torch() -> None:
    program = (
        "import sys; from ltx_export import step_graph; step_graph.model(128, 'bfloat16', 23);"
        "assert not {'torch', 'onnxscript', 'onnx_ir'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_it_is_built_for_every_card_and_never_waits_for_the_host(tmp_path: Path) -> None:
    """A shape that the host computes would come from there in each step."""
    pytest.importorskip("tensorrt_rtx", reason="the builder is an extra")
    for precision, targets in (("float16", (75, 80, 86, 89, 120, 121)), ("bfloat16", (80, 121))):
        table = built(tmp_path, precision, targets)
        kinds = {layer.kind for layer in table}
        assert kinds, "an engine without kernels"
        assert not any("HostToDevice" in kind for kind in kinds), kinds


def built(folder: Path, precision: Any, targets: tuple[int, ...]) -> Any:
    from ltx_export import build, engine_profiles, layer_table

    graph = step_graph.model(CHANNELS, precision, 23).SerializeToString()
    (folder / "step.onnx").write_bytes(graph)
    entry = step_graph.entry(CHANNELS, precision, graph, 23)
    buckets = [{"tokens": (tokens, tokens, tokens)} for tokens in (260, 5600)]
    job = build.Job(
        graph=folder / "step.onnx",
        engine=folder / "step.engine",
        layers=folder / "step.json",
        flavour="tensorrt-rtx",
        version=build.version("tensorrt-rtx"),
        targets=targets,
        profiles=tuple(engine_profiles.shapes(entry, bucket) for bucket in buckets),
        types={tensor.name: tensor.dtype for tensor in (*entry.inputs, *entry.outputs)},
    )
    build.build(job, lambda _: None)
    return layer_table.read(job.layers)


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Bundle:
    folder = shutil.copytree(exported.bundle.path, tmp_path / "bundle")
    return open_bundle(Path(folder))


def test_a_bundle_gets_it_once(bundle: Bundle) -> None:
    added = step_graph.add(bundle)
    entry = open_bundle(bundle.path).stage(SAMPLER_STEP)
    assert entry == added.stage(SAMPLER_STEP)
    transformer = bundle.stage("transformer")
    assert (entry.opset, entry.outputs[-1].dtype) == (transformer.opset, "float32")
    assert step_graph.add(added) is added


def test_it_is_replaced_with_its_transformer(bundle: Bundle) -> None:
    added = step_graph.add(bundle)
    transformer = added.stage("transformer")
    narrow = {
        "inputs": tuple(t.model_copy(update={"dtype": "float16"}) for t in transformer.inputs),
        "outputs": tuple(t.model_copy(update={"dtype": "float16"}) for t in transformer.outputs),
    }
    changed = {"transformer": transformer.model_copy(update=narrow)}
    manifest = added.manifest.model_copy(update={"stages": added.manifest.stages | changed})
    replaced = step_graph.add(Bundle(bundle.path, manifest))
    assert replaced.stage(SAMPLER_STEP).outputs[-1].dtype == "float16"
    assert [f.name for f in bundle.path.glob("*sampler*")] == [replaced.stage(SAMPLER_STEP).file]
    assert open_bundle(bundle.path).manifest == replaced.manifest


def test_coefficients_are_in_the_order_of_the_table() -> None:
    guide = StepGuidance(3, 4, 0.5, (1,), cfg_star_rescale=True)
    found = dict(zip(COEFFICIENTS, coefficients(STEP, guide).tolist(), strict=True))
    wanted = {"guidance_scale": 3, "stg_scale": 4, "rescaling_scale": 0.5, "cfg_star_rescale": 1}
    assert {name: found[name] for name in wanted} == wanted
    assert found["sigma"] == np.float32(STEP.sigma)
