"""litgpt's GPT in its NeoX form under Lightning Fabric, with litgpt's own cross-entropy.

Measured: its model, Fabric and its loss. Not its pretrain.py, which wants a tokenizer and a data
module; the optimizer is torch's fused AdamW, as litgpt's recipes choose.
"""

import importlib.metadata
import warnings

import lightning
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch import Tensor

from benchmarks.peers.measure import parse_arguments, train


def main() -> None:
    warnings.filterwarnings("ignore")
    arguments = parse_arguments()
    job = arguments.job
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.launch()
    config = Config(
        name="benchmark",
        block_size=job.seq_length,
        vocab_size=job.vocab_size,
        padded_vocab_size=job.vocab_size,
        n_layer=job.num_layers,
        n_head=job.num_attention_heads,
        n_embd=job.hidden_size,
        intermediate_size=job.ffn_hidden_size,
        rotary_percentage=1.0,
        parallel_residual=False,
    )
    model = fabric.setup_module(GPT(config))

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        return chunked_cross_entropy(model(ids), labels, chunk_size=0)

    train(arguments, model, loss_of, version=importlib.metadata.version("litgpt"))


if __name__ == "__main__":
    main()
