"""The benchmark of calibration counts what it says it counts, and limits what it says it limits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from calibrate import LIMITED, blocks, head


def test_the_bytes_of_the_blocks_are_those_of_their_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    names = ("model.diffusion_model.transformer_blocks.0.ff.net.2.weight", "vae.decoder.weight")
    save_file({name: np.ones((3, 5), np.float16) for name in names}, path, {"config": "{}"})
    assert blocks(head(path)) == 30


def test_the_kernel_refuses_what_is_above_the_limit() -> None:
    code = "import sys; bytearray(int(sys.argv[1]))"
    limited = [sys.executable, "-c", LIMITED, str(300_000_000), "-c", code]
    assert subprocess.run([*limited, "1000"], check=False).returncode == 0
    refused = subprocess.run([*limited, "400000000"], check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "MemoryError" in refused.stderr
