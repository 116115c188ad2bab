"""Every preset x every kind of flag, by the command line, on a two-layer model of its family.

A family is what a release's metadata says but for its widths and the number of its blocks; its
graphs are exported as those of a release are, but for the one of streams, which clips this small do
not need. The presets that are guided name blocks that a model of two has not got: they are refused
in one line, and then run from a file that names others.
`benchmarks/preset_matrix.py` has all blocks instead.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from ltx_engines import pipeline_config, presets
from ltx_engines.pipeline_config import PipelineConfig
from ltx_engines.presets import PRESETS, Preset
from ltx_engines.stages import OPTIONAL, STAGES
from ltx_export import cli as exporter
from ltx_ref.ltx_video.config import ModelConfig, VAEConfig, parse_config
from ltx_ref.ltx_video.upsampler import LatentUpsampler
from ltx_ref.ltx_video.upsampler_config import CLASS_NAME
from ltx_trt import cli, media
from ltx_trt.backend import Choice
from ltx_trt.session.bundle_stages import Stages
from ltx_trt.session.choice import open_stages
from preset_matrix import release_config, write_weights
from tests.export.checkpoints import CAPTION_CHANNELS, config, write_checkpoint
from tests.export.conftest import Files
from tests.export.test_upsampler import CONFIGS as UPSAMPLERS

LAYERS = 2
WIDTHS = {
    "transformer": (
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "in_channels",
        "out_channels",
        "caption_channels",
        "cross_attention_dim",
    ),
    "vae": ("latent_channels", "encoder_base_channels", "decoder_base_channels"),
}
"""All that a family's small model has in its own way, but for how many blocks of a kind its VAE
has one after the other."""

SMALL = {"--width": 64, "--height": 64, "--num-frames": 9}

FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "none": (),
        "image": ("--image", "{pictures}/fox.png"),
        "later image": ("--image", "{pictures}/fox.png@-1:0.5", "--image-cond-noise-scale", "0.1"),
        "video": ("--video", "{pictures}/walk.mp4@8", "--num-frames", "17"),
        "input video": ("--input-video", "{pictures}/walk.mp4"),
        "size": ("--width", "96", "--height", "128", "--num-frames", "17", "--frame-rate", "12"),
        "odd size": ("--width", "50", "--height", "36", "--num-frames", "10"),
        "chunks": ("--num-frames", "33", "--frame-rate", "16", "--chunk", "1.1"),
        "steps": ("--num-inference-steps", "6"),
        "guidance": ("--guidance-scale", "2"),
        "stg": ("--stg-scale", "0.5", "--rescaling-scale", "0.3"),
        "no guidance": ("--guidance-scale", "1", "--stg-scale", "0"),
        "words": ("--negative-prompt", "cab", "--seed", str(2**63)),
        "ddim": ("--sampler", "ddim", "--eta", "0.5"),
        "multistep": ("--sampler", "dpmpp-2m"),
        "step caching": ("--sampler", "euler", "--cache-steps", "easycache"),
        "vae tile": ("--vae-tile", "64x64x9", "--width", "96", "--num-frames", "17"),
        "vae whole": ("--vae-tile", "off"),
        "staged": ("--memory", "staged"),
        "resident": ("--memory", "resident"),
        "gif": ("--output", "{out}/a.gif"),
    }
)
TOLD = {
    "guidance": "guidance_scale is 2, but this checkpoint is distilled",
    "stg": "stg_scale is 0.5, but this checkpoint is distilled",
    "steps": "names the noise levels of its two passes|has not learned timestep",
    "step caching": "step caching is not for a distilled checkpoint",
}
"""What a distilled model says to these flags."""

GUIDED = [preset for preset in PRESETS.values() if not preset.release.distilled]

Opened = Callable[[Preset], Path]


@dataclass(frozen=True, slots=True)
class Told:
    """What the command has said."""

    code: int
    error: str
    report: Mapping[str, Any]


def family(preset: Preset) -> dict[str, Any]:
    """The release's metadata, small: wherever `checkpoints.config` says less than a release, it is
    what is so anyway."""
    table = release_config(preset, layers=LAYERS)
    small = config(parse_config(table).generation)
    for part, widths in WIDTHS.items():
        table[part] |= {width: small[part][width] for width in widths}
    blocks = {key: rows for key, rows in small["vae"].items() if key.endswith("blocks")}
    table["vae"] = {k: v for k, v in table["vae"].items() if not k.endswith("blocks")} | blocks
    return table


@pytest.fixture(scope="module")
def bundle_of(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """One bundle for each family."""
    kept: dict[str, Path] = {}

    def export(preset: Preset) -> Path:
        table = family(preset)
        key = json.dumps(table, sort_keys=True)
        if key not in kept:
            home = tmp_path_factory.mktemp("family")
            upsampler = home / "upsampler.safetensors"
            small = UPSAMPLERS["spatial"]
            said = {"_class_name": CLASS_NAME, **asdict(small)}
            write_weights(upsampler, said, partial(LatentUpsampler, small))
            words = ["onnx", str(write_checkpoint(home / "model.safetensors", table))]
            words += ["--text-encoder", str(files.text_encoder), "--upsampler", str(upsampler)]
            words += ["--stages", ",".join((*STAGES, *OPTIONAL))]
            assert exporter.main([*words, "--out", str(home / "bundle")]) == 0
            kept[key] = home / "bundle"
        return kept[key]

    return export


@pytest.fixture(scope="module", autouse=True)
def stay_open() -> Iterator[None]:
    """What the command opens stays open for the next run that opens the same: a run is a tenth of
    a second, of which opening would be most."""
    kept: dict[tuple[Path, Choice], Stages] = {}
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        @contextmanager
        def opened(folder: Path, choice: Choice) -> Iterator[Stages]:
            choice = replace(choice, prompt_cache=None)  # of each test's own cache folder
            if (folder, choice) not in kept:
                kept[folder, choice] = stack.enter_context(open_stages(folder, choice))
            yield kept[folder, choice]

        patch.setattr("ltx_trt.job.open_stages", opened)
        yield


@pytest.fixture(scope="module")
def files_of_two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each preset that is guided."""
    folder = tmp_path_factory.mktemp("configs")
    for preset in GUIDED:
        text = yaml.safe_dump(on_two_blocks(preset))
        (folder / f"{preset.name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(5)
    frames = noise.integers(0, 256, (9, 64, 64, 3), np.uint8)
    Image.fromarray(frames[0]).save(folder / "fox.png")
    media.write(media.Output(folder / "walk.mp4", "mp4"), frames, 30)
    return folder


def run(bundle: Path, words: tuple[str, ...], out: Path, capsys: Any) -> Told:
    said: dict[str, object] = {"--prompt": "a bad cab", "--bundle": bundle}
    said |= {"--output": out / "frames_%04d.png", "--memory": "resident", "--threads": 1, **SMALL}
    said |= dict(zip(words[::2], words[1::2], strict=True))
    capsys.readouterr()
    code = cli.main(["run", *(str(word) for pair in said.items() for word in pair), "--json"])
    heard = capsys.readouterr()
    return Told(code, heard.err, json.loads(heard.out) if code == 0 else {})


def on_two_blocks(preset: Preset) -> dict[str, Any]:
    """A file of what the preset says, with blocks that are there."""

    def there(blocks: list[Any]) -> list[Any]:
        if blocks and isinstance(blocks[0], list):
            return [there(entry) for entry in blocks]
        return sorted({block % LAYERS for block in blocks})

    def changed(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: changed(said)
            if isinstance(said, dict)
            else there(said)
            if key == "skip_block_list"
            else said
            for key, said in settings.items()
        }

    listed = json.loads(presets.as_json())[preset.name]
    return {"checkpoint_path": listed["release"]["file"], **changed(listed["settings"])}


def refusal(preset: Preset, flags: str) -> str | None:
    """What is said in place of a clip."""
    two = len(preset.steps) == 2
    if flags == "input video":
        one = "to begin at noise level 1, at which nothing of it is left"
        return "--input-video is for a run of one pass, as in the original" if two else one
    if flags == "stg" and not two:
        return None  # 0.9.6-distilled names no block that could be left out
    return TOLD.get(flags) if preset.release.distilled else None


def expected_steps(preset: Preset, flags: str) -> tuple[int, ...]:
    """Of each pass. Six of thirty are five in the first and three in the second."""
    if flags != "steps":
        return preset.steps
    return (6,) if len(preset.steps) == 1 else (5, 3)


@pytest.mark.parametrize("name", PRESETS)
def test_a_small_model_is_of_the_presets_family(name: str) -> None:
    preset = PRESETS[name]
    small, release = (
        parse_config(table) for table in (family(preset), release_config(preset, layers=None))
    )
    assert _without_widths(small) == _without_widths(release)
    assert small.transformer.num_layers == LAYERS
    assert small.transformer.caption_channels == CAPTION_CHANNELS
    assert small.generation == release.generation
    assert _kinds(small.vae) <= _kinds(release.vae)
    assert any("inject_noise" in kind for kind in _kinds(small.vae)) == (name == "ltxv-2b-0.9.1")
    assert release.transformer.num_layers == {"2B": 28, "13B": 48}[preset.release.size]
    assert (small.allowed_inference_steps is not None) == preset.release.distilled


def _without_widths(model: ModelConfig) -> dict[str, Any]:
    table = asdict(model)
    for part, widths in WIDTHS.items():
        table[part] = {key: said for key, said in table[part].items() if key not in widths}
    for end in ("encoder", "decoder"):
        table["vae"].pop(f"{end}_blocks")
    return table


def _kinds(vae: VAEConfig) -> set[tuple[str, ...]]:
    """Of blocks, with what they do."""
    rows = (*vae.encoder_blocks, *vae.decoder_blocks)
    return {(name, *(o for o, said in options.items() if said is True)) for name, options in rows}


@pytest.mark.parametrize("name", [preset.name for preset in GUIDED])
def test_blocks_that_two_layers_lack_are_refused_in_one_line(
    bundle_of: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    told = run(bundle_of(PRESETS[name]), ("--preset", name), tmp_path, capsys)
    assert told.code == 2
    assert "skip_block_list names block" in told.error
    assert "the transformer has 0 to 1; choose a preset or config of a model of" in told.error
    assert told.error.count("\n") == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", [preset.name for preset in GUIDED])
def test_the_file_that_names_other_blocks_says_nothing_else_otherwise(
    files_of_two_blocks: Path, name: str
) -> None:
    own = files_of_two_blocks / f"{name}.yaml"
    ours, theirs = (pipeline_config.load(path) for path in (own, presets.named(name)))
    for mine, shipped in zip(ours.passes(), theirs.passes(), strict=True):
        assert mine["skip_block_list"] != shipped["skip_block_list"]
        assert mine | {"skip_block_list": 0} == shipped | {"skip_block_list": 0}
    passes = {"first_pass", "second_pass", "skip_block_list"}
    for key in PipelineConfig.model_fields.keys() - passes:
        assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_on_two_layers_with_every_flag_or_says_why_not(
    bundle_of: Opened,
    files_of_two_blocks: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    flags: str,
) -> None:
    preset = PRESETS[name]
    out = tmp_path / "out"
    out.mkdir()
    words = tuple(word.format(pictures=pictures, out=out) for word in FLAGS[flags])
    config = f"{files_of_two_blocks}/{name}.yaml"
    named = ("--pipeline-config", config) if preset in GUIDED else ("--preset", name)
    told = run(bundle_of(preset), (*named, *words), out, capsys)
    if (said := refusal(preset, flags)) is not None:
        assert told.code == 2
        assert re.search(said, told.error)
        assert told.error.count("\n") == 1
        assert not [*out.iterdir()]
        return
    assert told.code == 0, told.error
    assert _passes(told.report) == expected_steps(preset, flags)
    wished = SMALL | dict(zip(words[::2], words[1::2], strict=True))
    frames = _frames(out)
    size = (int(wished[f"--{side}"]) for side in ("num-frames", "height", "width"))
    assert frames.shape == (*size, 3)
    assert np.ptp(frames) > 0


def _passes(report: Mapping[str, Any]) -> tuple[int, ...]:
    """Steps of each."""
    return tuple(len(sigmas) - 1 for sigmas in report["sigmas_by_pass"])


def _frames(out: Path) -> NDArray[np.uint8]:
    if not (clip := out / "a.gif").is_file():
        return np.stack([np.asarray(Image.open(path)) for path in sorted(out.iterdir())])
    with Image.open(clip) as image:
        return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)])
