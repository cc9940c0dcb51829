"""Parameters and FLOPs against numbers worked out by hand and published shapes."""

from dataclasses import replace

import pytest

from models.config import Activation, LayerNormPlacement, ModelConfig, Normalization
from models.moe_config import MoEConfig, RouterType
from models.parameter_count import (
    flops_per_step,
    flops_per_token,
    hardware_flops_per_token,
    layers_of_stage,
    padded_vocab_size,
    parameter_count,
    parameters_on_rank,
)
from parallel.config import RecomputeGranularity


def kosmos_1(**settings: object) -> ModelConfig:
    shape: dict[str, object] = {
        "name": "kosmos_1",
        "num_layers": 24,
        "hidden_size": 2048,
        "ffn_hidden_size": 8192,
        "num_attention_heads": 32,
        "make_vocab_size_divisible_by": 1,
    }
    return ModelConfig(**(shape | settings))  # type: ignore[arg-type]


def grouped(**settings: object) -> ModelConfig:
    return kosmos_1(
        **{
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "kv_channels": 16,
            "make_vocab_size_divisible_by": 128,
        }
        | settings
    )


def test_kosmos_1_decoder() -> None:
    """arXiv 2302.14045 section 3.2: 24 x 2048, FFN 8192; 64,007 entries, shared; weights only."""
    count = parameter_count(kosmos_1(add_bias_linear=False), vocab_size=64_007)
    assert count.total - count.norms == 1_339_045_888
    assert count.biases == 0


def test_lex_body() -> None:
    """arXiv 2212.10554 section 4.1: 24 layers of 1024, 12 L h^2 weights."""
    lex = kosmos_1(hidden_size=1024, ffn_hidden_size=4096, add_bias_linear=False)
    count = parameter_count(lex, vocab_size=1)
    assert count.non_embedding - count.norms == 301_989_888


def test_llama_2_70b() -> None:
    """Published as 68,976,648,192 parameters with 32,000 entries (arXiv 2307.09288), pre-LN."""
    llama = kosmos_1(
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_query_groups=8,
        activation=Activation.swiglu,
        normalization=Normalization.rms_norm,
        layer_norm_placement=LayerNormPlacement.pre_ln,
        add_bias_linear=False,
        share_embeddings_and_output_weights=False,
    )
    assert parameter_count(llama, vocab_size=32_000).total == 68_976_648_192


@pytest.mark.parametrize(
    ("placement", "per_layer", "final"),
    [
        (LayerNormPlacement.sub_ln, 2 * 64 + 8 * 16 + 128, 64),
        (LayerNormPlacement.pre_ln, 2 * 64, 64),
        (LayerNormPlacement.deepnorm_pre_ln, 2 * 64, 64),
        (LayerNormPlacement.post_ln, 2 * 64, 0),
        (LayerNormPlacement.deepnorm, 2 * 64, 0),
    ],
)
@pytest.mark.parametrize(
    ("normalization", "vectors"), [(Normalization.layer_norm, 2), (Normalization.rms_norm, 1)]
)
def test_norms(
    placement: LayerNormPlacement,
    per_layer: int,
    final: int,
    normalization: Normalization,
    vectors: int,
) -> None:
    config = grouped(layer_norm_placement=placement, normalization=normalization)
    assert parameter_count(config, vocab_size=1).norms == vectors * (4 * per_layer + final)


def test_breakdown_by_hand() -> None:
    count = parameter_count(grouped(), vocab_size=1000)
    qkv, heads = (8 + 2 * 4) * 16, 8 * 16
    assert count.embedding == 1024 * 64
    assert count.output_layer == 0
    assert count.attention == 4 * (qkv * 64 + qkv + 64 * heads + 64)
    assert count.feed_forward == 4 * (128 * 64 + 128 + 64 * 128 + 64)
    assert count.biases == 4 * (qkv + 64 + 128 + 64)
    assert count.total == count.embedding + count.non_embedding

    gated = parameter_count(grouped(activation=Activation.swiglu), vocab_size=1000)
    assert gated.feed_forward == 4 * (256 * 64 + 256 + 64 * 128 + 64)
    untied = parameter_count(grouped(share_embeddings_and_output_weights=False), vocab_size=1000)
    assert untied.total == count.total + count.embedding


def test_vocabulary_from_either_place() -> None:
    assert parameter_count(grouped(vocab_size=1000)) == parameter_count(grouped(), vocab_size=1000)
    with pytest.raises(ValueError, match="pass vocab_size, or set model"):
        parameter_count(grouped())


def test_padding() -> None:
    assert [padded_vocab_size(n, 128) for n in (1, 127, 128, 129)] == [128, 128, 128, 256]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("placement", list(LayerNormPlacement))
def test_ranks_hold_the_model_together(shared: bool, placement: LayerNormPlacement) -> None:
    """Over all ranks: every parameter once, replicated ones TP times, a shared embedding twice."""
    config = grouped(share_embeddings_and_output_weights=shared, layer_norm_placement=placement)
    count = parameter_count(config, vocab_size=1000)
    assert parameters_on_rank(config, vocab_size=1000) == count
    tp, pp = 4, 2
    held = sum(
        tp
        * parameters_on_rank(
            config,
            vocab_size=1000,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            pipeline_rank=stage,
        ).total
        for stage in range(pp)
    )
    sharded_norms = 2 * (8 * 16 + 128) * 4 if placement is LayerNormPlacement.sub_ln else 0
    replicated = count.norms - sharded_norms + 4 * (64 + 64)  # and the biases after a reduction
    second_embedding = count.embedding if shared else 0
    assert held == count.total + (tp - 1) * replicated + second_embedding


def test_flops_by_hand() -> None:
    config = grouped()
    weights = 4 * ((8 + 2 * 4) * 16 * 64 + 64 * 128 + 2 * 64 * 128) + 1024 * 64
    attention = 12 * 4 * 128 * 256  # 12 L a s
    assert flops_per_token(config, 256, vocab_size=1000) == 6 * weights + attention
    forward = flops_per_token(config, 256, vocab_size=1000, forward_only=True)
    assert 3 * forward == 6 * weights + attention
    # the keys that tokens 1 .. 256 see, counted one by one
    causal = flops_per_token(config, 256, vocab_size=1000, causal=True)
    assert 256 * causal == 256 * 6 * weights + 12 * 4 * 128 * sum(range(1, 257))


def test_recomputed_flops_by_hand() -> None:
    """One more forward pass of the layers, or of their scores; never of the output layer."""
    config = grouped()
    layers = 4 * ((8 + 2 * 4) * 16 * 64 + 64 * 128 + 2 * 64 * 128)
    attention = 4 * 4 * 128 * 256  # 4 L a s
    again = {
        RecomputeGranularity.none: 0,
        RecomputeGranularity.selective: attention,
        RecomputeGranularity.full: 2 * layers + attention,
    }
    model = flops_per_token(config, 256, 1000)
    for recompute, more in again.items():
        hardware = hardware_flops_per_token(config, 256, 1000, recompute=recompute)
        assert hardware == model + more
        assert flops_per_step(config, 256, 8, 1000, recompute=recompute) == 8 * 256 * hardware


def test_layers_of_stages() -> None:
    config = grouped(num_layers=8)
    assert layers_of_stage(config, 1, stages=2) == [[4, 5, 6, 7]]
    assert layers_of_stage(config, 0, stages=2, chunks=2) == [[0, 1], [4, 5]]


def test_flops_do_not_depend_on_sharing() -> None:
    untied = grouped(share_embeddings_and_output_weights=False)
    assert flops_per_token(untied, 64, 1000) == flops_per_token(grouped(), 64, 1000)


def test_active_parameters_are_those_of_the_chosen_experts() -> None:
    """With one expert a token, a sparse model and its dense twin differ by the routers alone."""
    dense = grouped()
    sparse = replace(dense, moe=MoEConfig(num_experts=8, layer_freq=2))
    count, twin = parameter_count(sparse, 1000), parameter_count(dense, 1000)
    one = count.experts // 8
    assert count.active_experts == one
    assert count.total - count.active == 7 * one
    sparse_layers = len(sparse.moe.sparse_layers(dense.num_layers))
    assert count.routers == sparse_layers * (4 * (dense.hidden_size + 8) + 1)
    assert count.active - count.routers == twin.total
    routers = sparse_layers * 4 * (dense.hidden_size + 8) + sparse_layers
    assert flops_per_token(sparse, 64, 1000) - flops_per_token(dense, 64, 1000) == 6 * routers
    two = replace(sparse, moe=replace(sparse.moe, router_topk=2))
    assert parameter_count(two, 1000).active_experts == 2 * one
    assert parameter_count(two, 1000).total == count.total


def test_phi_3_5_moe() -> None:
    """The counts of arXiv 2404.14219 (16 experts of width 6400, top-2), which has no sub-LN."""
    phi = ModelConfig(
        name="phi-3.5-moe",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=6400,
        num_attention_heads=32,
        num_query_groups=8,
        layer_norm_placement=LayerNormPlacement.pre_ln,
        activation=Activation.swiglu,
        add_bias_linear=False,
        share_embeddings_and_output_weights=False,
        vocab_size=32064,
        make_vocab_size_divisible_by=32,
        moe=MoEConfig(num_experts=16, layer_freq=1, router=RouterType.sparsemixer, router_topk=2),
    )
    count = parameter_count(phi)
    assert count.total == pytest.approx(41_870_163_968, rel=1e-4)
    assert count.active == pytest.approx(6_638_010_368, rel=1e-3)
