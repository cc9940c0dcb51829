"""A run as a user types it, which changes its engine, ZeRO stage and layout at every start."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.schema import load
from tests.distributed import run_on_gloo
from tests.parallel.test_deepspeed_engine import PATIENCE
from tests.pretrain.test_exact_resume import SMALL, curves, drawn

DEEPSPEED = "engine=deepspeed"
SPARSE = [
    *SMALL,
    "model=xmoe_tiny",
    "model.moe.num_experts=4",
    "model.moe.router_dim=8",
]
# settings of each start, two steps each
STARTS = {
    "dense": (
        SMALL,
        [
            [DEEPSPEED, "deepspeed.zero_stage=2"],
            ["parallel=tp2"],
            [DEEPSPEED, "deepspeed.zero_stage=3", "parallel=tp2"],
            [DEEPSPEED, "deepspeed.zero_stage=1", "deepspeed.offload_optimizer=true"],
            [],
        ],
    ),
    "sparse": (
        SPARSE,
        [["parallel=ep2"], [DEEPSPEED, "deepspeed.zero_stage=2", "parallel=ep2"], []],
    ),
}


def run_in_turn(settings: list[str], starts: list[list[str]], run_dir: Path) -> None:
    from pretrain.run import run

    for number, words in enumerate(starts, start=1):
        run(load([*settings, *words, f"train.train_steps={2 * number}", f"run_dir={run_dir}"]))


@pytest.mark.slow
@pytest.mark.parametrize("model", STARTS)
def test_a_run_that_changes_its_engine_has_the_numbers_of_one_that_does_not(
    model: str, tmp_path: Path
) -> None:
    settings, starts = STARTS[model]
    settings = [*settings, "train.eval_interval=2", "train.gradient_norm_interval=1"]
    run_on_gloo(2, run_in_turn, settings, starts, tmp_path / "changing", timeout=PATIENCE)
    same = [["parallel=ep2"] if model == "sparse" else []] * len(starts)
    run_on_gloo(2, run_in_turn, settings, same, tmp_path / "whole", timeout=PATIENCE)
    ours, expected = curves(tmp_path / "changing"), curves(tmp_path / "whole")
    assert {key: ours[key] for key in expected} == pytest.approx(expected, rel=2e-4)
    assert drawn(tmp_path / "changing") == drawn(tmp_path / "whole")
