"""What the loop over the steps has on the GPU, by name: uploaded once, before the first step.

`latents`, `previous` and `noise` are what the next step reads, `next_latents`, `clean` and `batch`
what the last one wrote; `rows` and the noises are of all steps, `row` of the one that is computed.
"""

from collections.abc import Mapping

import numpy as np

from ltx_engines.stages import BRANCHES
from ltx_trt.denoising import Denoising
from ltx_trt.session import Array, step_rows
from ltx_trt.session.driver import Address, Bytes, Driver, Stream
from ltx_trt.session.element_types import narrowed, stored
from ltx_trt.session.memory import ALIGNMENT, Buffers
from ltx_trt.session.step_rows import Branches

Move = tuple[Address, Address]
"""From device to device: target and source."""


class LoopMemory:
    """Of one run. `types` are the engines' element types; `close` when the stream has passed."""

    def __init__(
        self, job: Denoising, types: Mapping[str, str], driver: Driver, stream: Stream
    ) -> None:
        self._job, self._types = job, types
        self._driver, self._stream = driver, stream
        self._buffers = Buffers(driver, stream)
        self._places: dict[str, Address] = {}
        self._noises: dict[int, Address] = {}
        self._staging: Bytes | None = None
        self._rows = step_rows.rows(job, types)
        self._size = 4 * job.latents.size
        self._velocity_size = stored(types["velocity"]).itemsize * job.latents.size

    def upload(self) -> None:
        """
        Raises:
            UserError: there is no room for it.
        """
        job, types = self._job, self._types
        self._upload("latents", job.latents)
        self._upload("batch", step_rows.repeated(job.latents, types["batch"]))
        self._upload("coords", step_rows.repeated(job.coordinates, types["coords"]))
        self._upload("rows", self._rows.table)
        for branches in dict.fromkeys(guide.branches for guide in job.guidance):
            for name, values in step_rows.prompts(job, branches).items():
                self._upload(of(branches, name), narrowed(values, types[name]))
        self._upload_noises()
        for name in ("previous", "noise"):
            self._driver.fill(self._get(name, self._size), 0, self._size, self._stream)
        for name in ("next_latents", "clean"):
            self._get(name, self._size)
        self._get("velocity", self._velocity_size * len(BRANCHES))
        self._get("row", self._rows.size)

    def at(self, name: str) -> Address:
        return self._places[name]

    def in_row(self, name: str) -> Address:
        """One of the small inputs of the step that is computed."""
        return Address(self.at("row") + self._rows.offsets[name])

    def velocities(self, branches: Branches) -> tuple[dict[str, Address], tuple[Move, ...]]:
        """Where the step reads each branch, the text's for one that is not run; and what is to be
        copied there, since an engine takes no address between."""
        size, begin = self._velocity_size, self.at("velocity")
        found: dict[str, Address] = {}
        for index, branch in enumerate(branches):
            found[branch] = Address(begin + size * index)
        moves: tuple[Move, ...] = ()
        if size % ALIGNMENT:
            places = {branch: self._get(f"velocity of {branch}", size) for branch in found}
            moves = tuple((places[branch], found[branch]) for branch in found)
            found = places
        return {branch: found.get(branch, found["text"]) for branch in BRANCHES}, moves

    def move(self, moves: tuple[Move, ...]) -> None:
        for target, source in moves:
            self._driver.copy(target, source, self._velocity_size, self._stream)

    def begin(self, step: int) -> None:
        """Its row and its noise take their places."""
        row = Address(self.at("rows") + step * self._rows.size)
        self._driver.copy(self.at("row"), row, self._rows.size, self._stream)
        if step in self._noises:
            self._copy("noise", self._noises[step])

    def end(self) -> None:
        """What a step wrote is what the next one reads."""
        self._copy("latents", self.at("next_latents"))
        self._copy("previous", self.at("clean"))

    def download(self) -> Array:
        staged = self._staged(self._size)
        self._driver.download(staged, self.at("latents"), self._stream)
        self._driver.synchronize(self._stream)
        return staged.view(np.float32).reshape(self._job.latents.shape).copy()

    def unpin(self) -> None:
        if self._staging is not None:
            staging, self._staging = self._staging, None
            self._driver.unpin(staging)

    def close(self) -> None:
        self._buffers.close()

    def _upload_noises(self) -> None:
        """All of them, in one block. (To draw one of 5600 tokens takes a core 65 ms.)"""
        drawn = list(step_rows.noises(self._job))
        used = [(index, noise) for index, noise in enumerate(drawn) if noise is not None]
        if not used:
            return
        begin = self._get(f"the noise of {len(used)} steps", self._size * len(used))
        for place, (index, noise) in enumerate(used):
            self._noises[index] = address = Address(begin + place * self._size)
            self._send(address, noise)

    def _upload(self, name: str, values: Array) -> None:
        self._send(self._get(name, values.nbytes), values)

    def _send(self, address: Address, values: Array) -> None:
        staged = self._staged(values.nbytes)
        np.copyto(staged, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        self._driver.upload(address, staged, self._stream)
        self._driver.synchronize(self._stream)  # the next one is staged in the same place

    def _staged(self, size: int) -> Bytes:
        if self._staging is None or self._staging.size < size:
            self.unpin()
            self._staging = self._driver.pinned(size)
        return self._staging[:size]

    def _get(self, name: str, size: int) -> Address:
        self._places[name] = self._buffers.get(name, size)
        return self._places[name]

    def _copy(self, name: str, source: Address) -> None:
        self._driver.copy(self.at(name), source, self._size, self._stream)


def of(branches: Branches, name: str) -> str:
    """What a prompt's tensor is called for such a batch."""
    return f"{name} of {', '.join(branches)}"
