"""Amounts asked for: stages, ramps, epoch caps."""

import numpy as np
import pytest

from data.config import WhenExhausted
from data.ratio_schedule import RatioSchedule, Stage

FAMILIES = np.array([0, 0, 1])
HALF = np.array([0.3, 0.2, 0.5])
NO_LIMIT = np.full(3, np.inf)


def ratios(
    *stages: Stage,
    limits: np.ndarray = NO_LIMIT,
    policy: WhenExhausted = WhenExhausted.redistribute,
) -> RatioSchedule:
    return RatioSchedule([Stage(0, 0, HALF), *stages], FAMILIES, limits, policy)


def test_amounts_are_the_integral_of_the_shares() -> None:
    then = np.array([0.1, 0.1, 0.8])
    schedule = ratios(Stage(1000, 400, then))
    for n in (0, 1, 999, 1000, 1001, 1200, 1399, 1400, 1401, 10_000):
        inside = np.clip(n - 1000, 0, 400)
        ramp = HALF * inside + (then - HALF) * inside**2 / 800
        expected = HALF * min(n, 1000) + ramp + then * max(0, n - 1400)
        np.testing.assert_allclose(schedule.asked(n), expected, atol=1e-9)
        assert schedule.asked(n).sum() == pytest.approx(n, abs=1e-9)
    np.testing.assert_allclose(schedule.shares(1200), (HALF + then) / 2)
    np.testing.assert_allclose(schedule.shares(5000), then)
    assert schedule.knots(0, 900) == [0, 900]
    assert schedule.knots(900, 1500) == [900, *range(1000, 1400, 16), 1400, 1500]
    assert schedule.knots(1500, 2000) == [1500, 2000]
    assert schedule.end is None


def test_a_language_used_up_leaves_its_share_to_its_family() -> None:
    schedule = ratios(limits=np.array([300.0, np.inf, np.inf]))
    assert schedule.exhausted == [(1000, 0)]
    np.testing.assert_allclose(schedule.shares(1000), [0, 0.5, 0.5])
    np.testing.assert_allclose(schedule.asked(3000), [300, 200 + 1000, 1500])


def test_a_family_used_up_leaves_its_share_to_all_others() -> None:
    schedule = ratios(limits=np.array([300.0, 700.0, np.inf]))
    # the first at 1000, then the second has 0.5: 200 + 0.5 x 1000
    assert schedule.exhausted == [(1000, 0), (2000, 1)]
    np.testing.assert_allclose(schedule.shares(2000), [0, 0, 1])
    assert schedule.end is None


def test_nothing_left_ends_the_data() -> None:
    schedule = ratios(limits=np.array([300.0, 700.0, 1500.0]))
    assert schedule.end == 2500
    assert schedule.asked(2500).sum() == pytest.approx(2500)


def test_stop_ends_at_the_first_cap() -> None:
    schedule = ratios(limits=np.array([np.inf, 50.0, np.inf]), policy=WhenExhausted.stop)
    assert schedule.end == 250 and schedule.exhausted == [(250, 1)]


def test_repeat_reports_and_goes_on() -> None:
    schedule = ratios(limits=np.array([300.0, 700.0, np.inf]), policy=WhenExhausted.repeat)
    assert schedule.exhausted == [(1000, 0), (3500, 1)]
    assert schedule.end is None
    np.testing.assert_allclose(schedule.asked(10_000), HALF * 10_000)


@pytest.mark.parametrize("policy", list(WhenExhausted))
def test_caps_inside_a_ramp_and_across_stages(policy: WhenExhausted) -> None:
    limits = np.array([400.0, np.inf, np.inf])
    schedule = ratios(Stage(1000, 1000, np.array([0.1, 0.4, 0.5])), limits=limits, policy=policy)
    (at, language), *_ = schedule.exhausted
    assert language == 0 and 1000 < at < 2000
    free = ratios(Stage(1000, 1000, np.array([0.1, 0.4, 0.5])))
    assert free.asked(at)[0] <= 400 < free.asked(at + 1)[0]
    if policy is WhenExhausted.redistribute:
        for n in (at, at + 1, 1900, 2000, 5000, 10**9):
            assert schedule.asked(n)[0] <= 400
            assert schedule.asked(n).sum() == pytest.approx(n, rel=1e-12)
            assert schedule.asked(n)[2] == pytest.approx(n / 2, rel=1e-9)  # another family
    elif policy is WhenExhausted.stop:
        assert schedule.end == at


def test_a_stage_may_bring_a_language_in_or_drop_it() -> None:
    stages = Stage(100, 0, np.array([0.0, 0.5, 0.5])), Stage(200, 0, np.array([1.0, 0, 0]))
    schedule = ratios(*stages)
    np.testing.assert_allclose(schedule.asked(300), [30 + 100, 20 + 50, 50 + 50])
    assert [start for start, _, _ in schedule.segments()] == [0, 100, 200]


def test_a_spent_language_stays_out_of_later_stages() -> None:
    schedule = ratios(Stage(1500, 0, np.array([0.8, 0.1, 0.1])), limits=np.array([30.0, 1e9, 1e9]))
    np.testing.assert_allclose(schedule.shares(1500), [0, 0.9, 0.1])
