"""What "the loss" means in this project, whatever the layout: sum over valid tokens / their number.

Shapes: b = sequences of a micro-batch, s = tokens of a sequence, L = languages.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def mean_over_valid_tokens(loss_sum: Tensor, valid_tokens: Tensor) -> Tensor:
    """Mean loss in nats per token: `loss_sum / valid_tokens`, elementwise, any equal shapes.

    Both arguments are totals over everything the mean is to cover: all micro-batches of the step
    and all data- and context-parallel ranks. A mean of per-micro-batch means would weight tokens
    by how they happened to be batched, and change with the layout.

    NaN where there is no valid token: there is no such mean, 0 would read as a perfect loss, and
    raising would make the host wait for the device on every step.
    """
    nothing = torch.full_like(loss_sum, torch.nan)
    return torch.where(valid_tokens > 0, loss_sum / valid_tokens.clamp(min=1), nothing)


class LanguageLosses:
    """Loss sums and token counts by language, `totals` [L, 2] float64: (loss sum, valid tokens).

    Every view is a ratio of sums, so totals of micro-batches and ranks are merged by adding them:
    `merge` here, or an all-reduce (SUM) of `totals` by the caller. Ranks that hold copies of the
    same tokens (tensor parallelism) may all take part: numerator and denominator scale alike.
    """

    def __init__(self, languages: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.languages = tuple(languages)
        self.totals = torch.zeros(len(self.languages), 2, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, mask: Tensor, language_ids: Tensor) -> None:
        """Count a micro-batch in; the host does not wait for the device.

        Args:
            losses: [b, s] nats per token; what lies under a zero of the mask is never read, so it
                may be NaN.
            mask: [b, s], non-zero where the token counts.
            language_ids: [b] integers, indices into `languages`.

        Raises ValueError on other shapes, torch's RuntimeError (on CUDA a device-side assert) on
        an id outside `languages`. In float64, the order in which CUDA adds does not show.
        """
        if losses.ndim != 2 or mask.shape != losses.shape or language_ids.shape != losses.shape[:1]:
            raise ValueError(
                "LanguageLosses.add expects losses [b, s], mask [b, s] and language_ids [b], got "
                f"{list(losses.shape)}, {list(mask.shape)} and {list(language_ids.shape)}."
            )
        valid = mask != 0  # [b, s]
        loss_sums = torch.where(valid, losses.detach().double(), 0.0).sum(dim=1)  # [b]
        tokens = valid.sum(dim=1).double()  # [b]
        self.totals.index_add_(0, language_ids.long(), torch.stack([loss_sums, tokens], dim=1))

    def merge(self, other: "LanguageLosses") -> None:
        """Add another's totals; raises ValueError where the languages differ."""
        if other.languages != self.languages:
            raise ValueError(
                f"Losses over languages {list(other.languages)} cannot be merged into losses over "
                f"{list(self.languages)}: the same languages in the same order are needed."
            )
        self.totals += other.totals.to(self.totals.device)

    def per_language(self) -> dict[str, float]:
        """Mean loss of each language that has valid tokens; waits for the device."""
        return self._means({language: [language] for language in self.languages})

    def per_family(self, families: Mapping[str, str]) -> dict[str, float]:
        """Token-weighted mean loss of each family that has valid tokens, families in sorted order.

        Args:
            families: language -> family. Raises ValueError where one of `languages` is missing.
        """
        missing = [language for language in self.languages if language not in families]
        if missing:
            raise ValueError(f"No language family is known for {missing}: add them to the table.")
        members: dict[str, list[str]] = {}
        for family, language in sorted(
            (families[language], language) for language in self.languages
        ):
            members.setdefault(family, []).append(language)
        return self._means(members)

    def valid_tokens(self) -> int:
        """Valid tokens over all languages; waits for the device."""
        return int(self.totals[:, 1].sum())

    def mean(self) -> float:
        """Token-weighted mean over all languages; NaN without a valid token."""
        loss_sum, tokens = self.totals.sum(dim=0)
        return float(mean_over_valid_tokens(loss_sum, tokens))

    def metrics(self, families: Mapping[str, str]) -> dict[str, float]:
        """All three views under the names that trackers and reports use (`eval/...`)."""
        metrics = {"eval/loss": self.mean()}
        for family, loss in self.per_family(families).items():
            metrics[f"eval/family/{family}/loss"] = loss
        for language, loss in self.per_language().items():
            metrics[f"eval/language/{language}/loss"] = loss
        return metrics

    def _means(self, groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
        totals = self.totals.cpu()
        row = {language: index for index, language in enumerate(self.languages)}
        means = {}
        for name, members in groups.items():
            loss_sum, tokens = totals[[row[language] for language in members]].sum(dim=0)
            if tokens > 0:
                means[name] = float(mean_over_valid_tokens(loss_sum, tokens))
        return means
