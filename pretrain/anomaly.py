"""Is a step to be trusted? Pure functions of numbers that every rank has alike; see `judge`.

A step is judged after its gradients are known and before the update. What the verdict depends on
is in `AnomalyState`, which is part of every checkpoint: a resumed run decides as one that was not
interrupted. Imports neither torch nor megatron-core.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from pretrain.config import AnomalyConfig

# Scales the median absolute deviation to the standard deviation of normal numbers (the 75th
# percentile of the standard normal distribution).
_MAD_OF_NORMAL = 0.6745
# A spread below this share of the median counts as this much: losses that have stopped moving
# would otherwise make a spike of any change.
_SMALLEST_SPREAD = 1e-3


class Action(Enum):
    """What becomes of the update of a step."""

    apply = "apply"
    skip = "skip"
    rollback = "rollback"
    stop = "stop"


class AnomalyError(RuntimeError):
    """The run ends because of an anomaly, as anomaly.on_nonfinite or anomaly.on_spike asks."""


@dataclass(frozen=True)
class Verdict:
    """On one step."""

    action: Action = Action.apply
    kind: str = ""  # "nonfinite" or "spike"; empty: nothing to say
    why: str = ""
    # robust z-scores; NaN during the warm-up and where the number itself is not finite
    loss_z: float = math.nan
    grad_norm_z: float = math.nan

    @property
    def setting(self) -> str:
        """What the action follows from."""
        return "anomaly.on_spike" if self.kind == "spike" else "anomaly.on_nonfinite"


@dataclass
class AnomalyState:
    """What has been, as far as verdicts and the way through the data depend on it: plain values."""

    losses: list[float] = field(default_factory=list)  # of the last updates, oldest first
    grad_norms: list[float] = field(default_factory=list)
    count: int = 0  # anomalies so far, those before a rollback included
    # [first, end) of the samples whose update was skipped
    skipped_samples: list[list[int]] = field(default_factory=list)
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    # [first, end) of the samples that rollbacks leave out
    left_out_samples: list[list[int]] = field(default_factory=list)

    def note(
        self, verdict: Verdict, loss: float, grad_norm: float, samples: list[int], window: int
    ) -> None:
        """A step over `samples` [first, end) was taken; only updates enter the window."""
        self.count += bool(verdict.kind)
        if verdict.action is not Action.apply:
            self.skipped_samples.append(samples)
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.losses = [*self.losses, loss][-window:]
        self.grad_norms = [*self.grad_norms, grad_norm][-window:]

    def rolled_back(self, saved: "AnomalyState", left_out: list[int]) -> "AnomalyState":
        """The state to go on with from a checkpoint that holds `saved`."""
        return AnomalyState(
            losses=saved.losses,
            grad_norms=saved.grad_norms,
            count=self.count,
            skipped_samples=saved.skipped_samples,
            skipped_in_a_row=saved.skipped_in_a_row,
            rollbacks=self.rollbacks + 1,
            left_out_samples=[*self.left_out_samples, left_out],
        )


def robust_z(value: float, before: Sequence[float]) -> float:
    """How far `value` lies above the median of `before`, in robust standard deviations.

    The modified z-score of Iglewicz and Hoaglin (1993, "How to detect and handle outliers",
    section 3.3): 0.6745 (x - median) / MAD, with MAD the median absolute deviation from the median.
    Half of the numbers may be outliers themselves without moving it. Differs in that a MAD below a
    thousandth of the median counts as that.
    """
    middle = statistics.median(before)
    spread = statistics.median([abs(x - middle) for x in before])
    spread = max(spread, _SMALLEST_SPREAD * abs(middle))
    distance = value - middle
    if spread == 0.0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return _MAD_OF_NORMAL * distance / spread


def judge(config: AnomalyConfig, state: AnomalyState, loss: float, grad_norm: float) -> Verdict:
    """What to do with a step of this mean loss and global gradient norm (before clipping).

    Not finite: anomaly.on_nonfinite. A spike, which is a `robust_z` above anomaly.spike_threshold
    of loss or gradient norm over the last updates: anomaly.on_spike. A rollback beyond
    anomaly.max_rollbacks becomes a stop.
    """
    numbers = {"loss": (loss, state.losses), "gradient norm": (grad_norm, state.grad_norms)}
    broken = [name for name, (value, _) in numbers.items() if not math.isfinite(value)]
    if broken:
        verb = "is" if len(broken) == 1 else "are"
        why = f"{' and '.join(broken)} {verb} not finite"
        return _limited(config, state, Verdict(Action(config.on_nonfinite.value), "nonfinite", why))
    if len(state.losses) < config.spike_warmup:
        return Verdict()
    z = {name: robust_z(value, before) for name, (value, before) in numbers.items()}
    spikes = [
        f"{name} {value:.4g} is {z[name]:.1f} robust standard deviations above the median "
        f"{statistics.median(before):.4g} of the last {len(before)} updates"
        for name, (value, before) in numbers.items()
        if z[name] > config.spike_threshold
    ]
    if not spikes or config.on_spike.value == "ignore":
        return Verdict(loss_z=z["loss"], grad_norm_z=z["gradient norm"])
    wanted = config.on_spike.value
    action = Action.apply if wanted == "report" else Action(wanted)
    why = "; ".join(spikes)
    verdict = Verdict(action, "spike", why, z["loss"], z["gradient norm"])
    return _limited(config, state, verdict)


def _limited(config: AnomalyConfig, state: AnomalyState, verdict: Verdict) -> Verdict:
    if verdict.action is not Action.rollback or state.rollbacks < config.max_rollbacks:
        return verdict
    why = f"{verdict.why}; anomaly.max_rollbacks={config.max_rollbacks} are used up"
    return Verdict(Action.stop, verdict.kind, why, verdict.loss_z, verdict.grad_norm_z)


def first_sample(consumed: int, sequences: int, left_out: Sequence[list[int]]) -> int:
    """Where the next step of so many sequences begins, if it may touch no range that is left out.

    A step that would reach into one begins behind it; so samples before a range may be left out as
    well, when the batch size has changed since.
    """
    for first, end in sorted(left_out):
        if first < consumed + sequences and consumed < end:
            consumed = end
    return consumed


def whole_steps(consumed: int, end: int, sequences: int, left_out: Sequence[list[int]]) -> int:
    """How many steps of so many sequences are left before sample `end`, by `first_sample`."""
    steps = 0
    for first, behind in [*sorted(left_out), [end, end]]:
        if behind > consumed:
            steps += max(0, min(first, end) - consumed) // sequences
            consumed = behind
    return steps


def samples_to_leave_out(
    first: int, sequences: int, *, steps: int, saved_at: int
) -> tuple[int, int]:
    """[first, end) of what a rollback leaves out: the step that begins at sample `first`, and so
    many `steps` less one before it, but nothing before the checkpoint's sample `saved_at`."""
    end = first + sequences
    return max(saved_at, end - steps * sequences), end
