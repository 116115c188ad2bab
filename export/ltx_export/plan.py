"""What a model will take on a GPU, known before anything is converted, built or loaded.

    stage_plan.choose(sources, wanted, question) -> which stages, and why not the others
    stage_plan.parts(sources, question, stages) -> the graph and the weights' entries of each
    make(question, parts) -> Plan: what each stage costs, and a yes or no for each GPU
    plan_report.show(plan, console), plan_report.document(plan)

Everything follows from the graphs at the largest clip of the question (`graph_costs.py`) and from
the table of GPUs; a latent upsampler is counted as if that clip were what it reads, unless the
question is of two passes: then the clip is the second one's. What is not in
a graph was measured (`benchmarks/plan.py`) and is a named constant of stage_plan.py or fitting.py.
Seconds are a bound, not a promise: each kernel at the vendor's full rate or bandwidth, whichever
takes longer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType

from ltx_engines import targets
from ltx_engines.shapes import ENLARGES, TIME, VideoShape
from ltx_engines.stages import STREAM
from ltx_export.fitting import Verdict, verdict
from ltx_export.plan_question import Question, largest
from ltx_export.stage_plan import Part, StagePlan, Workshop, stage_plan

SHOWN = (
    *("rtx 3060", "rtx 3090", "rtx 4060", "rtx 4070", "rtx 4090", "rtx 5080", "rtx 5090"),
    *("rtx pro 6000", "l4", "l40s", "a100 80gb", "h100 sxm"),
)
"""The GPUs of a plan that names none."""

NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Plan:
    question: Question
    shape: VideoShape
    stages: tuple[StagePlan, ...]
    verdicts: tuple[Verdict, ...]
    left_out: Mapping[str, str]
    """Stages that are not counted, and why."""
    delay: int = 0
    """Frames by which a decoder that goes on is late."""

    def run_seconds(self, verdict: Verdict) -> float | None:
        """A whole clip: the prompt once, every step, the decoder; None where it cannot be built."""
        steps = self.question.steps + self.question.first_steps / ENLARGES**2  # by their tokens
        known = verdict.seconds
        decoder = {"vae_decoder": 1} if "vae_decoder" in known else {STREAM: self.pieces}
        calls = {"text_encoder": 1, "transformer": steps, **decoder}
        calls |= {"latent_upsampler": 1} if self.question.first_steps else {}
        return sum(known.get(name, 0.0) * n for name, n in calls.items()) if known else None

    @property
    def pieces(self) -> int:
        """In which a decoder that goes on is given a clip, and as much behind it as it is late."""
        latents = ceil((self.shape.frames + self.delay) / TIME)
        return ceil(latents / ((self.question.vae_stream or TIME) // TIME))

    @property
    def exit_code(self) -> int:
        """3 when a GPU that was asked for says no."""
        return 3 if self.question.gpus and not all(v.fits for v in self.verdicts) else 0


def make(
    question: Question, parts: Mapping[str, Part], left_out: Mapping[str, str] = NOTHING
) -> Plan:
    """
    Raises:
        UserError: the question names a shape, a precision or a GPU that there is not.
        ValueError, AssertionError: a graph is not one that can be counted.
    """
    shape = largest(question.shapes)
    cards = [targets.find(name) for name in question.gpus or SHOWN]
    workshop = Workshop(question, shape, parts)
    stages = tuple(stage_plan(name, workshop) for name in parts)
    verdicts = tuple(verdict(card, stages, workshop) for card in cards)
    delay = parts[STREAM].delay if STREAM in parts else 0
    return Plan(question, shape, stages, verdicts, left_out, delay)
