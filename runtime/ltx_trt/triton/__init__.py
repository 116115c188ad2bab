"""The runtime inside Triton Inference Server, and its client."""
