"""The files that a graph points into, mapped for a builder that cannot follow where it points."""

import ctypes
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path


class MappedWeights:
    """`files` are the graph's words for them, and where they are.

    The maps end with the process: a builder may hold their addresses until then.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = files
        self.maps: dict[str, mmap.mmap] = {}

    def initializers(self, graph: Path) -> Iterator[tuple[str, int, int]]:
        """Name, address and bytes of what the graph says lies in files."""
        import onnx

        proto = onnx.load(graph, load_external_data=False)
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                said = {entry.key: entry.value for entry in tensor.external_data}
                address = self._address(said["location"]) + int(said.get("offset", 0))
                yield tensor.name, address, int(said["length"])

    def _address(self, location: str) -> int:
        if location not in self.maps:
            with Path(self.files[location]).open("rb") as file:
                # A private map may be written to, which ctypes wants; nobody does.
                self.maps[location] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return ctypes.addressof(ctypes.c_char.from_buffer(self.maps[location]))
