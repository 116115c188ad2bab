"""Three prompts become three videos and one picture: `make demo` runs this without torch."""

import argparse
import importlib.util
import sys
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from ltx_trt import cli, media

CLIPS = {
    "circle": "a red circle moves right on a blue background",
    "diamond": "a green diamond moves up on a black background",
    "square": "a yellow square moves left on a purple background",
}


def read(path: Path) -> NDArray[np.uint8]:
    """A video's frames, [frames, height, width, 3]: what a player shows."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=cli.SHIPPED)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    options = parser.parse_args()
    if importlib.util.find_spec("torch") is not None:
        print("demo: this environment has torch; the demo is there to show that none is needed")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    for name, prompt in CLIPS.items():
        video = options.out / f"{name}.mp4"
        arguments = ["--bundle", str(options.bundle), "--prompt", prompt, "-o", str(video)]
        print(f"$ ltx-trt run {' '.join(arguments)}", flush=True)
        if code := cli.main(["run", *arguments]):
            return code
    sheet = options.out / "contact-sheet.png"
    media.write_image(sheet, media.contact_sheet([read(options.out / f"{n}.mp4") for n in CLIPS]))
    print(f"all three, one line each: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
