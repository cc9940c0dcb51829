"""A nanoGPT-style loop: the least a user would write, and what all others are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.jobs import Job
from benchmarks.peers.measure import parse_arguments, train


class Block(nn.Module):
    def __init__(self, job: Job) -> None:
        super().__init__()
        d, f = job.hidden_size, job.ffn_hidden_size
        self.heads = job.num_attention_heads
        self.norm_attention, self.norm_ffn = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h]
        b, s, h = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(b, s, 3, self.heads, h // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [b, heads, s, head width]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(self.norm_ffn(x))))


class PlainLanguageModel(nn.Module):
    def __init__(self, job: Job) -> None:
        super().__init__()
        d = job.hidden_size
        self.embedding = nn.Embedding(job.vocab_size, d)
        self.positions = nn.Embedding(job.seq_length, d)
        self.blocks = nn.ModuleList(Block(job) for _ in range(job.num_layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, job.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:  # [b, s] -> [b, s, vocab]
        x = self.embedding(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main() -> None:
    arguments = parse_arguments()
    model = PlainLanguageModel(arguments.job)

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())

    train(arguments, model, loss_of, version=torch.__version__)


if __name__ == "__main__":
    main()
