"""Weights are written once, and by as many ranks as hold them."""

from __future__ import annotations

from collections import Counter

import pytest

from models.config import ModelConfig
from parallel import optimizer_state
from parallel.config import ParallelConfig
from parallel.megatron import ShardedTensor, ShardedTensorFactory
from parallel.runtime import shutdown
from tests.distributed import run_on_gloo
from tests.parallel.test_checkpoint_layouts import DENSE, SPARSE, build
from tests.parity import layout

Shard = tuple[str, tuple[int, ...]]


def shards(
    model: ModelConfig, parallel: ParallelConfig
) -> tuple[dict[Shard, int], dict[Shard, int]]:
    """Bytes of all that this rank holds of the weights, and of what it is to write of them."""
    runtime, engine = build(model, parallel)
    held, written = {}, {}
    for entry in optimizer_state.leaves(engine.sharded_state_dict(weights_only=True)):
        whole = isinstance(entry, ShardedTensorFactory)
        for one in optimizer_state.leaves(entry.build()) if whole else [entry]:
            if isinstance(one, ShardedTensor):
                shard = one.key, tuple(one.global_offset)
                held[shard] = one.data.nbytes
                if not any(one.replica_id):
                    written[shard] = one.data.nbytes
    shutdown(runtime)
    return held, written


@pytest.mark.parametrize(
    ("model", "parallel", "replicas"),
    [
        (DENSE, layout(), 4),
        (DENSE, layout(context_parallel_size=2), 4),
        (DENSE, layout(tp=2, sp=True), 2),
        (DENSE, layout(pp=2), 2),
        (SPARSE, layout(expert_model_parallel_size=2), 2),
    ],
    ids=["dp4", "cp2 dp2", "tp2 dp2", "pp2 dp2", "ep2 dp2"],
)
def test_each_weight_has_one_writer_and_replicas_share_them(
    model: ModelConfig, parallel: ParallelConfig, replicas: int
) -> None:
    ranks = run_on_gloo(4, shards, model, parallel)
    writers = Counter(shard for _, written in ranks for shard in written)
    assert set(writers) == {shard for held, _ in ranks for shard in held}
    assert set(writers.values()) == {1}
    for held, _ in ranks:
        alike = [sum(written.values()) for other, written in ranks if other == held]
        assert len(alike) == replicas
        # each goes to the replica with the least so far; dense ones and experts are dealt out apart
        assert max(alike) - min(alike) <= 2 * max(held.values())
