"""What the model is trained on in one forward pass."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """b sequences of s tokens.

    labels[i, t] is the token after tokens[i, t]. loss_mask is 1 where a label counts, 0 on padding.
    language_ids are places in the data's sorted list of languages; those of padding sequences
    (loss_mask all 0) are 0 and mean nothing.
    """

    tokens: torch.Tensor  # [b, s] int64
    labels: torch.Tensor  # [b, s] int64
    loss_mask: torch.Tensor  # [b, s] float32
    language_ids: torch.Tensor  # [b] int64
