"""What several passes do to a graph, written once."""

import onnx_ir as ir


def take_place(new: ir.Value, old: ir.Value) -> None:
    """Let one value stand for another everywhere, in name, and at the graph's border too."""
    name, old.name = old.name, None
    new.name, new.type, new.shape = name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
