"""What a job asks for, in the words of a run: request, notes, and the files it reads."""

from collections.abc import Iterator
from pathlib import Path

from ltx_engines import pipeline_config, presets
from ltx_engines.bundle import Bundle
from ltx_engines.pipeline_config import PipelineConfig
from ltx_trt import cached_run, input_media
from ltx_trt.batch.jobs import Job
from ltx_trt.pipeline import plan
from ltx_trt.request import Request, resolve


def request(
    job: Job, bundle: Bundle, config: Path | None, loras: tuple[str, ...]
) -> tuple[Request, tuple[str, ...]]:
    """As `ltx-trt run` would be asked; `config` is of jobs that name no preset.

    Raises:
        UserError: it cannot be done.
    """
    wishes = job.wishes
    pictures = input_media.media(wishes)
    caching = cached_run.caching(job.cache, bundle.path)
    asked, notes = resolve(wishes, bundle, config_of(job, config))
    plan(input_media.outline(asked, pictures), bundle.manifest)
    asked, more = input_media.attach(asked, pictures)
    asked, doubts = cached_run.attach(asked, caching, loras)
    return asked, (*notes, *more, *doubts)


def config_of(job: Job, config: Path | None) -> PipelineConfig | None:
    """A job's own preset comes before what the command line says of all."""
    found = config if job.preset is None else presets.named(job.preset)
    return None if found is None else pipeline_config.load(found)


def table(job: Job, bundle: Path) -> Path | None:
    """Of the bundle itself, where the job names none and needs one."""
    return None if job.cache.table is not None else cached_run.table_of(job.cache, bundle)


def files(job: Job) -> Iterator[Path]:
    """That the job names, whose contents decide what the clip is."""
    media = input_media.media(job.wishes)
    yield from (wish.path for wish in media.wishes)
    if job.cache.table is not None:
        yield job.cache.table
