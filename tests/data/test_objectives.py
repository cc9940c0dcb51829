import numpy as np

from data.objectives import causal_lm
from data.packed_sequences import Rows

IDS = np.arange(12, dtype=np.int64).reshape(2, 6)


def test_every_token_predicts_the_next() -> None:
    targets = causal_lm(Rows(IDS, np.array([5, 5])))
    assert targets.tokens.tolist() == IDS[:, :-1].tolist()
    assert targets.labels.tolist() == IDS[:, 1:].tolist()
    assert targets.loss_mask.tolist() == [[1.0] * 5] * 2
    assert targets.tokens.data_ptr() == IDS.ctypes.data  # a view, not a copy


def test_padding_carries_no_loss() -> None:
    assert causal_lm(Rows(IDS, np.array([2, 5]))).loss_mask.tolist() == [[1, 1, 0, 0, 0], [1] * 5]


def test_a_label_mask_is_the_whole_truth() -> None:
    mask = np.array([[1, 0, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
    targets = causal_lm(Rows(IDS, np.array([3, 5]), label_mask=mask))
    assert targets.loss_mask.tolist() == mask.astype(float).tolist()
