"""The benchmarks are scripts, not a package: what they import from each other lies beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
