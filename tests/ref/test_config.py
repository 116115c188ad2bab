"""What a checkpoint's metadata may say, and what is refused."""

from typing import Any

import pytest

from ltx_ref.checkpoint import CheckpointError
from ltx_ref.ltx_video.config import SD3_SHIFT, parse_config

BLOCKS = [["res_x", 1], ["compress_all", 1]]


def table(**scheduler: Any) -> dict[str, Any]:
    named = {"_class_name": "RectifiedFlowScheduler", **scheduler}
    return {"transformer": {}, "vae": {"blocks": BLOCKS}, "scheduler": named}


def test_null_is_accepted_where_the_original_writes_it() -> None:
    original = {"shifting": "SD3", "base_resolution": None, "target_shift_terminal": 0.1}
    assert parse_config(table(**original)).scheduler == SD3_SHIFT


@pytest.mark.parametrize("key", ["num_train_timesteps", "sampler"])
def test_null_is_refused_where_a_value_is_needed(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"scheduler.{key} is None"):
        parse_config(table(**{key: None}))


def test_a_number_of_another_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"base_resolution is 'large', wanted a value of int"):
        parse_config(table(base_resolution="large"))
