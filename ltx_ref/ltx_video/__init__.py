"""LTX-Video 0.9 to 0.9.8, 2B and 13B."""
