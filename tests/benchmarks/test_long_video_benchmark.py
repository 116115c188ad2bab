"""What the benchmark of long clips measures, on clips that are drawn and not made."""

import numpy as np

from long_video import RATE, Made, Turning, jumps, scenes, seen
from tiny import clips
from tiny.clips import Format, Scene

FORM = Format(RATE + 1, 128, 128, float(RATE))


def drawn(scene: Turning, seconds: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    parts = [
        clips.draw(
            Scene("circle", scene.colour, scene.background, scene.heading(second)), FORM, rng
        )[:RATE]
        for second in range(seconds)
    ]
    return np.concatenate([*parts, parts[-1][-1:]])


def test_a_clip_that_turns_each_second_is_seen_to() -> None:
    scene = scenes(3)[1]
    frames = drawn(scene, 3)
    assert seen(frames, scene, 3) == []
    backwards = frames[::-1]
    assert len(seen(backwards, scene, 3)) == 3
    frames[RATE : 2 * RATE] = frames[0, 0, 0]
    wrong = seen(frames, scene, 3)  # a second is seen to its end, which is the next one's beginning
    assert [line.partition(" on ")[0] for line in wrong] == ["0: none", "1: none"]


def test_a_join_is_measured_by_the_steps_within() -> None:
    levels = np.array([0, 2, 4, 10, 12, 14, 15])
    frames = np.broadcast_to(levels[:, None, None, None], (7, 4, 4, 3)).astype(np.uint8)
    assert jumps(Made(frames, (3, 6), 0.0)) == [3.0, 0.5]


def test_scenes_are_new_to_the_model_and_differ() -> None:
    found = scenes(6)
    assert len(set(found)) == 6
    assert all(Scene("circle", s.colour, s.background, s.direction).held_out for s in found)
