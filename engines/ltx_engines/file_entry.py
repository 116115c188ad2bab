"""What a manifest says of a file: enough to know it again."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """A value of the manifest."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class FileEntry(Frozen):
    """The hash says that a file is the same. Where nobody has read it all, the time of its last
    change in nanoseconds and the hash of a sample (`hashes.sample`) stand for that."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256 | None = None
    modified_ns: int | None = None
    sample: Sha256 | None = None

    def is_same(self, other: "FileEntry") -> bool:
        """Whether both are of one content, by the best that is known of both."""
        if self.bytes != other.bytes:
            return False
        if self.sha256 is not None and other.sha256 is not None:
            return self.sha256 == other.sha256
        times = {self.modified_ns, other.modified_ns} - {None}
        return self.sample is not None and self.sample == other.sample and len(times) <= 1
