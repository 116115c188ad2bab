"""What `ltx-export inspect` says of files whose weights are a hole: only headers can be read."""

import json
import os
import struct
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

import ltx_trt
from ltx_engines.errors import UserError
from ltx_export import inspection, quantize, recipes
from ltx_ref.checkpoint import BITS, CheckpointError, read_header

TINY = Path(ltx_trt.__file__).parent / "ltx_tiny"
CHECKPOINT = TINY / "ltx-tiny.safetensors"

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def sparse(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file that ends in a hole as long as its weights."""
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    os.truncate(path, 8 + len(head) + end)
    return path


def like_tiny(path: Path, **changes: str) -> Path:
    """The shipped checkpoint's header; `changes` are element types of weights of two axes."""
    header = read_header(CHECKPOINT)
    tensors: Tensors = {}
    for name, info in header.tensors.items():
        block = "transformer_blocks" in name and name.endswith(".weight") and len(info.shape) == 2
        tensors[name] = (changes["blocks"] if block and changes else "BF16", info.shape)
    return sparse(path, tensors, dict(header.metadata))


def report(path: Path, tensors: int | None = 10) -> str:
    return "\n".join(inspection.lines(path, tensors=tensors))


def test_the_shipped_checkpoint_says_what_it_is() -> None:
    text = report(CHECKPOINT)
    header = read_header(CHECKPOINT)
    parameters = sum(
        prod(info.shape) for name, info in header.tensors.items() if name.startswith("model.")
    )
    assert f"{CHECKPOINT.stat().st_size:,} bytes, {len(header.tensors):,} tensors" in text
    assert f"parameters {parameters:,} F32" in text
    assert "weights: float, floating-point weights" in text
    assert "family: ltx_video" in text
    assert "transformer: 6 layers" in text


def test_the_largest_tensors_are_listed_largest_first_and_all_if_asked() -> None:
    sizes = [int(line.split()[0].replace(",", "")) for line in tensor_lines(10)]
    assert len(sizes) == 10
    assert sizes == sorted(sizes, reverse=True)
    header = read_header(CHECKPOINT)
    assert sizes[0] == max(info.end - info.begin for info in header.tensors.values())
    assert len(tensor_lines(None)) == len(header.tensors)


def tensor_lines(count: int | None) -> list[str]:
    return [line for line in report(CHECKPOINT, count).splitlines() if line.startswith("    ")]


def test_plain_fp8_weights_are_recognised(tmp_path: Path) -> None:
    text = report(like_tiny(tmp_path / "fp8.safetensors", blocks="F8_E4M3"))
    assert "weights: fp8_plain, plain 8-bit casts without scales" in text
    assert " F8_E4M3" in next(line for line in text.splitlines() if "transformer: " in line)


def test_weights_with_scales_are_recognised(tmp_path: Path) -> None:
    tensors: Tensors = {
        "model.diffusion_model.x.weight": ("F8_E4M3", (8, 8)),
        "model.diffusion_model.x.weight_scale": ("F32", (1,)),
    }
    lines = inspection.lines(sparse(tmp_path / "scaled.safetensors", tensors))
    with pytest.raises(CheckpointError, match="ltx-export onnx needs the configuration"):
        said = []
        for line in lines:
            said.append(line)
    assert any("weights: scaled, quantized weights with scales" in line for line in said)


def test_int8_weights_are_recognised(tmp_path: Path) -> None:
    text = report(like_tiny(tmp_path / "int8.safetensors", blocks="I8"))
    assert "weights: unsupported, " in text
    assert "is I8" in text


def sharded_text_encoder(folder: Path) -> Path:
    """The shipped encoder in two files; the path of their index."""
    table = read_header(TINY / "text_encoder" / "model.safetensors").tensors
    places: dict[str, str] = {}
    for index, names in enumerate((sorted(table)[::2], sorted(table)[1::2])):
        shard = f"model-{index + 1:05}-of-00002.safetensors"
        sparse(folder / shard, {name: (table[name].dtype, table[name].shape) for name in names})
        places |= dict.fromkeys(names, shard)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    (folder / "config.json").write_bytes((TINY / "text_encoder" / "config.json").read_bytes())
    return path


def test_a_folder_of_a_text_encoder_is_one_model(tmp_path: Path) -> None:
    whole = report(TINY / "text_encoder")
    assert "family: t5, 2 layers" in whole
    sharded_text_encoder(tmp_path)
    sharded = report(tmp_path)
    count = len(read_header(TINY / "text_encoder" / "model.safetensors").tensors)
    assert f"in 2 files, {count:,} tensors" in sharded
    parameters = [line for line in whole.splitlines() if "text_encoder: parameters" in line]
    assert parameters[0] in sharded


def test_a_text_encoder_is_known_by_its_index_and_by_each_of_its_files(tmp_path: Path) -> None:
    index = sharded_text_encoder(tmp_path)
    assert report(index).splitlines()[1:] == report(tmp_path).splitlines()[1:]
    for file in (*tmp_path.glob("*.safetensors"), TINY / "text_encoder" / "model.safetensors"):
        text = report(file)
        assert "family: t5, 2 layers" in text
        assert "tensors of no stage" not in text
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        report(index)


def test_a_quantized_file_says_its_recipe_and_what_each_stage_has_of_it(tmp_path: Path) -> None:
    header = read_header(CHECKPOINT)
    for _ in quantize.write(quantize.plan(header, recipes.load("int8-wo")), tmp_path / "q"):
        pass
    text = report(tmp_path / "q")
    assert "weights: quantized, linear layers quantized by the recipe int8-wo: 60 to int8" in text
    [transformer] = [line for line in text.splitlines() if "linear layers in" in line]
    assert transformer.startswith("  transformer: ")
    assert transformer.endswith(" I8, 60 linear layers in int8-wo")
    assert "metadata ltx_trt" not in text
    assert "family: ltx_video" in text


def test_a_file_of_llama_cpp_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"a\.gguf is a GGUF file"):
        report(tmp_path / "a.gguf")


def test_an_upscaler_is_known_by_its_index(tmp_path: Path) -> None:
    config = {"_class_name": "LatentUpsampler", "in_channels": 8, "mid_channels": 32, "dims": 3}
    config |= {"spatial_upsample": True, "temporal_upsample": False}
    metadata = {"config": json.dumps(config)}
    sparse(
        tmp_path / "a.safetensors", {"initial_conv.weight": ("BF16", (32, 8, 3, 3, 3))}, metadata
    )
    sparse(tmp_path / "b.safetensors", {"initial_conv.bias": ("BF16", (32,))}, metadata)
    places = {"initial_conv.weight": "a.safetensors", "initial_conv.bias": "b.safetensors"}
    index = tmp_path / "up.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    assert "latent upsampler that doubles rows and columns" in report(index)


def test_an_index_stands_for_its_shards(tmp_path: Path) -> None:
    header = read_header(CHECKPOINT)
    places: dict[str, str] = {}
    for index in range(3):
        names = sorted(header.tensors)[index::3]
        metadata = dict(header.metadata) if index == 0 else None
        tensors = {n: (header.tensors[n].dtype, header.tensors[n].shape) for n in names}
        sparse(tmp_path / f"part-{index}.safetensors", tensors, metadata)
        places |= dict.fromkeys(names, f"part-{index}.safetensors")
    path = tmp_path / "ltx.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    one, three = report(CHECKPOINT).splitlines(), report(path).splitlines()
    assert one[-6:] == three[-6:]
    assert "in 3 files" in three[0]
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names part-1\.safetensors, which is not there"):
        report(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        report(path)


def test_an_upscalers_file_says_what_it_doubles(tmp_path: Path) -> None:
    config = {"_class_name": "LatentUpsampler", "in_channels": 128, "mid_channels": 512, "dims": 3}
    config |= {"spatial_upsample": True, "temporal_upsample": False}
    tensors: Tensors = {"initial_conv.weight": ("BF16", (512, 128, 3, 3, 3))}
    path = sparse(tmp_path / "up.safetensors", tensors, {"config": json.dumps(config)})
    text = report(path)
    assert "latent upsampler that doubles rows and columns; 128 latent channels" in text
    assert f"parameters {512 * 128 * 27:,} BF16" in text


def test_a_checkpoint_of_26_gb_is_read_by_its_header(tmp_path: Path) -> None:
    big: Tensors = {
        f"model.diffusion_model.w{i}.weight": ("BF16", (4096, 4096)) for i in range(800)
    }
    path = sparse(tmp_path / "big.safetensors", big)
    assert path.stat().st_size > 26e9
    assert path.stat().st_blocks * 512 < 1e6
    with pytest.raises(CheckpointError, match="no tensors of LTX-Video"):
        report(path)


def test_inspecting_needs_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from ltx_export import inspection; "
        f"list(inspection.lines(Path({str(CHECKPOINT)!r}))); "
        "print({'torch', 'onnx', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
