"""Ranks that wait for the data to be prepared wait for as long as it takes."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from data.config import DataConfig
from launch.schema import load
from parallel.runtime import initialize
from pretrain import run
from tests.distributed import run_on_gloo


def preparing_longer_than_a_collective_may_take(cache: str) -> str:
    config = load(
        ["+model=magneto_tiny", "data.corpus=/no/such/file.jsonl", f"data.cache_dir={cache}"]
    )
    runtime = initialize(config.parallel, seed=1)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    prepare = run.prepare

    def prepare_slowly(data: DataConfig) -> None:
        time.sleep(3)
        prepare(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "prepare", prepare_slowly)
        with pytest.raises(Exception) as caught:
            run.prepare_data(config, runtime)
    return str(caught.value)


def test_preparing_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    first, second = run_on_gloo(2, preparing_longer_than_a_collective_may_take, str(tmp_path))
    assert "/no/such/file.jsonl" in first
    assert second == "preparing the data failed on another rank; its message says why"
