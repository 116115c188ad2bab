"""What the benchmark of batches counts as a failure, it sees."""

import json
import os
from pathlib import Path

from batch import PLANS, Watch, jobs


def test_a_report_that_is_replaced_or_has_no_clip_is_seen(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"clip")
        (tmp_path / f"{name}.json").write_text(json.dumps({"bytes": 4}))
    watch.look()
    watch.look()
    assert (sorted(watch.reports), watch.replaced, watch.without_clip) == (["a", "b"], [], [])
    again = tmp_path / "again"
    again.write_text(json.dumps({"bytes": 4}))
    os.replace(again, tmp_path / "a.json")
    (tmp_path / "b.mp4").write_bytes(b"cl")
    watch.look()
    assert (watch.replaced, watch.without_clip) == (["a"], ["b"])


def test_jobs_differ_and_their_shapes_take_turns() -> None:
    rows = jobs(60)
    assert len({row["name"] for row in rows}) == len({row["seed"] for row in rows}) == 60
    shapes = [(row["width"], row["height"], row["num_frames"]) for row in rows]
    assert len(set(shapes)) == 3
    assert shapes[:3] == shapes[3:6]


def test_processes_of_every_kind_are_killed() -> None:
    assert {plan.name for plan in PLANS} >= {"group", "workers", "ray"}
    assert all(plan.kills for plan in PLANS)
