"""The engine: forward and backward over micro-batches, gradient reduction, one optimizer step.

`Engine` is what a run needs of any engine; `MegatronEngine` does it with megatron-core's schedules
(plain, 1F1B, interleaved 1F1B), gradient buffers, gradient finalisation, clipping and distributed
optimizer (ZeRO-1). The other one is in `parallel.deepspeed_engine`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from parallel import adam, optimizer_state
from parallel.checkpoint_replicas import deal_out_weights
from parallel.collectives import skip_collectives_of_one_rank
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    MegatronModule,
    MegatronOptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    ParamPredicate,
    clip_grad_by_total_norm_fp32,
    finalize_model_grads,
    get_forward_backward_func,
    get_megatron_optimizer,
    parallel_state,
    tensor_parallel,
)
from parallel.runtime import Runtime

# (iterator over micro-batches, model chunk) -> (model output, function of it)
# The function runs on the last stage only and returns (loss sum, valid tokens, metrics); the loss
# sum carries the gradient.
ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[Any, Callable[[Any], Any]]]
# global gradient norm before clipping -> whether to update
Accept = Callable[[float], bool]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step reports; the same on every rank."""

    grad_norm: float  # global, before clipping
    applied: bool  # False: the update was skipped, for gradients that are not finite or on request


@dataclass(frozen=True)
class Counted:
    """What a rank adds to norms: each weight once among the ranks of `group`, as far as they hold
    it. The three lists go together, an entry for each parameter or part of one."""

    group: Any  # a process group; None: all ranks
    parameters: list[torch.Tensor]  # the model's
    gradients: list[torch.Tensor]
    weights: list[torch.Tensor]  # what is updated: the weight, its master, or this rank's share


class Engine(Protocol):
    runtime: Runtime
    # called by every step, on all ranks, when its gradients are complete and not yet clipped
    before_clipping: Callable[[], None] | None

    @property
    def chunks(self) -> Sequence[Any]: ...

    @property
    def has_frozen_parameters(self) -> bool: ...

    def seed_random_numbers(self, seed: int, step: int) -> None: ...

    def forward_backward(
        self,
        micro_batches: Sequence[Any],
        forward_step: ForwardStep,
        *,
        seq_length: int,
        micro_batch_size: int,
        forward_only: bool = False,
    ) -> list[dict[str, Any]]: ...

    def step(self, learning_rate: float, accept: Accept | None = None) -> StepResult: ...

    def sharded_state_dict(
        self, *, is_loading: bool = False, weights_only: bool = False
    ) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def counted(self) -> Iterator[Counted]: ...

    def stage_calls(self) -> list[tuple[Any, str, str]]: ...


class ModelEngine:
    """What engines have in common. `chunks` hold the model's in `.module`."""

    def __init__(self, chunks: Sequence[Any], parallel: ParallelConfig, runtime: Runtime) -> None:
        self.chunks = chunks
        self.parallel = parallel
        self.runtime = runtime
        self.before_clipping: Callable[[], None] | None = None
        config = chunks[0].module.config
        self._draws_random_numbers = bool(
            config.hidden_dropout
            or config.attention_dropout
            or any(module.draws for module in self._modules_with("draws"))
        )

    def seed_random_numbers(self, seed: int, step: int) -> None:
        """Make a step's dropout masks, and the draws of routers that sample, a function of
        (seed, step, this rank's place along every axis).

        A resumed run repeats those of an uninterrupted one without any random state being saved.
        Other layouts draw others. Does nothing in a model that draws nothing.
        """
        if not self._draws_random_numbers:
            return
        runtime = self.runtime
        place: tuple[int, ...] = (runtime.pipeline_parallel_rank, runtime.data_parallel_rank)
        if runtime.context_parallel_size > 1:
            place += (runtime.context_parallel_rank,)
        text = f"dropout:{seed}:{step}:{place}".encode()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")
        torch.manual_seed(key)
        # tensor-parallel ranks share the seed above (they hold the same activations) and differ in
        # megatron-core's tracker, which sharded activations draw from
        tensor_parallel.model_parallel_cuda_manual_seed(key)

    @property
    def has_frozen_parameters(self) -> bool:
        """Whether this rank holds parameters that no optimizer knows."""
        return any(not p.requires_grad for chunk in self.chunks for p in chunk.parameters())

    def _modules_with(self, method: str) -> Iterator[Any]:
        for chunk in self.chunks:
            yield from (module for module in chunk.modules() if hasattr(module, method))


class MegatronEngine(ModelEngine):
    """megatron-core's training machinery around the model chunks of this rank.

    All ranks must construct it and call its methods in the same order.

    Args:
        chunks: this rank's model chunks, on the runtime's device, weights already initialised
            (the optimizer copies them into its fp32 master weights).
        parallel, optimizer: settings.
        runtime: this process's place in the layout.
    """

    def __init__(
        self,
        chunks: Sequence[MegatronModule],
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        runtime: Runtime,
    ) -> None:
        adam.register()
        adam.register_multi_tensor_kernels()
        skip_collectives_of_one_rank()
        config = chunks[0].config
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            average_in_collective=False,
        )
        wrapped = [
            # buckets beyond the first chunk would only delay the reduction they overlap with
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        super().__init__(wrapped, parallel, runtime)
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.adam_beta1,
                adam_beta2=optimizer.adam_beta2,
                adam_eps=optimizer.adam_eps,
                clip_grad=optimizer.clip_grad,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                overlap_param_gather=parallel.overlap_param_gather,
            ),
            list(self.chunks),
            config_overrides=_without_weight_decay(),
        )
        adam.initialize_state(self.optimizer)
        for group in self.optimizer.param_groups:
            # megatron-core leaves this product to a scheduler of its own: without it biases and
            # norms would decay like everything else
            group["weight_decay"] = optimizer.weight_decay * group.get("wd_mult", 1.0)
        self._set_schedule_hooks(config)

    def _set_schedule_hooks(self, config: Any) -> None:
        config.finalize_model_grads_func = finalize_model_grads
        single = len(self.chunks) == 1
        if self.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync[0] if single else no_sync
        # Without it the first use of each bucket starts its gather. Where one chunk runs in a
        # pipeline, megatron-core 0.16.1 would start the same gather twice and fail.
        if self.parallel.overlap_param_gather and not single:
            config.param_sync_func = [chunk.start_param_sync for chunk in self.chunks]

    def forward_backward(
        self,
        micro_batches: Sequence[Any],
        forward_step: ForwardStep,
        *,
        seq_length: int,
        micro_batch_size: int,
        forward_only: bool = False,
    ) -> list[dict[str, Any]]:
        """Run the schedule over this rank's micro-batches; gradients end up reduced and divided.

        Gradients are sums over the step's valid tokens divided by their global count, whatever
        the micro-batching and the layout. Returns the metrics of each micro-batch on the last
        pipeline stage, an empty list elsewhere.
        """
        if forward_only:
            for chunk in self.chunks:
                chunk.eval()
        else:
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        iterators = [iter(micro_batches) for _ in self.chunks]
        single = len(self.chunks) == 1
        run = get_forward_backward_func()
        # megatron-core's forward_only does not switch autograd off
        with torch.no_grad() if forward_only else contextlib.nullcontext():
            return run(
                forward_step_func=forward_step,
                data_iterator=iterators[0] if single else iterators,
                model=self.chunks[0] if single else list(self.chunks),
                num_microbatches=len(micro_batches),
                seq_length=seq_length,
                micro_batch_size=micro_batch_size,
                forward_only=forward_only,
            )

    def step(self, learning_rate: float, accept: Accept | None = None) -> StepResult:
        """Clip by the global norm and update, with this learning rate.

        `accept` is asked when the norm is known and nothing has changed yet; the update is skipped
        where it says no. It may communicate, and must say the same on every rank.

        The update is skipped, on every rank alike, when the global norm is not finite: one NaN
        would otherwise reach every weight through the clipping factor (megatron-core's own step
        checks under fp16 only).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        overflow = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if self.before_clipping is not None:
            self.before_clipping()
        accepted = accept is None or accept(grad_norm)
        if not accepted or overflow or not math.isfinite(grad_norm):
            return StepResult(grad_norm, applied=False)
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            parameters = optimizer.get_parameters()
            if parameters and optimizer.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(
                    parameters, max_norm=optimizer.config.clip_grad, total_norm=grad_norm
                )
        applied = bool(self.optimizer.step_with_ready_grads())
        if applied:
            for module in self._modules_with("after_optimizer_step"):
                module.after_optimizer_step()
        return StepResult(grad_norm, applied)

    def sharded_state_dict(
        self, *, is_loading: bool = False, weights_only: bool = False
    ) -> dict[str, Any]:
        """Weights and optimizer state as megatron-core's sharded tensors, layout-free keys.

        The tensors are those that training uses: loading into them changes the engine. All ranks
        must call it.
        """
        if not is_loading:
            self._settle()
        metadata = checkpoint_metadata()
        # one dictionary per chunk: their keys are layer numbers within the chunk
        state: dict[str, Any] = {
            f"model{index}": chunk.module.sharded_state_dict(metadata=metadata)
            for index, chunk in enumerate(self.chunks)
        }
        deal_out_weights(state)
        if weights_only:
            return state
        state["optimizer"] = optimizer_state.sharded_state(self.optimizer, state)
        return state

    def _settle(self) -> None:
        """Bring the weights to what the next forward pass would use."""
        if self.parallel.overlap_param_gather:
            for chunk in self.chunks:  # the gather of the last step waits for that forward pass
                chunk.start_param_sync(force_sync=True)
        for module in self._modules_with("settle"):
            module.settle()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `parallel.checkpoint_io.load` filled in; weights alone where there is no
        optimizer state in it, which then stays as it is."""
        for index, chunk in enumerate(self.chunks):
            chunk.module.load_state_dict(state[f"model{index}"], strict=True)
        if "optimizer" in state:
            optimizer_state.take_over(self.optimizer, state["optimizer"])
            return
        with torch.no_grad():
            self.optimizer.reload_model_params()

    def counted(self) -> Iterator[Counted]:
        """What this rank adds to the norms of the step, optimizer by optimizer: each has a group
        of its own that its norm is summed over. All ranks yield as many.

        Between the reduction of gradients and the update.
        """
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            pairs = [] if optimizer.is_stub_optimizer else _counted_once(optimizer)
            yield Counted(
                optimizer.get_grad_stats_parallel_group(),
                [parameter for parameter, _ in pairs],
                [updated.grad for _, updated in pairs],
                [updated.detach() for _, updated in pairs],
            )

    def stage_calls(self) -> list[tuple[Any, str, str]]:
        """(owner, name, stage) of what a step calls, for `parallel.stage_clock`."""
        schedules = sys.modules["megatron.core.pipeline_parallel.schedules"]
        return [
            (schedules, "forward_step", "forward"),
            (schedules, "backward_step", "backward"),
            (self, "forward_backward", "schedule"),
            (self.chunks[0].config, "finalize_model_grads_func", "gradients"),
            (self, "step", "optimizer"),
        ]


def _counted_once(optimizer: Any) -> list[tuple[torch.Tensor, Any]]:
    """(parameter, what is updated for it) of those that the global norm counts on this rank."""
    return [
        (parameter, updated)
        for parameter, updated in optimizer_state.updated_parameters(optimizer)
        if updated.grad is not None
        and not getattr(updated, "shared", False)
        and tensor_parallel.param_is_not_tensor_parallel_duplicate(
            updated, getattr(optimizer, "tp_group", None)
        )
    ]


def _without_weight_decay() -> dict[ParamKey, ParamGroupOverride]:
    """`is_spared_weight_decay` in megatron-core's words."""
    key = ParamKey(
        name="*.bias",
        attr="no_weight_decay",
        predicate=ParamPredicate("vector", lambda parameter: parameter.dim() == 1),
    )
    return {key: ParamGroupOverride(wd_mult=0.0)}


def is_spared_weight_decay(name: str, parameter: torch.Tensor) -> bool:
    """megatron-core's rule (vectors and names in ".bias"), and parameters marked
    `no_weight_decay`: biases and norms of experts are stacked into matrices."""
    marked = bool(getattr(parameter, "no_weight_decay", False))
    return marked or name.endswith(".bias") or parameter.dim() == 1


def checkpoint_metadata() -> dict[str, Any]:
    """How megatron-core's modules should describe their weights: readable by any layout."""
    return {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
