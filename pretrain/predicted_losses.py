"""What a fitted scaling law (data.mixture.law) says a run's validation losses should be.

    L_f(N, D, p_f)    N: non-embedding parameters, all experts counted
                      D: tokens trained on so far
                      p_f: the family's share of the samples drawn so far

At the end of the run, D all its tokens, the law speaks of just such a run. Before that it does not:
it is fitted to finished runs, whose learning rate had decayed, and a run in the middle of its
schedule lies above it. Imports neither torch nor megatron-core.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.provenance import atomic_write_text

if TYPE_CHECKING:
    from data.language_mixture import LanguageMixture
    from data.scaling_law.law import ScalingLaw
    from pretrain.train_state import TrainState

LEVEL = 0.9  # probability with which the loss of one more run lies between low and high
PREDICTION_FILE = "predicted_losses.json"


@dataclass(frozen=True)
class Prediction:
    """Of one family's validation loss, in nats per token."""

    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class EndPoint:
    """Where a run should end."""

    step: int
    num_parameters: int
    tokens: int
    families: dict[str, Prediction]
    warnings: list[str]  # what lies outside of what the law was fitted to, and how far

    def lines(self, law: str) -> list[str]:
        """For the one who starts the run."""
        losses = [
            f"  {family} {p.loss:.3f} ({p.low:.3f} to {p.high:.3f})"
            for family, p in self.families.items()
        ]
        about = f"at step {self.step:,}, {self.tokens:,} tokens"
        head = f"data.mixture.law={law} predicts these validation losses {about}:"
        beyond = [f"WARNING: the law is used outside of its fit: {line}" for line in self.warnings]
        return [head, *losses, *beyond]


class PredictedLosses:
    """The law for one model and one stream of samples. Needs no device and no communication.

    law: knows every family of the mixture that is drawn.
    differences: between this run and those the law was fitted to (data/mixture_law.py).
    """

    def __init__(
        self,
        law: ScalingLaw,
        mixture: LanguageMixture,
        num_parameters: int,
        differences: Sequence[str] = (),
    ) -> None:
        self._law, self._mixture, self._num_parameters = law, mixture, num_parameters
        self._differences = differences

    def at(self, consumed_sequences: int, consumed_tokens: int) -> dict[str, Prediction]:
        """By family, those not drawn yet left out; {} before the first token."""
        ratios = self._ratios(consumed_sequences)
        if not ratios or not consumed_tokens:
            return {}
        losses = self._law.loss(self._num_parameters, consumed_tokens, ratios)
        intervals = self._law.interval(self._num_parameters, consumed_tokens, ratios, LEVEL)
        return {family: Prediction(loss, *intervals[family]) for family, loss in losses.items()}

    def end_point(self, state: TrainState, train_steps: int, global_batch_size: int) -> EndPoint:
        """Of the run that goes on from `state`, as it is set now; padding counts as tokens."""
        steps = max(0, train_steps - state.step)
        if self._mixture.end is not None:  # the data may end first
            left = self._mixture.end - state.consumed_sequences
            steps = min(steps, left // global_batch_size)
        sequences = steps * global_batch_size
        tokens = state.consumed_tokens + sequences * self._mixture.seq_length
        last = state.consumed_sequences + sequences
        ratios = self._ratios(last)
        beyond = self._law.extrapolation(self._num_parameters, tokens, ratios) if tokens else []
        return EndPoint(
            state.step + steps,
            self._num_parameters,
            tokens,
            self.at(last, tokens),
            [*beyond, *self._differences],
        )

    def metrics(self, state: TrainState, evaluation: Mapping[str, float]) -> dict[str, float]:
        """eval/family/<family>/predicted_... and the measured loss over the predicted one.

        evaluation: the losses measured in `state`.
        """
        found: dict[str, float] = {}
        for family, prediction in self.at(state.consumed_sequences, state.consumed_tokens).items():
            prefix = f"eval/family/{family}/"
            found |= {f"{prefix}predicted_{name}": v for name, v in asdict(prediction).items()}
            if (measured := evaluation.get(f"{prefix}loss")) is not None:
                found[f"{prefix}loss_over_prediction"] = measured / prediction.loss
        return found

    def _ratios(self, sequences: int) -> dict[str, float]:
        """Each family's share of the first samples of the stream, where it is above 0."""
        drawn = dict.fromkeys(self._mixture.families, 0)
        for language, count in self._mixture.counts(sequences).items():
            drawn[self._mixture.family_of[language]] += count
        return {family: count / sequences for family, count in drawn.items() if count}


def keep_law(law: str, record: Path) -> None:
    """Copy the law's file beside the record of a start: run.1.json gets scaling_law.1.yaml."""
    copy = record.with_name(record.stem.replace("run", "scaling_law", 1) + ".yaml")
    atomic_write_text(copy, Path(law).expanduser().read_text(encoding="utf-8"))


def write_prediction(run_dir: Path, end: EndPoint) -> None:
    atomic_write_text(run_dir / PREDICTION_FILE, json.dumps(asdict(end), indent=1) + "\n")


def read_prediction(run_dir: Path) -> EndPoint | None:
    """What `write_prediction` wrote; None for a run without a law."""
    try:
        content = json.loads((run_dir / PREDICTION_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    families = {name: Prediction(**values) for name, values in content.pop("families").items()}
    return EndPoint(**content, families=families)


def predicted_families(names: Sequence[str] | Mapping[str, object]) -> list[str]:
    """The families that metrics of these names predict losses of, sorted."""
    start, end = "eval/family/", "/predicted_loss"
    return sorted(
        n[len(start) : -len(end)] for n in names if n.startswith(start) and n.endswith(end)
    )
