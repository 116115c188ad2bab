import plan as benchmark

PLANNED = {"engine": 104, "build_memory": 60, "activations": 100}
MEASURED = {"engine": 100, "build_memory": 100, "activations": 100}


def test_a_plan_is_met_when_it_is_close_enough_on_either_side() -> None:
    row = benchmark.compared(PLANNED, MEASURED)
    assert row["errors"] == {"engine": 0.04, "build_memory": -0.4, "activations": 0.0}
    assert row["met"] == {"engine": True, "build_memory": False, "activations": True}


def test_every_stage_that_can_be_measured_has_sizes_for_its_profile() -> None:
    for ranges in benchmark.RANGES.values():
        assert all(least <= most for least, most in ranges.values())
    tokens = benchmark.RANGES["transformer"]["tokens"][1]
    width, height, frames = map(int, benchmark.SHAPE.split("x"))
    assert tokens == (width // 32) * (height // 32) * ((frames - 1) // 8 + 1)
