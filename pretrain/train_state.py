"""Where a run stands: everything besides weights and optimizer that a resume needs.

The data order and the dropout masks are functions of the step, so counters are all there is, and
what later steps are compared with.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pretrain.anomaly import AnomalyState


@dataclass
class Unreported:
    """What the steps since the last report on the mixture add up to: plain values."""

    consumed_sequences: int = 0  # where they begin
    # of each language with valid tokens: [language, sum of losses in nats, valid tokens]
    losses: list[list[Any]] = field(default_factory=list)


@dataclass
class TrainState:
    step: int = 0  # optimizer steps taken
    consumed_sequences: int = 0
    consumed_tokens: int = 0  # valid tokens
    wandb_run_id: str | None = None  # so that a resumed run is the same one there, too
    anomaly: AnomalyState = field(default_factory=AnomalyState)
    unreported: Unreported = field(default_factory=Unreported)  # kept up to date by Instruments

    def __post_init__(self) -> None:
        if isinstance(self.anomaly, dict):  # as `to_dict` gave it
            self.anomaly = AnomalyState(**self.anomaly)
        if isinstance(self.unreported, dict):
            self.unreported = Unreported(**self.unreported)

    def advance(self, sequences: int, tokens: int) -> None:
        self.step += 1
        self.consumed_sequences += sequences
        self.consumed_tokens += tokens

    def go_back(self, saved: "TrainState", left_out: list[int]) -> None:
        """To what a checkpoint of this run holds; samples [first, end) `left_out` come no more."""
        self.step = saved.step
        self.consumed_sequences = saved.consumed_sequences
        self.consumed_tokens = saved.consumed_tokens
        self.anomaly = self.anomaly.rolled_back(saved.anomaly, left_out)
        self.unreported = saved.unreported

    def rollback(self) -> dict[str, Any]:
        """Right after `go_back`: what the checkpoint does not know of it."""
        known = asdict(self.anomaly)
        return {
            "step": self.step,
            **{name: known[name] for name in ("count", "rollbacks", "left_out_samples")},
        }

    def take_up(self, rollback: dict[str, Any]) -> bool:
        """After a resume: go on as after this `rollback`, if it was to this step or a later one and
        the checkpoint does not know of it. Returns whether that was so."""
        known_to_checkpoint = rollback["rollbacks"] <= self.anomaly.rollbacks
        if not 0 < self.step <= rollback["step"] or known_to_checkpoint:
            return False
        news = {name: value for name, value in rollback.items() if name != "step"}
        self.anomaly = replace(self.anomaly, **news)
        return True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
