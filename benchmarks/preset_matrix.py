"""Every preset, with every kind of flag, on random weights in the layout of its release.

    python benchmarks/preset_matrix.py [--only NAME] [--out FILE.json]

The models have the releases' metadata, blocks and schedules; their widths are small, so that each
block that a preset names is there and a run takes a second. Each family is exported once by
`ltx-export onnx --preset`. A combination must give a finite clip of the wished size in the number
of steps that the preset says, or be refused in one line where the matrix says so. The last line is
JSON; exit code 1 if one combination is otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from ltx_engines import pipeline_config, presets
from ltx_engines.errors import UserError
from ltx_engines.presets import PRESETS, Preset
from ltx_export import cli, graphs, templates
from ltx_ref.ltx_video.config import parse_config
from ltx_ref.ltx_video.model import LTXVideo
from ltx_ref.ltx_video.upsampler import LatentUpsampler
from ltx_ref.ltx_video.upsampler_config import CLASS_NAME, SPATIAL
from ltx_trt import pipeline
from ltx_trt.backend import Choice, Memory
from ltx_trt.pipeline import Decoded, StepDone
from ltx_trt.request import Wishes, resolve
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages
from report import Facts, machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

from make_checkpoint import write_random  # noqa: E402 - in a folder of tools
from releases import File, Model, Tensor, Vae, Wish, video_config  # noqa: E402

STAGES = "text_encoder,transformer,vae_decoder,latent_upsampler"
TEXT_ENCODER = ROOT / "runtime/ltx_trt/ltx_tiny/text_encoder"
CHANNELS, BASE, HEADS = 16, 8, 2
HEAD_DIM = {"2B": 16, "13B": 32}
"""Twice as wide in the larger model, as in the releases."""

FLAGS: dict[str, dict[str, Any]] = {
    "none": {},
    "guidance": {"guidance_scale": 2.0},
    "no guidance": {"guidance_scale": 1.0, "stg_scale": 0.0},
    "stg": {"stg_scale": 0.5, "rescaling_scale": 0.3},
    "steps": {"num_inference_steps": 6},
    "words": {"negative_prompt": "dull", "seed": 2**63},
    "size": {"width": 160, "height": 96, "num_frames": 17, "frame_rate": 12.0},
    "odd size": {"width": 100, "height": 70, "num_frames": 10},
    "sampler": {"sampler": "ddim", "eta": 0.5},
}
REFUSED = ("guidance", "stg", "steps")
"""Of distilled models. Without a block that is named, STG is only without effect."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`said` is why it was refused, or what is wrong with it."""

    preset: str
    flags: str
    right: bool
    seconds: float
    steps: int = 0
    said: str = ""


def release_config(preset: Preset, layers: int | None = None) -> dict[str, Any]:
    """The metadata of the preset's release, or of one with so many blocks."""
    version = preset.name.split("-")[2]
    model = Model.small if preset.release.size == "2B" else Model.large
    vae = Vae(version) if version in ("0.9", "0.9.1") else Vae.third
    return video_config(Wish(model, layers=layers, vae=vae, distilled=preset.release.distilled))


def metadata(preset: Preset) -> dict[str, Any]:
    """The release's own, but for its widths."""
    table = release_config(preset)
    width = HEADS * HEAD_DIM[preset.release.size]
    caption = json.loads((TEXT_ENCODER / "config.json").read_text(encoding="utf-8"))["d_model"]
    table["transformer"] |= {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM[preset.release.size],
        "cross_attention_dim": width,
        "caption_channels": caption,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
    }
    bases = {f"{end}_base_channels": BASE for end in ("encoder", "decoder")}
    table["vae"] |= {"latent_channels": CHANNELS, **bases}
    return table


def write_weights(path: Path, table: dict[str, Any], module: Callable[[], torch.nn.Module]) -> None:
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in module().state_dict().items()}
    tensors = tuple(Tensor(name, "F32", shape) for name, shape in shapes.items())
    file = File("", tensors, {"config": json.dumps(table), "format": "pt"})
    for _ in write_random(path, file, seed=0):
        pass


def export(preset: Preset, table: dict[str, Any], home: Path) -> Path:
    """A bundle whose defaults are the preset's."""
    checkpoint, upsampler = home / "checkpoint.safetensors", home / "upsampler.safetensors"
    write_weights(checkpoint, table, lambda: LTXVideo(parse_config(table)))
    small = replace(SPATIAL, in_channels=CHANNELS, mid_channels=64)
    write_weights(
        upsampler, {"_class_name": CLASS_NAME, **asdict(small)}, lambda: LatentUpsampler(small)
    )
    words = ["onnx", str(checkpoint), "--text-encoder", str(TEXT_ENCODER), "--preset", preset.name]
    words += ["--upsampler", str(upsampler), "--out", str(home / "bundle"), "--stages", STAGES]
    if cli.main(words):
        raise SystemExit(f"{preset.name}: the export failed")
    return home / "bundle"


def expected_steps(preset: Preset, flags: str) -> int:
    """Of both passes; six of thirty are five in the first and three in the second."""
    if flags == "steps":
        return 6 if len(preset.steps) == 1 else 5 + 3
    return sum(preset.steps)


def is_refused(preset: Preset, flags: str) -> bool:
    if flags == "stg" and len(preset.steps) == 1:
        return False
    return preset.release.distilled and flags in REFUSED


def attempt(preset: Preset, flags: str, stages: Stages) -> Outcome:
    started = perf_counter()
    sizes = {"width": 128, "height": 64, "num_frames": 9}
    wishes = Wishes("a red circle", **{**sizes, **FLAGS[flags]})
    config = pipeline_config.load(presets.named(preset.name))
    try:
        request, _ = resolve(wishes, stages.bundle, config)
        with closing(pipeline.generate(request, stages.bundle, stages)) as generated:
            events = list(generated)
    except UserError as error:
        told, right = str(error), is_refused(preset, flags) and "\n" not in str(error)
        return Outcome(preset.name, flags, right, perf_counter() - started, said=told)
    steps = sum(isinstance(event, StepDone) for event in events)
    frames = np.concatenate([event.frames for event in events if isinstance(event, Decoded)])
    wished = (wishes.num_frames, wishes.height, wishes.width, 3)
    right = not is_refused(preset, flags) and frames.shape == wished
    right &= steps == expected_steps(preset, flags) and int(frames.max()) > int(frames.min())
    told = "" if right else f"{steps} steps, frames {frames.shape}"
    return Outcome(preset.name, flags, right, perf_counter() - started, steps, told)


def trace_once() -> None:
    """The families share most graphs, and a trace of a VAE takes a minute."""
    kept: dict[str, onnx.ModelProto] = {}
    trace = graphs.traced

    def traced(stage: str, model: graphs.Model) -> ir.Model:
        key = json.dumps([stage, graphs.facts(stage, model), model.layers(stage)], sort_keys=True)
        if key not in kept:
            kept[key] = templates.to_proto(trace(stage, model))
        return templates.from_proto(kept[key])

    graphs.traced = traced


def outcomes(chosen: list[Preset]) -> Iterator[Outcome]:
    """A family stays open while its presets are tried; one is the export's."""
    families: dict[str, list[Preset]] = {}
    for preset in chosen:
        families.setdefault(json.dumps(metadata(preset), sort_keys=True), []).append(preset)
    for table, members in families.items():
        with TemporaryDirectory() as home:
            bundle = export(members[-1], json.loads(table), Path(home))
            with open_stages(bundle, Choice(memory=Memory.resident)) as stages:
                for preset in members:
                    for flags in FLAGS:
                        yield attempt(preset, flags, stages)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="A preset; else all.")
    parser.add_argument("--out", type=Path, help="Also write the JSON here.")
    asked = parser.parse_args()
    only = asked.only
    torch.set_num_threads(1)
    trace_once()
    chosen = [*PRESETS.values()] if only is None else [presets.find(only)]
    found: list[Outcome] = []
    for outcome in outcomes(chosen):
        found.append(outcome)
        kind = "refused" if outcome.right and outcome.said else f"{outcome.steps} steps"
        word = kind if outcome.right else f"WRONG: {outcome.said}"
        print(
            f"{outcome.preset:<30}{outcome.flags:<14}{outcome.seconds:6.2f} s  {word}", flush=True
        )
    wrong = [outcome for outcome in found if not outcome.right]
    facts: Facts = {
        "machine": machine(),
        "combinations": len(found),
        "ran": sum(not outcome.said for outcome in found),
        "refused": sum(bool(outcome.said) and outcome.right for outcome in found),
        "wrong": [asdict(outcome) for outcome in wrong],
        "seconds": round(sum(outcome.seconds for outcome in found), 1),
    }
    if asked.out is not None:
        asked.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
