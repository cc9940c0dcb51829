"""The arithmetic of models/parameter_count.py against what models/build.py builds on real ranks."""

import pytest

from models.build import build_model
from models.config import Activation, LayerNormPlacement, ModelConfig, Normalization
from models.moe_config import MoEConfig, RouterType
from models.parameter_count import parameters_on_rank
from parallel.config import ParallelConfig
from parallel.rank_layout import RankLayout
from parallel.runtime import initialize
from tests.distributed import run_on_gloo

VOCAB_SIZE = 1000
VARIANTS: list[dict[str, object]] = [
    *({"layer_norm_placement": placement} for placement in LayerNormPlacement),
    {"normalization": Normalization.rms_norm},
    {"activation": Activation.swiglu, "add_bias_linear": False},
    {"num_query_groups": 2, "kv_channels": 16},
    {"share_embeddings_and_output_weights": False},
]
SPARSE: list[dict[str, object]] = [
    *({"moe": MoEConfig(num_experts=4, router=router)} for router in RouterType),
    {
        "moe": MoEConfig(
            num_experts=4, shared_expert_intermediate_size=32, ffn_hidden_size=64, layer_freq=3
        ),
        "activation": Activation.swiglu,
    },
    {"moe": MoEConfig(num_experts=4, router_dim=3), "normalization": Normalization.rms_norm},
]
STACKED: list[dict[str, object]] = [
    {"moe": MoEConfig(num_experts=4, sparse_after_layer=2, stacked_sublayers=3)},
]


def variant(settings: dict[str, object]) -> ModelConfig:
    shape: dict[str, object] = {
        "name": "tiny",
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
    }
    return ModelConfig(**(shape | settings))  # type: ignore[arg-type]


def built(parallel: ParallelConfig, variants: list[dict[str, object]]) -> list[tuple[int, int]]:
    """On one rank, for each variant: parameters of the built chunks, and their count."""
    runtime = initialize(parallel, seed=1)
    pairs = []
    for model in map(variant, variants):
        chunks = build_model(model, parallel, runtime, vocab_size=VOCAB_SIZE, seed=1)
        counted = parameters_on_rank(
            model,
            VOCAB_SIZE,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            pipeline_rank=RankLayout.of(parallel, runtime.world_size).coordinates(runtime.rank).pp,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        )
        parameters = {id(p): p.numel() for chunk in chunks for p in chunk.parameters()}
        pairs.append((sum(parameters.values()), counted.total))
    return pairs


def check(parallel: ParallelConfig, world_size: int, variants: list[dict[str, object]]) -> None:
    for rank, pairs in enumerate(run_on_gloo(world_size, built, parallel, variants)):
        for settings, (there, counted) in zip(variants, pairs, strict=True):
            assert there == counted, (rank, settings)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1)]
)
def test_every_rank_holds_what_is_counted(tensor: int, pipeline: int, virtual: int) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
    )
    check(parallel, tensor * pipeline, VARIANTS + SPARSE + STACKED)


@pytest.mark.parametrize(("expert", "expert_tensor", "pipeline"), [(2, 1, 1), (4, 1, 1), (1, 2, 2)])
def test_experts_on_every_rank(expert: int, expert_tensor: int, pipeline: int) -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    variants = SPARSE if expert_tensor > 1 else SPARSE + STACKED
    check(parallel, expert * expert_tensor * pipeline, variants)
