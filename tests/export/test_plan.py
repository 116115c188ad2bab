"""Plans of the shipped tiny model, and of transformers of the released sizes drawn by hand."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from rich.console import Console

import ltx_trt
from ltx_engines import targets
from ltx_engines.errors import UserError
from ltx_export import fitting, plan_report, quantize, recipes, sources
from ltx_export.calibration import Calibration
from ltx_export.plan import Plan, make
from ltx_export.plan_question import (
    Question,
    float_type,
    largest,
    number,
    own_precision,
    precision,
    usual,
)
from ltx_export.stage_plan import EXPORT_BASE, KERNEL_BYTES, Part, parts
from ltx_ref import quantization
from ltx_ref.checkpoint import Header, TensorInfo, read_header
from ltx_ref.ltx_video.config import read_config

TINY = Path(ltx_trt.__file__).parent / "ltx_tiny"
PREFIX = "model.diffusion_model."
SIZES = {"2b": (28, 2048), "13b": (48, 4096)}
PARAMETERS = {"2b": 1_923_385_472, "13b": 13_042_569_344}
TEXT_WIDTH = 4096

GB = 10**9
RTX_4090 = targets.find("rtx 4090")


class Drawing:
    """A graph in bf16, node by node; weights get names and shapes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, tuple[int, ...]] = {}
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def weight(self, name: str, *shape: int) -> str:
        self.weights[PREFIX + name] = shape
        return PREFIX + name

    def shape(self, *sizes: int) -> str:
        name = f"shape_{len(self.constants)}"
        self.constants.append(helper.make_tensor(name, TensorProto.INT64, [len(sizes)], sizes))
        return name

    def linear(self, x: str, name: str, width: int, out: int) -> str:
        turned = self("Transpose", self.weight(f"{name}.weight", out, width), perm=[1, 0])
        return self("Add", self("MatMul", x, turned), self.weight(f"{name}.bias", out))

    def attention(self, x: str, context: str, name: str, width: int) -> str:
        heads = self.shape(0, 0, 32, width // 32)
        q, k, v = (
            self.linear(of, f"{name}.to_{letter}", width, width)
            for letter, of in (("q", x), ("k", context), ("v", context))
        )
        q, k = (
            self("RMSNormalization", t, self.weight(f"{name}.{letter}_norm.weight", width), axis=-1)
            for letter, t in (("q", q), ("k", k))
        )
        parts = [self("Transpose", self("Reshape", t, heads), perm=[0, 2, 1, 3]) for t in (q, k, v)]
        joined = self("Transpose", self("Attention", *parts), perm=[0, 2, 1, 3])
        return self.linear(
            self("Reshape", joined, self.shape(0, 0, width)), f"{name}.to_out.0", width, width
        )

    def block(self, x: str, context: str, time: str, name: str, width: int) -> str:
        table = self.weight(f"{name}.scale_shift_table", 6, width)
        gates = self("ReduceMean", self("Add", time, table), self.shape(2), keepdims=0)
        x = self("Add", x, self("Mul", self.attention(x, x, f"{name}.attn1", width), gates))
        x = self("Add", x, self.attention(x, context, f"{name}.attn2", width))
        inner = self("Gelu", self.linear(x, f"{name}.ff.net.0.proj", width, 4 * width))
        return self("Add", x, self.linear(inner, f"{name}.ff.net.2", 4 * width, width))


def drawn(size: str, layers: int | None = None) -> Part:
    """A transformer with the weights of a released one, and about its arithmetic."""
    count, width = SIZES[size]
    draw = Drawing()
    time = draw.linear("timestep", "adaln_single.emb.timestep_embedder.linear_1", 256, width)
    time = draw.linear(time, "adaln_single.emb.timestep_embedder.linear_2", width, width)
    head = draw("Unsqueeze", time, draw.shape(2))
    time = draw.linear(time, "adaln_single.linear", width, 6 * width)
    time = draw("Reshape", time, draw.shape(0, 0, 6, width))
    context = draw.linear("prompt_embeds", "caption_projection.linear_1", TEXT_WIDTH, width)
    context = draw.linear(draw("Gelu", context), "caption_projection.linear_2", width, width)
    x = draw.linear("latents", "patchify_proj", 128, width)
    for index in range(layers or count):
        x = draw.block(x, context, time, f"transformer_blocks.{index}", width)
    table = draw("Add", head, draw.weight("scale_shift_table", 2, width))
    x = draw("Add", x, draw("ReduceMean", table, draw.shape(2), keepdims=0))
    draw("Identity", draw.linear(x, "proj_out", width, 128))
    draw.nodes[-1].output[0] = "velocity"
    return _part(draw)


def _part(draw: Drawing) -> Part:
    bf16 = TensorProto.BFLOAT16
    inputs = [
        helper.make_tensor_value_info("latents", bf16, ["batch", "tokens", 128]),
        helper.make_tensor_value_info("timestep", bf16, ["batch", "timesteps", 256]),
        helper.make_tensor_value_info("prompt_embeds", bf16, ["batch", "text", TEXT_WIDTH]),
    ]
    outputs = [helper.make_tensor_value_info("velocity", bf16, ["batch", "tokens", 128])]
    external = [_external(name, shape) for name, shape in draw.weights.items()]
    graph = helper.make_graph(
        draw.nodes, "transformer", inputs, outputs, [*draw.constants, *external]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    tensors = {
        name: TensorInfo("BF16", shape, 0, 2 * prod(shape)) for name, shape in draw.weights.items()
    }
    return Part(ir.from_proto(model), tensors)


def _external(name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
    """A weight that would be read if anybody read it: its file does not exist."""
    tensor = TensorProto(name=name, data_type=TensorProto.BFLOAT16, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="nowhere.safetensors")
    return tensor


@pytest.fixture(scope="module")
def transformer_13b() -> Mapping[str, Part]:
    return {"transformer": drawn("13b")}


@pytest.fixture(scope="module")
def tiny() -> dict[str, Part]:
    files = read_header(TINY / "ltx-tiny.safetensors").tensors
    text = read_header(TINY / "text_encoder" / "model.safetensors").tensors
    return {
        stage: Part(ir.load(TINY / f"{stage}.onnx"), text if stage == "text_encoder" else files)
        for stage in ("text_encoder", "transformer", "vae_encoder", "vae_decoder")
    }


TINY_QUESTION = Question(
    ("256x256x17",), rest_precision="fp32", steps=4, branches=1, text_tokens=16
)


def test_13b_in_fp8_fits_a_4090_and_not_a_4060(transformer_13b: Mapping[str, Part]) -> None:
    found = make(Question(precision="fp8", gpus=("rtx 4090", "rtx 4060")), transformer_13b)
    [stage] = found.stages
    assert stage.parameters == PARAMETERS["13b"]
    large, small = found.verdicts
    assert large.fits
    assert not small.fits
    assert found.exit_code == 3
    assert stage.engine > small.target.memory
    assert small.reasons[0].startswith("transformer needs ")
    assert "engine 13.2," in small.reasons[0]
    assert "RTX 4060 has 8.6 GB" in small.reasons[0]


def test_the_exit_code_is_0_when_all_that_was_asked_for_fits(
    transformer_13b: Mapping[str, Part],
) -> None:
    question = Question(precision="fp8", gpus=("rtx 4090", "rtx 5090"))
    assert make(question, transformer_13b).exit_code == 0
    nobody_asked = make(replace(question, gpus=()), transformer_13b)
    assert {v.fits for v in nobody_asked.verdicts} == {True, False}
    assert nobody_asked.exit_code == 0


def test_parameters_are_the_released_models() -> None:
    assert sum(prod(shape) for shape in _shapes(drawn("2b"))) == PARAMETERS["2b"]


def _shapes(part: Part) -> list[tuple[int, ...]]:
    return [info.shape for info in part.tensors.values()]


@pytest.mark.parametrize(
    ("name", "bytes_each"), [("fp8", 1.0), ("int8", 1.0), ("int4", 0.515625), ("nvfp4", 0.5625)]
)
def test_quantization_shrinks_the_blocks_matrices_and_nothing_else(
    name: str, bytes_each: float
) -> None:
    part = drawn("2b", layers=2)
    plain, small = (
        make(Question(precision=p), {"transformer": part}).stages[0] for p in ("bf16", name)
    )
    matrices = sum(
        prod(info.shape)
        for weight, info in part.tensors.items()
        if ".transformer_blocks." in weight and weight.endswith("weight") and len(info.shape) == 2
    )
    assert plain.engine - small.engine == pytest.approx(matrices * (2 - bytes_each), rel=1e-9)
    assert plain.costs == small.costs


def test_an_engine_is_its_weights_and_little_more() -> None:
    part = drawn("2b", layers=2)
    [stage] = make(Question(), {"transformer": part}).stages
    weights = sum(2 * prod(shape) for shape in _shapes(part))
    assert weights < stage.engine < 1.02 * weights
    assert stage.disk == weights
    assert stage.build_memory > 2 * weights


def test_fp8_on_ampere_is_refused_with_the_reason_whatever_the_memory() -> None:
    part = drawn("2b", layers=1)
    question = Question(("256x256x9",), precision="fp8", gpus=("a100 80gb", "rtx 4060"))
    refused, fine = make(question, {"transformer": part}).verdicts
    assert refused.reasons == (
        "transformer: fp8 needs SM89 or newer, A100 80GB is SM80 (Ampere); "
        "use fp32, fp16, bf16, int8, int4",
    )
    assert not refused.seconds
    assert fine.fits


def test_turing_cannot_even_hold_what_a_quantized_model_leaves_in_bf16() -> None:
    question = Question(("256x256x9",), precision="int8", gpus=("rtx 2080 ti",))
    [verdict] = make(question, {"transformer": drawn("2b", layers=1)}).verdicts
    [reason] = verdict.reasons
    assert reason.startswith("transformer: int8 leaves other weights bf16, and bf16 needs SM80")


def test_the_roofline_never_gets_slower_on_a_better_card() -> None:
    parts = {"transformer": drawn("2b", layers=2)}
    slow, fast = make(Question(gpus=("rtx 4060", "rtx 4090")), parts).verdicts
    assert slow.seconds["transformer"] > fast.seconds["transformer"]
    for verdict in (slow, fast):
        [stage] = make(Question(gpus=("rtx 4060",)), parts).stages
        rate = verdict.target.rate("bf16")
        assert verdict.seconds["transformer"] >= stage.costs.flops / rate
        assert verdict.seconds["transformer"] >= stage.engine * 0.98 / verdict.target.bandwidth


def test_w8a8_is_faster_and_weights_alone_in_fp8_are_not() -> None:
    part = drawn("2b", layers=2)
    published = {
        name: replace(info, dtype="F8_E4M3") if len(info.shape) == 2 else info
        for name, info in part.tensors.items()
    }
    gpus = ("rtx 4090",)
    parts = {"transformer": part}
    bf16 = make(Question(gpus=gpus), parts).verdicts[0].seconds["transformer"]
    fp8 = make(Question(precision="fp8", gpus=gpus), parts).verdicts[0].seconds["transformer"]
    own = make(Question(gpus=gpus), {"transformer": replace(part, tensors=published)})
    assert own.stages[0].number.stored == "fp8"
    assert own.stages[0].number.computed == "bf16"
    assert fp8 < 0.8 * bf16  # attention stays bf16
    assert own.verdicts[0].seconds["transformer"] == pytest.approx(bf16, rel=0.01)


def test_each_branch_of_guidance_costs_one_more_clip() -> None:
    parts = {"transformer": drawn("2b", layers=1)}
    one, three = (make(Question(branches=n), parts).stages[0].costs for n in (1, 3))
    assert three.flops == 3 * one.flops
    assert three.activations == 3 * one.activations


def test_a_timestep_for_each_token_takes_more_memory() -> None:
    parts = {"transformer": drawn("2b", layers=1)}
    one, each, keyframes = (
        make(Question(conditioning=n), parts).stages[0].costs for n in (None, 0, 2)
    )
    assert one.activations < each.activations < keyframes.activations
    assert one.io < each.io < keyframes.io


def test_the_shipped_model_fits_a_small_card_at_once(tiny: dict[str, Part]) -> None:
    found = make(replace(TINY_QUESTION, gpus=("rtx 3070",)), tiny)
    [verdict] = found.verdicts
    assert verdict.residency == "all resident"
    assert {stage.name: stage.number.stored for stage in found.stages} == dict.fromkeys(
        tiny, "fp32"
    )
    size = sum((TINY / name).stat().st_size for name in ("ltx-tiny.safetensors",))
    in_file = sum(s.disk for s in found.stages if s.name != "text_encoder")
    assert in_file == pytest.approx(size, rel=0.03)  # a header, and statistics in both VAE stages


def test_a_clip_takes_all_its_steps(tiny: dict[str, Part]) -> None:
    found = make(replace(TINY_QUESTION, gpus=("l4",)), tiny)
    [verdict] = found.verdicts
    parts = verdict.seconds
    wanted = parts["text_encoder"] + 4 * parts["transformer"] + parts["vae_decoder"]
    assert found.run_seconds(verdict) == pytest.approx(wanted)


def on_cards_of(
    memories: Sequence[int], tiny: Mapping[str, Part], monkeypatch: pytest.MonkeyPatch
) -> Plan:
    """The plan of cards with so much free memory, for the stages that can be cut small."""
    cards = tuple(
        replace(RTX_4090, name=f"RTX {index}", memory=fitting.RESERVED + memory)
        for index, memory in enumerate(memories)
    )
    monkeypatch.setattr(targets, "TARGETS", cards)
    parts = {name: part for name, part in tiny.items() if name != "transformer"}
    gpus = tuple(card.name for card in cards)
    return make(replace(TINY_QUESTION, shapes=("768x512x121",), gpus=gpus), parts)


def test_less_memory_means_stages_in_turn_then_tiles_then_no(
    tiny: Mapping[str, Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = [int(10 * GB * 0.8**n) for n in range(34)]
    found = on_cards_of(memories, tiny, monkeypatch)
    together = sum(stage.engine for stage in found.stages)
    assert found.verdicts[0].residency == "all resident"
    assert {v.residency for v in found.verdicts} == {"all resident", "staged", None}
    counts = [
        v.tilings["vae_decoder"].count for v in found.verdicts if v.residency == "all resident"
    ]
    assert counts[0] == 1 < counts[-1]
    assert counts == sorted(counts)
    fitting = [verdict.fits for verdict in found.verdicts]
    assert fitting == sorted(fitting, reverse=True)
    for verdict, memory in zip(found.verdicts, memories, strict=True):
        assert verdict.fits == (max(verdict.memory.values()) <= memory)
        if verdict.residency == "all resident":
            assert min(verdict.memory.values()) > together


def test_tiles_cover_the_clip_with_their_overlaps(
    tiny: Mapping[str, Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = on_cards_of([500_000_000], tiny, monkeypatch)
    tiling = found.verdicts[0].tilings["vae_decoder"]
    assert tiling.count > 1
    pieces = [
        -(-(size - lap) // (tile - lap))
        for size, tile, lap in zip(found.shape.latent, tiling.tile, fitting.OVERLAP, strict=True)
    ]
    assert prod(pieces) <= tiling.count
    frames, rows, columns = tiling.tile
    assert tiling.pixels == f"{32 * columns}x{32 * rows}x{8 * frames - 7}"


def test_a_convolution_that_cannot_count_its_elements_is_tiled(tiny: dict[str, Part]) -> None:
    parts = {"vae_decoder": tiny["vae_decoder"]}
    question = replace(TINY_QUESTION, shapes=("2560x1440x1001",), gpus=("b200",))
    found = make(question, parts)
    [verdict] = found.verdicts
    assert found.stages[0].most_elements > 2**31 - 1
    assert verdict.fits
    assert verdict.tilings["vae_decoder"].count > 1
    assert all(c.elements <= 2**31 - 1 for c in verdict.tilings["vae_decoder"].costs.convolutions)


def test_attention_in_float32_has_no_kernel() -> None:
    part = drawn("2b", layers=1)
    for value in (*part.model.graph.inputs, *part.model.graph.outputs):
        value.dtype = ir.DataType.FLOAT
    for value in part.model.graph.initializers.values():
        if value.name in part.tensors:
            value.const_value, value.dtype = None, ir.DataType.FLOAT
    [verdict] = make(Question(("64x64x9",), "fp32", gpus=("l4",)), {"transformer": part}).verdicts
    assert verdict.reasons == (
        "transformer: no attention kernel for fp32 heads of 64; "
        "wanted fp16 or bf16 and at most 256",
    )


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("1216x704x121",), (121, 704, 1216)),
        (("256x256x9..1216x704x121",), (121, 704, 1216)),
        (("1216x704x121..256x256x9", "64x64x17"), (121, 704, 1216)),
        (("32x32x257", "512x512x9"), (9, 512, 512)),
    ],
)
def test_the_largest_clip_of_ranges_and_lists_counts(
    words: tuple[str, ...], wanted: tuple[int, int, int]
) -> None:
    shape = largest(words)
    assert (shape.frames, shape.height, shape.width) == wanted


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ({"shapes": ("1216x704",)}, "shape '1216x704' is not WIDTHxHEIGHTxFRAMES"),
        ({"shapes": ("1216x704x120",)}, "frames must be 8k + 1, not 120; try 121"),
        ({"shapes": ("1216x720x121",)}, "height must be a multiple of 32, not 720; try 704"),
        ({"precision": "fp9"}, "unknown precision 'fp9'; did you mean 'fp8'?"),
        (
            {"rest_precision": "fp8"},
            "vae_decoder cannot be fp8; give --rest-precision one of fp32, fp16, bf16",
        ),
        ({"rest_precision": "bf61"}, "unknown precision 'bf61'; did you mean 'bf16'?"),
        ({"text_tokens": 0}, "text tokens must be at least 1, not 0"),
        ({"gpus": ("rtx 9999",)}, "unknown GPU 'rtx 9999'"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"branches": -1}, "branches must be at least 1, not -1"),
        ({"branches": 4}, "branches must be at most 3, not 4"),
    ],
)
def test_a_typo_in_the_order_costs_one_line(
    question: dict[str, Any], wanted: str, tiny: dict[str, Part]
) -> None:
    with pytest.raises(UserError, match=re.escape(wanted)) as caught:
        make(replace(TINY_QUESTION, **question), {"vae_decoder": tiny["vae_decoder"], **tiny})
    assert "\n" not in str(caught.value)


def test_a_precision_is_known_by_its_long_name_too() -> None:
    assert [precision(word) for word in ("bfloat16", "bf16", "float32", "int8")] == [
        *("bf16", "bf16", "fp32", "int8")
    ]


@pytest.mark.parametrize(
    ("transformer", "rest", "wanted"),
    [
        ("fp16", None, "fp16"),
        ("float32", None, "fp32"),
        ("fp8", None, "bf16"),
        (None, None, "bf16"),
        ("fp8", "fp16", "fp16"),
        ("bf16", "float32", "fp32"),
    ],
)
def test_the_other_stages_follow_a_float_type_and_their_own_option_before_it(
    transformer: str | None, rest: str | None, wanted: str
) -> None:
    assert Question(precision=transformer, rest_precision=rest).rest == wanted
    tensors = {"a": TensorInfo("BF16", (8,), 0, 16)}
    question = Question(precision=transformer, rest_precision=rest)
    assert number("vae_decoder", question, tensors).stored == wanted


def test_more_tokens_of_a_prompt_cost_more(tiny: dict[str, Part]) -> None:
    few, many = (
        make(replace(TINY_QUESTION, text_tokens=n), {"text_encoder": tiny["text_encoder"]})
        for n in (16, 256)
    )
    assert many.stages[0].costs.flops > 16 * few.stages[0].costs.flops


def test_a_stage_says_in_which_type_its_graph_is_wanted() -> None:
    tensors = {"a": TensorInfo("F8_E4M3", (8, 8), 0, 64), "b": TensorInfo("BF16", (8,), 64, 80)}
    assert own_precision("transformer", tensors) == "fp8"
    assert float_type("transformer", Question(), tensors) == "bfloat16"
    assert float_type("transformer", Question(precision="fp16"), tensors) == "float16"
    assert float_type("vae_decoder", Question(rest_precision="float32"), tensors) == "float32"
    assert number("transformer", Question(precision="int4"), tensors).computed == "bf16"
    odd = {"a": TensorInfo("I64", (8,), 0, 64)}
    with pytest.raises(UserError, match="the weights of transformer are I64; say their --prec"):
        own_precision("transformer", odd)


@pytest.mark.parametrize(
    ("name", "computed"),
    [("fp8", "fp8"), ("int8", "int8"), ("fp8-cast", "fp32"), ("int4-wo", "fp32")],
)
def test_a_quantized_checkpoint_is_planned_as_it_is(
    tmp_path: Path, name: Any, computed: str
) -> None:
    quantized = quantized_tiny(tmp_path / "q.safetensors", name)
    question = Question(("256x256x17",), gpus=("rtx 4090",), branches=1)
    found = make(question, parts(sources.read(quantized.path), question, ("transformer",)))
    [stage] = found.stages
    mine = [i for n, i in quantized.tensors.items() if n.startswith(PREFIX)]
    stored = {"fp8-cast": "fp8", "int4-wo": "int4"}.get(name, name)
    assert (stage.number.stored, stage.number.computed, stage.number.base) == (
        *(stored, computed),
        "fp32",
    )
    assert stage.disk == sum(info.end - info.begin for info in mine)
    assert stage.engine - KERNEL_BYTES * len(stage.costs.kernels) == pytest.approx(
        stage.disk, rel=0.01
    )
    assert stage.parameters == sum(
        prod(shape) for n, shape in quantization.shapes(quantized).items() if n.startswith(PREFIX)
    )
    assert stage.export_memory == EXPORT_BASE


def test_another_precision_for_what_is_quantized_is_refused(tmp_path: Path) -> None:
    quantized = quantized_tiny(tmp_path / "q.safetensors", "int8-wo")
    question = Question(precision="fp8")
    with pytest.raises(UserError, match=r"quantized already \(int8-wo\); leave out --precision"):
        parts(sources.read(quantized.path), question, ("transformer",))


def test_a_format_of_some_layers_alone_decides_where_it_runs(tmp_path: Path) -> None:
    some = recipes.Rule("transformer_blocks.5.*", "nvfp4", "why")
    rest = recipes.load("int8-wo").rules
    quantized = quantized_tiny(
        tmp_path / "q.safetensors", recipes.Recipe("mixed", "", "max", None, (some, *rest))
    )
    question = Question(("256x256x17",), gpus=("rtx 4090",), branches=1)
    made = make(question, parts(sources.read(quantized.path), question, ("transformer",)))
    assert made.stages[0].number.stored == "int8"
    assert "nvfp4 needs SM100 or newer" in " ".join(made.verdicts[0].reasons)


def quantized_tiny(path: Path, recipe: str | recipes.Recipe) -> Header:
    """The shipped checkpoint by a recipe, with ranges of ones."""
    header = read_header(TINY / "ltx-tiny.safetensors")
    chosen = recipes.load(recipe) if isinstance(recipe, str) else recipe
    ranges = {
        layer: np.ones(header.tensors[f"{layer}.weight"].shape[1], np.float32)
        for layer in quantize.linear_layers(header)
    }
    known = Calibration(path, ranges, {}) if chosen.calibrated else None
    for _ in quantize.write(quantize.plan(header, chosen, known), path):
        pass
    return read_header(path)


def test_a_checkpoint_on_the_disk_is_planned_without_torch() -> None:
    code = f"""
import sys
from pathlib import Path
from ltx_export import plan, sources, stage_plan
from ltx_export.plan_question import Question
tiny = Path({str(TINY)!r})
question = Question(("256x256x17",), "bf16", gpus=("rtx 4060",), branches=1)
stages = ("text_encoder", "transformer", "vae_encoder", "vae_decoder")
files = sources.read(tiny / "ltx-tiny.safetensors", tiny / "text_encoder")
found = plan.make(question, stage_plan.parts(files, question, stages))
assert [stage.name for stage in found.stages] == list(stages)
assert found.verdicts[0].fits, found.verdicts[0].reasons
print({{"torch", "transformers"}} & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_steps_and_branches_are_those_of_the_model() -> None:
    config = read_config(read_header(TINY / "ltx-tiny.safetensors"))
    assert usual(replace(config, allowed_inference_steps=None)) == (40, 3)
    assert usual(replace(config, allowed_inference_steps=(1.0, 0.9, 0.5))) == (3, 1)


def test_a_weight_without_a_file_is_a_mistake(tiny: dict[str, Part]) -> None:
    with pytest.raises(AssertionError, match="weights of the graph are in no file"):
        make(TINY_QUESTION, {"vae_decoder": replace(tiny["vae_decoder"], tensors={"x": _F32})})


_F32 = TensorInfo("F32", (1,), 0, 4)


def shown(found: Plan, *, terminal: bool, width: int = plan_report.UNFOLDED) -> str:
    stream = io.StringIO()
    plan_report.show(found, Console(file=stream, width=width, force_terminal=terminal))
    return stream.getvalue()


def test_the_tables_say_yes_and_no_in_words(tiny: dict[str, Part]) -> None:
    text = shown(make(replace(TINY_QUESTION, gpus=("rtx 4060",)), tiny), terminal=False)
    assert "256x256x17: 192 tokens, 4 steps of 1 branch\n" in text
    assert "RTX 4060: yes, all stages at once;" in text
    for stage in tiny:
        assert re.search(rf"^{stage} +fp32 +0\.\d{{3}} G", text, re.MULTILINE)
    assert "not counted" not in text
    assert "a bound from the GPU's rates, not a promise" in text
    assert text.isascii()


def test_a_yes_for_some_stages_is_not_a_yes_for_all(tiny: dict[str, Part]) -> None:
    without = {"vae_encoder": "not in x", "text_encoder": "give y", "vae_decoder": "not in x"}
    parts = {"transformer": tiny["transformer"]}
    found = make(replace(TINY_QUESTION, gpus=("rtx 4060",)), parts, without)
    lines = shown(found, terminal=False).splitlines()
    assert lines[1] == (
        "vae_encoder, vae_decoder not counted: not in x; text_encoder not counted: give y"
    )
    [sentence] = [line for line in lines if line.startswith("RTX 4060: yes")]
    assert "the counted stages at once" in sentence
    assert "all stages" not in sentence
    assert plan_report.document(found)["not_counted"] == without


@pytest.mark.parametrize("width", [plan_report.FOLDED, plan_report.UNFOLDED])
def test_a_table_keeps_every_number_in_its_width(width: int) -> None:
    part = drawn("2b", layers=1)
    published = {
        name: replace(info, dtype="F8_E4M3") if len(info.shape) == 2 else info
        for name, info in part.tensors.items()
    }
    gpus = ("rtx pro 6000 blackwell", "rtx 4060")
    names = ("transformer", "latent_upsampler")
    parts = dict.fromkeys(names, replace(part, tensors=published))
    question = Question(("1216x704x257",), rest_precision="bf16", gpus=gpus)
    text = re.sub(
        r"\x1b\[[\d;]*m", "", shown(make(question, parts), terminal=width == 80, width=width)
    )
    tables = text[text.index("Stages") : text.index("RTX PRO 6000 Blackwell: ")].splitlines()
    assert max(map(len, tables)) <= width
    assert not re.search("\u2026", text)
    for row in ("transformer", "latent_upsampler", "RTX 4060"):
        assert any(re.match(rf"{row} +\S", line) for line in tables)


def test_a_terminal_gets_rules_between_the_rows(tiny: dict[str, Part]) -> None:
    found = make(replace(TINY_QUESTION, gpus=("rtx 4060",)), tiny)
    assert not shown(found, terminal=True).isascii()


def test_the_document_is_json_and_holds_what_the_tables_show(tiny: dict[str, Part]) -> None:
    found = make(replace(TINY_QUESTION, precision="fp32", gpus=("rtx 4060", "l4")), tiny)
    document = json.loads(json.dumps(plan_report.document(found)))
    assert document["exit_code"] == 0
    assert list(document["stages"]) == list(tiny)
    assert [gpu["name"] for gpu in document["gpus"]] == ["RTX 4060", "L4"]
    for stage in found.stages:
        row = document["stages"][stage.name]
        assert row["parameters"] == stage.parameters
        assert row["device_memory"] > stage.engine
        assert row["flops_per_step"] == stage.costs.flops
    for gpu, verdict in zip(document["gpus"], found.verdicts, strict=True):
        assert gpu["fits"] is verdict.fits
        assert gpu["source"] == verdict.target.source
