"""TorchScale's decoder with Magneto's sub-LayerNorm (variants: subln, subln_xpos).

The reference implementation of the model that this project trains. It is a model library: the loop
and the optimizer are the plain ones.
"""

import importlib.metadata
import sys
import types

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.measure import parse_arguments, train


def stand_in_for_timm() -> None:
    """TorchScale takes drop_path from timm, and nothing else; timm drags in torchvision.

    torchvision's registry build is for a CUDA torch and dies on import beside a CPU one. Dropping
    paths is switched off here (drop_path_rate is 0), so the identity is what timm would compute.
    """

    def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
        return x

    for name in ("timm", "timm.models", "timm.models.layers"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.layers"].drop_path = drop_path  # type: ignore[attr-defined]


def main() -> None:
    stand_in_for_timm()
    from torchscale.architecture.config import DecoderConfig
    from torchscale.architecture.decoder import Decoder
    from torchscale.component.embedding import PositionalEmbedding

    arguments = parse_arguments()
    job = arguments.job
    xpos = arguments.variant == "subln_xpos"
    config = DecoderConfig(
        vocab_size=job.vocab_size,
        decoder_embed_dim=job.hidden_size,
        decoder_attention_heads=job.num_attention_heads,
        decoder_ffn_embed_dim=job.ffn_hidden_size,
        decoder_layers=job.num_layers,
        max_target_positions=job.seq_length,
        subln=True,
        xpos_rel_pos=xpos,
    )
    # learned positions start at 2, after fairseq's padding index
    positions = None if xpos else PositionalEmbedding(job.seq_length + 2, job.hidden_size)
    embedding = nn.Embedding(job.vocab_size, job.hidden_size)
    model = Decoder(config, embed_tokens=embedding, embed_positions=positions)

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        logits, _ = model(ids)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    train(arguments, model, loss_of, version=importlib.metadata.version("torchscale"))


if __name__ == "__main__":
    main()
