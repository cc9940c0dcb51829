"""Settings that are legal and most likely not meant: schedules, intervals, units, W&B."""

import math
import os
import re
from collections.abc import Callable

from launch.findings import Findings
from launch.units import minutes_or_hours
from pretrain.config import DecayStyle, PretrainConfig, WandbMode
from pretrain.tracker import has_wandb_key

# of one step: more is likelier a batch size in tokens (its unit is sequences) than a wish
MOST_TOKENS_A_STEP = 200_000_000
# seconds without any progress before a run ends; below, a slow evaluation or a cold disk may do it
SHORTEST_HANG_TIMEOUT = 60.0
HIGHEST_LR = 0.1
LONGEST_WANDB_NAME = 128
_NOT_IN_A_PROJECT = re.compile(r"[/\\#?%:]")
_NOT_IN_AN_ENTITY = re.compile(r"[^\w-]", re.ASCII)


def check_plausibility(
    config: PretrainConfig, findings: Findings, typed: Callable[[str], bool]
) -> None:
    """typed: whether somebody chose a setting's value; defaults are not held against anybody."""
    findings.warnings("schedule", _learning_rate(config))
    findings.warnings("intervals", _intervals(config, typed))
    findings.warnings("units", _units(config))
    findings.warnings("optimizer", _optimizer(config))
    _wandb(config, findings)


def _learning_rate(config: PretrainConfig) -> list[str]:
    schedule, steps = config.schedule, config.train.train_steps
    warmup, decay, style = (
        schedule.lr_warmup_steps,
        schedule.lr_decay_steps,
        schedule.lr_decay_style,
    )
    found = []
    if 1 < steps < 2 * warmup and warmup <= steps:  # a longer one is refused
        found.append(
            f"schedule.lr_warmup_steps={warmup} is {100 * warmup / steps:.0f} % of "
            f"train.train_steps={steps}: the learning rate "
            + ("never falls" if warmup >= steps else "rises for most of the run")
            + f"; use {_range(max(1, steps // 100), max(1, steps // 10))}, or a longer run"
        )
    if style is DecayStyle.constant:
        for name, value in (("lr_decay_steps", decay), ("min_lr", schedule.min_lr or None)):
            if value is not None:
                found.append(
                    f"schedule.{name}={value:g} means nothing with "
                    "schedule.lr_decay_style=constant; leave it out, or use cosine or linear"
                )
    elif decay is not None and decay < steps and schedule.min_lr == 0:
        found.append(
            f"schedule.lr_decay_steps={decay} ends before train.train_steps={steps}: the last "
            f"{steps - decay} steps have a learning rate of 0 and learn nothing; leave it out, or "
            f"set schedule.min_lr={config.optimizer.lr / 10:g}"
        )
    elif decay is not None and decay > steps:
        found.append(
            f"schedule.lr_decay_steps={decay} is beyond train.train_steps={steps}: the run ends "
            f"before the learning rate has come down; leave it out to decay over {steps}"
        )
    if style is not DecayStyle.constant and 0 < config.optimizer.lr == schedule.min_lr:
        found.append(
            f"schedule.min_lr={schedule.min_lr:g} equals optimizer.lr: nothing decays; use "
            f"{config.optimizer.lr / 10:g}, or schedule.lr_decay_style=constant"
        )
    return found


def _range(first: int, last: int) -> str:
    return f"{first} to {last}" if first < last else str(first)


def _intervals(config: PretrainConfig, typed: Callable[[str], bool]) -> list[str]:
    train, checkpoint, steps = config.train, config.checkpoint, config.train.train_steps
    found = [
        f"{setting}={value} is beyond train.train_steps={steps}: {what}; use "
        f"{max(1, steps // 10)}, or 0"
        for setting, value, what in (
            ("train.eval_interval", train.eval_interval, "nothing is evaluated on the way"),
            ("checkpoint.save_interval", checkpoint.save_interval, "nothing is saved on the way"),
            ("train.router_health_interval", train.router_health_interval, "no report on routers"),
            ("train.mixture_interval", train.mixture_interval, "no report on the mixture"),
        )
        if value > steps and typed(setting)
    ]
    if train.log_interval > steps:
        found.append(
            f"train.log_interval={train.log_interval} is beyond train.train_steps={steps}: no loss "
            "is logged; use 1"
        )
    if checkpoint.save_interval == 0 and steps > 1000:
        found.append(
            f"checkpoint.save_interval=0 with train.train_steps={steps}: a run that is killed "
            "starts anew; use 500"
        )
    every, save = checkpoint.keep_every, checkpoint.save_interval
    if every and save and every % save:
        found.append(
            f"checkpoint.keep_every={every} is no multiple of checkpoint.save_interval={save}: "
            f"only every {math.lcm(every, save)} steps one is kept; use "
            f"{max(1, round(every / save)) * save}"
        )
    if config.profile.start_step > steps:
        found.append(
            f"profile.start_step={config.profile.start_step} is beyond train.train_steps={steps}: "
            f"nothing is traced; use {min(10, steps)}"
        )
    return found


def _units(config: PretrainConfig) -> list[str]:
    found = []
    batch, length = config.train.global_batch_size, config.seq_length
    if batch * length > MOST_TOKENS_A_STEP:
        found.append(
            f"train.global_batch_size={batch} counts sequences of {length} tokens: "
            f"{batch * length:,} tokens a step; for {batch:,} tokens a step use "
            f"{max(1, batch // length)}"
        )
    hang = config.fault_tolerance.hang_timeout_seconds
    timeouts = {
        "fault_tolerance.hang_timeout_seconds": hang,
        "parallel.startup_timeout_seconds": config.parallel.startup_timeout_seconds,
        "parallel.collective_timeout_seconds": config.parallel.collective_timeout_seconds,
    }
    found += [
        f"{setting}={seconds:g} is {seconds:g} seconds, in which a healthy run may well seem to "
        f"hang; if minutes were meant: {60 * seconds:g}"
        for setting, seconds in timeouts.items()
        if 0 < seconds < SHORTEST_HANG_TIMEOUT
    ]
    return found + minutes_or_hours("fault_tolerance.walltime", config.fault_tolerance.walltime)


def _optimizer(config: PretrainConfig) -> list[str]:
    optimizer, found = config.optimizer, []
    if optimizer.lr > HIGHEST_LR:
        found.append(
            f"optimizer.lr={optimizer.lr:g} is far above what AdamW trains a transformer with; use "
            f"1e-3 or less (was the minus of an exponent left out?)"
        )
    if optimizer.adam_beta2 < optimizer.adam_beta1:
        found.append(
            f"optimizer.adam_beta2={optimizer.adam_beta2:g} is below optimizer.adam_beta1="
            f"{optimizer.adam_beta1:g}: the second moment would forget faster than the first; "
            "exchange them, or use 0.95 to 0.999"
        )
    if optimizer.weight_decay >= 1:
        found.append(
            f"optimizer.weight_decay={optimizer.weight_decay:g} times the learning rate is taken "
            "off the weights at each step; 0.1 is usual"
        )
    if 0 < optimizer.clip_grad < 0.01:
        found.append(
            f"optimizer.clip_grad={optimizer.clip_grad:g} is a norm that no gradient stays below; "
            "1.0 is usual, 0 switches clipping off"
        )
    return found


def _wandb(config: PretrainConfig, findings: Findings) -> None:
    wandb = config.wandb
    if wandb.mode is WandbMode.disabled:
        return
    if not wandb.project or len(wandb.project) > LONGEST_WANDB_NAME:
        findings.errors(
            "wandb",
            [
                f"wandb.project={wandb.project} must have 1 to {LONGEST_WANDB_NAME} characters; "
                "use a name such as magnetron"
            ],
        )
    if bad := _NOT_IN_A_PROJECT.search(wandb.project):
        better = _NOT_IN_A_PROJECT.sub("-", wandb.project)
        findings.errors(
            "wandb",
            [
                f"wandb.project={wandb.project} has a {bad[0]!r}, and W&B takes no / \\ # ? % : in "
                f"a project's name; use {better}"
                + (", and wandb.entity for what stands before the /" if bad[0] == "/" else "")
            ],
        )
    if wandb.entity is not None and (not wandb.entity or _NOT_IN_AN_ENTITY.search(wandb.entity)):
        better = _NOT_IN_AN_ENTITY.sub("-", wandb.entity) or "null"
        findings.errors(
            "wandb",
            [
                f"wandb.entity={wandb.entity} must be letters, digits, - and _, as in the address "
                f"of your team's page; use {better}"
            ],
        )
    if wandb.mode is WandbMode.online and not has_wandb_key():
        findings.warnings(
            "wandb",
            [
                "wandb.mode=online needs a key, and here is neither WANDB_API_KEY nor an entry in "
                "~/.netrc: the run would record offline; run `wandb login`, or use "
                "wandb.mode=offline"
            ],
        )
    elif wandb.mode is WandbMode.auto and not os.environ.get("WANDB_MODE") and not has_wandb_key():
        findings.notes("wandb", ["wandb.mode=auto: without a key here, W&B records offline"])
