"""What DeepSpeed has to be told of a model made of megatron-core's layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engine import is_spared_weight_decay
from parallel.megatron import MegatronModule
from parallel.runtime import Runtime


def is_expert(parameter: torch.Tensor) -> bool:
    """Whether its gradient is summed over the expert-data-parallel ranks."""
    return getattr(parameter, "allreduce", True) is False


@contextlib.contextmanager
def experts_marked(deepspeed: ModuleType, model: MegatronModule, runtime: Runtime) -> Iterator[str]:
    """What `deepspeed.initialize` needs to see of a model with experts; gives their group's name.

    DeepSpeed knows a model with experts by a module of its class MoE in it, their parameters by
    `allreduce=False` and their group's name, and the ranks by that name.
    """
    name = f"ep_size_{runtime.groups.ep.size()}"
    experts = [parameter for parameter in model.parameters() if is_expert(parameter)]
    if not experts:
        yield name
        return
    groups = deepspeed.utils.groups
    for kind, group in {
        "_EXPERT_PARALLEL_GROUP": runtime.groups.ep,
        "_EXPERT_DATA_PARALLEL_GROUP": runtime.groups.expt_dp,
    }.items():
        getattr(groups, kind)[name] = group
        getattr(groups, f"{kind}_RANKS")[name] = dist.get_process_group_ranks(group)
    for parameter in experts:
        parameter.group_name = name

    class Mark(deepspeed.moe.layer.MoE):  # type: ignore[name-defined]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.num_experts = model.config.num_moe_experts

        def set_deepspeed_parallelism(self, *unused: Any) -> None: ...

    if not any(parameter.requires_grad for parameter in experts):
        yield name  # all frozen: it would look for them in the optimizer
        return
    model.mark_of_experts = Mark()
    try:
        yield name
    finally:
        del model.mark_of_experts


def take_gradients_from_autograd(model: MegatronModule) -> None:
    """Layers add to gradient buffers of megatron-core's otherwise, which DeepSpeed has not."""
    for module in model.modules():
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = False
    model.config.gradient_accumulation_fusion = False


def refuse_what_is_not_summed(model: MegatronModule) -> None:
    """No setting of ours makes such a model; megatron-core's finalize_model_grads looks after it.

    Raises ValueError for parameters whose gradients are to be summed or averaged over the
    tensor-parallel ranks without being marked `sequence_parallel`.
    """
    found = [
        name
        for name, parameter in model.named_parameters()
        if getattr(parameter, "average_gradients_across_tp_domain", False)
        or (model.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name))
    ]
    if found and model.tp_group.size() > 1:
        raise ValueError(
            f"engine=deepspeed does not reduce the gradients of {', '.join(found)} over tensor-"
            "parallel ranks; use engine=megatron, or parallel.tensor_model_parallel_size=1"
        )


def without_experts_apart(model: MegatronModule) -> None:
    """ZeRO-3 takes experts for parameters like others; the rules see to it that they are."""
    for parameter in model.parameters():
        if is_expert(parameter):
            parameter.allreduce = True


def parameter_groups(
    model: MegatronModule, weight_decay: float, expert_group: str
) -> list[dict[str, Any]]:
    """Trained parameters by what DeepSpeed and Adam do with them."""
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = is_expert(parameter), is_spared_weight_decay(name, parameter)
        if kind not in groups:
            expert, spared = kind
            decay = 0.0 if spared else weight_decay
            marks = {"moe": True, "name": expert_group} if expert else {"name": "dense"}
            groups[kind] = {"params": [], "weight_decay": decay, **marks}
        groups[kind]["params"].append(parameter)
    return list(groups.values())


def output_weight(model: Any) -> Tensor:
    """The projection onto the vocabulary, which may be the embedding."""
    if model.share_embeddings_and_output_weights:
        return model.embedding.word_embeddings.weight
    return model.output_layer.weight


@contextlib.contextmanager
def whole_shapes(model: MegatronModule) -> Iterator[None]:
    """Parameters of ZeRO-3 with the shape they have when they are gathered.

    What they hold meanwhile is memory of the host that nobody writes, hence nobody provides.
    """
    kept = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.data = torch.empty(parameter.ds_shape, dtype=parameter.dtype)
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
