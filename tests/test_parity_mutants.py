"""The comparison of layouts must see the bugs that layouts have: with each of them it turns red.

Every mutant is a mistake somebody could make, or has made, in parallel training, and harmless in
one process. It runs under the smallest layout it shows in, which without it is green.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from models.moe_config import MoEConfig
from parallel.config import ContextParallelComm, ParallelConfig
from pretrain.parity import Exercise, RankRecord, compare, merge, table, train_on_rank
from tests.distributed import run_on_gloo
from tests.parity import assert_same, exercise_of, layout, reference_of, train_exercise, variant

Patch = pytest.MonkeyPatch
CLEARLY = 1000.0  # times the bound: no defect may be mistaken for rounding

TWO_LAYERS = exercise_of(variant(num_layers=2), global_batch_size=4)
FOUR_LAYERS = exercise_of(variant(num_layers=4), global_batch_size=4)
EXPERTS = exercise_of(
    variant(num_layers=2, moe=MoEConfig(num_experts=4, router_topk=2, router_dim=8)),
    global_batch_size=4,
)


@dataclass(frozen=True)
class Mutant:
    inject: Callable[[Patch], None]  # on every rank, before the model is built
    world_size: int
    parallel: ParallelConfig
    exercise: Exercise = TWO_LAYERS


def norms_are_not_marked_sequence_parallel(patch: Patch) -> None:
    """Each rank has gradients of norms from its own tokens, and nobody sums them."""
    from parallel.norm import Norm

    def unmarked(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        for parameter in self.parameters():
            parameter.sequence_parallel = False

    build = Norm.__init__
    patch.setattr(Norm, "__init__", unmarked)


def sub_layernorm_statistics_of_the_shard(patch: Patch) -> None:
    """A norm over each rank's part of the width: another model, which depends on TP."""
    from parallel.megatron import RowParallelLinear
    from parallel.norm import normalize
    from parallel.sub_layernorm import SubLayerNormRowParallelLinear

    def local(self: Any, x: Any) -> Any:
        normalized = normalize(x, self.norm_weight, self.norm_bias, self.eps, self.rms)
        return RowParallelLinear.forward(self, normalized)

    patch.setattr(SubLayerNormRowParallelLinear, "forward", local)


def tokens_counted_on_one_rank(patch: Patch) -> None:
    """Every rank divides by its own number of valid tokens: a mean of means."""
    import parallel.engine

    def mean_of_means(chunks: Any, num_tokens: Any, **options: Any) -> None:
        group = chunks[0].dp_cp_group
        finalize(chunks, None, **options)
        for chunk in chunks:
            chunk.scale_gradients(1.0 / (num_tokens * group.size()))

    finalize = parallel.engine.finalize_model_grads
    patch.setattr("parallel.engine.finalize_model_grads", mean_of_means)


def gradients_scaled_by_context_parallel_size(patch: Patch) -> None:
    """As by megatron-core's schedules, for a loss function that returns two values."""
    import parallel.engine

    def scaled(chunks: Any, num_tokens: Any, **options: Any) -> None:
        finalize(chunks, num_tokens, **options)
        for chunk in chunks:
            chunk.scale_gradients(chunk.module.cp_group.size())

    finalize = parallel.engine.finalize_model_grads
    patch.setattr("parallel.engine.finalize_model_grads", scaled)


def positions_counted_on_one_rank(patch: Patch) -> None:
    from models.attention import CausalAttention

    def local(self: Any, query: Any) -> Any:
        return self.rotary.get(query.shape[0], query.shape[-1], query.device)

    patch.setattr(CausalAttention, "_rotary_tables", local)


def sequence_cut_in_reading_order(patch: Patch) -> None:
    """Ranks hold consecutive parts, where attention expects a chunk from each end."""

    def consecutive(x: Any, rank: int, size: int, *, dim: int = 0) -> Any:
        return x.chunk(size, dim)[rank]

    patch.setattr("pretrain.train_step.shard_sequence", consecutive)


def key_gradients_of_own_queries_only(patch: Patch) -> None:
    """The gradient of gathered keys and values is cut, not summed over the ranks that used them."""
    from parallel.context_parallel import _AllGather

    def cut(ctx: Any, gradient: Any) -> Any:
        return gradient.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None

    patch.setattr(_AllGather, "backward", staticmethod(cut))


def tied_embedding_not_summed_over_stages(patch: Patch) -> None:
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    patch.setattr(module, "_allreduce_word_embedding_grads", lambda *arguments: None)


def interleaved_with_batched_messages(patch: Patch) -> None:
    """With two stages the previous rank is the next one, and messages are told apart by order."""
    import models.build

    def batched(*arguments: Any) -> Any:
        config = build(*arguments)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        config.deallocate_pipeline_outputs = True
        return config

    build = models.build.transformer_config
    patch.setattr("models.build.transformer_config", batched)


def norms_counted_by_every_tensor_rank(patch: Patch) -> None:
    """The gradient norm counts what tensor-parallel ranks hold copies of once for each."""
    patch.setattr(
        "megatron.core.tensor_parallel.param_is_not_tensor_parallel_duplicate",
        lambda *arguments, **options: True,
    )


def hidden_gradient_of_own_vocabulary_only(patch: Patch) -> None:
    """In front of the output layer the gradient of a rank's vocabulary is taken for the whole."""
    import models.language_model

    gather = models.language_model.gather_from_sequence_parallel_region

    def split(hidden: Any, *, tensor_parallel_output_grad: bool, group: Any) -> Any:
        return gather(hidden, tensor_parallel_output_grad=False, group=group)

    patch.setattr("models.language_model.gather_from_sequence_parallel_region", split)


def hidden_gradient_not_summed_over_vocabulary(patch: Patch) -> None:
    patch.setattr(
        "models.language_model.copy_to_tensor_model_parallel_region", lambda hidden, group: hidden
    )


def parameters_gathered_too_late(patch: Patch) -> None:
    """ZeRO with overlap: the forward pass takes parameters as they were before the update."""
    from parallel.megatron import DistributedDataParallel

    def nothing(self: Any, *, force_sync: bool = False, **options: Any) -> None:
        if force_sync:
            gather(self, force_sync=True, **options)

    gather = DistributedDataParallel.start_param_sync
    patch.setattr(DistributedDataParallel, "start_param_sync", nothing)
    patch.setattr(DistributedDataParallel, "enable_forward_pre_hook", lambda self: None)


def shards_drawn_alike(patch: Patch) -> None:
    """Every tensor-parallel rank starts from the same numbers."""
    import models.initialize

    sharding = models.initialize._sharding

    def first_rank(parameter: Any, dim: int) -> tuple[int, int, int]:
        size, _, stride = sharding(parameter, dim)
        return size, 0, stride

    patch.setattr("models.initialize._sharding", first_rank)


def chunks_numbered_within_their_stage(patch: Patch) -> None:
    """Interleaved chunks of a stage take themselves for consecutive layers of the model."""

    def without_interleaving(config: Any, vp_stage: int | None, pp_rank: int) -> int:
        layers_of_a_stage = config.num_layers // config.pipeline_model_parallel_size
        layers_of_a_chunk = layers_of_a_stage // config.virtual_pipeline_model_parallel_size
        return pp_rank * layers_of_a_stage + vp_stage * layers_of_a_chunk

    patch.setattr("models.initialize.get_transformer_layer_offset", without_interleaving)


def balance_counts_of_one_rank(patch: Patch) -> None:
    """The balance loss takes the share of an expert among a rank's own part of the sequence."""
    import models.router

    class Alone:
        def size(self) -> int:
            return 1

    def local(scores: Any, first: Any, sequences: int, group: Any) -> Any:
        alone: Any = Alone()
        return balance_loss(scores, first, sequences, alone)

    balance_loss = models.router.balance_loss
    patch.setattr("models.router.balance_loss", local)


def balance_loss_of_every_tensor_rank(patch: Patch) -> None:
    """Each tensor-parallel rank adds the loss of all their tokens, not of its own."""
    import models.router
    from parallel.megatron import parallel_state

    class Scaled:
        @staticmethod
        def apply(gates: Any, loss: Any) -> Any:
            return attach(gates, loss * parallel_state.get_tensor_model_parallel_world_size())

    attach = models.router.MoEAuxLossAutoScaler.apply
    patch.setattr("models.router.MoEAuxLossAutoScaler", Scaled)


def expert_gradients_scaled_by_expert_ranks(patch: Patch) -> None:
    import parallel.engine

    def scaled(chunks: Any, num_tokens: Any, **options: Any) -> None:
        finalize(chunks, num_tokens, **options)
        for chunk in chunks:
            for buffer in chunk.expert_parallel_buffers:
                buffer.scale_gradients(chunk.module.pg_collection.ep.size())

    finalize = parallel.engine.finalize_model_grads
    patch.setattr("parallel.engine.finalize_model_grads", scaled)


def _mark_experts(patch: Patch, **marks: Any) -> None:
    from models.experts import ExpertFeedForward

    def marked(self: Any, *shape: int, **options: Any) -> Any:
        parameter = make(self, *shape, **options)
        for name, value in marks.items():
            setattr(parameter, name, value)
        return parameter

    make = ExpertFeedForward._parameter
    patch.setattr(ExpertFeedForward, "_parameter", marked)


def expert_gradients_summed_over_all_data_ranks(patch: Patch) -> None:
    """Ranks that hold other experts are taken for replicas."""
    _mark_experts(patch, allreduce=True)


def experts_of_one_tensor_rank_in_the_gradient_norm(patch: Patch) -> None:
    """What is not marked as sharded counts as a copy of what tensor-parallel rank 0 has."""
    _mark_experts(patch, tensor_model_parallel=False)


def router_gradients_of_own_tokens(patch: Patch) -> None:
    """Each tensor-parallel rank routes its part of the sequence, and nobody sums over them."""
    from models.router import ExpertRouter

    def unmarked(self: Any, *shape: int, **options: Any) -> Any:
        parameter: Any = make(self, *shape, **options)
        parameter.sequence_parallel = False
        return parameter

    make = ExpertRouter.new_parameter
    patch.setattr(ExpertRouter, "new_parameter", unmarked)


def expert_biases_of_the_first_rank_only(patch: Patch) -> None:
    """Expert-tensor ranks add their parts of a bias to the same columns of the output."""
    from models.experts import ExpertFeedForward

    def first_columns(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        self.bias_columns = slice(0, self.bias_columns.stop - self.bias_columns.start)

    build = ExpertFeedForward.__init__
    patch.setattr(ExpertFeedForward, "__init__", first_columns)


def expert_norms_over_their_shard(patch: Patch) -> None:
    import models.experts

    def local(*arguments: Any) -> Any:
        *inputs, _ = arguments if len(arguments) == 7 else (*arguments, None)
        return norm(*inputs)

    norm = models.experts._grouped_norm
    patch.setattr("models.experts._grouped_norm", local)


def context(size: int, comm: str = "all_gather", **more: Any) -> ParallelConfig:
    return layout(context_parallel_size=size, cp_comm_type=ContextParallelComm(comm), **more)


OVERLAPPED = layout(overlap_grad_reduce=True, overlap_param_gather=True)
EP2 = layout(expert_model_parallel_size=2)
ETP2 = layout(expert_tensor_parallel_size=2)
MUTANTS = [
    Mutant(norms_are_not_marked_sequence_parallel, 2, layout(tp=2, sp=True)),
    Mutant(sub_layernorm_statistics_of_the_shard, 2, layout(tp=2)),
    Mutant(tokens_counted_on_one_rank, 2, layout()),
    Mutant(tokens_counted_on_one_rank, 2, context(2)),
    Mutant(gradients_scaled_by_context_parallel_size, 2, context(2)),
    Mutant(positions_counted_on_one_rank, 2, context(2)),
    Mutant(sequence_cut_in_reading_order, 2, context(2)),
    Mutant(key_gradients_of_own_queries_only, 2, context(2)),
    Mutant(tied_embedding_not_summed_over_stages, 2, layout(pp=2)),
    Mutant(interleaved_with_batched_messages, 2, layout(pp=2, vpp=2), FOUR_LAYERS),
    Mutant(norms_counted_by_every_tensor_rank, 2, layout(tp=2)),
    Mutant(hidden_gradient_of_own_vocabulary_only, 2, layout(tp=2, sp=True)),
    Mutant(hidden_gradient_not_summed_over_vocabulary, 2, layout(tp=2)),
    Mutant(parameters_gathered_too_late, 2, OVERLAPPED),
    Mutant(shards_drawn_alike, 2, layout(tp=2)),
    Mutant(chunks_numbered_within_their_stage, 2, layout(pp=2, vpp=2), FOUR_LAYERS),
    Mutant(balance_counts_of_one_rank, 2, layout(tp=2, sp=True), EXPERTS),
    Mutant(balance_counts_of_one_rank, 2, context(2), EXPERTS),
    Mutant(balance_loss_of_every_tensor_rank, 2, layout(tp=2, sp=True), EXPERTS),
    Mutant(expert_gradients_scaled_by_expert_ranks, 2, EP2, EXPERTS),
    Mutant(expert_gradients_summed_over_all_data_ranks, 2, EP2, EXPERTS),
    Mutant(
        experts_of_one_tensor_rank_in_the_gradient_norm,
        2,
        layout(tp=2, sp=True, expert_model_parallel_size=2),
        EXPERTS,
    ),
    Mutant(router_gradients_of_own_tokens, 2, layout(tp=2, sp=True), EXPERTS),
    Mutant(shards_drawn_alike, 2, EP2, EXPERTS),
    Mutant(expert_biases_of_the_first_rank_only, 2, ETP2, EXPERTS),
    Mutant(expert_norms_over_their_shard, 2, ETP2, EXPERTS),
]


def train_mutated(index: int) -> RankRecord:
    mutant = MUTANTS[index]
    with Patch.context() as patch:
        mutant.inject(patch)
        return train_on_rank(mutant.exercise, mutant.parallel)


_seen_right: set[str] = set()


def assert_right_without(mutant: Mutant) -> None:
    """The layout equals one process as the code is; tried once for all its mutants."""
    key = repr((mutant.exercise, mutant.parallel))
    if key not in _seen_right:
        found = train_exercise(mutant.exercise, mutant.parallel, mutant.world_size)
        assert_same(found, reference_of(mutant.exercise))
        _seen_right.add(key)


@pytest.mark.parametrize(
    "index", range(len(MUTANTS)), ids=[mutant.inject.__name__ for mutant in MUTANTS]
)
def test_the_comparison_sees(index: int) -> None:
    mutant = MUTANTS[index]
    assert_right_without(mutant)
    mutated = merge(run_on_gloo(mutant.world_size, train_mutated, index))
    differences = compare(mutated, reference_of(mutant.exercise))
    print(table(differences))
    assert any(not row.deviation <= CLEARLY * row.bound for row in differences), table(differences)
