"""From packed ids to what a model is asked: the seam between reading text and training on it.

Packing decides which ids stand in a row, which labels may count and where documents end. An
objective turns that into (tokens, labels, loss_mask). Causal language modelling is the one there
is; another one (masked tokens, replaced tokens, prefixes, translation pairs) is another function
of this signature, chosen in data.loader, and must be a function of its arguments alone (a random
choice needs the sample's number as a key), or a step could not be replayed.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from data.packed_sequences import Rows


class Targets(NamedTuple):
    tokens: torch.Tensor  # [b, s] int64
    labels: torch.Tensor  # [b, s] int64
    loss_mask: torch.Tensor  # [b, s] float32


def causal_lm(rows: Rows) -> Targets:
    """Every token predicts the next: tokens and labels are two views of rows.ids, nothing copied.

    Padding never carries loss, nor do labels that rows.label_mask leaves out.
    """
    ids = torch.from_numpy(rows.ids)
    b, s = rows.ids.shape[0], rows.ids.shape[1] - 1
    if rows.label_mask is not None:
        loss_mask = torch.from_numpy(rows.label_mask.astype(np.float32))
    elif bool((rows.valid == s).all()):
        loss_mask = _all_valid(b, s)
    else:
        loss_mask = torch.from_numpy((np.arange(s) < rows.valid[:, None]).astype(np.float32))
    return Targets(ids[:, :-1], ids[:, 1:], loss_mask)


@lru_cache(maxsize=8)
def _all_valid(b: int, s: int) -> torch.Tensor:
    # the same for nearly every training batch; filling a new one costs more than reading the ids
    return torch.ones(b, s)
