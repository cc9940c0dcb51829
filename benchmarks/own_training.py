"""This project's own training step on random tokens, for the benchmarks."""

import torch

from benchmarks.jobs import ADAM_BETAS, CLIP_GRAD, LEARNING_RATE, WEIGHT_DECAY
from data.batch import Batch
from models.build import build_model
from models.config import ModelConfig
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import MegatronEngine
from parallel.precision import parameter_dtype
from parallel.runtime import initialize, shutdown
from pretrain.train_step import train_step

LANGUAGES = ("random",)


class OwnTraining:
    """Model, engine and one batch that is repeated; `pretrain.train_step.train_step` is a step.

    What a real run adds to a step is loading the batch, logging and, now and then, a checkpoint.
    A context manager, as the process groups have to be closed. `model.vocab_size` must be given.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        seq_length: int,
        micro_batch_size: int,
        micro_batches: int = 1,
        seed: int = 0,
    ) -> None:
        assert model.vocab_size is not None
        self.model_config = model
        self.tokens_per_step = micro_batches * micro_batch_size * seq_length
        self._runtime = initialize(parallel, seed)
        self.device = self._runtime.device
        dtype = parameter_dtype(parallel.precision, self.device)
        self.precision = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        chunks = build_model(model, parallel, self._runtime, vocab_size=model.vocab_size, seed=seed)
        self.parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
        optimizer = OptimizerConfig(
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            adam_beta1=ADAM_BETAS[0],
            adam_beta2=ADAM_BETAS[1],
            clip_grad=CLIP_GRAD,
        )
        self.engine = MegatronEngine(chunks, parallel, optimizer, self._runtime)
        generator = torch.Generator().manual_seed(1)
        shape = (micro_batch_size, seq_length + 1)
        self.micro_batches = [
            as_batch(torch.randint(0, model.vocab_size, shape, generator=generator))
            for _ in range(micro_batches)
        ]

    def step(self) -> float:
        """One optimizer step over the micro-batches; its mean loss. Waits for the device."""
        metrics = train_step(
            self.engine,
            self.micro_batches,
            self._runtime,
            learning_rate=LEARNING_RATE,
            languages=LANGUAGES,
            stop_requested=False,
        )
        return metrics.losses.mean()

    def __enter__(self) -> "OwnTraining":
        return self

    def __exit__(self, *_: object) -> None:
        shutdown(self._runtime)


def as_batch(ids: torch.Tensor) -> Batch:
    """All of `ids` [b, s + 1] count, in one language."""
    return Batch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=torch.ones(ids.shape[0], ids.shape[1] - 1),
        language_ids=torch.zeros(ids.shape[0], dtype=torch.int64),
    )
