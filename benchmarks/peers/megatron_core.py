"""megatron-core's own GPT: its local layer spec, DDP wrapper, optimizer and schedule.

On a CPU through this project's bridge, as megatron-core has no CPU path of its own; the rest is
megatron-core as it comes. The optimizer is what it takes without apex: torch's AdamW. So is the
attention: without Transformer Engine it materialises the scores of every head.
"""

import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from benchmarks.jobs import ADAM_BETAS, CLIP_GRAD, LEARNING_RATE, WEIGHT_DECAY, Job
from benchmarks.peers.measure import StepMeter, make_batch, parse_arguments
from parallel.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    MegatronOptimizerConfig,
    TransformerConfig,
    get_forward_backward_func,
    get_megatron_optimizer,
    parallel_state,
    tensor_parallel,
)

# what only this benchmark needs, after parallel.megatron has laid the bridge
from megatron.core.models.gpt import GPTModel  # isort: skip
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # isort: skip


def build(job: Job) -> tuple[GPTModel, DistributedDataParallel, Any]:
    """The model, the model in its data-parallel wrapper, and the optimizer."""
    config = TransformerConfig(
        num_layers=job.num_layers,
        hidden_size=job.hidden_size,
        num_attention_heads=job.num_attention_heads,
        ffn_hidden_size=job.ffn_hidden_size,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # these fusions are CUDA kernels
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=job.vocab_size,
        max_sequence_length=job.seq_length,
        share_embeddings_and_output_weights=False,
    )
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), gpt)
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            adam_beta1=ADAM_BETAS[0],
            adam_beta2=ADAM_BETAS[1],
            weight_decay=WEIGHT_DECAY,
            clip_grad=CLIP_GRAD,
        ),
        [model],
    )
    return gpt, model, optimizer


def main() -> None:
    arguments = parse_arguments()
    job = arguments.job
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    gpt, model, optimizer = build(job)

    batch = make_batch(job)
    positions = torch.arange(job.seq_length)[None].expand(batch[0].shape)
    ones = torch.ones(1, 1, job.seq_length, job.seq_length, dtype=torch.bool)
    future = torch.triu(ones, diagonal=1)  # True where attention is forbidden

    def mean_loss(per_token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = per_token.mean()
        return loss, {"loss": loss.detach()}

    def forward_step(data: Iterator[tuple[Tensor, Tensor]], model: torch.nn.Module):
        ids, labels = next(data)
        return model(ids, positions, future, labels=labels), mean_loss

    forward_backward = get_forward_backward_func()
    meter = StepMeter(arguments.warmup)
    for _ in range(arguments.warmup + arguments.steps):
        meter.start()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        outputs = forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter([batch]),
            model=model,
            num_microbatches=1,
            seq_length=job.seq_length,
            micro_batch_size=job.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        meter.stop(outputs[0]["loss"].item())
    meter.print_result(
        parameters=sum(p.numel() for p in gpt.parameters()),
        version=importlib.metadata.version("megatron-core"),
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
