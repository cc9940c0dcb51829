"""Trains a tiny model under a layout and gathers what must not depend on the layout.

`train(layout)` returns losses, gradient norms, every gradient of the first step and every weight
after the last one, as full tensors under their global names. Ranks return their shards; the parent
process puts them together, so no code of the engine takes part in the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from models.build import build_model
from models.config import ModelConfig
from models.initialize import global_parameters
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import MegatronEngine
from parallel.runtime import initialize, shutdown
from pretrain.train_step import forward_step, reduce_losses
from tests.distributed import run_on_gloo

SEQ_LENGTH, VOCAB, GLOBAL_BATCH, STEPS = 16, 120, 8, 3
LANGUAGES = ("de", "hi", "zh")
MODEL = ModelConfig(
    name="parity",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    max_position_embeddings=SEQ_LENGTH,
    make_vocab_size_divisible_by=8,
)
# Adam divides by the gradient's own size: where a gradient is rounding noise, the update is of
# order lr in any layout. An eps above the noise keeps the update linear in the gradient there.
OPTIMIZER = OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=1.0)


@dataclass
class Result:
    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    family_totals: Tensor  # [languages, 2]


_references: dict[str, Result] = {}


def reference(model: ModelConfig = MODEL, *, resets: bool = False) -> Result:
    """The same training in one process; run once a model."""
    key = repr((model, resets))
    if key not in _references:
        one_process = ParallelConfig(use_distributed_optimizer=False)
        _references[key] = train(one_process, model, resets=resets)
    return _references[key]


def train(
    parallel: ParallelConfig,
    model: ModelConfig = MODEL,
    *,
    world_size: int = 1,
    micro_batch_size: int = 1,
    timeout: float = 180,
    resets: bool = False,
) -> Result:
    """resets: several documents in each sequence; attention and positions start anew in each."""
    ranks = run_on_gloo(
        world_size, _train_on_rank, parallel, model, micro_batch_size, resets, timeout=timeout
    )
    first = ranks[0]
    for other in ranks[1:]:  # every rank must report the same numbers
        assert other["losses"] == first["losses"]
        assert other["grad_norms"] == first["grad_norms"]
    return Result(
        first["losses"],
        first["grad_norms"],
        assemble([rank["gradients"] for rank in ranks]),
        assemble([rank["weights"] for rank in ranks]),
        first["family_totals"],
    )


def global_batch(step: int, resets: bool = False) -> Batch:
    """The step's sequences, with a ragged loss mask, the same in every layout."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, VOCAB, (GLOBAL_BATCH, SEQ_LENGTH + 1), generator=generator)
    lengths = torch.randint(1, SEQ_LENGTH + 1, (GLOBAL_BATCH,), generator=generator)
    mask = (torch.arange(SEQ_LENGTH) < lengths[:, None]).float()
    languages = torch.randint(0, len(LANGUAGES), (GLOBAL_BATCH,), generator=generator)
    documents = None
    if resets:
        begins = torch.rand((GLOBAL_BATCH, SEQ_LENGTH), generator=generator) < 0.2
        documents = begins.cumsum(1).int()
    return Batch(
        ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask, languages, documents, resets
    )


def micro_batches(
    step: int, micro_batch_size: int, rank: int, ranks: int, resets: bool = False
) -> list[Batch]:
    batch = global_batch(step, resets)
    order = torch.arange(GLOBAL_BATCH).view(-1, ranks, micro_batch_size)[:, rank]
    return [
        Batch(
            batch.tokens[i],
            batch.labels[i],
            batch.loss_mask[i],
            batch.language_ids[i],
            None if batch.documents is None else batch.documents[i],
            batch.reset_positions,
        )
        for i in order
    ]


def _train_on_rank(
    parallel: ParallelConfig, model: ModelConfig, micro_batch_size: int, resets: bool
) -> dict[str, Any]:
    runtime = initialize(parallel, seed=1)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine = MegatronEngine(chunks, parallel, OPTIMIZER, runtime)
    out: dict[str, Any] = {"losses": [], "grad_norms": []}
    for step in range(STEPS):
        batches = micro_batches(
            step, micro_batch_size, runtime.data_parallel_rank, runtime.data_parallel_size, resets
        )
        metrics = engine.forward_backward(
            batches,
            partial(forward_step, device=runtime.device),
            seq_length=SEQ_LENGTH,
            micro_batch_size=micro_batch_size,
        )
        losses, _ = reduce_losses(metrics, runtime, LANGUAGES, False)
        out["losses"].append(losses.mean())
        if step == 0:
            out["family_totals"] = losses.totals
            gather_gradients(engine)
            out["gradients"] = shards(chunks, lambda parameter: parameter.main_grad)
        out["grad_norms"].append(engine.step(OPTIMIZER.lr).grad_norm)
    if parallel.overlap_param_gather:
        for chunk in engine.chunks:
            chunk.start_param_sync(force_sync=True)
    out["weights"] = shards(chunks, lambda parameter: parameter.data)
    shutdown(runtime)
    return out


def gather_gradients(engine: MegatronEngine) -> None:
    """Under the distributed optimizer each rank holds only its share of the reduced gradients."""
    if not engine.parallel.use_distributed_optimizer:
        return
    for chunk in engine.chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                group = buffer.data_parallel_group
                share = bucket.grad_data.numel() // group.size()
                mine = bucket.grad_data[group.rank() * share : (group.rank() + 1) * share].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def shards(chunks: Any, value: Any) -> dict[str, tuple[Tensor, int, int, int, int]]:
    """name -> (this rank's shard, dim, stride, tensor-parallel rank and size)."""
    group = chunks[0].tp_group
    found = {}
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            sharded = getattr(parameter, "tensor_model_parallel", False)
            found[name] = (
                value(parameter).detach().clone().float(),
                parameter.partition_dim if sharded else -1,
                parameter.partition_stride if sharded else 1,
                group.rank(),
                group.size(),
            )
    return found


def assemble(ranks: list[dict[str, tuple[Tensor, int, int, int, int]]]) -> dict[str, Tensor]:
    """Full tensors from every rank's shards; copies of a shard must be equal, bit for bit."""
    pieces: dict[str, dict[int, tuple[Tensor, int, int]]] = {}
    for rank in ranks:
        for name, (tensor, dim, stride, tp_rank, _) in rank.items():
            place = pieces.setdefault(name, {})
            key = tp_rank if dim >= 0 else 0
            if key in place:
                assert torch.equal(place[key][0], tensor), f"replicas of {name} differ"
            place[key] = (tensor, dim, stride)
    full = {}
    for name, place in pieces.items():
        tensors = [place[index][0] for index in sorted(place)]
        _, dim, stride = place[0]
        if dim < 0:
            full[name] = tensors[0]
            continue
        # stride k: each rank holds its share of k parts (gate and up), one after the other
        split = [tensor.chunk(stride, dim) for tensor in tensors]
        full[name] = torch.cat(
            [split[r][part] for part in range(stride) for r in range(len(split))], dim
        )
    return full


def variant(**changes: Any) -> ModelConfig:
    return replace(MODEL, **changes)
