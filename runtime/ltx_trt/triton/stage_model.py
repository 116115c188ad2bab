"""One stage of a bundle as a model of a Triton server, for bundles that its own backends do not
load: TensorRT-RTX and ONNX Runtime."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ltx_engines.errors import UserError
from ltx_engines.triton_settings import Settings, read
from ltx_ref.checkpoint import CheckpointError
from ltx_trt.backend import Backend, Choice
from ltx_trt.session import Array, Session
from ltx_trt.session.bundle_stages import EngineStages
from ltx_trt.session.choice import OpenDevice, open_stages
from ltx_trt.session.vae_streams import DecoderSession
from ltx_trt.triton import backend_words as words
from ltx_trt.triton.requests import without_paths
from ltx_trt.triton.responses import Refused, Status

FAILED = "the stage failed at this request; the server's log says why"


@contextmanager
def open_stage(
    bundle: Path, stage: str, settings: Settings, *, open_device: OpenDevice | None = None
) -> Iterator[Session]:
    """
    Raises:
        UserError: no bundle, or the stage does not run here.
    """
    choice = Choice(Backend(settings.backend), settings.threads)
    with open_stages(bundle, choice, open_device=open_device) as stages:
        opened = stages.alone(stage) if isinstance(stages, EngineStages) else stages(stage)
        with opened as session:
            if isinstance(session, DecoderSession):  # a model knows nothing of the whole clip
                session.open()
            yield session


def answer(session: Session, feeds: dict[str, Array]) -> dict[str, Array]:
    """
    Raises:
        Refused: the caller's tensors are not the stage's, or it failed on them.
    """
    try:
        return session(feeds)
    except ValueError as error:  # `check_feeds`: the caller is our own video model, or a stranger
        raise Refused(Status.invalid, without_paths(error)) from error
    except (UserError, CheckpointError) as error:
        raise Refused(Status.internal, without_paths(error)) from error


class TritonPythonModel:
    """What Triton's Python backend makes an instance of."""

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as backend

        logging.basicConfig(format="ltx-trt: %(message)s")
        self._backend = backend
        config = json.loads(args["model_config"])
        settings = read(words.parameters(config))
        folder = Path(args["model_repository"]) / args["model_version"] / settings.bundle
        self._inputs, self._outputs = words.element_types(config)
        self._opened = open_stage(folder.resolve(), config["name"], settings)
        self._session = self._opened.__enter__()

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        self._opened.__exit__(None, None, None)

    def _answer(self, request: Any) -> Any:
        try:
            feeds = {t.name(): words.values(t, self._inputs[t.name()]) for t in request.inputs()}
            made = answer(self._session, feeds)
            tensors = [words.tensor(self._backend, n, made[n], d) for n, d in self._outputs.items()]
            return self._backend.InferenceResponse(output_tensors=tensors)
        except Refused as refused:
            return words.failure(self._backend, refused)
        except Exception:
            logging.getLogger(__name__).exception("a request of this stage failed")
            return words.failure(self._backend, Refused(Status.internal, FAILED))
