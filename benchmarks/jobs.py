"""The training jobs that every framework is given, and the arithmetic they are judged by.

Standard library only: each peer imports this file under its own interpreter.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """A decoder-only language model and one micro-batch of it; fp32, untied embeddings."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    seq_length: int  # tokens
    micro_batch_size: int  # sequences; one micro-batch is one optimizer step
    threads: int

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batch_size * self.seq_length

    @property
    def gated_ffn_hidden_size(self) -> int:
        """Width at which a gated feed-forward's three matrices cost what two cost here."""
        return self.ffn_hidden_size * 2 // 3

    def flops_per_token(self) -> int:
        """Model FLOPs of one training token: 6 x matmul weights + 12 L d s.

        The weights are those a token meets in a matmul (attention's 4 d^2, the feed-forward's
        2 d f, the output layer's d V; not the embedding, which is a lookup). Attention's 12 L d s
        has no discount for the causal half. One formula for all frameworks, whatever each of them
        really computes, so that a share of the matmul rate means the same in every row.
        """
        d = self.hidden_size
        weights_in_layers = self.num_layers * (4 * d * d + 2 * d * self.ffn_hidden_size)
        weights = weights_in_layers + d * self.vocab_size
        return 6 * weights + 12 * self.num_layers * d * self.seq_length


# `large` spends its time in matmuls, as real trainings do. `small` has layers so thin that what a
# framework does between the matmuls shows, and one thread, which a busy machine disturbs least.
JOBS = {
    "large": Job(
        name="large",
        num_layers=8,
        hidden_size=512,
        ffn_hidden_size=2048,
        num_attention_heads=8,
        vocab_size=32000,
        seq_length=512,
        micro_batch_size=4,
        threads=2,
    ),
    "small": Job(
        name="small",
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=1024,
        num_attention_heads=4,
        vocab_size=8000,
        seq_length=256,
        micro_batch_size=4,
        threads=1,
    ),
}

# AdamW and gradient clipping, the same for every framework
LEARNING_RATE = 3e-4
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP_GRAD = 1.0
