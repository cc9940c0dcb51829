"""engine=deepspeed: megatron-core's tensor- and expert-parallel layers with DeepSpeed's ZeRO.

DeepSpeed reduces gradients over the data-parallel ranks, holds masters and moments, gathers
parameters, moves what is offloaded, and updates. Ours, because both engines must agree on it to the
last digit that rounding leaves: the division of gradients by the step's valid tokens, the sum over
tensor-parallel ranks under sequence parallelism, the global norm, who is clipped and whether to
update at all. Checkpoints are those of `parallel.optimizer_state`: no engine and no ZeRO stage can
be told from them.

Which combinations it refuses stands in `parallel.deepspeed_config`.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import adam, optimizer_state
from parallel.checkpoint_replicas import deal_out_weights
from parallel.config import ConfigError, OptimizerConfig, ParallelConfig
from parallel.deepspeed_config import DeepSpeedConfig, Launch, not_installed, problems_of
from parallel.deepspeed_library import (
    ModelParallelUnit,
    configuration,
    forget_earlier_engines,
    library,
)
from parallel.deepspeed_library import adam as make_adam
from parallel.deepspeed_model import (
    experts_marked,
    is_expert,
    output_weight,
    parameter_groups,
    refuse_what_is_not_summed,
    take_gradients_from_autograd,
    whole_shapes,
    without_experts_apart,
)
from parallel.deepspeed_shards import Zero3, shards_of
from parallel.engine import (
    Accept,
    Counted,
    ForwardStep,
    ModelEngine,
    StepResult,
)
from parallel.engine import checkpoint_metadata as described_for_any_layout
from parallel.megatron import (
    MegatronModule,
    reset_model_temporary_tensors,
    schedules,
    tensor_parallel,
    update_router_expert_bias,
)
from parallel.optimizer_state import WEIGHT, Part
from parallel.runtime import Runtime


def check(parallel: ParallelConfig, deepspeed: DeepSpeedConfig, num_experts: int) -> None:
    """The rules that need to know the device: parallel.precision=auto is bf16 on a GPU.

    Raises ConfigError; call it before there is any process group.
    """
    launch = Launch(parallel, deepspeed, num_experts, on_gpu=torch.cuda.is_available())
    problems = not_installed() + problems_of(launch)
    if problems:
        raise ConfigError(*problems)


class DeepSpeedEngine(ModelEngine):
    """DeepSpeed around the one model chunk of this rank.

    All ranks must construct it and call its methods in the same order.

    Args:
        chunks: one model chunk, on the runtime's device, weights initialised.
        parallel, optimizer, deepspeed: settings, held against each other already (`check`).
        runtime: this process's place in the layout.

    Raises ValueError for a model with gradients that only megatron-core's engine reduces rightly.
    """

    def __init__(
        self,
        chunks: Sequence[MegatronModule],
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        deepspeed: DeepSpeedConfig,
        runtime: Runtime,
    ) -> None:
        (model,) = chunks
        refuse_what_is_not_summed(model)
        self._clip_grad, self._deepspeed = optimizer.clip_grad, deepspeed
        self._library = library()
        forget_earlier_engines(self._library)
        os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))  # it refuses to start without
        take_gradients_from_autograd(model)
        if deepspeed.zero_stage == 3:
            without_experts_apart(model)
        with (
            experts_marked(self._library, model, runtime) as expert_group,
            contextlib.redirect_stdout(io.StringIO()),  # it prints what memory there is
        ):
            groups = parameter_groups(model, optimizer.weight_decay, expert_group)
            self._engine, *_ = self._library.initialize(
                model=model,
                optimizer=make_adam(self._library, groups, optimizer, deepspeed),
                config=configuration(
                    deepspeed,
                    bf16=model.config.bf16,
                    elements=sum(parameter.numel() for parameter in model.parameters()),
                ),
                mpu=ModelParallelUnit(runtime),
                dist_init_required=False,
            )
        super().__init__([self._engine], parallel, runtime)
        self._shards = shards_of(self._engine, deepspeed.zero_stage)
        self._has_gradients, self._settled = False, True
        if isinstance(self._shards, Zero3):
            # read outside of its module's call: gathered as long as the whole model's runs
            weight = output_weight(model)
            self._library.zero.register_external_parameter(model, weight)
        self._initialize_moments()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over this rank's flat tensors."""
        return self._engine.basic_optimizer

    def _initialize_moments(self) -> None:
        """Now: a checkpoint taken before the first update must hold them too."""
        for flat in {id(shard.flat): shard.flat for shard in self._shards.shards}.values():
            self.optimizer.state[flat] = {
                "step": self._step_as_kept(0, flat),
                "exp_avg": torch.zeros_like(flat.detach()),
                "exp_avg_sq": torch.zeros_like(flat.detach()),
            }

    def _step_as_kept(self, step: int, flat: Tensor) -> Any:
        if self._deepspeed.native_adam:
            return step
        return torch.tensor(float(step), device=flat.device)

    # ---- a step ----------------------------------------------------------------------------------

    def forward_backward(
        self,
        micro_batches: Sequence[Any],
        forward_step: ForwardStep,
        *,
        seq_length: int,
        micro_batch_size: int,
        forward_only: bool = False,
    ) -> list[dict[str, Any]]:
        """As `MegatronEngine.forward_backward`, for a model in one piece."""
        self._settle()
        engine, config = self._engine, self._engine.module.config
        engine.module.train(not forward_only)
        if not forward_only and self._has_gradients:
            self._shards.discard()
        iterator, metrics = iter(micro_batches), list[Any]()
        valid_tokens = torch.zeros((), dtype=torch.int, device=self.runtime.device)
        with torch.no_grad() if forward_only else contextlib.nullcontext():
            for index in range(len(micro_batches)):
                if not forward_only:
                    engine.set_gradient_accumulation_boundary(index + 1 == len(micro_batches))
                loss_sum, valid = schedules.forward_step(
                    forward_step,
                    iterator,
                    engine,
                    len(micro_batches),
                    None,
                    metrics,
                    config,
                    self.runtime.context_parallel_size,
                    current_microbatch=index,
                )
                valid_tokens += valid
                if not forward_only:
                    self._backward(loss_sum)
        if not forward_only:
            self._has_gradients = True
            self._finish_gradients(valid_tokens)
        return metrics

    def _backward(self, loss_sum: Tensor) -> None:
        self._engine.backward(loss_sum, scale_wrt_gas=False)

    @torch.no_grad()
    def _finish_gradients(self, valid_tokens: Tensor) -> None:
        """What megatron-core's finalize_model_grads does after the data-parallel reduction."""
        model = [self._engine]
        config = self._engine.module.config
        if self._deepspeed.offload_optimizer:
            # gradients on their way to the host are not there yet
            self._library.get_accelerator().synchronize()
        gradients = self._shards.gradients()
        if config.sequence_parallel:
            self._sum_over_tensor_parallel_ranks(gradients)
        if config.moe_router_enable_expert_bias:
            update_router_expert_bias(model, config)
        reset_model_temporary_tensors(config, model)
        ranks = self.runtime.groups.dp_cp
        dist.all_reduce(valid_tokens, group=ranks)
        # DeepSpeed has taken the mean over these ranks
        factor = ranks.size() / valid_tokens.clamp(min=1)
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))

    def _sum_over_tensor_parallel_ranks(self, gradients: list[Tensor]) -> None:
        """Of parameters that see a part of the sequence only: norms, routers, biases.

        ZeRO cuts the same way on all tensor-parallel ranks, so that shards correspond."""
        parts = [
            gradient
            for shard, gradient in zip(self._shards.shards, gradients, strict=True)
            if getattr(shard.parameter, "sequence_parallel", False)
        ]
        if not parts:
            return
        together = torch.cat(parts).to(self.runtime.device)
        dist.all_reduce(together, group=self.runtime.groups.tp)
        for part, summed in zip(parts, together.split([p.numel() for p in parts]), strict=True):
            part.copy_(summed)

    def step(self, learning_rate: float, accept: Accept | None = None) -> StepResult:
        """As `MegatronEngine.step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._gradient_norm()
        if self.before_clipping is not None:
            self.before_clipping()
        accepted = accept is None or accept(norm)
        self._has_gradients = False
        if not accepted or not math.isfinite(norm):
            self._shards.discard()
            return StepResult(norm, applied=False)
        factor = self._clip_grad / (norm + 1.0e-6) if self._clip_grad > 0 else 1.0
        gradients = self._shards.gradients()
        if gradients and factor < 1.0:
            torch._foreach_mul_(gradients, factor)
        self._shards.update(norm)
        for module in self._modules_with("after_optimizer_step"):
            module.after_optimizer_step()
        self._settled = False
        return StepResult(norm, applied=True)

    @torch.no_grad()
    def _settle(self) -> None:
        """After an update routers bring weights back to where they must stay. What Adam updates has
        to follow, so this is not left to their next forward pass."""
        if self._settled:
            return
        self._settled = True
        for module in self._modules_with("settle"):
            if parameters := list(module.parameters()):
                with self._shards.changing(parameters):
                    module.settle()

    @torch.no_grad()
    def _gradient_norm(self) -> float:
        (counted,) = self.counted()
        square = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        if counted.gradients:
            square += adam.norms(counted.gradients).double().square().sum().to(square.device)
        dist.all_reduce(square, group=counted.group)
        return math.sqrt(square)

    def counted(self) -> Iterator[Counted]:
        """As `MegatronEngine.counted`: each element of the model on one rank of all."""
        kept = [
            (shard, gradient)
            for shard, gradient in zip(self._shards.shards, self._shards.gradients(), strict=True)
            if self._counts(shard.parameter)
        ]
        yield Counted(
            None,
            [shard.parameter for shard, _ in kept],
            [gradient for _, gradient in kept],
            [shard.weight for shard, _ in kept],
        )

    def _counts(self, parameter: Tensor) -> bool:
        groups = self.runtime.groups
        copies, tensor = groups.dp_cp, groups.tp
        if is_expert(parameter):
            copies, tensor = groups.expt_dp, groups.expt_tp
        if not self._shards.alone and copies.rank() > 0:
            return False
        return tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter, tensor)

    def stage_calls(self) -> list[tuple[Any, str, str]]:
        """As `MegatronEngine.stage_calls`. DeepSpeed reduces inside of the backward pass."""
        return [
            (schedules, "forward_step", "forward"),
            (self, "_backward", "backward"),
            (self, "forward_backward", "schedule"),
            (self, "_finish_gradients", "gradients"),
            (self, "step", "optimizer"),
        ]

    # ---- checkpoints -----------------------------------------------------------------------------

    def sharded_state_dict(
        self, *, is_loading: bool = False, weights_only: bool = False
    ) -> dict[str, Any]:
        """As `MegatronEngine.sharded_state_dict`, and not to be told from it in a checkpoint."""
        if not is_loading:
            self._settle()
        model = self._engine.module
        with whole_shapes(model) if isinstance(self._shards, Zero3) else contextlib.nullcontext():
            described = model.sharded_state_dict(metadata=described_for_any_layout())
            deal_out_weights(described)
            state: dict[str, Any] = {"model0": described}
            if isinstance(self._shards, Zero3):
                state["model0"] = self._shares_for(described)
            if not weights_only:
                state["optimizer"] = {
                    "step": optimizer_state.agreed_step(self._steps()),
                    "settings": optimizer_state.settings_of(self.optimizer.param_groups),
                    "tensors": optimizer_state.sharded_parts(self._moments(), described),
                }
        return state

    def _shares_for(self, described: dict[str, Any]) -> dict[str, Any]:
        """The model's state with this rank's shares of parameters in place of these."""
        parameters = {id(parameter): parameter for parameter in self._engine.module.parameters()}
        parts = []
        for parameter in parameters.values():
            start, size = Zero3.share(parameter)
            held = parameter.ds_tensor.detach().view(-1).narrow(0, 0, size)
            parts.append(Part(parameter, start, {WEIGHT: held}, alone=True))
        rest = {
            name: entry
            for name, entry in described.items()
            if id(getattr(entry, "data", None)) not in parameters
        }
        return {**rest, _SHARES: optimizer_state.sharded_parts(parts, described)}

    def _steps(self) -> set[int]:
        states = (self.optimizer.state[shard.flat] for shard in self._shards.shards)
        return {int(state["step"]) for state in states} - {0}

    def _moments(self) -> Iterator[Part]:
        for shard in self._shards.shards:
            state = self.optimizer.state[shard.flat]
            tensors = {kind: shard.of(state[kind]) for kind in ("exp_avg", "exp_avg_sq")}
            if shard.parameter.dtype != torch.float32:
                tensors["fp32_param"] = shard.weight
            yield Part(shard.parameter, shard.start, tensors, alone=self._shards.alone)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `MegatronEngine.load_state_dict`."""
        model = dict(state["model0"])
        shared_out = model.pop(_SHARES, None) is not None
        self._engine.module.load_state_dict(model, strict=not shared_out)
        with_optimizer = "optimizer" in state
        with torch.no_grad():
            # fp32 weights are their own masters in a checkpoint, and two tensors here
            masters_too = with_optimizer and self._engine.module.config.bf16
            self._shards.weights_were_read(masters_too=masters_too)
        if not with_optimizer:
            return
        step = optimizer_state.step_of(state["optimizer"])
        for shard in self._shards.shards:
            held = self.optimizer.state[shard.flat]
            held["step"] = self._step_as_kept(step, shard.flat)


_SHARES = "shares"  # of parameters, among the entries of a model's state
