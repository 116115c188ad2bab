"""Engines whose weights are inputs: what both sides call their tensors.

The prologue gives HIDDEN and whatever else all blocks read; a block makes HIDDEN_OUT of HIDDEN, and
the next one reads that as its HIDDEN; the epilogue reads the last one's. A block's SKIP is one row
of the stage's input of that name.
"""

PROLOGUE, BLOCK, EPILOGUE = "prologue", "block", "epilogue"

HIDDEN, HIDDEN_OUT = "hidden_states", "hidden_states_out"

SKIP = "skip_layer_mask"

NUMBER = "{block}"
"""Stands for the block's number in the name of a weight."""


def weight(pattern: str, block: int | None = None) -> str:
    """The name in the checkpoint of what an input takes.

    Raises:
        ValueError: it is a weight of a block, and no block is said.
    """
    if block is None and NUMBER in pattern:
        raise ValueError(f"{pattern} is a weight of each block")
    return pattern.replace(NUMBER, str(block))
