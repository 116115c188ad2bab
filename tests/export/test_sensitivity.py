"""The error that a layer causes, in real runs of small models, against the formula done by hand."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltx_engines.errors import UserError
from ltx_export import recipes, sensitivity
from ltx_export.calibration import Calibration
from ltx_export.recipes import Recipe
from ltx_export.sensitivity_report import Errors
from ltx_ref.checkpoint import read_header
from ltx_ref.ltx_video.model import LTXVideo, load, skeleton
from ltx_ref.ltx_video.transformer import Block, Transformer
from ltx_ref.offload import offloaded
from tests.export.checkpoints import (
    CAPTION_CHANNELS,
    LATENT_CHANNELS,
    LAYERS,
    config,
    write_checkpoint,
)
from tests.export.generators import finish
from tests.ref.oracles import normals

B = "model.diffusion_model.transformer_blocks."
TOKENS, WORDS, CALLS = 12, 5, 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("m") / "small.safetensors", config("0.9.5"))


def run(transformer: Transformer, calls: int = CALLS) -> list[Tensor]:
    """A few calls, of two branches."""
    found, dtype = [], transformer.proj_out.weight.dtype
    for call in range(calls):
        x = normals(2, TOKENS, LATENT_CHANNELS, seed=call).to(dtype)
        text = normals(2, WORDS, CAPTION_CHANNELS, seed=10 + call).to(dtype)
        coords = torch.arange(TOKENS).expand(2, 3, TOKENS).float()
        sigma = torch.full((2, 1), 1 - 0.3 * call)
        keep, mask = torch.ones(LAYERS, 2, dtype=dtype), torch.ones(2, WORDS, dtype=dtype)
        found.append(transformer(x, coords, sigma, text, mask, keep))
    return found


def block_inputs(model: LTXVideo, block: int) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """What a block is given, and what it makes of it."""
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    module = model.transformer.transformer_blocks[block]
    handle = module.register_forward_hook(lambda _, args, y: seen.append((args, y)))
    run(model.transformer)
    handle.remove()
    return seen


def calibrated(model: LTXVideo) -> Calibration:
    """The largest inputs of each layer in the same runs."""
    ranges: dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]] = {}

    def note(path: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        amax = args[0].abs().flatten(0, -2).amax(0).float().numpy()
        ranges[path] = np.maximum(ranges.get(path, amax), amax)

    handles = [
        module.register_forward_pre_hook(partial(note, path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith(B)
    ]
    run(model.transformer)
    for handle in handles:
        handle.remove()
    return Calibration(Path("ranges"), ranges, {})


def unsmoothed() -> Recipe:
    return replace(recipes.load("int8"), name="int8 max", algorithm="max", alpha=None)


@contextmanager
def measured(
    checkpoint: Path, folder: Path, *chosen: Recipe, calls: frozenset[int] = frozenset(range(CALLS))
) -> Iterator[sensitivity.Watch]:
    """The model runs when this is entered."""
    folder.mkdir(exist_ok=True)
    model = load(checkpoint)
    ranges = calibrated(model)
    paths = finish(sensitivity.written(read_header(checkpoint), chosen, ranges, folder))
    with (
        sensitivity.opened(paths, chosen) as candidates,
        sensitivity.watched(model.transformer, candidates) as watch,
    ):
        watch.begin(calls, "a test")
        run(model.transformer)
        yield watch


def errors_of(checkpoint: Path, folder: Path, *chosen: Recipe) -> list[Errors]:
    with measured(checkpoint, folder, *chosen) as watch:
        return [watch.relative(number) for number in range(len(chosen))]


def relative(pairs: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Of x, y and y_q of all calls, in float64."""
    change = sum(float((y.double() - x.double()).square().sum()) for x, y, _ in pairs)
    error = sum(float((q.double() - y.double()).square().sum()) for _, y, q in pairs)
    return float(np.sqrt(error / change))


def rounded(weight: Tensor) -> Tensor:
    """Each row to 127 steps, whose size is rounded up to a bfloat16 number."""
    scale = weight.double().abs().amax(1, keepdim=True) / 127
    near = scale.to(torch.bfloat16)
    up = torch.where(near < scale, torch.nextafter(near, torch.tensor(9.0).bfloat16()), near)
    return ((weight / up.float()).round() * up.float()).float()


def weight_of(block: nn.Module, kind: str) -> Tensor:
    linear = block.get_submodule(kind)
    assert isinstance(linear, nn.Linear)
    return linear.weight


def twin_of(model: LTXVideo, block: int) -> Block:
    module = model.transformer.transformer_blocks[block]
    assert isinstance(module, Block)
    return sensitivity.widened(module, model.config.transformer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_layer_is_that_of_its_block_with_this_layer_alone_changed(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """In float32 whatever the model's type is: a 16-bit output hides a small error."""
    file = write_checkpoint(tmp_path / "small.safetensors", config("0.9.5"), dtype=dtype)
    found = errors_of(file, tmp_path, recipes.load("int8-wo"))[0]
    model = load(file)
    for block, kind in ((0, "attn1.to_v"), (1, "ff.net.0.proj"), (1, "attn2.to_out.0")):
        seen = block_inputs(model, block)
        twin = twin_of(model, block)
        widened = [tuple(map(sensitivity.wide, args)) for args, _ in seen]
        before = [twin(*args) for args in widened]
        weight = weight_of(twin, kind)
        twin.get_submodule(kind).weight = nn.Parameter(rounded(weight))
        after = [twin(*args) for args in widened]
        by_hand = relative(
            [(args[0], y, q) for args, y, q in zip(widened, before, after, strict=True)]
        )
        assert found.layers[f"{B}{block}.{kind}"] == pytest.approx(by_hand, rel=1e-4)
        assert found.formats[f"{B}{block}.{kind}"] == "int8-wo"


def test_a_block_in_float32_makes_what_the_block_makes(checkpoint: Path) -> None:
    model = load(checkpoint)
    twin = twin_of(model, 1)
    for args, y in block_inputs(model, 1):
        assert torch.equal(twin(*args), y)
    half = twin_of(model.to(torch.bfloat16), 1)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float32}


def test_the_error_of_a_block_is_that_with_all_of_its_layers_changed(
    checkpoint: Path, tmp_path: Path
) -> None:
    found = errors_of(checkpoint, tmp_path, recipes.load("int8-wo"))[0]
    model = load(checkpoint)
    seen = block_inputs(model, 1)
    module = model.transformer.transformer_blocks[1]
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.copy_(rounded(linear.weight.clone()))
    by_hand = relative([(args[0], y, module(*args)) for args, y in seen])
    assert found.blocks[f"{B}1"] == pytest.approx(by_hand, rel=1e-4)
    assert found.blocks.keys() == {f"{B}0", f"{B}1"}


def test_quantized_activations_are_part_of_the_error(checkpoint: Path, tmp_path: Path) -> None:
    found = errors_of(checkpoint, tmp_path, unsmoothed())[0]
    model = load(checkpoint)
    path, ranges = f"{B}1.ff.net.2", calibrated(model).ranges
    seen = block_inputs(model, 1)
    module = model.transformer.transformer_blocks[1]
    weight_of(module, "ff.net.2").copy_(rounded(weight_of(module, "ff.net.2").clone()))
    step = float(rounded(torch.from_numpy(ranges[path])[None]).max() / 127)
    module.get_submodule("ff.net.2").register_forward_pre_hook(
        lambda _, args: ((args[0] / step).round().clamp(-128, 127) * step,)
    )
    by_hand = relative([(args[0], y, module(*args)) for args, y in seen])
    assert found.layers[path] == pytest.approx(by_hand, rel=1e-2)


def test_every_layer_of_every_block_is_measured_in_each_recipe(
    checkpoint: Path, tmp_path: Path
) -> None:
    chosen = [recipes.load(name) for name in ("fp8", "int8", "fp8-cast")]
    for errors, recipe in zip(errors_of(checkpoint, tmp_path, *chosen), chosen, strict=True):
        assert len(errors.layers) == 10 * LAYERS
        assert set(errors.formats.values()) == {recipe.name}
        assert all(0 < error < 1 for error in errors.layers.values())


def test_the_run_itself_is_not_disturbed(checkpoint: Path, tmp_path: Path) -> None:
    alone = run(load(checkpoint).transformer)
    model = load(checkpoint)
    paths = finish(
        sensitivity.written(
            read_header(checkpoint), [recipes.load("int8")], calibrated(model), tmp_path
        )
    )
    with (
        sensitivity.opened(paths, [recipes.load("int8")]) as candidates,
        sensitivity.watched(model.transformer, candidates) as watch,
    ):
        watch.begin(frozenset(range(CALLS)), "a test")
        beside = run(model.transformer)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone, run(model.transformer), strict=True))


def test_only_the_wanted_calls_are_measured(checkpoint: Path, tmp_path: Path) -> None:
    one, cast = frozenset({1}), recipes.load("fp8-cast")
    with measured(checkpoint, tmp_path, cast, calls=one) as watch:
        found = watch.relative(0).layers[f"{B}0.attn1.to_q"]
    model = load(checkpoint)
    args, y = block_inputs(model, 0)[1]
    module = model.transformer.transformer_blocks[0]
    weight = weight_of(module, "attn1.to_q")
    weight.copy_(weight.to(torch.float8_e4m3fn).float())
    assert found == pytest.approx(relative([(args[0], y, module(*args))]), rel=1e-4)


def test_one_resident_block_gives_the_same_errors(checkpoint: Path, tmp_path: Path) -> None:
    cast = [recipes.load("fp8-cast")]
    resident = errors_of(checkpoint, tmp_path, *cast)[0]
    model = skeleton(read_header(checkpoint))
    with (
        sensitivity.opened([tmp_path / "0.safetensors"], cast) as candidates,
        offloaded(model, checkpoint),
        sensitivity.watched(model.transformer, candidates) as watch,
    ):
        watch.begin(frozenset(range(CALLS)), "a test")
        run(model.transformer)
        assert watch.relative(0) == resident


def changed(checkpoint: Path, path: Path, tensors: Mapping[str, Tensor]) -> Path:
    header = read_header(checkpoint)
    save_file(load_file(checkpoint) | dict(tensors), path, dict(header.metadata))
    return path


def worst(errors: Errors) -> str:
    return max(errors.layers, key=lambda path: errors.layers[path])


def test_an_outlier_column_of_weights_makes_its_layer_the_most_sensitive(
    checkpoint: Path, tmp_path: Path
) -> None:
    """The column's input is silent, so the outlier costs the others their steps and helps none."""
    tensors = load_file(checkpoint)
    rows, silent = f"{B}1.ff.net.0.proj", tensors[f"{B}1.ff.net.0.proj.bias"].clone()
    silent[7] = -50.0  # gelu(-50) = 0
    columns = tensors[f"{B}1.ff.net.2.weight"].clone()
    columns[:, 7] = 100.0
    edits = {f"{rows}.bias": silent, f"{B}1.ff.net.2.weight": columns}
    file = changed(checkpoint, tmp_path / "outlier.safetensors", edits)
    assert worst(errors_of(checkpoint, tmp_path / "a", unsmoothed())[0]) != f"{B}1.ff.net.2"
    assert worst(errors_of(file, tmp_path / "b", unsmoothed())[0]) == f"{B}1.ff.net.2"


def test_smoothing_mends_an_outlier_of_activations(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint)
    loud = tensors[f"{B}1.ff.net.0.proj.bias"].clone()
    loud[7] = 200.0
    columns = tensors[f"{B}1.ff.net.2.weight"].clone()
    columns[:, 7] *= 1e-3
    edits = {f"{B}1.ff.net.0.proj.bias": loud, f"{B}1.ff.net.2.weight": columns}
    file = changed(checkpoint, tmp_path / "loud.safetensors", edits)
    plain, smooth = errors_of(file, tmp_path / "a", unsmoothed(), recipes.load("int8"))
    assert worst(plain) == f"{B}1.ff.net.2"
    assert smooth.layers[f"{B}1.ff.net.2"] < plain.layers[f"{B}1.ff.net.2"] / 5


def test_an_output_that_is_not_finite_is_said_with_its_block(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Numbers of a file are finite, their squares need not be."""
    bias = torch.full((40,), 3e38)
    file = changed(checkpoint, tmp_path / "inf.safetensors", {f"{B}1.ff.net.2.bias": bias})
    found = rf"{B}1: the output is not finite in a test, step 1"
    with (
        pytest.raises(UserError, match=found.replace(".", r"\.")),
        measured(file, tmp_path, recipes.load("int8-wo")),
    ):
        pass


def test_nothing_measured_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with (
        measured(checkpoint, tmp_path, recipes.load("int8-wo"), calls=frozenset()) as watch,
        pytest.raises(UserError, match=r"transformer_blocks\.0 was never called"),
    ):
        watch.relative(0)


def test_a_block_that_changes_nothing_has_errors_without_measure(
    checkpoint: Path, tmp_path: Path
) -> None:
    with measured(checkpoint, tmp_path, recipes.load("int8-wo")) as watch:
        watch.changes[1] = 0.0
        with pytest.raises(UserError, match=r"transformer_blocks\.1 changes nothing"):
            watch.relative(0)
        watch.errors = dict.fromkeys(watch.errors, 0.0)
        assert set(watch.relative(0).layers.values()) == {0.0}


def test_a_recipe_that_quantizes_outside_the_blocks_is_not_measured(checkpoint: Path) -> None:
    table = recipes.load("int8-wo").table()
    table["rule"] = [{"layers": "*", "format": "int8-wo", "why": "all of it"}]
    with pytest.raises(UserError, match=r"(adaln|caption|patchify|proj_out)\S* would become"):
        sensitivity.check(read_header(checkpoint), [recipes.parse(table, "mine")])


@pytest.mark.parametrize(
    ("count", "steps", "wanted"),
    [(1, 8, {0}), (2, 8, {0, 7}), (4, 30, {0, 10, 19, 29}), (4, 3, {0, 1, 2}), (4, 1, {0})],
)
def test_steps_are_sampled_evenly_from_the_first_to_the_last(
    count: int, steps: int, wanted: set[int]
) -> None:
    assert sensitivity.spread(count, steps) == wanted


def test_no_step_is_no_measurement() -> None:
    with pytest.raises(UserError, match="--sample-steps must be at least 1"):
        sensitivity.spread(0, 8)
