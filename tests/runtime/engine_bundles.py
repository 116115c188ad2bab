"""Bundles with engines for the fake GPU: plans beside the graphs, named by the manifest."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ltx_engines import bundle
from ltx_engines.bundle import EngineEntry, FileEntry, Manifest, StageEntry, TensorEntry
from ltx_engines.cache_key import EngineKey, Profile, Range
from ltx_engines.shapes import VideoShape
from ltx_engines.targets import Flavour
from tests.runtime.fake_engines import Limits, Plan

STAGES = ("text_encoder", "transformer", "vae_decoder")


@dataclass(frozen=True, slots=True)
class Engines:
    """What is built. `dtype` takes float32's place at the engines' edges, where the stage's own
    precision is meant and not where float32 is fixed. `conditioning` is as `build-engine` has it.
    """

    clips: tuple[VideoShape, ...]
    stages: tuple[str, ...] = STAGES
    branches: int = 3
    dtype: str = "float32"
    flavour: Flavour = "tensorrt-rtx"
    version: str = "1.7.1.116"
    targets: tuple[int, ...] = (89,)
    weights: int = 1000
    streamable: int = 0
    refittable: tuple[str, ...] = ()
    conditioning: int | None = None


def add(folder: Path, engines: Engines) -> None:
    """Write the plans of a bundle's stages, and their entries in its manifest."""
    manifest = bundle.read(folder)
    for stage in engines.stages:
        manifest = _add(folder, manifest, stage, engines)
    bundle.update(folder, manifest)


def _add(folder: Path, manifest: Manifest, stage: str, engines: Engines) -> Manifest:
    entry = manifest.stages[stage]
    found = [
        profile for clip in engines.clips for profile in _profiles(manifest, entry, clip, engines)
    ]
    profiles = [profile for index, profile in enumerate(found) if profile not in found[:index]]
    name = f"{stage}.{'-'.join(f'sm{t}' for t in engines.targets)}.{engines.flavour}"
    dtypes = {t.name: _dtype(t, engines) for t in (*entry.inputs, *entry.outputs)}
    plan = Plan(
        stage,
        str(folder / entry.file),
        tuple(limits(entry.inputs, profile) for profile in profiles),
        dtypes=dtypes,
        flavour=engines.flavour,
        version=engines.version,
        targets=engines.targets,
        weights=engines.weights,
        streamable=engines.streamable,
        refittable=engines.refittable,
    )
    files = {f"{name}.engine": _written(plan, folder / f"{name}.engine")}
    files[f"{name}.layers.json"] = folder / f"{name}.layers.json"
    files[f"{name}.layers.json"].write_text("[]\n", encoding="utf-8")
    described = EngineEntry(
        file=f"{name}.engine",
        layers=f"{name}.layers.json",
        key=_key(manifest, stage, profiles, engines),
        inputs=_stored(entry.inputs, dtypes),
        outputs=_stored(entry.outputs, dtypes),
        activations=4096,
        refittable=bool(engines.refittable),
    )
    return manifest.model_copy(
        update={
            "files": {**manifest.files, **{n: file_entry(f) for n, f in files.items()}},
            "engines": (*manifest.engines, described),
        }
    )


def _written(plan: Plan, file: Path) -> Path:
    """As large as its weights: that is what the runtime plans with."""
    plan.write(file)
    file.write_text(file.read_text(encoding="utf-8").ljust(plan.weights), encoding="utf-8")
    return file


def file_entry(file: Path) -> FileEntry:
    data = file.read_bytes()
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def limits(inputs: Sequence[TensorEntry], profile: Profile) -> Mapping[str, Limits]:
    """The smallest, likeliest and largest shape of each input."""
    return {
        t.name: (
            tuple(a if isinstance(a, int) else profile[a][0] for a in t.axes),
            tuple(a if isinstance(a, int) else profile[a][1] for a in t.axes),
            tuple(a if isinstance(a, int) else profile[a][2] for a in t.axes),
        )
        for t in inputs
    }


def _dtype(tensor: TensorEntry, engines: Engines) -> str:
    fixed = tensor.name in ("coords", "timestep") or tensor.dtype != "float32"
    return tensor.dtype if fixed else engines.dtype


def _stored(rows: Sequence[TensorEntry], dtypes: Mapping[str, str]) -> tuple[TensorEntry, ...]:
    return tuple(row.model_copy(update={"dtype": dtypes[row.name]}) for row in rows)


def _key(
    manifest: Manifest, stage: str, profiles: Sequence[Profile], engines: Engines
) -> EngineKey:
    entry = manifest.stages[stage]
    graph = manifest.files[entry.file].sha256
    assert graph is not None
    return EngineKey(
        stage=stage,
        graph=graph,
        weights={name: manifest.files[name] for name in entry.weights},
        profiles=tuple(profiles),
        flavour=engines.flavour,
        version=engines.version,
        targets=engines.targets,
    )


def _profiles(
    manifest: Manifest, entry: StageEntry, clip: VideoShape, engines: Engines
) -> Iterator[Profile]:
    yield (profile := _profile(manifest, entry, clip, engines.branches))
    if engines.conditioning is None:
        return
    if "timesteps" in profile:
        frames, rows, columns = clip.latent
        most = (frames + engines.conditioning) * rows * columns
        yield profile | dict.fromkeys(("tokens", "timesteps"), (clip.tokens, most, most))
    if "frames" in profile:
        yield profile | {
            "frames": (1, clip.frames, clip.frames),
            "latent_frames": (1, clip.latent[0], clip.latent[0]),
        }


def _profile(manifest: Manifest, entry: StageEntry, clip: VideoShape, branches: int) -> Profile:
    sizes = _sizes(manifest, clip, branches)
    axes = (axis for tensor in entry.inputs for axis in tensor.axes if isinstance(axis, str))
    return {axis: sizes[axis] for axis in axes}


def _sizes(manifest: Manifest, clip: VideoShape, branches: int) -> dict[str, Range]:
    frames, height, width = clip.latent
    text = 256 if manifest.tokenizer is None else manifest.tokenizer.max_length
    fixed = {
        "tokens": clip.tokens,
        "timesteps": 1,
        "text": text,
        "latent_frames": frames,
        "latent_height": height,
        "latent_width": width,
        "frames": clip.frames,
        "height": clip.height,
        "width": clip.width,
    }
    for noise in manifest.model.noise_blocks:
        number = noise.name.rpartition("_")[2]
        fixed |= {f"height_{number}": height * noise.scale, f"width_{number}": width * noise.scale}
    for scale in (2, 4, 8):
        fixed |= {
            f"latent_height_x{scale}": height * scale,
            f"latent_width_x{scale}": width * scale,
        }
    ranges = {name: (size, size, size) for name, size in fixed.items()}
    return {**ranges, "batch": (1, branches, branches)}
