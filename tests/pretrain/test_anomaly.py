"""The verdict on a step, and the way around samples that a rollback left out: numbers only."""

import math
import random
from dataclasses import asdict, replace

import pytest

from parallel.config import ConfigError
from pretrain.anomaly import (
    Action,
    AnomalyState,
    Verdict,
    first_sample,
    judge,
    robust_z,
    samples_to_leave_out,
    whole_steps,
)
from pretrain.config import AnomalyConfig, OnNonfinite, OnSpike
from pretrain.train_state import TrainState

CONFIG = AnomalyConfig(spike_window=9, spike_warmup=5)


def calm(updates: int = 9) -> AnomalyState:
    """Losses around 2.0 and gradient norms around 0.5."""
    noise = random.Random(0)
    state = AnomalyState()
    for step in range(updates):
        loss, norm = 2.0 + noise.uniform(-0.01, 0.01), 0.5 + noise.uniform(-0.05, 0.05)
        state.note(Verdict(), loss, norm, [8 * step, 8 * step + 8], CONFIG.spike_window)
    return state


def test_robust_z_is_the_modified_z_score() -> None:
    # the example of Iglewicz and Hoaglin's formula: median 5, absolute deviations 4 2 0 2 4, MAD 2
    assert robust_z(9.0, [1.0, 3.0, 5.0, 7.0, 9.0]) == pytest.approx(0.6745 * 4 / 2)
    assert robust_z(1.0, [1.0, 3.0, 5.0, 7.0, 9.0]) == pytest.approx(-0.6745 * 4 / 2)
    # half of the numbers may be outliers
    assert robust_z(6.0, [5.0, 4.9, 5.1, 1e9, 1e9]) < robust_z(6.0, [5.0, 4.9, 5.1, 5.0, 4.9])
    assert robust_z(6.0, [5.0, 4.9, 5.1, 4.8, 1e9]) == pytest.approx(0.6745 * 1.0 / 0.1)


def test_a_standard_deviation_is_about_one() -> None:
    noise = random.Random(1)
    numbers = [noise.gauss(3.0, 0.2) for _ in range(4001)]
    assert robust_z(3.0 + 4 * 0.2, numbers) == pytest.approx(4.0, rel=0.05)


def test_losses_that_stand_still_make_no_spike_of_a_small_change() -> None:
    assert robust_z(2.001, [2.0] * 9) == pytest.approx(0.6745 / 2)
    assert robust_z(2.0, [2.0] * 9) == 0.0
    assert robust_z(1.0, [0.0] * 9) == math.inf
    assert robust_z(0.0, [0.0] * 9) == 0.0


def test_an_ordinary_step_is_applied() -> None:
    verdict = judge(CONFIG, calm(), 2.005, 0.52)
    assert (verdict.action, verdict.kind) == (Action.apply, "")
    assert abs(verdict.loss_z) < 3 and abs(verdict.grad_norm_z) < 3
    # far below is nothing to worry about
    assert judge(CONFIG, calm(), 0.5, 0.01).kind == ""


@pytest.mark.parametrize(
    ("loss", "grad_norm", "why"),
    [
        (math.nan, 0.5, "loss is not finite"),
        (2.0, math.inf, "gradient norm is not finite"),
        (math.nan, math.nan, "loss and gradient norm are not finite"),
    ],
)
def test_what_is_not_finite_is_never_applied(loss: float, grad_norm: float, why: str) -> None:
    for setting, action in (
        (OnNonfinite.skip, Action.skip),
        (OnNonfinite.rollback, Action.rollback),
        (OnNonfinite.stop, Action.stop),
    ):
        config = replace(CONFIG, on_nonfinite=setting, on_spike=OnSpike.ignore)
        for state in (AnomalyState(), calm()):
            verdict = judge(config, state, loss, grad_norm)
            assert (verdict.action, verdict.kind, verdict.why) == (action, "nonfinite", why)
            assert verdict.setting == "anomaly.on_nonfinite"


@pytest.mark.parametrize(
    ("setting", "action", "kind"),
    [
        (OnSpike.ignore, Action.apply, ""),
        (OnSpike.report, Action.apply, "spike"),
        (OnSpike.skip, Action.skip, "spike"),
        (OnSpike.rollback, Action.rollback, "spike"),
        (OnSpike.stop, Action.stop, "spike"),
    ],
)
def test_a_spike_is_what_the_setting_makes_of_it(
    setting: OnSpike, action: Action, kind: str
) -> None:
    config = replace(CONFIG, on_spike=setting)
    for loss, grad_norm, name in ((2.5, 0.5, "loss"), (2.0, 5.0, "gradient norm")):
        verdict = judge(config, calm(), loss, grad_norm)
        assert (verdict.action, verdict.kind) == (action, kind)
        assert not kind or (verdict.why.startswith(name) and ";" not in verdict.why)
        assert max(verdict.loss_z, verdict.grad_norm_z) > CONFIG.spike_threshold
    assert verdict.setting == "anomaly.on_spike" or not kind
    if kind:
        assert "; gradient norm 5 is" in judge(config, calm(), 2.5, 5.0).why


def test_there_is_no_spike_before_the_warm_up() -> None:
    config = replace(CONFIG, on_spike=OnSpike.skip)
    assert judge(config, calm(4), 100.0, 100.0) == Verdict()
    assert judge(config, calm(5), 100.0, 100.0).action is Action.skip


def test_only_updates_enter_the_window() -> None:
    state = calm()
    before = list(state.losses)
    state.note(Verdict(Action.skip, "spike"), 9.0, 9.0, [72, 80], CONFIG.spike_window)
    state.note(Verdict(Action.skip, "nonfinite"), math.nan, 1.0, [80, 88], CONFIG.spike_window)
    assert state.losses == before
    assert (state.count, state.skipped_in_a_row) == (2, 2)
    assert state.skipped_samples == [[72, 80], [80, 88]]
    state.note(Verdict(kind="spike"), 9.0, 9.0, [88, 96], CONFIG.spike_window)  # reported
    assert state.losses == [*before[1:], 9.0] and len(state.grad_norms) == 9
    assert (state.count, state.skipped_in_a_row) == (3, 0)


def test_the_last_rollback_is_followed_by_a_stop() -> None:
    config = replace(CONFIG, on_spike=OnSpike.rollback, max_rollbacks=2)
    state = calm()
    for rollbacks, action in enumerate((Action.rollback, Action.rollback, Action.stop)):
        state.rollbacks = rollbacks
        verdict = judge(config, state, 3.0, 0.5)
        assert verdict.action is action and verdict.loss_z > 10
    assert verdict.why.endswith("anomaly.max_rollbacks=2 are used up")


def test_a_rollback_forgets_what_came_after_the_checkpoint_but_not_itself() -> None:
    saved = TrainState(step=4, consumed_sequences=32, consumed_tokens=320, anomaly=calm(4))
    now = TrainState(9, 72, 720, wandb_run_id="x", anomaly=calm(8))
    now.anomaly.note(Verdict(Action.rollback, "spike"), 9.0, 9.0, [64, 72], 9)
    now.go_back(saved, [56, 72])
    assert (now.step, now.consumed_sequences, now.consumed_tokens) == (4, 32, 320)
    assert now.wandb_run_id == "x"
    assert now.anomaly.losses == saved.anomaly.losses and now.anomaly.skipped_samples == []
    assert (now.anomaly.count, now.anomaly.rollbacks, now.anomaly.skipped_in_a_row) == (1, 1, 0)
    assert now.anomaly.left_out_samples == [[56, 72]]


def test_a_rollback_is_taken_up_once_and_only_by_what_does_not_know_it() -> None:
    saved = TrainState(step=4, consumed_sequences=32, anomaly=calm(4))
    now = TrainState(9, 72, 720, anomaly=calm(8))
    now.anomaly.note(Verdict(Action.rollback, "spike"), 9.0, 9.0, [64, 72], 9)
    now.go_back(saved, [64, 72])
    rollback = now.rollback()
    resumed = TrainState(**saved.to_dict())
    assert resumed.take_up(rollback)
    assert resumed.anomaly == now.anomaly and resumed.step == 4
    assert not resumed.take_up(rollback)
    older = TrainState(step=2)  # the checkpoint gone back to was damaged
    assert older.take_up(rollback) and older.anomaly.left_out_samples == [[64, 72]]
    for step in (0, 5):  # a run from the beginning; a later save knows, or belongs to no rollback
        assert not TrainState(step=step).take_up(rollback)


def test_the_state_survives_a_checkpoint() -> None:
    state = TrainState(step=9, consumed_sequences=72, anomaly=calm())
    state.anomaly.left_out_samples.append([8, 16])
    plain = state.to_dict()
    assert plain["anomaly"] == asdict(state.anomaly)
    assert TrainState(**plain) == state


@pytest.mark.parametrize(
    ("consumed", "left_out", "first"),
    [
        (0, [], 0),
        (0, [[8, 16]], 0),
        (8, [[8, 16]], 16),
        (16, [[8, 16]], 16),
        (4, [[8, 16]], 16),  # the batch size has changed: no step may reach into the range
        (12, [[8, 16]], 16),
        (8, [[16, 24], [8, 16]], 24),
        (8, [[8, 32], [16, 24]], 32),
        (0, [[8, 16], [20, 24]], 0),
    ],
)
def test_a_step_begins_behind_what_is_left_out(
    consumed: int, left_out: list[list[int]], first: int
) -> None:
    assert first_sample(consumed, 8, left_out) == first


def test_whole_steps_counts_the_steps_that_are_taken() -> None:
    chance = random.Random(3)
    for _ in range(300):
        left_out = []
        for _ in range(chance.randrange(4)):
            first = chance.randrange(100)
            left_out.append([first, first + chance.randrange(1, 30)])
        consumed, end, sequences = chance.randrange(40), chance.randrange(40, 120), 8
        taken, at = 0, consumed
        while (at := first_sample(at, sequences, left_out)) + sequences <= end:
            taken, at = taken + 1, at + sequences
        assert whole_steps(consumed, end, sequences, left_out) == taken, (consumed, end, left_out)


def test_a_rollback_leaves_out_steps_up_to_the_checkpoint() -> None:
    assert samples_to_leave_out(80, 8, steps=1, saved_at=40) == (80, 88)
    assert samples_to_leave_out(80, 8, steps=3, saved_at=40) == (64, 88)
    assert samples_to_leave_out(80, 8, steps=30, saved_at=40) == (40, 88)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        AnomalyConfig(spike_window=10, spike_warmup=20, spike_threshold=0.0, keep_batches=0)
    text = str(caught.value)
    assert "anomaly.spike_window=10 must hold the anomaly.spike_warmup=20 updates" in text
    assert "anomaly.spike_threshold=0.0 must be a finite number above 0" in text
    assert "anomaly.keep_batches=0" in text
    with pytest.raises(ConfigError, match=r"anomaly\.max_rollbacks=-1"):
        AnomalyConfig(max_rollbacks=-1)
