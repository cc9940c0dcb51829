"""Rules of the times after which ranks count as dead, or the run as hanging."""

import math

import pytest

from parallel.config import ConfigError, ParallelConfig
from pretrain.config import FaultToleranceConfig, PretrainConfig
from pretrain.config_rules import validate
from tests.parity import MODEL


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heartbeat_interval_seconds": 0.0}, "heartbeat_interval_seconds=0.0 must be a finite"),
        ({"heartbeat_timeout_seconds": math.inf}, "heartbeat_timeout_seconds=inf must be a finite"),
        (
            {"heartbeat_timeout_seconds": 5.0},
            "heartbeat_timeout_seconds=5 must be at least 3 times "
            "fault_tolerance.heartbeat_interval_seconds=2, or one late sign of life counts as a "
            "death; use 6 or more, or an interval of 1.66667 or less",
        ),
        ({"hang_timeout_seconds": -1.0}, "hang_timeout_seconds=-1.0 must be 0 (never) or a"),
    ],
)
def test_rules(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FaultToleranceConfig(**settings)  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    assert problem.startswith(f"fault_tolerance.{words}")


def configured(hang: float, collective: float) -> PretrainConfig:
    return PretrainConfig(
        model=MODEL,
        parallel=ParallelConfig(collective_timeout_seconds=collective),
        fault_tolerance=FaultToleranceConfig(hang_timeout_seconds=hang),
    )


def test_a_hang_is_named_before_its_collective_times_out() -> None:
    validate(PretrainConfig(model=MODEL), world_size=1)  # the defaults
    validate(configured(hang=0.0, collective=1.0), world_size=1)
    with pytest.raises(ConfigError) as caught:
        validate(configured(hang=300.0, collective=600.0), world_size=1)
    assert caught.value.problems == (
        "fault_tolerance.hang_timeout_seconds=300, times 2 in the first step, must be below "
        "parallel.collective_timeout_seconds=600, or the collective gives up before anyone has "
        "said which rank is behind; use 200, or a longer timeout there",
    )
