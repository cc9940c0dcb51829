"""What a run learns of each family and language: loss, asked and realised ratio, tokens, epochs."""

from __future__ import annotations

from collections.abc import Mapping

from data.language_mixture import LanguageMixture
from pretrain.loss import LanguageLosses
from pretrain.train_state import TrainState, Unreported


class MixtureReport:
    """Collects the losses of steps; `metrics` says what has come together since the last call.

    Tokens, epochs and asked ratios are functions of the number of consumed sequences; the sums of
    losses are in the run's state (`unreported`) and so in its checkpoints: a resumed run reports
    what one that was left alone does. Needs no communication: losses are the same on all ranks
    already.
    """

    def __init__(self, mixture: LanguageMixture, state: TrainState) -> None:
        self._mixture = mixture
        self._sizes = {packed.store.language: float(len(packed)) for packed in mixture.sequences}
        self._family_sizes = self._by_family(self._sizes)
        self.go_on(state)

    def go_on(self, state: TrainState) -> None:
        """From what `state` has of the steps since the last report.

        A checkpoint of format 2 or older has nothing: then from where it stands.
        """
        carried = state.unreported
        self._restart(carried.consumed_sequences if carried.losses else state.consumed_sequences)
        for language, loss_sum, tokens in carried.losses:
            row = self._losses.totals[self._mixture.languages.index(language)]
            row[0], row[1] = loss_sum, tokens

    def _restart(self, consumed_sequences: int) -> None:
        self._losses = LanguageLosses(self._mixture.languages)
        self._begin = consumed_sequences
        self._asked_before = self._mixture.asked(consumed_sequences)

    def unreported(self) -> Unreported:
        """What `go_on` goes on from."""
        rows = zip(self._mixture.languages, self._losses.totals.tolist(), strict=True)
        return Unreported(
            self._begin,
            [[language, loss_sum, int(tokens)] for language, (loss_sum, tokens) in rows if tokens],
        )

    def add(self, losses: LanguageLosses) -> None:
        """One step's, summed over all ranks."""
        self._losses.merge(losses)

    def metrics(self, consumed_sequences: int) -> dict[str, float]:
        """train/family/..., train/language/... and data/...; starts collecting anew."""
        metrics = self._loss_metrics()
        metrics |= self._drawn(consumed_sequences)
        before = self._asked_before
        self._restart(consumed_sequences)
        asked = self._by_family({code: n - before[code] for code, n in self._asked_before.items()})
        whole = sum(asked.values())
        if whole > 0:
            metrics |= {
                f"data/family/{family}/asked_ratio": n / whole for family, n in asked.items()
            }
        return metrics

    def _loss_metrics(self) -> dict[str, float]:
        rows = dict(zip(self._mixture.languages, self._losses.totals.tolist(), strict=True))
        sums = {language: loss_sum for language, (loss_sum, _) in rows.items()}
        tokens = {language: count for language, (_, count) in rows.items()}
        metrics = {}
        for kind, of_sums, of_tokens in (
            ("family", self._by_family(sums), self._by_family(tokens)),
            ("language", sums, tokens),
        ):
            for name, count in of_tokens.items():
                if count:
                    metrics[f"train/{kind}/{name}/loss"] = of_sums[name] / count
        trained = sum(tokens.values())
        for family, count in self._by_family(tokens).items():
            if trained:
                metrics[f"data/family/{family}/ratio"] = count / trained
        return metrics

    def _drawn(self, consumed_sequences: int) -> dict[str, float]:
        metrics, seq_length = {}, self._mixture.seq_length
        counts = self._mixture.counts(consumed_sequences)
        for kind, drawn, sizes in (
            ("family", self._by_family(counts), self._family_sizes),
            ("language", counts, self._sizes),
        ):
            for name, number in drawn.items():
                metrics[f"data/{kind}/{name}/tokens"] = float(number * seq_length)
                metrics[f"data/{kind}/{name}/epochs"] = number / sizes[name]
        return metrics

    def _by_family(self, of_languages: Mapping[str, float]) -> dict[str, float]:
        sums = dict.fromkeys(self._mixture.families, 0.0)
        for language, value in of_languages.items():
            sums[self._mixture.family_of[language]] += value
        return sums
