"""Attention over a split sequence equals attention in one process; so do whole models trained so.

Bounds. All in fp32 (unit roundoff 6e-8). A rank adds up the same products in another order, and the
gradients of keys are sums over ranks: measured differences stay below 1e-6 of a tensor's largest
entry.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from models.attention import CausalAttention, RotaryTables, _lower_right_mask
from models.build import build_model, transformer_config
from models.config import PositionEmbedding
from parallel.config import (
    ContextParallelComm,
    OptimizerConfig,
    ParallelConfig,
    RecomputeGranularity,
)
from parallel.context_parallel import (
    chunks_of,
    context_parallel_group,
    place_of,
    shard_sequence,
)
from parallel.engine import MegatronEngine
from parallel.inference import last_token_logits
from parallel.runtime import initialize, shutdown
from pretrain.parity import LANGUAGES, micro_batches
from pretrain.train_step import context_parallel_part, forward_losses, forward_step
from tests.distributed import run_on_gloo
from tests.parity import (
    EXERCISE,
    MODEL,
    VOCAB,
    assert_same,
    layout,
    reference,
    train,
    variant,
)

BOUND = 2e-6  # of a tensor's largest entry
BATCH, HEADS, WIDTH = 2, 8, 6
COMM = list(ContextParallelComm)


# ---- who holds what ------------------------------------------------------------------------------


def test_every_rank_holds_an_early_and_a_late_chunk() -> None:
    assert [chunks_of(rank, 4) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    x = torch.arange(16)
    assert [shard_sequence(x, rank, 2).tolist() for rank in range(2)] == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7, 8, 9, 10, 11],
    ]
    rows = torch.arange(48).view(3, 16)
    assert torch.equal(shard_sequence(rows, 1, 2, dim=1), rows[:, 4:12])


def test_it_is_megatron_cores_own_order() -> None:
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    x = torch.arange(24).view(24, 1, 1, 1)
    for size in (2, 4):
        for rank in range(size):
            group: Any = SimpleNamespace(size=lambda size=size: size, rank=lambda rank=rank: rank)
            theirs = get_pos_emb_on_this_cp_rank(x, 0, group)
            assert torch.equal(shard_sequence(x, rank, size), theirs)


def test_one_rank_holds_everything() -> None:
    x = torch.arange(5)  # not a multiple of anything
    assert shard_sequence(x, 0, 1) is x
    assert [place_of(position, 5, 1) for position in range(5)] == [(0, i) for i in range(5)]


def test_the_place_of_a_position() -> None:
    x = torch.arange(24)
    for size in (2, 3, 4):
        held = [shard_sequence(x, rank, size).tolist() for rank in range(size)]
        for position in range(24):
            rank, index = place_of(position, 24, size)
            assert held[rank][index] == position


def test_tables_of_a_rank_are_rows_of_the_whole() -> None:
    """Also xPos's scale, whose centre is that of the whole sequence."""
    for kind in (PositionEmbedding.xpos, PositionEmbedding.rope):
        tables = RotaryTables(variant(position_embedding_type=kind))
        cpu = torch.device("cpu")
        whole = tables.get(24, WIDTH, cpu)
        for rank in range(3):
            part = tables.get(24, WIDTH, cpu, context_rank=rank, context_size=3)
            for ours, theirs in zip(part, whole, strict=True):
                assert torch.equal(ours, shard_sequence(theirs, rank, 3))


def test_later_queries_see_all_keys_before_them() -> None:
    mask = _lower_right_mask(2, 5)
    assert mask.long().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    query, key, value = (torch.randn(1, 2, length, 4) for length in (2, 5, 5))
    mark = causal_lower_right(2, 5)  # what stands for the mask on a GPU
    masked, marked = (
        F.scaled_dot_product_attention(query, key, value, attn_mask=bias) for bias in (mask, mark)
    )
    assert torch.equal(masked, marked)


# ---- attention -----------------------------------------------------------------------------------

Case = tuple[int, int, PositionEmbedding]  # tokens, key/value groups, positions


def inputs(length: int, groups: int) -> list[Tensor]:
    """Queries, keys, values, and the output's gradient: [s, b, heads, d] each."""
    generator = torch.Generator().manual_seed(length + groups)
    heads = (HEADS, groups, groups, HEADS)
    return [torch.randn(length, BATCH, n, WIDTH, generator=generator) for n in heads]


def attend(parallel: ParallelConfig, cases: list[Case]) -> list[list[Tensor]]:
    """Of each case, this rank's output and gradients of queries, keys and values."""
    runtime = initialize(parallel, seed=1)
    rank, size = runtime.context_parallel_rank, runtime.context_parallel_size
    config = transformer_config(MODEL, parallel, torch.float32)
    found = []
    for length, groups, positions in cases:
        attention = CausalAttention(
            config,
            1,
            None,
            "self",
            pg_collection=runtime.groups,
            rotary=RotaryTables(variant(position_embedding_type=positions)),
        )
        query, key, value, gradient = (
            shard_sequence(x, rank, size).requires_grad_() for x in inputs(length, groups)
        )
        out = attention(query, key, value).unflatten(2, (HEADS, WIDTH))
        gradients = torch.autograd.grad(out, (query, key, value), gradient)
        found.append([out.detach(), *gradients])
    shutdown(runtime)
    return found


def put_together(parts: list[Tensor]) -> Tensor:
    """The whole sequence of what each rank holds, by the definition of who holds what."""
    halves = [part.chunk(2) for part in parts]
    return torch.cat([early for early, _ in halves] + [late for _, late in halves[::-1]])


def assert_attention_is_whole(size: int, comm: ContextParallelComm, cases: list[Case]) -> None:
    split = ParallelConfig(context_parallel_size=size, cp_comm_type=comm)
    ranks = run_on_gloo(size, attend, split, cases)
    (expected,) = run_on_gloo(1, attend, ParallelConfig(), cases)
    for number, case in enumerate(cases):
        for which, name in enumerate(("output", "queries", "keys", "values")):
            whole = expected[number][which]
            ours = put_together([rank[number][which] for rank in ranks])
            deviation = float((ours - whole).abs().max() / whole.abs().max())
            assert deviation < BOUND, (case, name, deviation)


@pytest.mark.parametrize("comm", COMM)
@pytest.mark.parametrize("size", [2, 4])
def test_attention_equals_one_process(size: int, comm: ContextParallelComm) -> None:
    """Chunks of one token, of odd numbers of them; each head with keys of its own or in groups."""
    cases = [
        (2 * size * chunk, groups, positions)
        for chunk in (1, 5, 33)
        for groups in (4, HEADS)
        for positions in PositionEmbedding
    ]
    assert_attention_is_whole(size, comm, cases)


def test_gathering_works_with_fewer_groups_than_ranks() -> None:
    case = (24, 1, PositionEmbedding.xpos)
    assert_attention_is_whole(4, ContextParallelComm.all_gather, [case])


# ---- whole models --------------------------------------------------------------------------------

RAGGED = {
    "cp2": (2, layout(context_parallel_size=2)),
    "cp4": (4, layout(context_parallel_size=4)),
    "cp2 no zero": (2, layout(context_parallel_size=2, zero=False)),
    "tp2 sp cp2": (4, layout(tp=2, sp=True, context_parallel_size=2)),
    "tp2 cp2": (4, layout(tp=2, context_parallel_size=2)),
    "pp2 cp2": (4, layout(pp=2, context_parallel_size=2)),
    "pp2 vpp2 cp2": (4, layout(pp=2, vpp=2, context_parallel_size=2)),
    "cp2 dp2": (4, layout(context_parallel_size=2)),
    "cp2 dp2 overlap": (
        4,
        layout(context_parallel_size=2, overlap_grad_reduce=True, overlap_param_gather=True),
    ),
}


@pytest.mark.parametrize("name", RAGGED)
def test_layout_equals_one_process(name: str) -> None:
    """Loss masks are ragged: ranks hold different numbers of valid tokens, some hold none."""
    world_size, parallel = RAGGED[name]
    assert_same(train(parallel, world_size=world_size), reference())


@pytest.mark.parametrize("name", ["cp2", "cp4", "tp2 sp cp2", "pp2 vpp2 cp2"])
def test_exchanging_heads_equals_one_process(name: str) -> None:
    world_size, parallel = RAGGED[name]
    parallel = replace(parallel, cp_comm_type=ContextParallelComm.a2a)
    assert_same(train(parallel, world_size=world_size), reference())


@pytest.mark.parametrize("comm", COMM)
@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_changes_nothing(granularity: str, comm: ContextParallelComm) -> None:
    parallel = layout(
        context_parallel_size=2,
        cp_comm_type=comm,
        recompute_granularity=RecomputeGranularity[granularity],
    )
    assert_same(train(parallel, world_size=2), reference())


@pytest.mark.parametrize("comm", COMM)
def test_query_groups_and_several_sequences_a_micro_batch(comm: ContextParallelComm) -> None:
    model = variant(num_query_groups=2, position_embedding_type=PositionEmbedding.rope)
    parallel = layout(context_parallel_size=2, cp_comm_type=comm)
    result = train(parallel, model, world_size=2, micro_batch_size=4)
    assert_same(result, reference(model))


def count_own_tokens(parallel: ParallelConfig) -> tuple[Tensor, list[float]]:
    """Validation totals by language, and the valid tokens this rank was left with."""
    runtime = initialize(parallel, seed=1)
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)
    batches = micro_batches(EXERCISE, 0, runtime.data_parallel_rank, runtime.data_parallel_size)
    group = context_parallel_group(engine.chunks[0])
    own = [float(context_parallel_part(batch, group).loss_mask.sum()) for batch in batches]
    losses = forward_losses(engine, batches, runtime, languages=LANGUAGES)
    shutdown(runtime)
    return losses.totals, own


@pytest.mark.parametrize("name", ["cp2", "pp2 cp2", "tp2 sp cp2", "cp2 dp2"])
def test_validation_counts_every_token_once(name: str) -> None:
    world_size, parallel = RAGGED[name]
    expected, (whole,) = zip(*run_on_gloo(1, count_own_tokens, ParallelConfig()), strict=True)
    ranks = run_on_gloo(world_size, count_own_tokens, parallel)
    for totals, _ in ranks:
        assert torch.equal(totals[:, 1], expected[0][:, 1])
        assert (totals[:, 0] - expected[0][:, 0]).abs().max() < BOUND * expected[0].max()
    if world_size == 2:
        mine, other = (own for _, own in ranks)
        assert [a + b for a, b in zip(mine, other, strict=True)] == whole
        assert 0.0 in mine + other  # a rank without a valid token


def last_logits(parallel: ParallelConfig, lengths: list[int]) -> list[Tensor]:
    runtime = initialize(parallel, seed=1)
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=7)
    for chunk in chunks:
        chunk.eval()
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        tokens = torch.randint(0, VOCAB, (2, length), generator=generator)
        found.append(last_token_logits(chunks, tokens, runtime, padded_vocab_size=VOCAB))
    shutdown(runtime)
    return found


@pytest.mark.parametrize("name", ["cp2", "cp4", "tp2 sp cp2", "pp2 cp2", "tp2 sp"])
def test_sampling_takes_any_length(name: str) -> None:
    """Every rank gets the logits of the last token, whichever rank of the group holds it."""
    world_size, parallel = RAGGED.get(name, (2, layout(tp=2, sp=True)))
    lengths = [1, 2, 3, 4, 5, 7, 8, 13]
    expected = run_on_gloo(1, last_logits, ParallelConfig(), lengths)[0]
    for rank in run_on_gloo(world_size, last_logits, parallel, lengths):
        for ours, theirs in zip(rank, expected, strict=True):
            assert (ours - theirs).abs().max() < 2 * BOUND * theirs.abs().max()


def train_with_dropout(parallel: ParallelConfig) -> list[float]:
    model = replace(MODEL, attention_dropout=0.3, hidden_dropout=0.3)
    runtime = initialize(parallel, seed=1)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)
    norms = []
    for _ in range(2):
        engine.seed_random_numbers(1, 0)
        engine.forward_backward(
            micro_batches(EXERCISE, 0, 0, 1),
            partial(forward_step, device=runtime.device),
            seq_length=EXERCISE.seq_length,
            micro_batch_size=1,
        )
        norms.append(engine.step(0.0).grad_norm)
    shutdown(runtime)
    return norms


@pytest.mark.parametrize("comm", COMM)
def test_dropout_repeats(comm: ContextParallelComm) -> None:
    parallel = layout(context_parallel_size=2, cp_comm_type=comm)
    for first, second in run_on_gloo(2, train_with_dropout, parallel):
        assert first == second
        assert first != pytest.approx(reference().grad_norms[0], rel=1e-2)
