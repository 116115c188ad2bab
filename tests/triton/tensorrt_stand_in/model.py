"""A stand-in for Triton's TensorRT backend, on the CPU: its plans are `tests.runtime.fake_engines`.

A plan is JSON that names an ONNX graph, and ONNX Runtime runs that. No TensorRT is in it. What the
real backend refuses when a model is loaded, it refuses too: other names, types or sizes than the
plan has, and profiles that it has not.
"""

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as backend

from ltx_engines import cpu
from ltx_engines.triton_model import ELEMENT_TYPES
from ltx_trt.session.onnxruntime_session import FOLDING
from ltx_trt.triton import backend_words as words
from tests.runtime.fake_engines import Plan, read_plan


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        import onnxruntime

        config = json.loads(args["model_config"])
        assert config["platform"] == "tensorrt_plan", config["platform"]
        version = Path(args["model_repository"]) / args["model_version"]
        plan = read_plan(version / config["default_model_filename"])
        self.types, self.made = words.element_types(config)
        options = onnxruntime.SessionOptions()
        options.enable_mem_pattern = False
        for name, value in cpu.session_options(()).items():
            options.add_session_config_entry(name, value)
        self.session = onnxruntime.InferenceSession(
            plan.graph, options, disabled_optimizers=[FOLDING]
        )
        check(config, plan, self.session)
        self.plan = plan

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        feeds = {t.name(): words.values(t, self.types[t.name()]) for t in request.inputs()}
        if not any(fits(feeds, profile) for profile in self.plan.profiles):
            shapes = {name: feed.shape for name, feed in feeds.items()}
            error = backend.TritonError(
                f"no profile takes {shapes}", backend.TritonError.INVALID_ARG
            )
            return backend.InferenceResponse(error=error)
        made = self.session.run(list(self.made), feeds)
        return backend.InferenceResponse(
            output_tensors=[
                words.tensor(backend, name, array, dtype)
                for (name, dtype), array in zip(self.made.items(), made, strict=True)
            ]
        )


def check(config: dict[str, Any], plan: Plan, session: Any) -> None:
    graph = {node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())}
    rows = {row["name"]: row for row in (*config["input"], *config["output"])}
    assert rows.keys() == graph.keys(), (rows.keys(), graph.keys())
    for name, row in rows.items():
        fixed = [size if isinstance(size, int) else -1 for size in graph[name]]
        assert list(map(int, row["dims"])) == fixed, (name, row["dims"], fixed)
        dtype = plan.dtypes[name]
        assert ELEMENT_TYPES[dtype] == row["data_type"].removeprefix("TYPE_"), (name, dtype)
    for group in config["instance_group"]:
        assert set(group["profile"]) <= set(map(str, range(len(plan.profiles)))), group["profile"]


def fits(feeds: dict[str, Any], profile: Any) -> bool:
    return all(
        low <= size <= high
        for name, feed in feeds.items()
        for size, low, high in zip(feed.shape, profile[name][0], profile[name][2], strict=True)
    )
