"""What the model is trained on in one forward pass."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Batch:
    """b sequences of s tokens.

    labels[i, t] is the token after tokens[i, t]. loss_mask is 1 where a label counts, 0 on padding
    and where data.packing masks it. language_ids are places in the data's sorted list of languages;
    those of padding sequences (loss_mask all 0) are 0 and mean nothing.

    documents numbers the documents of each row from 0, and is None unless attention stops at their
    borders. Padding is a document of its own. reset_positions: positions count from each document's
    first token in the sequence.

    Tensors may share memory (tokens and labels are views of one buffer, full loss masks are one and
    the same): never write into a batch.
    """

    tokens: torch.Tensor  # [b, s] int64
    labels: torch.Tensor  # [b, s] int64
    loss_mask: torch.Tensor  # [b, s] float32
    language_ids: torch.Tensor  # [b] int64
    documents: torch.Tensor | None = None  # [b, s] int32
    reset_positions: bool = False

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, which a CUDA device reads while the host goes on."""
        return replace(
            self,
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            loss_mask=self.loss_mask.pin_memory(),
            language_ids=self.language_ids.pin_memory(),
            # documents are read on the host: attention needs the borders as numbers
        )
