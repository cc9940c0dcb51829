"""Learning rate as a pure function of the optimizer step: nothing to save, nothing to restore.

Imports neither torch nor megatron-core.
"""

import math

from pretrain.config import DecayStyle, ScheduleConfig


def learning_rate(step: int, *, peak: float, schedule: ScheduleConfig, train_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0: the number of steps already taken.

    With W = lr_warmup_steps and D = lr_decay_steps (train_steps where None):

        step < W        peak * (step + 1) / W, so the last warm-up step runs at peak
        W <= step < D   min_lr + (peak - min_lr) * f(t),  t = (step - W) / (D - W)
        step >= D       min_lr
        f(t) = 1 - t (linear) or (1 + cos(pi t)) / 2 (cosine: arXiv 1608.03983 section 3, without
        restarts)

    `constant` stays at peak after the warm-up; D and min_lr play no part. No step of a run is
    taken at a rate of zero: Megatron-LM's schedule starts at step / W, so its first step changes
    nothing; and t reaches 1 only after the last step.

    Raises ValueError where the step is negative or the schedule cannot be followed.
    """
    if step < 0:
        raise ValueError(f"step={step}: optimizer steps are counted from 0.")
    warmup_steps = schedule.lr_warmup_steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule.lr_decay_style is DecayStyle.constant:
        return peak

    decay_steps = train_steps if schedule.lr_decay_steps is None else schedule.lr_decay_steps
    if warmup_steps > decay_steps:
        raise ValueError(
            f"schedule.lr_warmup_steps={warmup_steps} is more than the {decay_steps} steps over "
            f"which the learning rate decays (schedule.lr_decay_steps={schedule.lr_decay_steps}, "
            f"train.train_steps={train_steps}). Warm up for fewer steps or decay over more."
        )
    if step >= decay_steps:
        return schedule.min_lr
    t = (step - warmup_steps) / (decay_steps - warmup_steps)
    if schedule.lr_decay_style is DecayStyle.linear:
        remaining = 1 - t
    else:
        remaining = (1 + math.cos(math.pi * t)) / 2
    return schedule.min_lr + (peak - schedule.min_lr) * remaining
