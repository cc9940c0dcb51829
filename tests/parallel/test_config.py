"""Rules of ParallelConfig and OptimizerConfig: each broken once, and all of them told at once."""

import math

import pytest

from parallel.config import (
    ConfigError,
    OptimizerConfig,
    ParallelConfig,
    RecomputeGranularity,
    below,
    not_positive,
)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_model_parallel_size": 0}, "parallel.tensor_model_parallel_size=0 must be 1"),
        ({"pipeline_model_parallel_size": -2}, "parallel.pipeline_model_parallel_size=-2 must"),
        (
            {"virtual_pipeline_model_parallel_size": 0},
            "parallel.virtual_pipeline_model_parallel_size=0 must be 1 or more",
        ),
        ({"context_parallel_size": 0}, "parallel.context_parallel_size=0 must be 1 or more"),
        ({"recompute_num_layers": 0}, "parallel.recompute_num_layers=0 must be 1 or more"),
        (
            {"recompute_num_layers": 2},
            "parallel.recompute_num_layers=2 counts only with parallel.recompute_granularity=full",
        ),
        ({"startup_timeout_seconds": 0.0}, "parallel.startup_timeout_seconds=0.0 must be a finite"),
        ({"collective_timeout_seconds": math.inf}, "parallel.collective_timeout_seconds=inf must"),
        ({"sequence_parallel": True}, "parallel.tensor_model_parallel_size=1 has only one"),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            "parallel.pipeline_model_parallel_size=1 has only one",
        ),
        (
            {
                "overlap_param_gather": True,
                "overlap_grad_reduce": True,
                "use_distributed_optimizer": False,
            },
            "it needs parallel.use_distributed_optimizer=true",
        ),
        ({"overlap_param_gather": True}, "needs parallel.overlap_grad_reduce=true"),
    ],
)
def test_parallel_rules(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(**settings)
    assert len(caught.value.problems) == 1
    assert words in caught.value.problems[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, "optimizer.lr=0.0 must be a finite number above 0"),
        ({"lr": math.nan}, "optimizer.lr=nan must be"),
        ({"adam_eps": 0.0}, "optimizer.adam_eps=0.0 must be"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1 must be 0 or"),
        ({"clip_grad": -1.0}, "optimizer.clip_grad=-1.0 must be 0 or"),
        ({"adam_beta1": 1.0}, "optimizer.adam_beta1=1.0 must be at least 0 and below 1"),
        ({"adam_beta2": -0.5}, "optimizer.adam_beta2=-0.5 must be at least 0 and below 1"),
    ],
)
def test_optimizer_rules(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig(**settings)
    assert len(caught.value.problems) == 1
    assert words in caught.value.problems[0]


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(
            sequence_parallel=True, overlap_param_gather=True, startup_timeout_seconds=-1
        )
    assert len(caught.value.problems) == 3
    assert str(caught.value).splitlines() == list(caught.value.problems)


def test_what_is_allowed() -> None:
    ParallelConfig()
    ParallelConfig(
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=2,
        sequence_parallel=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        recompute_granularity=RecomputeGranularity.full,
        recompute_num_layers=5,
    )
    OptimizerConfig(weight_decay=0.0, clip_grad=0.0, adam_beta1=0.0)


def test_numbers_on_the_border() -> None:
    assert below({"a": 1, "b": 0}, 1) == ["b=0 must be 1 or more"]
    assert not_positive({"a": 1e-30, "b": math.nan}) == ["b=nan must be a finite number above 0"]
