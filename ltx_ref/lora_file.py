"""A LoRA's own file: which module each key means, in every style of names that is in use.

    diffusers  transformer.transformer_blocks.0.attn1.to_q.lora_A.weight  (or .lora.down.weight)
    PEFT       base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight
    ComfyUI    diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight  (or .lora_down.weight)
    kohya      lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight

Modules are compared without prefix, with `_` for every dot, and in the checkpoint's own words.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from ltx_ref import casts
from ltx_ref.checkpoint import CheckpointError, Header, read_header

Role = Literal["down", "up", "alpha", "diff", "diff_b"]
"""A is `down`, B is `up`; `diff` is the change of a weight as it is, `diff_b` that of a bias."""

ENDINGS: MappingProxyType[str, Role] = MappingProxyType(
    {
        ".lora_A.weight": "down",
        ".lora_B.weight": "up",
        ".lora_A.default.weight": "down",
        ".lora_B.default.weight": "up",
        ".lora_down.weight": "down",
        ".lora_up.weight": "up",
        ".lora.down.weight": "down",
        ".lora.up.weight": "up",
        ".alpha": "alpha",
        ".diff": "diff",
        ".diff_b": "diff_b",
    }
)
INTEGERS = MappingProxyType({"I64": np.int64, "I32": np.int32})
"""Types that trainers write alpha in, beside the floats."""

STYLES = MappingProxyType(
    {
        "base_model.model.": "PEFT",
        "transformer.": "diffusers",
        "model.diffusion_model.": "checkpoint",
        "diffusion_model.": "ComfyUI",
        "lora_unet_": "kohya",
        "lora_transformer_": "kohya",
    }
)
"""By the prefix of the keys."""

RENAMES = MappingProxyType(
    {
        "proj_in": "patchify_proj",
        "time_embed": "adaln_single",
        "norm_q": "q_norm",
        "norm_k": "k_norm",
    }
)
"""The four words in which diffusers' module names differ from the checkpoint's."""

UNSUPPORTED = MappingProxyType(
    {
        "dora_scale": "DoRA, which also rescales every row",
        "lora_magnitude_vector": "DoRA, which also rescales every row",
        "lora_mid": "a LoCon with a third factor",
        "hada_w": "a LoHa",
        "lokr_w": "a LoKr",
        "lora_B.bias": "a LoRA with biases",
        "lora_B.default.bias": "a LoRA with biases",
        "oft_": "an OFT",
    }
)
"""Adapters that are not a sum of products; by a part of their keys."""

ELSEWHERE = MappingProxyType(
    {
        r"audio_": "LTX-2",
        r"single_transformer_blocks_": "FLUX",
        r"(double|single)_blocks_": "FLUX or HunyuanVideo",
        r"^blocks_\d+_": "Wan",
        r"text_model_": "a CLIP text encoder",
        r"(down|up|input|output)_blocks_": "Stable Diffusion",
    }
)
"""What other models' modules are called."""

RELEASES = MappingProxyType({2048: "LTX-Video 2B", 4096: "LTX-Video 13B"})
"""By width. LTX-2 is as wide as 13B, but has modules for audio."""

READS_WIDTH = re.compile(r"(attn1_to_[qkv]|attn2_to_q|to_out_0|ff_net_0_proj)$")
WRITES_WIDTH = re.compile(r"(attn\d_to_[qkv]|to_out_0|ff_net_2)$")
BLOCK = re.compile(r"^transformer_blocks_(\d+)_")


@dataclass(frozen=True, slots=True)
class Module:
    """What the file has for one module: the key of each role. `name` is without prefix."""

    name: str
    keys: Mapping[Role, str]


@dataclass(frozen=True, slots=True)
class Likeness:
    """What a model's modules tell about it; 0 where they do not."""

    family: str
    blocks: int
    width: int

    def __str__(self) -> str:
        if self.family != "LTX-Video" or not self.width:
            return self.family
        known = RELEASES.get(self.width, self.family)
        return f"{known} (width {self.width}, {self.blocks} blocks)"

    def contradicts(self, other: "Likeness") -> bool:
        both = self.width and other.width
        return self.family != other.family or bool(both and self.width != other.width)


@dataclass(frozen=True, slots=True)
class Settings:
    """PEFT keeps alpha beside the weights, in metadata or in adapter_config.json."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    file: Path | None = None

    def alpha_of(self, module: str) -> float | None:
        """PEFT's rule: a pattern matches the end of the module's name, the first one counts."""
        for pattern, alpha in self.alpha_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.alpha


@dataclass(frozen=True, slots=True)
class LoraFile:
    header: Header
    modules: Mapping[str, Module]
    """By the flat name."""
    settings: Settings

    @property
    def path(self) -> Path:
        return self.header.path

    def shape(self, key: str) -> tuple[int, ...]:
        return self.header.tensors[key].shape

    def rank(self, module: Module) -> int:
        return self.shape(module.keys["down"])[0]

    def alpha(self, module: Module) -> float | None:
        """None where none is given, and the product counts as it is."""
        if (key := module.keys.get("alpha")) is None:
            return self.settings.alpha_of(module.name)
        info = self.header.tensors[key]
        with self.path.open("rb") as file:
            value = casts.read(file, info)
        value = value.view(INTEGERS[info.dtype]) if info.dtype in INTEGERS else value
        if value.size != 1 or not math.isfinite(value[0]):
            raise CheckpointError(
                f"{self.path}: {key} must be one finite number, not {value[:3]}; download it again"
            )
        return float(value[0])

    def scale(self, module: Module) -> float:
        """What the product B @ A is multiplied with before the strength."""
        if (alpha := self.alpha(module)) is None:
            return 1.0
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.settings.rank_stabilized else rank)

    def style(self) -> str:
        names = {_style(key) for key in self.header.tensors}
        return " and ".join(sorted(names))

    def likeness(self) -> Likeness:
        pairs = {flat: m.keys for flat, m in self.modules.items() if {"down", "up"} <= {*m.keys}}
        shapes = {
            flat: (self.shape(keys["up"])[0], *self.shape(keys["down"])[1:])
            for flat, keys in pairs.items()
        }
        return likeness(shapes | {flat: () for flat in self.modules if flat not in shapes})


def read(path: Path) -> LoraFile:
    """
    Raises:
        CheckpointError: not a safetensors file, or not a LoRA that can be fused.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the .safetensors file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; give the LoRA's .safetensors file")
    header = read_header(path)
    _check_supported(header)
    found = LoraFile(header, _modules(header), _settings(header))
    for module in found.modules.values():
        _check_module(found, module)
    return found


def flat(name: str) -> str:
    """A module's or a weight's name in the form in which all styles agree."""
    words = bare(name).replace(".", "_")
    for theirs, ours in RENAMES.items():
        words = words.replace(theirs, ours)
    return words


def bare(name: str) -> str:
    """Without any of the prefixes, of which there may be several."""
    for prefix in STYLES:
        if name.startswith(prefix):
            return bare(name.removeprefix(prefix))
    return name


def likeness(shapes: Mapping[str, tuple[int, ...]]) -> Likeness:
    """Of a denoiser, from the shapes of its linear layers by flat name; () is not known."""
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("vae_")}
    family = next((known for part, known in ELSEWHERE.items() if _any(part, shapes)), "LTX-Video")
    widths = [s[1] for name, s in shapes.items() if len(s) == 2 and READS_WIDTH.search(name)]
    widths += [s[0] for name, s in shapes.items() if len(s) == 2 and WRITES_WIDTH.search(name)]
    found = (BLOCK.match(name) for name in shapes)
    blocks = max((int(match[1]) + 1 for match in found if match), default=0)
    return Likeness(family, blocks, widths[0] if widths else 0)


def _any(part: str, names: Iterable[str]) -> bool:
    return any(re.search(part, name) for name in names)


def _style(key: str) -> str:
    return next((style for prefix, style in STYLES.items() if key.startswith(prefix)), "bare names")


def _check_supported(header: Header) -> None:
    for key, info in header.tensors.items():
        if (
            reason := next((r for part, r in UNSUPPORTED.items() if part in key), None)
        ) is not None:
            raise CheckpointError(
                f"{header.path}: {key} makes this {reason}; only plain LoRAs are fused, "
                "fuse it with the program it was trained with"
            )
        whole = info.dtype in INTEGERS and key.endswith(".alpha")
        if info.dtype not in casts.FLOATS and not whole:
            raise CheckpointError(f"{header.path}: {key} is {info.dtype}; take the float version")


def _modules(header: Header) -> dict[str, Module]:
    names: dict[str, str] = {}
    found: dict[str, dict[Role, str]] = {}
    strange = []
    for key in header.tensors:
        ending = next((end for end in ENDINGS if key.endswith(end)), None)
        if ending is None:
            strange.append(key)
            continue
        module, role = key.removesuffix(ending), ENDINGS[ending]
        keys = found.setdefault(flat(module), {})
        if role in keys:
            raise CheckpointError(
                f"{header.path}: {keys[role]} and {key} mean the same; remove one of them"
            )
        keys[role] = key
        names.setdefault(flat(module), bare(module))
    if strange or not found:
        what = listed(strange) if strange else "no tensors"
        raise CheckpointError(
            f"{header.path} is not a LoRA: it has {what}; known endings: .lora_A.weight"
        )
    return {name: Module(names[name], keys) for name, keys in found.items()}


def _check_module(found: LoraFile, module: Module) -> None:
    """A and B are there, and go together."""
    keys = module.keys
    if ("down" in keys) != ("up" in keys):
        key, lacks = (keys["down"], "up (B)") if "down" in keys else (keys["up"], "down (A)")
        raise CheckpointError(f"{found.path}: {key} has no {lacks} beside it; download it again")
    if "down" not in keys:
        if keys.keys() == {"alpha"}:
            raise CheckpointError(
                f"{found.path}: {keys['alpha']} has no factors; download it again"
            )
        return
    down, up = found.shape(keys["down"]), found.shape(keys["up"])
    if len(down) < 2 or len(up) < 2 or 0 in down + up or prod(up[2:]) != 1:
        raise CheckpointError(
            f"{found.path}: {keys['down']} is {list(down)} and {keys['up']} {list(up)}, "
            "wanted [rank, inputs] and [outputs, rank]; download it again"
        )
    if down[0] != up[1]:
        raise CheckpointError(
            f"{found.path}: {keys['down']} has rank {down[0]}, {keys['up']} has rank {up[1]}; "
            "download it again"
        )


def _settings(header: Header) -> Settings:
    """What diffusers writes into the metadata, or PEFT beside the file."""
    if (text := header.metadata.get("lora_adapter_metadata")) is not None:
        table = _json_object(text, f"{header.path}: metadata lora_adapter_metadata")
        return _parsed({key.removeprefix("transformer."): v for key, v in table.items()}, header)
    beside = header.path.with_name("adapter_config.json")
    peft = any(key.startswith("base_model.model.") for key in header.tensors)
    if not peft or not beside.is_file():
        return Settings()
    return _parsed(_json_object(beside.read_bytes(), str(beside)), header, beside)


def _parsed(table: Mapping[str, Any], header: Header, file: Path | None = None) -> Settings:
    where = file or f"{header.path}: metadata lora_adapter_metadata"
    if table.get("use_dora"):
        raise CheckpointError(f"{where}: use_dora is set; only plain LoRAs are fused")
    try:
        alpha = table.get("lora_alpha")
        patterns = {str(k): float(v) for k, v in (table.get("alpha_pattern") or {}).items()}
        for pattern in patterns:
            re.compile(pattern)
        return Settings(
            None if alpha is None else float(alpha), patterns, bool(table.get("use_rslora")), file
        )
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{where}: alpha is not understood ({error}); download it again"
        ) from None


def _json_object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}); download it again") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{where} is not a JSON object; download it again")
    return table


def listed(names: Iterable[str]) -> str:
    """The first three, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
