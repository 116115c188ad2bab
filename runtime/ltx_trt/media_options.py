"""The options that say what a clip shows where: images, videos, and texts of long clips."""

from pathlib import Path
from typing import Annotated

import typer

PLACE = "PATH[@FRAME][:STRENGTH]"

Images = Annotated[
    list[str],
    typer.Option(
        metavar=PLACE,
        help="The clip shows it there; frame 0 if none is said, -1 is the last; may be repeated.",
    ),
]
Videos = Annotated[
    list[str],
    typer.Option(
        metavar=PLACE, help="The clip continues, or leads to it; may be repeated. 8k + 1 frames."
    ),
]
InputVideo = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Video to video: what the first noise level lets through."),
]
InputMediaPath = Annotated[
    str | None, typer.Option(metavar="PATH", help="The original's --input-video --resize.")
]
Resize = Annotated[
    bool, typer.Option("--resize", help="Cut and resize videos that have not the clip's size.")
]
HeldNoise = Annotated[
    float | None,
    typer.Option(help="Of what the clip is held to, for more motion; 0.15 if not said."),
]
MediaPaths = Annotated[
    list[str], typer.Option(metavar="PATHS", help="The original's lists; --image is shorter.")
]
Strengths = Annotated[list[float], typer.Option(metavar="NUMBERS", help="All 1 if not said.")]
StartFrames = Annotated[list[int], typer.Option(metavar="FRAMES", help="One for each path.")]
Chunk = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Make the clip in overlapping pieces of this length; those above 20 seconds are.",
    ),
]
PromptsAt = Annotated[
    list[str],
    typer.Option(
        metavar="SECONDS:TEXT",
        help="What a clip shows from the chunk that begins then or next; may be repeated.",
    ),
]

OutputPath = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="The original's --output: the file gets a name there."),
]
Offload = Annotated[bool, typer.Option("--offload-to-cpu", help="The original's --memory staged.")]
