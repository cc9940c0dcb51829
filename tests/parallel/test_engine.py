"""Optimizer and precision of the engine, beyond what the layout parity tests hold."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from models.build import build_model
from models.config import ModelConfig
from models.moe_config import MoEConfig
from parallel import adam
from parallel.config import OptimizerConfig, ParallelConfig, Precision
from parallel.engine import MegatronEngine
from parallel.precision import parameter_dtype
from parallel.runtime import initialize, shutdown
from pretrain.train_step import forward_step, reduce_losses, train_step
from tests.distributed import run_on_gloo
from tests.parity import GLOBAL_BATCH, LANGUAGES, MODEL, SEQ_LENGTH, VOCAB, micro_batches


def test_fused_adam_is_torchs_adamw() -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    ours = [torch.nn.Parameter(x.clone()) for x in start]
    theirs = [torch.nn.Parameter(x.clone()) for x in start]
    settings = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    first, second = adam.FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.full_like(a, 0.1 * step - 0.2)
            b.grad = a.grad.clone()
        first.step()
        second.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-7)
    assert first.param_groups[0]["step"] == 5
    assert set(first.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def test_fused_adam_refuses_uncorrected_bias() -> None:
    with pytest.raises(ValueError, match="bias_correction=False"):
        adam.FusedAdam([torch.nn.Parameter(torch.zeros(1))], bias_correction=False)


def test_precision_follows_the_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert parameter_dtype(Precision.auto, cpu) is torch.float32
    assert parameter_dtype(Precision.auto, cuda) is torch.bfloat16
    assert parameter_dtype(Precision.fp32, cuda) is torch.float32
    assert parameter_dtype(Precision.bf16, cpu) is torch.bfloat16


def losses_of(parallel: ParallelConfig, steps: int = 4) -> dict[str, Any]:
    runtime = initialize(parallel, 1)
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(lr=1e-2), runtime)
    out = []
    for step in range(steps):
        batches = micro_batches(step, 1, runtime.data_parallel_rank, runtime.data_parallel_size)
        metrics = train_step(
            engine,
            batches,
            runtime,
            learning_rate=1e-2,
            languages=LANGUAGES,
            stop_requested=runtime.rank == 0 and step == 2,
        )
        assert metrics.stop_requested == (step == 2)  # one rank's wish is everybody's
        out.append(metrics.losses.mean())
    parameter = next(chunks[0].parameters())
    groups = engine.optimizer.param_groups
    kinds = {
        "parameter": str(parameter.dtype),
        "main_grad": str(parameter.main_grad.dtype),
        "master": str(groups[0]["params"][0].dtype),
    }
    shutdown(runtime)
    return {"losses": out, **kinds}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ],
)
def test_bf16_with_fp32_gradients_and_master_weights(
    world_size: int, layout: dict[str, Any]
) -> None:
    """bf16 rounds activations to 3 digits: 4 steps stay within 1e-2 of the fp32 losses near 5."""
    exact = run_on_gloo(1, losses_of, ParallelConfig())[0]
    parallel = ParallelConfig(precision=Precision.bf16, **layout)
    rough = run_on_gloo(world_size, losses_of, parallel)[0]
    assert rough["parameter"] == "torch.bfloat16"
    assert rough["main_grad"] == rough["master"] == "torch.float32"
    assert rough["losses"] == pytest.approx(exact["losses"], abs=2e-2)
    assert rough["losses"] != exact["losses"]


SPARSE = replace(MODEL, moe=MoEConfig(num_experts=4))


def weight_decay_of(model: ModelConfig) -> dict[str, float]:
    runtime = initialize(ParallelConfig(use_distributed_optimizer=False), 1)
    parallel = ParallelConfig(use_distributed_optimizer=False)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(weight_decay=0.3), runtime)
    decay = {
        id(parameter): group["weight_decay"]
        for group in engine.optimizer.param_groups
        for parameter in group["params"]
    }
    shutdown(runtime)
    return {name: decay[id(parameter)] for name, parameter in chunks[0].named_parameters()}


@pytest.mark.parametrize("model", [MODEL, SPARSE], ids=["dense", "sparse"])
def test_weight_decay_skips_biases_and_norms(model: ModelConfig) -> None:
    """Experts stack theirs into matrices; X-MoE's embeddings keep their norm, and its temperature
    is a factor."""
    also = ("router.temperature", "router.expert_embeddings")
    for name, decay in run_on_gloo(1, weight_decay_of, model)[0].items():
        spared = name.endswith(("bias", *also)) or "norm" in name
        assert decay == (0.0 if spared else 0.3), name


def step_with_a_nan() -> tuple[bool, bool]:
    """Whether the update was applied, and whether the weights stayed."""
    parallel = ParallelConfig(use_distributed_optimizer=False)
    runtime = initialize(parallel, 1)
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)
    forward = partial(forward_step, device=runtime.device)
    engine.forward_backward(
        micro_batches(0, 1, 0, 1), forward, seq_length=SEQ_LENGTH, micro_batch_size=1
    )
    before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
    next(chunks[0].parameters()).main_grad[0, 0] = float("nan")
    result = engine.step(1e-3)
    after = list(chunks[0].parameters())
    shutdown(runtime)
    return result.applied, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    assert run_on_gloo(1, step_with_a_nan) == [(False, True)]


def evaluation_leaves_no_trace() -> bool:
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    runtime = initialize(parallel, 1)
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)
    forward = partial(forward_step, device=runtime.device)
    batches = micro_batches(0, 2, 0, 1)
    shape = {"seq_length": SEQ_LENGTH, "micro_batch_size": 2}
    grad_enabled = []
    chunks[0].register_forward_hook(lambda *unused: grad_enabled.append(torch.is_grad_enabled()))
    metrics = engine.forward_backward(batches, forward, forward_only=True, **shape)
    assert grad_enabled == [False] * len(batches)
    evaluated, _ = reduce_losses(metrics, runtime, LANGUAGES, False)
    no_gradients = all(
        not parameter.main_grad.any() for chunk in chunks for parameter in chunk.parameters()
    )
    metrics = engine.forward_backward(batches, forward, **shape)
    trained, _ = reduce_losses(metrics, runtime, LANGUAGES, False)
    shutdown(runtime)
    assert evaluated.valid_tokens() > GLOBAL_BATCH
    return no_gradients and abs(evaluated.mean() - trained.mean()) < 1e-6


def test_evaluation_is_the_training_loss_without_gradients() -> None:
    assert run_on_gloo(2, evaluation_leaves_no_trace) == [True, True]


def test_gradient_norm_is_exact_for_large_tensors() -> None:
    """Eight million elements of very different sizes, where torch's own fp32 norm is off by 3e-4
    and a dot product, on some processors, by 5e-5."""
    torch.manual_seed(0)
    large = torch.randn(8192, 1024) * torch.linspace(0, 1, 8192)[:, None] ** 8
    small = torch.randn(7).bfloat16()
    expected = (large.double().square().sum() + small.double().square().sum()).sqrt()
    found, _ = adam._l2_norm(0, None, [[large, small]], False)
    assert found.shape == (1,)
    assert float(found) == pytest.approx(float(expected), rel=3e-7)


def test_scaling_copies_only_where_it_must() -> None:
    source, target = [torch.ones(3), torch.full((2,), 2.0)], [torch.zeros(3), torch.zeros(2)]
    adam._foreach_scale(0, None, [source, target], 0.5)
    assert [t.tolist() for t in target] == [[0.5] * 3, [1.0] * 2]
    assert [t.tolist() for t in source] == [[1.0] * 3, [2.0] * 2]
    adam._foreach_scale(0, None, [source, source], 0.5)
    assert [t.tolist() for t in source] == [[0.5] * 3, [1.0] * 2]


def buffers_alone() -> list[int]:
    """Calls of torch's collectives made by gradient and parameter buffers of one rank."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    calls: list[int] = []
    runtime = initialize(ParallelConfig(), 1)
    chunks = build_model(MODEL, ParallelConfig(), runtime, vocab_size=VOCAB, seed=7)
    engine = MegatronEngine(chunks, ParallelConfig(), OptimizerConfig(), runtime)
    assert buffers.dist_reduce_scatter_func.skips_one_rank
    output = torch.zeros(4)
    assert buffers.dist_all_gather_func(output, output, group=runtime.groups.dp) is None
    buffers.dist_all_gather_func(output, torch.ones(4), group=runtime.groups.dp)
    calls.append(int(output.sum()))  # another tensor is copied all the same
    before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
    forward = partial(forward_step, device=runtime.device)
    engine.forward_backward(
        micro_batches(0, 1, 0, 1), forward, seq_length=SEQ_LENGTH, micro_batch_size=1
    )
    engine.step(1e-3)
    moved = [not torch.equal(a, b) for a, b in zip(before, chunks[0].parameters(), strict=True)]
    calls.append(sum(moved) - len(moved))
    shutdown(runtime)
    return calls


def test_one_rank_does_not_copy_its_buffers_onto_themselves() -> None:
    assert run_on_gloo(1, buffers_alone) == [[4, 0]]


def pending_gathers(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Parameters used in a forward pass whose gather nobody had waited for."""
    runtime = initialize(parallel, 1)
    chunks = build_model(model, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)
    pending: set[str] = set()

    def forward(batches: Any, chunk: Any) -> Any:
        out = forward_step(batches, chunk, device=runtime.device)
        for name, parameter in chunk.module.named_parameters():
            group = chunk.param_to_bucket_group[parameter]
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                pending.add(name)
        return out

    for _ in range(2):
        pending.clear()  # nothing is gathered before the first step
        engine.forward_backward(
            micro_batches(0, 1, runtime.data_parallel_rank, runtime.data_parallel_size),
            forward,
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
        )
        engine.step(1e-3)
    shutdown(runtime)
    return sorted(pending)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model", [MODEL, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_no_weight_is_used_before_its_gather_has_ended(
    pipeline: int, model: ModelConfig, tied: bool
) -> None:
    """Hooks of modules wait; a weight read without calling its module would be the last step's."""
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pipeline, overlap_grad_reduce=True, overlap_param_gather=True
    )
    model = replace(model, share_embeddings_and_output_weights=tied)
    assert run_on_gloo(2 * pipeline, pending_gathers, model, parallel) == [[]] * 2 * pipeline


def gradient_against_its_definition() -> float:
    """Largest relative difference from d(Σ loss over valid tokens / their number), by hand."""
    runtime = initialize(ParallelConfig(), 1)
    parallel = ParallelConfig(use_distributed_optimizer=False)
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=7)
    plain = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=7)[0]
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)
    batches = micro_batches(0, 2, 0, 1)
    forward = partial(forward_step, device=runtime.device)
    engine.forward_backward(batches, forward, seq_length=SEQ_LENGTH, micro_batch_size=2)
    for parameter in plain.parameters():  # the fused weight gradients go here
        parameter.main_grad = torch.zeros_like(parameter)
    for batch in batches:
        plain(batch.tokens, batch.labels, batch.loss_mask).loss_sum.backward()
    valid = sum(float(batch.loss_mask.sum()) for batch in batches)
    assert valid < GLOBAL_BATCH * SEQ_LENGTH  # some tokens are masked, or this shows nothing
    worst = 0.0
    for ours, parameter in zip(chunks[0].parameters(), plain.parameters(), strict=True):
        rest = 0 if parameter.grad is None else parameter.grad
        expected = (parameter.main_grad + rest) / valid
        worst = max(worst, float((ours.main_grad - expected).abs().max() / expected.abs().max()))
    shutdown(runtime)
    return worst


def test_gradients_are_divided_by_the_number_of_valid_tokens() -> None:
    assert run_on_gloo(1, gradient_against_its_definition)[0] < 2e-6
