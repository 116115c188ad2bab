"""From bundle to video, without PyTorch."""

SEED = 171198
"""The original's default."""
