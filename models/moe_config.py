"""Settings of sparse layers: how many experts, where they sit, who sends a token to which.

`model.moe.router_topk` is megatron-core's `moe_router_topk`, and so on for every name here. Imports
neither torch nor megatron-core.
"""

import math
from dataclasses import dataclass, fields
from enum import Enum

from parallel.config import ConfigError, below

# X-MoE's learnable temperature is kept here or above, which the paper does not say; below 0 all
# scores would change their sign.
SMALLEST_TEMPERATURE = 0.01


class RouterType(Enum):
    """Who scores experts, and how scores become gates; see models/router.py."""

    # cosine score in a low-dimensional space, learnable temperature (arXiv 2204.09179 section 3.1)
    xmoe = "xmoe"
    linear = "linear"  # Switch (arXiv 2101.03961) with top-1, GShard (arXiv 2006.16668) with top-2
    aux_free = "aux_free"  # megatron-core's: sigmoid scores, balanced by a bias and by no loss
    sparsemixer = "sparsemixer"  # SparseMixer-v2 of GRIN (arXiv 2409.12136)
    torchscale = "torchscale"  # TorchScale 0.3.0's Top1Gate and Top2Gate, capacity and all
    torchscale_xmoe = "torchscale_xmoe"  # the same with its use_xmoe=True


class ScoreFunction(Enum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class BalanceScope(Enum):
    """Over which tokens the balance loss counts an expert's share."""

    micro_batch = "micro_batch"  # all tokens of a forward pass of one data-parallel rank
    sequence = "sequence"  # each sequence by itself: the same under any micro_batch_size


class TokenDropPolicy(Enum):
    """Which tokens an expert over its capacity drops."""

    probs = "probs"  # those with the smallest gates
    position = "position"  # the last ones


class SecondExpertPolicy(Enum):
    """TorchScale's: whether the second of two experts is asked."""

    sampling = "sampling"
    random = "random"
    all = "all"


@dataclass(kw_only=True)
class MoEConfig:
    """Sparsely activated feed-forward layers; `num_experts=0` is a dense model."""

    num_experts: int = 0  # of each sparse layer; 0: a dense model
    # layer i, counted from 0, is sparse where (i + 1) is a multiple of this
    layer_freq: int = 2
    # X-MoE's placement instead (arXiv 2204.09179 section 4.1): every layer stays dense, and one
    # sparse sublayer stands after this layer, counted from 1; 0: by layer_freq
    sparse_after_layer: int = 0
    # feed-forward sublayers stacked in each expert, with residuals; the paper has 3
    stacked_sublayers: int = 1
    ffn_hidden_size: int | None = None  # of one expert; None: model.ffn_hidden_size
    # width of a feed-forward beside the experts that every token goes through; 0: none
    shared_expert_intermediate_size: int = 0
    router: RouterType = RouterType.xmoe
    router_topk: int = 1  # experts a token is sent to
    router_score_function: ScoreFunction = ScoreFunction.softmax  # of xmoe and linear
    # of the space xmoe compares in; None: half of num_experts, and 2 at least
    router_dim: int | None = None
    # start of xmoe's learnable temperature, and the constant one of its balance loss; None: the
    # paper's 0.3 with softmax, 0.07 with sigmoid
    router_temperature: float | None = None
    router_bias_update_rate: float = 1e-3  # of aux_free
    router_jitter_eps: float = 0.01  # of sparsemixer
    # experts and router keep their weights; the balance loss reaches what is below them
    freeze_routing: bool = False
    aux_loss_coeff: float = 0.01  # of the balance loss; 0 switches it off
    balance_scope: BalanceScope = BalanceScope.micro_batch
    z_loss_coeff: float = 0.0  # ST-MoE (arXiv 2202.08906) equation 5
    # tokens an expert takes, in multiples of the even share; None: all that come (dropless)
    expert_capacity_factor: float | None = None
    token_drop_policy: TokenDropPolicy = TokenDropPolicy.probs
    # TorchScale's own, under its names without "moe_"
    second_expert_policy: SecondExpertPolicy = SecondExpertPolicy.random
    # the two gates sum to 1 before experts that are full drop tokens; false: after
    normalize_gate_prob_before_dropping: bool = True
    eval_capacity_token_fraction: float = 0.25  # of the tokens; an expert's room in evaluation

    @property
    def temperature(self) -> float:
        """Where the temperature of `xmoe` starts."""
        if self.router_temperature is not None:
            return self.router_temperature
        return 0.3 if self.router_score_function is ScoreFunction.softmax else 0.07

    @property
    def dim(self) -> int:
        """Width of the space that `xmoe` compares in."""
        return self.router_dim if self.router_dim is not None else max(2, self.num_experts // 2)

    def sparse_layers(self, num_layers: int) -> list[int]:
        """Layers, counted from 0, that have experts: instead of their feed-forward, or (with
        `sparse_after_layer`) behind it."""
        if self.num_experts == 0:
            return []
        if self.sparse_after_layer:
            return [self.sparse_after_layer - 1]
        return [i for i in range(num_layers) if (i + 1) % self.layer_freq == 0]

    def __post_init__(self) -> None:
        """Raises ConfigError for what is wrong whatever the model and the layout."""
        problems = below(
            {
                "model.moe.num_experts": self.num_experts,
                "model.moe.sparse_after_layer": self.sparse_after_layer,
                "model.moe.shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            },
            0,
        )
        sizes: dict[str, float] = {
            "model.moe.layer_freq": self.layer_freq,
            "model.moe.stacked_sublayers": self.stacked_sublayers,
            "model.moe.router_topk": self.router_topk,
        }
        if self.ffn_hidden_size is not None:
            sizes["model.moe.ffn_hidden_size"] = self.ffn_hidden_size
        if self.router_dim is not None:
            sizes["model.moe.router_dim"] = self.router_dim
        problems += below(sizes, 1)
        for name, value in {
            "model.moe.aux_loss_coeff": self.aux_loss_coeff,
            "model.moe.z_loss_coeff": self.z_loss_coeff,
            "model.moe.router_bias_update_rate": self.router_bias_update_rate,
            "model.moe.router_jitter_eps": self.router_jitter_eps,
        }.items():
            if not (math.isfinite(value) and value >= 0):
                problems.append(f"{name}={value} must be 0 or a finite number above")
        for name, positive in {
            "model.moe.router_temperature": self.router_temperature,
            "model.moe.expert_capacity_factor": self.expert_capacity_factor,
        }.items():
            if positive is not None and not (math.isfinite(positive) and positive > 0):
                problems.append(f"{name}={positive} must be a finite number above 0, or null")
        temperature, lowest = self.router_temperature, SMALLEST_TEMPERATURE
        if temperature is not None and 0 < temperature < lowest:
            problems.append(
                f"model.moe.router_temperature={temperature} must be {lowest} or more, where the "
                "router keeps it"
            )
        if not math.isfinite(self.eval_capacity_token_fraction):
            problems.append(
                f"model.moe.eval_capacity_token_fraction={self.eval_capacity_token_fraction} must "
                "be a number; 0 or less is the rule of training"
            )
        problems += self._rules_between_settings()
        if problems:
            raise ConfigError(*problems)

    def _rules_between_settings(self) -> list[str]:
        if self.num_experts == 0:
            return [
                f"{typed} sets up experts, and model.moe.num_experts=0 is a dense model; set "
                "model.moe.num_experts, or leave it out"
                for typed in self._changed()
            ]
        problems = [
            f"{typed} belongs to model.moe.router={' or '.join(owners)}, and changes nothing for "
            f"model.moe.router={self.router.value}; leave it out"
            for typed, owners in self._without_effect()
        ]
        experts, topk, router = self.num_experts, self.router_topk, self.router.value
        if 0 < experts < topk:
            problems.append(
                f"model.moe.router_topk={topk} must not exceed model.moe.num_experts={experts}; "
                f"use {experts} or less"
            )
        if topk > 2 and router in ("sparsemixer", "torchscale", "torchscale_xmoe"):
            problems.append(
                f"model.moe.router_topk={topk}: model.moe.router={router} is defined for 1 and 2 "
                "experts a token"
            )
        if router == "xmoe" and self.dim < 2:
            problems.append(
                f"model.moe.router_dim={self.dim} must be 2 or more: on a line there are two "
                "directions, and no gradient that would turn one into the other"
            )
        if self.stacked_sublayers > 1 and not self.sparse_after_layer:
            problems.append(
                f"model.moe.stacked_sublayers={self.stacked_sublayers} belongs to X-MoE's "
                "placement; name the layer it stands after as model.moe.sparse_after_layer, or use "
                "model.moe.stacked_sublayers=1"
            )
        if self.sparse_after_layer and self.layer_freq != _default("layer_freq"):
            problems.append(
                f"model.moe.layer_freq={self.layer_freq} changes nothing beside "
                f"model.moe.sparse_after_layer={self.sparse_after_layer}; leave one of them out"
            )
        if self.expert_capacity_factor is None and self.token_drop_policy is not (
            _default("token_drop_policy")
        ):
            problems.append(
                f"model.moe.token_drop_policy={self.token_drop_policy.value} drops nothing without "
                "model.moe.expert_capacity_factor; set that, or leave it out"
            )
        return problems

    def _changed(self) -> list[str]:
        """Settings that are not at their defaults, as typed."""
        return [
            f"model.moe.{field.name}={getattr(value, 'value', value)}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]

    def _without_effect(self) -> list[tuple[str, tuple[str, ...]]]:
        """Settings of other routers that were changed, and whose they are."""
        found = []
        for typed in self._changed():
            owners = SETTINGS_OF_ROUTERS.get(typed.removeprefix("model.moe.").partition("=")[0])
            if owners is not None and self.router.value not in owners:
                found.append((typed, owners))
        return found


# which routers read a setting; those not listed are every router's
_COSINE = ("xmoe",)
_TORCHSCALE = ("torchscale", "torchscale_xmoe")
SETTINGS_OF_ROUTERS = {
    "router_score_function": ("xmoe", "linear"),
    "router_dim": _COSINE,
    "router_temperature": _COSINE,
    "router_bias_update_rate": ("aux_free",),
    "router_jitter_eps": ("sparsemixer",),
    "aux_loss_coeff": ("xmoe", "linear", "sparsemixer", *_TORCHSCALE),
    "balance_scope": ("xmoe", "linear", "sparsemixer", *_TORCHSCALE),
    # TorchScale's gates bring a capacity of their own, SparseMixer never drops a token
    "expert_capacity_factor": ("xmoe", "linear", "aux_free"),
    "second_expert_policy": _TORCHSCALE,
    "normalize_gate_prob_before_dropping": _TORCHSCALE,
    "eval_capacity_token_fraction": _TORCHSCALE,
}


def _default(name: str) -> object:
    return next(field.default for field in fields(MoEConfig) if field.name == name)
