"""What a clip is made of, to tell a finished one from one that is now wished otherwise.

How it is computed (backend, threads, memory, workers) is no part of it, and neither are the engines
of the bundle: a batch that was interrupted may go on with others.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ltx_engines import hashes, pipeline_config
from ltx_engines.bundle import MANIFEST
from ltx_ref.lora import parse
from ltx_trt.batch import asking
from ltx_trt.batch.jobs import LINE, Job
from ltx_trt.batch.results import Facts

NOT_THE_MODEL = ("engines", "onnxruntime", "toolchain")
"""Of a manifest: they change when engines are built."""

DEFAULTS: dict[str, Any] = {
    key: list(default) if isinstance(default := field.get_default(), tuple) else default
    for key, field in LINE.model_fields.items()
}
"""Of a job's keys, as JSON has them."""


def shared(bundle: Path, config: Path | None, loras: tuple[str, ...]) -> Facts:
    """Of all jobs of a batch."""
    facts: dict[str, Any] = {"bundle": of_bundle(bundle)}
    if config is not None:
        told = pipeline_config.load(config).model_dump(mode="json", exclude_defaults=True)
        facts["pipeline config"] = fingerprint(told)
    if loras:
        facts["LoRAs"] = [
            [str(wish.path), wish.strength, hashes.sample(wish.path)] for wish in parse(loras)
        ]
    return facts


def of_job(job: Job, form: str, batch: Facts, bundle: Path) -> Facts:
    """As they come back from the disk."""
    told: dict[str, Any] = {**batch, "format": form, "job": dict(job.keys)}
    if read := {str(path): hashes.sample(path) for path in asking.files(job)}:
        told["files"] = read
    if (table := asking.table(job, bundle)) is not None:
        told["cache table"] = hashes.sample(table)
    facts: Facts = json.loads(json.dumps(told))
    return facts


def of_bundle(folder: Path) -> str:
    """As `fingerprint` of everything in the manifest that decides a clip; the files by their
    contents, since they may be the same at another time."""
    told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    built = {engine[key] for engine in told.get("engines", ()) for key in ("file", "layers")}
    files = {
        name: entry.get("sample") or entry.get("sha256")
        for name, entry in told.get("files", {}).items()
        if name not in built
    }
    kept = {key: value for key, value in told.items() if key not in NOT_THE_MODEL}
    return fingerprint({**kept, "files": files})


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def difference(before: Facts, now: Facts) -> str:
    """In words, for a person who has changed something and wonders what; empty: nothing has."""
    told, wished = _flat(before), _flat(now)
    names = [key for key in {**told, **wished} if told.get(key) != wished.get(key)]
    return ", ".join(_said(name, told.get(name), wished.get(name)) for name in names)


OTHER = {
    "bundle": "another bundle",
    "pipeline config": "another pipeline config",
    "LoRAs": "other LoRAs",
    "cache table": "another step_cache.json in the bundle",
    "files": "other contents of a file that it names",
}
"""In place of hashes."""


def _flat(facts: Facts) -> dict[str, Any]:
    """Without what is said in vain: a key with the value that it has anyway."""
    said = {key: value for key, value in facts["job"].items() if value != DEFAULTS.get(key)}
    return {**{key: value for key, value in facts.items() if key != "job"}, **said}


def _said(name: str, before: Any, now: Any) -> str:
    return OTHER.get(name) or f"{name} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = "not said" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
