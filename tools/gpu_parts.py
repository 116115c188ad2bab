"""Parts of gpu_check.py that drive ltx-export and ltx-trt as a user would.

    python tools/gpu_parts.py PART --work FOLDER --gpu sm89

What a part builds stays in FOLDER for those that come after it. The last line is JSON, the exit
code 1 if something is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_machine
import quantized_slice
from child import ChildError, run
from ltx_engines.targets import LEAST, RTX_CAPABILITIES, Precision
from quantized_slice import EXPORT

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "runtime/ltx_trt/ltx_tiny"
CHECKPOINT = TINY / "ltx-tiny.safetensors"
CONFIG = ROOT / "tools/tiny/ltx-tiny.yaml"
RUN = (sys.executable, "-m", "ltx_trt.cli", "run", "--no-prompt-cache")
PROMPT = "a red circle moves right over a blue ground"
SHAPE = "96x96x17"
SIZES = ("--width", "96", "--height", "96", "--num-frames", "17")

ALIKE_PSNR, ALIKE_SSIM = 30.0, 0.95
"""Of clips of one seed by two programs; half precision is further from float32 than any kernel."""

LAYERS = 4
"""Of the slice."""

Facts = dict[str, Any]
Words = list[str | Path]


@dataclass(frozen=True, slots=True)
class Here:
    """`gpu` is smXX."""

    work: Path
    gpu: str

    @property
    def capability(self) -> int:
        return int(self.gpu.removeprefix("sm"))

    def legal(self, *wanted: Precision) -> list[Precision]:
        return [precision for precision in wanted if self.capability >= LEAST[precision]]

    @property
    def half(self) -> Precision:
        return "bf16" if self.capability >= LEAST["bf16"] else "fp16"

    def bundle(self, precision: str) -> Path:
        return self.work / f"tiny-{precision}"


def tiny(here: Here) -> Facts:
    """All stages in half precision, and with the transformer in the formats of codes."""
    sides: Words = ["--text-encoder", TINY / "text_encoder", "--pipeline-config", CONFIG]
    sizes: Words = ["--gpu", here.gpu, "--shape", SHAPE]
    own: Words = [*EXPORT, "build-engine", CHECKPOINT, *sides, *sizes]
    own += ["--out", here.bundle(here.half)]
    rows: Facts = {here.half: built([*own, "--precision", here.half, "--refittable"])}
    for form in here.legal("fp8", "int8"):
        words: Words = ["--precision", form, "--calibration", ranges(here), *sizes]
        words += ["--out", here.bundle(form), *sides]
        rows[form] = built([*EXPORT, "build-engine", CHECKPOINT, *words])
    return {"passed": True, "engines": rows}


def ranges(here: Here) -> Path:
    """Of activations, from short runs of the one prompt."""
    path, prompts = here.work / "ranges.safetensors", here.work / "prompts.txt"
    if not path.exists():
        prompts.write_text(f"{PROMPT}\n", encoding="utf-8")
        words: Words = ["--text-encoder", TINY / "text_encoder", "--pipeline-config", CONFIG]
        words += ["--prompts", prompts, "--shape", SHAPE, "--out", path]
        run([*EXPORT, "calibrate", CHECKPOINT, *words])
    return path


def built(command: Sequence[str | Path]) -> Facts:
    """Seconds, memory and what the builder said of each engine."""
    cost, said = run(command)
    for line in said.splitlines():
        print(line, flush=True)
    return {**cost.row(), "said": said.splitlines()}


def layers(here: Here) -> Facts:
    """The table of the builder, and the engine's own where it can be opened."""
    rows: Facts = {}
    for folder in sorted(here.work.glob("tiny-*")):
        for engine in json.loads(run([*EXPORT, "inspect", folder, "--json"])[1]):
            inspector = engine["inspector"]
            rows[f"{folder.name} {engine['stage']}"] = {
                "counts": engine["counts"],
                "inspector": engine["no_inspector"],
                "inspector_layers": None if inspector is None else len(inspector["Layers"]),
            }
    whole = all(row["counts"]["unfused S x S softmaxes"] == 0 for row in rows.values())
    opened = all(row["inspector_layers"] for row in rows.values())
    return {"passed": bool(rows) and whole and opened, "engines": rows}


def ladder(here: Here) -> Facts:
    """From float32 to the engine, for each bundle."""
    from ltx_engines.bundle import read

    rows: Facts = {}
    for folder in sorted(here.work.glob("tiny-*")):
        form = folder.name.removeprefix("tiny-")
        file: Words = [CHECKPOINT]
        if form != here.half:
            file = [folder / read(folder).checkpoint, "--original", CHECKPOINT]
        figures = here.work / f"ladder-{form}.json"
        words: Words = ["--prompt", PROMPT, "--shape", SHAPE, "--bundle", folder]
        words += ["--json", figures]
        sides: Words = ["--text-encoder", TINY / "text_encoder", "--pipeline-config", CONFIG]
        done = said([*EXPORT, "verify", *file, *words, *sides])
        rows[form] = json.loads(figures.read_text()) if figures.exists() else {"failed": done}
    passed = all(row.get("passed") and "engine" not in row["skipped"] for row in rows.values())
    return {"passed": bool(rows) and passed, "ladders": rows}


def said(command: Sequence[str | Path]) -> str:
    """Of a command that may fail: the end of what it printed."""
    try:
        return run(command)[1][-2000:]
    except ChildError as error:
        return str(error)


def clip(here: Here, name: str, *options: str | Path) -> Facts:
    """A run's own report; the frames lie in `name`."""
    out = here.work / name
    words: Words = ["--prompt", PROMPT, "--seed", "7", *SIZES, "--json", "--output", out]
    report: Facts = json.loads(run([*RUN, *words, *options])[1].splitlines()[-1])
    return report


def by_engine(here: Here, name: str, *options: str | Path) -> Facts:
    words: Words = ["--bundle", here.bundle(here.half), "--backend", flavour(here)]
    return clip(here, name, *words, *options)


def by_cpu(here: Here, name: str, *options: str | Path) -> Facts:
    """ONNX Runtime, in float32."""
    return clip(here, name, "--backend", "onnxruntime", "--provider", "cpu", *options)


def flavour(here: Here) -> str:
    """Of the engines that `tiny` has built."""
    return flavour_of(here.bundle(here.half))


def flavour_of(bundle: Path) -> str:
    from ltx_engines.bundle import read

    return read(bundle).engines[0].key.flavour


def alike(here: Here, name: str, other: str) -> Facts:
    """Two clips, by metrics.py, and whether they are the same to the eye."""
    from ltx_engines import metrics

    clips = [frames(here.work / folder) for folder in (name, other)]
    found = metrics.measure(*clips)
    near = found.psnr >= ALIKE_PSNR and found.ssim >= ALIKE_SSIM
    return {"psnr": round(found.psnr, 2), "ssim": round(found.ssim, 4), "alike": near}


def frames(folder: Path) -> Any:
    import numpy as np
    from PIL import Image

    paths = sorted(folder.glob("*.png"))
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def clips(here: Here) -> Facts:
    reports = {"onnxruntime": by_cpu(here, "cpu"), "engine": by_engine(here, "engine")}
    reports |= {"again": by_engine(here, "again")}
    reports |= {"without_graphs": by_engine(here, "kernels", "--no-cuda-graphs")}
    found = alike(here, "engine", "cpu")
    wanted = reports["engine"]["sha256"]
    same = {name: reports[name]["sha256"] == wanted for name in ("again", "without_graphs")}
    return {"passed": found["alike"], **found, "same_bytes": same, "reports": reports}


def stream(here: Here) -> Facts:
    """A clip decoded whole beside the same clip 16 frames at a time, of one transformer."""
    bundle = here.work / "stream"
    words: Words = [*EXPORT, "build-engine", CHECKPOINT, "--text-encoder", TINY / "text_encoder"]
    words += ["--pipeline-config", CONFIG, "--precision", here.half, "--gpu", here.gpu]
    words += ["--stages", "text_encoder,transformer,vae_decoder", "--vae-stream", "16"]
    rows: Facts = {"engines": built([*words, "--shape", "96x96x65", "--out", bundle])}
    own: Words = ["--bundle", bundle, "--backend", flavour_of(bundle), "--num-frames", "65"]
    ways = {"whole": "off", "streamed": "stream", "again": "stream"}
    reports = {name: clip(here, name, *own, "--vae-tile", way) for name, way in ways.items()}
    found = alike(here, "whole", "streamed")
    most = int(abs(frames(here.work / "whole").astype(int) - frames(here.work / "streamed")).max())
    same = reports["streamed"]["sha256"] == reports["again"]["sha256"]
    found |= {"most_levels": most, "same_bytes": same}
    return {"passed": found["alike"], **found, "reports": reports, **rows}


def provider(here: Here) -> Facts:
    """ONNX Runtime's own way onto the card."""
    by_cpu(here, "cpu-2")
    words = ["--backend", "onnxruntime", "--provider", "cuda"]
    report = clip(here, "cuda", *words)
    found = alike(here, "cuda", "cpu-2")
    return {"passed": found["alike"], **found, "report": report}


def lora(here: Here) -> Facts:
    """The same LoRA into an engine on the card and into the graph's weights on the CPU."""
    file = write_lora(here.work / "lora.safetensors")
    words = ["--lora", f"{file}:0.8"]
    by_cpu(here, "cpu-lora", *words)
    report = by_engine(here, "engine-lora", *words)
    by_engine(here, "engine-plain")
    found = alike(here, "engine-lora", "cpu-lora")
    changed = alike(here, "engine-lora", "engine-plain")["psnr"] < found["psnr"]
    passed = found["alike"] and changed
    return {"passed": passed, **found, "changes_the_clip": changed, "report": report}


def write_lora(path: Path) -> Path:
    """Of rank 4 for one attention and one feed-forward layer of each block."""
    import numpy as np

    from ltx_ref.checkpoint import read_header

    rng, header = np.random.default_rng(0), read_header(CHECKPOINT)
    prefix, tensors = "model.diffusion_model.", {}
    for name, info in header.tensors.items():
        if name.endswith(("attn1.to_v.weight", "ff.net.2.weight")):
            module = name.removeprefix(prefix).removesuffix(".weight")
            outputs, inputs = info.shape
            down = rng.standard_normal((4, inputs), np.float32) / np.float32(inputs**0.5)
            up = rng.standard_normal((outputs, 4), np.float32)
            tensors[f"diffusion_model.{module}.lora_A.weight"] = down
            tensors[f"diffusion_model.{module}.lora_B.weight"] = up
    path.write_bytes(safetensors(tensors))
    return path


def safetensors(tensors: dict[str, Any]) -> bytes:
    """The format, for which the runtime's own dependencies have no writer; float32 only."""
    table, parts, end = {}, [], 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        table[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [begin, end]}
        parts.append(array.tobytes())
    head = json.dumps(table).encode()
    return len(head).to_bytes(8, "little") + head + b"".join(parts)


def memory(here: Here) -> Facts:
    """Peaks by the runs' own reports; with less than it takes at once the clip is the same."""
    plain = by_engine(here, "plain")
    kept = by_engine(here, "kept", "--keep-loaded")
    peak = plain["device_memory"]
    less = by_engine(here, "less", "--device-memory", str(peak))
    words: Words = ["--prompt", PROMPT, "--output", here.work / "refused", *SIZES]
    words += ["--bundle", here.bundle(here.half), "--device-memory", "1MiB"]
    refused = said([*RUN, *words])
    same = plain["sha256"] == kept["sha256"] == less["sha256"]
    peaks = {
        name: row["device_memory"]
        for name, row in {"plain": plain, "keep-loaded": kept, "device-memory": less}.items()
    }
    return {
        "passed": same and "ended with 2" in refused,
        "peaks": peaks,
        "same": same,
        "with_1_MiB": refused,
    }


def warm(here: Here) -> Facts:
    """Nothing compiled for this card is kept yet, then something is."""
    os.environ["XDG_CACHE_HOME"] = str(here.work / "cold")
    rows = [by_engine(here, f"start-{number}")["seconds"] for number in range(2)]
    opened = [sum(s for name, s in row.items() if name.endswith("_open")) for row in rows]
    return {"passed": True, "open_s": {"first": opened[0], "second": opened[1]}, "seconds": rows}


def slices(here: Here) -> Facts:
    """Blocks of the true 2B transformer, built and stepped at the true size; then with half of the
    weights in host memory."""
    plain, rows = quantized_slice.made(here.work, LAYERS, "bf16"), Facts()
    shape = "1216x704x121"
    sizes = ["--gpu", here.gpu, "--shape", shape, "--branches", "1", "--stages", "transformer"]
    for form in here.legal("bf16", "fp8", "int8"):
        file = plain if form == "bf16" else quantized_slice.quantized(plain, form, here.work)
        bundle = quantized_slice.exported(file)
        rows[form] = attempt(lambda b=bundle: stepped(b, sizes, shape))  # type: ignore[misc]
    if (peak := rows.get("bf16", {}).get("peak_memory")) is not None:
        less = str(peak - plain.stat().st_size // 2)
        bundle, streams = plain.with_suffix(""), [*sizes, "--weight-streaming"]
        rows["streamed"] = attempt(lambda: stepped(bundle, streams, shape, "--device-memory", less))
    return {"passed": bool(rows) and not any("failed" in row for row in rows.values()), **rows}


def stepped(bundle: Path, sizes: Sequence[str], shape: str, *options: str) -> Facts:
    facts = built([*EXPORT, "build-engine", bundle, *sizes])
    step = ROOT / "benchmarks/engine_gpu_step.py"
    _, text = run([sys.executable, step, bundle, shape, "5", *options])
    facts |= json.loads(text.splitlines()[-1])
    return facts


def attempt(work: Callable[[], Facts]) -> Facts:
    try:
        return work()
    except ChildError as error:
        return {"failed": str(error)}


def swaps(here: Here) -> Facts:
    """How much of a load is hidden behind another engine's run, of the slice in bf16."""
    script = ROOT / "tools/gpu_swaps.py"
    _, text = run([sys.executable, script, here.work / "slice"])
    return {"passed": True, **json.loads(text.splitlines()[-1])}


def rtx(here: Here) -> Facts:
    """A small engine of TensorRT-RTX, made in each way that there is, and what becomes of it. A
    card that it knows must run its own; of any other card this is a question."""
    ways = ("no list", "CURRENT", f"SM{here.capability}", "portable")
    rows = {}
    for way in ways:
        script = ROOT / "tools/gpu_rtx.py"
        command = [sys.executable, str(script), way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        ended = f"it ended with {done.returncode}: {gpu_machine.last(done.stderr)}"
        rows[way] = json.loads(lines[-1]) if lines and not done.returncode else {"crashed": ended}
        print(f"{way:<10} {json.dumps(rows[way])}", flush=True)
    known = here.capability in RTX_CAPABILITIES
    ran = [way for way, row in rows.items() if row.get("runs")]
    return {"passed": not known or ways[2] in ran, "in_its_list": known, "runs": ran, "ways": rows}


PARTS = (tiny, layers, ladder, clips, stream, provider, lora, memory, warm, slices, swaps, rtx)


def main() -> int:
    named = {part.__name__: part for part in PARTS}
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("part", choices=named)
    words.add_argument("--work", type=Path, required=True)
    words.add_argument("--gpu", required=True)
    asked = words.parse_args()
    try:
        found = named[asked.part](Here(asked.work, asked.gpu))
    except ChildError as error:
        found = {"passed": False, "failed": str(error)}
    print(json.dumps(found))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
