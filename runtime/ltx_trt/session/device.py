"""The GPU of a process: its driver, the library of its engines, one stream and one arena."""

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ltx_engines.targets import Flavour
from ltx_trt.session.closing import close_all
from ltx_trt.session.driver import Driver, Stream
from ltx_trt.session.engine_api import Library
from ltx_trt.session.memory import Arena, Watch


@dataclass(frozen=True, slots=True)
class Device:
    """All stages of a clip compute on `stream`, one after the other, in `arena`; `watch` knows how
    much they took."""

    driver: Driver
    library: Library
    stream: Stream
    arena: Arena
    watch: Watch

    @classmethod
    def open(cls, flavour: Flavour) -> Self:
        """The first visible GPU.

        Raises:
            UserError: cuda-python, the vendor's driver, a GPU or the library is missing.
        """
        from ltx_trt.session.cuda_driver import CudaDriver
        from ltx_trt.session.tensorrt_adapter import TensorRT

        driver = CudaDriver()
        try:
            return cls.of(driver, TensorRT(flavour, driver))
        except BaseException:
            driver.close()
            raise

    @classmethod
    def of(cls, driver: Driver, library: Library) -> Self:
        """`close` closes the driver too."""
        watch, stream = Watch(driver), driver.stream()
        return cls(driver, library, stream, Arena(driver, stream), watch)

    def close(self, error: BaseException | None = None) -> None:
        """`error` is what it is closed because of."""
        driver = self.driver
        steps = (self.arena.close, lambda: driver.close_stream(self.stream), driver.close)
        close_all(steps, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)
