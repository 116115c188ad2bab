"""From checkpoint to bundle: one ONNX graph per stage, whose weights stay where they are."""

__version__ = "0.1.0"
