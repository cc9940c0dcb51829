"""The schedule, value by value."""

import math

import pytest

from pretrain.config import DecayStyle, ScheduleConfig
from pretrain.learning_rate import learning_rate


def rates(schedule: ScheduleConfig, train_steps: int, count: int | None = None) -> list[float]:
    steps = range(train_steps if count is None else count)
    return [learning_rate(s, peak=1.0, schedule=schedule, train_steps=train_steps) for s in steps]


def test_linear_warmup_reaches_the_peak_with_its_last_step_and_never_starts_at_zero():
    schedule = ScheduleConfig(lr_warmup_steps=4, lr_decay_style=DecayStyle.constant, min_lr=0.5)
    assert rates(schedule, 7) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_linear_decay():
    schedule = ScheduleConfig(lr_warmup_steps=2, lr_decay_style=DecayStyle.linear, min_lr=0.2)
    expected = [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]
    assert rates(schedule, 6) == pytest.approx(expected, abs=1e-15)


def test_cosine_decay():
    schedule = ScheduleConfig(lr_decay_style=DecayStyle.cosine, min_lr=0.1)
    half = math.sqrt(0.5) / 2
    expected = [1.0, 0.1 + 0.9 * (0.5 + half), 0.55, 0.1 + 0.9 * (0.5 - half)]
    assert rates(schedule, 4) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("style", [DecayStyle.linear, DecayStyle.cosine])
def test_min_lr_after_the_decay_steps(style: DecayStyle):
    schedule = ScheduleConfig(
        lr_warmup_steps=1, lr_decay_style=style, lr_decay_steps=3, min_lr=0.25
    )
    assert rates(schedule, 100, count=6) == pytest.approx([1, 1, 0.625, 0.25, 0.25, 0.25])


def test_warmup_may_fill_the_whole_decay():
    schedule = ScheduleConfig(lr_warmup_steps=2, lr_decay_steps=2, min_lr=0.3)
    assert rates(schedule, 10, count=4) == [0.5, 1.0, 0.3, 0.3]


def test_the_peak_scales():
    schedule = ScheduleConfig(lr_warmup_steps=10)
    assert learning_rate(4, peak=6e-4, schedule=schedule, train_steps=100) == pytest.approx(3e-4)


def test_refuses_a_negative_step():
    with pytest.raises(ValueError, match="step=-1"):
        learning_rate(-1, peak=1.0, schedule=ScheduleConfig(), train_steps=10)


def test_refuses_a_warmup_longer_than_the_decay():
    schedule = ScheduleConfig(lr_warmup_steps=20)
    with pytest.raises(ValueError, match=r"schedule\.lr_warmup_steps=20 .* 10 steps"):
        learning_rate(20, peak=1.0, schedule=schedule, train_steps=10)
