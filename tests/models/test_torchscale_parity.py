"""With TorchScale's weights, our model gives TorchScale's logits and gradients.

Both sides compute in fp32; logits of order 1 agree to 2e-5 after four layers (post-LN and the
up-scaled DeepNorm residual are the worst, xPos adds the rounding of its complex tables).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models.build import build_model
from models.config import InitMethod, LayerNormPlacement, ModelConfig, PositionEmbedding
from models.initialize import global_parameters
from parallel.config import ParallelConfig
from parallel.megatron import gather_from_tensor_model_parallel_region
from parallel.runtime import initialize, shutdown
from tests.distributed import run_on_gloo
from tests.torchscale_reference import decoder, load, weights_of

VOCAB = 48
LENGTH = 21  # odd, so that centring the xPos positions is tested away from the symmetric case
MODEL = ModelConfig(
    name="reference",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    max_position_embeddings=32,
    make_vocab_size_divisible_by=8,
    share_embeddings_and_output_weights=False,
    position_embedding_type=PositionEmbedding.none,
)

CASES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "subln": (MODEL, {"subln": True}),
    "subln xpos": (
        replace(MODEL, position_embedding_type=PositionEmbedding.xpos),
        {"subln": True, "xpos_rel_pos": True},
    ),
    "deepnorm": (
        replace(MODEL, layer_norm_placement=LayerNormPlacement.deepnorm),
        {"deepnorm": True, "subln": False},
    ),
    # what deepnorm=True builds in TorchScale's repository after the 0.3.0 release
    "deepnorm on a pre-LN block": (
        replace(MODEL, layer_norm_placement=LayerNormPlacement.deepnorm_pre_ln),
        {"deepnorm": True, "subln": False, "decoder_normalize_before": True},
    ),
    "post-LN": (
        replace(MODEL, layer_norm_placement=LayerNormPlacement.post_ln),
        {"subln": False, "decoder_normalize_before": False},
    ),
    "pre-LN": (
        replace(MODEL, layer_norm_placement=LayerNormPlacement.pre_ln),
        {"subln": False},
    ),
}


def compare(case: str, parallel: ParallelConfig) -> tuple[float, float]:
    """Largest differences of (logits, gradients of the embedding, relative to the largest)."""
    model, settings = CASES[case]
    torch.manual_seed(5)
    reference = decoder(model, VOCAB, **settings)
    tokens = torch.randint(0, VOCAB, (2, LENGTH))
    labels = torch.randint(0, VOCAB, (2, LENGTH))
    expected, _ = reference(tokens)
    F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()

    runtime = initialize(parallel, seed=1)
    chunk = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=1)[0]
    load(chunk, weights_of(reference, model))
    for parameter in chunk.parameters():  # the fused weight gradients go here
        parameter.main_grad = torch.zeros_like(parameter)
    hidden: list[torch.Tensor] = []
    chunk.decoder.register_forward_hook(lambda *args: hidden.append(args[2]))
    output = chunk(tokens, labels, torch.ones(2, LENGTH))
    output.loss_sum.backward()
    local = F.linear(chunk._gather_for_vocabulary(hidden[0].detach()), chunk.output_weight())
    logits = gather_from_tensor_model_parallel_region(local, group=chunk.tp_group).transpose(0, 1)

    grads = {name: parameter for name, parameter in global_parameters(chunk)}
    ours = grads["decoder.layers.0.input_layernorm.weight"]
    gradient = ours.main_grad if ours.grad is None else ours.grad
    theirs = reference.layers[0].self_attn_layer_norm.weight.grad
    shutdown(runtime)
    return (
        float((logits - expected).detach().abs().max()),
        float((gradient - theirs).abs().max() / theirs.abs().max()),
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_logits_and_gradients_equal_torchscale(case: str, tensor_parallel: int) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor_parallel)
    for logits, gradient in run_on_gloo(tensor_parallel, compare, case, parallel):
        assert logits < 2e-5
        assert gradient < 2e-5


def initial_ratios(placement: LayerNormPlacement) -> dict[str, float]:
    """Standard deviation of our torchscale-style initial tensors over TorchScale's own."""
    model = replace(
        MODEL,
        hidden_size=128,
        ffn_hidden_size=512,
        layer_norm_placement=placement,
        init_method=InitMethod.torchscale,
    )
    settings = (
        {"subln": True}
        if placement is LayerNormPlacement.sub_ln
        else {"deepnorm": True, "subln": False, "decoder_normalize_before": True}
    )
    torch.manual_seed(5)
    theirs = weights_of(decoder(model, VOCAB, **settings), model)
    runtime = initialize(ParallelConfig(), seed=1)
    chunk = build_model(model, ParallelConfig(), runtime, vocab_size=VOCAB, seed=1)[0]
    shutdown(runtime)
    ratios = {}
    for name, parameter in global_parameters(chunk):
        if "norm" not in name and "embedding" not in name:
            ours, reference = parameter.detach(), theirs[name]
            ratios[name] = float(ours.std() / reference.std())
            if name.endswith(("qkv.weight", "qkv.bias")):  # value rows apart: only they are scaled
                value = [t.unflatten(0, (4, 3, -1))[:, 2].std() for t in (ours, reference)]
                ratios[f"{name} (value)"] = float(value[0] / value[1])
    return ratios


@pytest.mark.parametrize(
    "placement", [LayerNormPlacement.sub_ln, LayerNormPlacement.deepnorm_pre_ln]
)
def test_torchscale_initialisation_has_its_spreads(placement: LayerNormPlacement) -> None:
    ratios = run_on_gloo(1, initial_ratios, placement)[0]
    assert len(ratios) > 30
    for name, ratio in ratios.items():
        samples = 128 if name.endswith("bias") or "bias (" in name else 16384
        # the relative error of a uniform sample's spread is 0.45/sqrt(n); two samples, 5 sigma
        assert ratio == pytest.approx(1, abs=5 * 0.45 * (2 / samples) ** 0.5), name
