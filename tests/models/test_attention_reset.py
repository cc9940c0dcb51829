"""Attention that stays inside documents: a packed sequence equals its documents one by one.

All in fp32. Packed and alone differ in the order of sums and, without reset positions, in the
rounding of the rotary tables; logits are of order 1, and measured differences lie below 2e-6.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import CausalAttention
from models.build import build_model
from models.config import ModelConfig, PositionEmbedding
from models.document_segments import DocumentSegments
from models.initialize import global_parameters
from parallel.config import ParallelConfig, RecomputeGranularity
from parallel.runtime import initialize, shutdown
from tests.distributed import run_on_gloo
from tests.parity import MODEL, SEQ_LENGTH, VOCAB, reference, train, variant
from tests.test_layout_parity import assert_same, layout

LENGTHS = [[5, 1, 17, 9], [32], [11, 21]]  # of the documents of three sequences of 32 tokens
BOUND = 1e-5


def documents_of(lengths: list[list[int]]) -> Tensor:
    return torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    ).int()


def test_segments_are_where_documents_change() -> None:
    documents = documents_of([[2, 3, 1], [6]])
    documents[1] = 7  # numbers mean nothing by themselves, nor across rows
    segments = DocumentSegments(documents)
    assert segments.lengths == [[2, 3, 1], [6]]
    assert segments.longest == 6
    cpu = torch.device("cpu")
    assert segments.borders(cpu).tolist() == [0, 2, 5, 6, 12]
    assert segments.positions.t().tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert segments.mask(cpu)[0, 0].long().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert (segments.mask(cpu)[1, 0] == torch.ones(6, 6).tril().bool()).all()
    assert DocumentSegments(torch.zeros(2, 3).int()).lengths == [[3], [3]]


def run_model(chunk: Any, tokens: Tensor, **packing: Any) -> tuple[Tensor, Tensor]:
    """Logits [b, s, v] and per-token losses [b, s]; gradients are added to main_grad."""
    hidden: list[Tensor] = []
    hook = chunk.decoder.register_forward_hook(lambda *args: hidden.append(args[2]))
    labels = (tokens + 1) % VOCAB  # any will do
    output = chunk(tokens, labels, torch.ones(tokens.shape), **packing)
    output.loss_sum.backward()
    hook.remove()
    logits = F.linear(hidden[0].detach(), chunk.output_weight()).transpose(0, 1).detach()
    return logits, output.per_token_loss


def gradients(chunk: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in global_parameters(chunk):
        found[name] = parameter.main_grad.clone()
        if parameter.grad is not None:
            found[name] += parameter.grad
            parameter.grad = None
        parameter.main_grad.zero_()
    return found


def packed_and_alone(model: ModelConfig, reset_positions: bool) -> dict[str, float]:
    """Largest differences of logits, losses and gradients."""
    runtime = initialize(ParallelConfig(), seed=1)
    chunk = build_model(model, ParallelConfig(), runtime, vocab_size=VOCAB, seed=3)[0]
    for parameter in chunk.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    tokens = torch.randint(0, VOCAB, (3, 32), generator=torch.Generator().manual_seed(1))
    logits, losses = run_model(
        chunk, tokens, documents=documents_of(LENGTHS), reset_positions=reset_positions
    )
    together = gradients(chunk)
    alone_logits, alone_losses = torch.empty_like(logits), torch.empty_like(losses)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            there = slice(start, start + length)
            alone_logits[row, there], alone_losses[row, there] = run_model(
                chunk, tokens[row : row + 1, there]
            )
            start += length
    alone = gradients(chunk)
    crossing, _ = run_model(chunk, tokens)
    shutdown(runtime)
    return {
        "logits": float((logits - alone_logits).abs().max()),
        "losses": float((losses - alone_losses).abs().max()),
        "gradients": max(
            float((together[name] - alone[name]).abs().max() / alone[name].abs().max())
            for name in alone
        ),
        "without resets": float((crossing - alone_logits).abs().max()),
    }


@pytest.mark.parametrize("positions", PositionEmbedding)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("reset_positions", [True, False])
def test_a_packed_sequence_equals_its_documents_alone(
    positions: PositionEmbedding, groups: int, reset_positions: bool
) -> None:
    model = replace(
        MODEL,
        max_position_embeddings=32,
        position_embedding_type=positions,
        num_query_groups=groups,
    )
    found = run_on_gloo(1, packed_and_alone, model, reset_positions)[0]
    assert found.pop("without resets") > 1e-2  # the documents do see each other otherwise
    assert max(found.values()) < BOUND, found


def attention(model: ModelConfig = MODEL) -> CausalAttention:
    from models.attention import RotaryTables
    from models.build import transformer_config

    config = transformer_config(model, ParallelConfig(), torch.float32)
    return CausalAttention(config, 1, None, "self", rotary=RotaryTables(model))


def heads(sequence: int, batch: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (sequence, batch, 4, 8), (sequence, batch, 2, 8), (sequence, batch, 2, 8)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def test_equal_documents_in_one_sequence_give_equal_bits_with_reset_positions() -> None:
    """Relative positions make both settings the same function; only reset ones the same bits."""
    query, key, value = (x.detach().repeat(3, 1, 1, 1) for x in heads(11, 2))
    for reset in (True, False):
        segments = DocumentSegments(documents_of([[11, 11, 11]] * 2), reset_positions=reset)
        out = attention()(query, key, value, packed_seq_params=segments)
        first, _, third = out.split(11)
        assert torch.equal(first, third) is reset
        assert torch.allclose(first, third, atol=BOUND)


def test_no_token_sees_another_document() -> None:
    query, key, value = (x.detach() for x in heads(32, 1))
    segments = DocumentSegments(documents_of([[10, 22]]))
    before = attention()(query, key, value, packed_seq_params=segments)
    for x in (query, key, value):
        x[:10] += 1.0
    after = attention()(query, key, value, packed_seq_params=segments)
    assert torch.equal(before[10:], after[10:]) and not torch.equal(before[:10], after[:10])


@pytest.mark.parametrize("lengths", [LENGTHS, [[32]] * 3, [[1] * 32, [31, 1], [16, 16]]])
def test_each_way_computes_the_same(lengths: list[list[int]]) -> None:
    """Segment by segment (CPU) and with an [s, s] mask (GPU in fp32): outputs and gradients."""
    module, segments = attention(), DocumentSegments(documents_of(lengths))
    inputs = heads(32, 3)
    found = []
    for way in (module._segment_by_segment, module._masked):
        out = way(*inputs, 0.0, segments)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        found.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=BOUND)


RESETS = {
    "tp2": (2, layout(tp=2)),
    "tp2 sp": (2, layout(tp=2, sp=True)),
    "pp2": (2, layout(pp=2)),
    "pp2 vpp2": (2, layout(pp=2, vpp=2)),
    "dp2": (2, layout()),
    "pp2 selective": (2, layout(pp=2, recompute_granularity=RecomputeGranularity.selective)),
    "pp2 full": (2, layout(pp=2, recompute_granularity=RecomputeGranularity.full)),
}


@pytest.mark.parametrize("name", RESETS)
def test_layouts_train_the_same_model_with_resets(name: str) -> None:
    world_size, parallel = RESETS[name]
    result = train(parallel, world_size=world_size, resets=True)
    assert_same(result, reference(resets=True))
    assert result.losses != reference().losses


def test_resets_with_query_groups_and_several_sequences_a_micro_batch() -> None:
    model = variant(num_query_groups=2, position_embedding_type=PositionEmbedding.rope)
    result = train(layout(tp=2, sp=True), model, world_size=2, micro_batch_size=4, resets=True)
    assert_same(result, reference(model, resets=True))


def refuse_context_parallelism() -> str:
    runtime = initialize(ParallelConfig(), seed=1)
    chunk = build_model(MODEL, ParallelConfig(), runtime, vocab_size=VOCAB, seed=3)[0]
    chunk.config.context_parallel_size = 2
    tokens = torch.zeros(1, SEQ_LENGTH, dtype=torch.int64)
    try:
        chunk(tokens, tokens, torch.ones(tokens.shape), documents=tokens.int())
    except ValueError as error:
        return str(error)
    finally:
        shutdown(runtime)
    return ""


def test_resets_refuse_context_parallelism() -> None:
    message = run_on_gloo(1, refuse_context_parallelism)[0]
    assert "data.packing.reset_attention=true" in message
    assert "parallel.context_parallel_size=1, not 2" in message
