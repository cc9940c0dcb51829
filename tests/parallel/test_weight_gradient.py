"""parallel.weight_gradient through megatron-core's own layers and DistributedDataParallel."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.embedding import FusedVocabParallelEmbedding
from parallel.layers import (
    Norm,
    SubLayerNormRowParallelLinear,
    enable_embedding_gradient_fusion,
    enable_torch_weight_gradient_fusion,
    vocab_parallel_linear_cross_entropy,
)
from parallel.megatron import (
    ColumnParallelLinear,
    DistributedDataParallel,
    DistributedDataParallelConfig,
    MegatronModule,
    RowParallelLinear,
    TransformerConfig,
    parallel_state,
    tensor_parallel,
)
from parallel.weight_gradient import (
    accumulate_weight_gradient,
    gradient_placeholder,
    matmul_in_fp32,
    weight_gradient,
)
from tests.distributed import run_on_gloo
from tests.parallel.test_sub_layernorm import ignore_warnings_about_megatron

HIDDEN, FFN, VOCABULARY = 16, 32, 40
TOKENS = torch.tensor([[3, 3, VOCABULARY - 1], [0, 3, 1]])


class TinyModel(MegatronModule):
    """One layer of every kind that uses the fusion; the output projection may be the embedding."""

    def __init__(self, config: TransformerConfig, tied: bool, sub_layernorm: bool) -> None:
        super().__init__(config)
        group = dist.group.WORLD
        common = {"config": config, "init_method": torch.nn.init.normal_, "tp_group": group}
        self.embedding = FusedVocabParallelEmbedding(VOCABULARY, HIDDEN, **common)
        self.norm = Norm(config, HIDDEN)
        linear = {"bias": True, "skip_bias_add": False}
        self.fc1 = ColumnParallelLinear(HIDDEN, FFN, **common, **linear, gather_output=False)
        row_class = SubLayerNormRowParallelLinear if sub_layernorm else RowParallelLinear
        self.fc2 = row_class(FFN, HIDDEN, **common, **linear, input_is_parallel=True)
        self.output = None if tied else torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN))
        if tied:
            self.embedding.weight.zero_out_wgrad = True  # as megatron-core's LanguageModule does

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.fc2(torch.tanh(self.fc1(self.norm(hidden))[0]))[0]
        output = self.embedding.weight if self.output is None else self.output
        mask = torch.ones(labels.numel())
        return vocab_parallel_linear_cross_entropy(
            hidden.flatten(0, 1),
            output,
            labels.flatten(),
            mask,
            chunk_tokens=8,
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
        )[0]


def main_grads(
    fusion: bool, dtype: torch.dtype, tied: bool, sub_layernorm: bool, overlap: bool
) -> dict[str, Tensor]:
    """DistributedDataParallel's gradients after two micro-batches on one rank."""
    ignore_warnings_about_megatron()
    enable_torch_weight_gradient_fusion()
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=fusion,
        use_cpu_initialization=True,
        cuda_graph_scope=[],
    )
    torch.manual_seed(0)
    module = TinyModel(config, tied, sub_layernorm).to(dtype)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap
    )
    model = DistributedDataParallel(config, ddp_config, module)
    model.zero_grad_buffer()
    for micro_batch in range(2):
        tokens, labels = torch.randint(VOCABULARY, (2, 4, 3))
        if micro_batch == 0:
            with model.no_sync():
                model(tokens, labels).backward()
        else:
            model(tokens, labels).backward()
    model.finish_grad_sync()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(parameter.main_grad.dtype == torch.float32 for parameter in module.parameters())
    fused = {name for name, p in module.named_parameters() if p.grad_added_to_main_grad}
    matrices = {"fc1.weight", "fc2.weight", "embedding.weight"} | (set() if tied else {"output"})
    assert fused == (matrices if fusion else set())
    return {name: p.main_grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sub_layernorm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_fusion_changes_no_gradient(
    dtype: torch.dtype, bound: float, tied: bool, sub_layernorm: bool, overlap: bool
) -> None:
    """Through megatron-core's linears, ours, and DistributedDataParallel's hooks; in bf16 the
    unfused gradients are rounded to bf16 before they are added."""
    arguments = (dtype, tied, sub_layernorm, overlap)
    expected = run_on_gloo(1, main_grads, False, *arguments)[0]
    actual = run_on_gloo(1, main_grads, True, *arguments)[0]
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        error = ((actual[name] - gradient).norm() / gradient.norm()).item()
        assert error < bound, (name, error)


def embedding_gradient(ranks: int) -> dict[str, Any]:
    """Of the looked-up rows times 1, 2, 3 ...; `main_grad` starts with ones."""
    ignore_warnings_about_megatron()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        tensor_model_parallel_size=ranks,
        gradient_accumulation_fusion=True,
        use_cpu_initialization=True,
        cuda_graph_scope=[],
    )
    embedding = FusedVocabParallelEmbedding(
        VOCABULARY,
        HIDDEN,
        config=config,
        init_method=torch.nn.init.normal_,
        tp_group=dist.group.WORLD,
    )
    weight = embedding.weight
    weight.main_grad = torch.ones_like(weight)
    rows = embedding(TOKENS)
    (rows * torch.arange(rows.numel()).view_as(rows)).sum().backward()
    returned = weight.grad if weight.grad is not None else torch.zeros_like(weight)
    return {
        "table": weight.detach(),
        "rows": rows.detach(),
        "gradient": weight.main_grad - 1 + returned,
        "fused": weight.grad is None,
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_embedding_gradient(ranks: int) -> None:
    parts = run_on_gloo(ranks, embedding_gradient, ranks)
    table = torch.cat([part["table"] for part in parts]).requires_grad_()
    rows = table[TOKENS]
    (rows * torch.arange(rows.numel()).view_as(rows)).sum().backward()
    torch.testing.assert_close(parts[0]["rows"], rows.detach())
    torch.testing.assert_close(torch.cat([part["gradient"] for part in parts]), table.grad)
    # sharded, the lookup is megatron-core's own
    assert [part["fused"] for part in parts] == [ranks == 1] * ranks


def enable_twice() -> list[bool]:
    enable_embedding_gradient_fusion()
    enable_embedding_gradient_fusion()
    assert tensor_parallel.VocabParallelEmbedding is FusedVocabParallelEmbedding
    return [enable_torch_weight_gradient_fusion(), enable_torch_weight_gradient_fusion()]


def test_enabling_twice_changes_nothing() -> None:
    assert run_on_gloo(1, enable_twice)[0][1] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulates_without_rounding_the_product(dtype: torch.dtype) -> None:
    inputs, grad_output = torch.randn(50, 8).to(dtype), torch.randn(50, 6).to(dtype)
    main_grad = torch.ones(6, 8)
    accumulate_weight_gradient(inputs, grad_output, main_grad)
    expected = 1 + grad_output.double().t() @ inputs.double()
    torch.testing.assert_close(main_grad.double(), expected, rtol=1e-5, atol=1e-5)
    product = matmul_in_fp32(grad_output.t(), inputs)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double() + 1, expected, rtol=1e-5, atol=1e-5)


def test_gradient_returned_to_autograd() -> None:
    weight = torch.nn.Parameter(torch.zeros(6, 8))
    inputs, grad_output = torch.randn(50, 8), torch.randn(50, 6)
    product = weight_gradient(weight, None, inputs, grad_output)
    torch.testing.assert_close(product, grad_output.t() @ inputs)
    main_grad = torch.zeros(6, 8)
    assert weight_gradient(weight, main_grad, inputs, grad_output) is None  # no DDP, no hook
    torch.testing.assert_close(main_grad, product)
    weight.grad_added_to_main_grad = False
    placeholder = gradient_placeholder(weight)
    assert placeholder is not None and placeholder.shape == weight.shape
    assert weight.grad_added_to_main_grad


def norm_of(config_arguments: dict[str, Any]) -> dict[str, Any]:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        tensor_model_parallel_size=dist.get_world_size(),
        use_cpu_initialization=True,
        cuda_graph_scope=[],
        **config_arguments,
    )
    norm = Norm(config, HIDDEN, eps=1e-3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(0.5, 2, HIDDEN))
    x = torch.linspace(-1, 3, 3 * HIDDEN).view(3, 1, HIDDEN)
    return {
        "x": x,
        "y": norm(x).detach(),
        "marks": {name: p.sequence_parallel for name, p in norm.named_parameters()},
        "text": repr(norm),
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm(sequence_parallel: bool) -> None:
    arguments: dict[str, Any] = {"sequence_parallel": sequence_parallel}
    gain = torch.linspace(0.5, 2, HIDDEN).double()
    layer_norm = run_on_gloo(2, norm_of, arguments)[0]
    x = layer_norm["x"].double()
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gain + gain
    torch.testing.assert_close(layer_norm["y"].double(), expected, rtol=1e-5, atol=1e-5)
    assert layer_norm["marks"] == {"weight": sequence_parallel, "bias": sequence_parallel}
    assert layer_norm["text"] == f"Norm(LayerNorm, {HIDDEN}, eps=0.001)"

    rms_norm = run_on_gloo(2, norm_of, arguments | {"normalization": "RMSNorm"})[0]
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gain
    torch.testing.assert_close(rms_norm["y"].double(), expected, rtol=1e-5, atol=1e-5)
    assert rms_norm["marks"] == {"weight": sequence_parallel}
