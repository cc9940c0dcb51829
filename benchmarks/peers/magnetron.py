"""This project: Magneto (sub-LayerNorm, xPos) through its own engine and training step.

Variants: magneto, and pre_ln without positions in attention, the block nearest to the plain loop's.
"""

import importlib.metadata

from benchmarks.own_training import OwnTraining
from benchmarks.peers.measure import StepMeter, parse_arguments
from models.config import LayerNormPlacement, ModelConfig, PositionEmbedding
from parallel.config import ParallelConfig, Precision


def version() -> str:
    try:
        return importlib.metadata.version("magnetron")
    except importlib.metadata.PackageNotFoundError:
        return "this tree"


def main() -> None:
    arguments = parse_arguments()
    job = arguments.job
    magneto = arguments.variant == "magneto"
    model = ModelConfig(
        name=f"benchmark_{arguments.variant}",
        num_layers=job.num_layers,
        hidden_size=job.hidden_size,
        ffn_hidden_size=job.ffn_hidden_size,
        num_attention_heads=job.num_attention_heads,
        max_position_embeddings=job.seq_length,
        vocab_size=job.vocab_size,
        make_vocab_size_divisible_by=1,  # the same output layer as everybody's
        layer_norm_placement=LayerNormPlacement.sub_ln if magneto else LayerNormPlacement.pre_ln,
        position_embedding_type=PositionEmbedding.xpos if magneto else PositionEmbedding.none,
        share_embeddings_and_output_weights=False,
    )
    with OwnTraining(
        model,
        ParallelConfig(precision=Precision.fp32),
        seq_length=job.seq_length,
        micro_batch_size=job.micro_batch_size,
    ) as training:
        meter = StepMeter(arguments.warmup)
        for _ in range(arguments.warmup + arguments.steps):
            meter.start()
            loss = training.step()
            meter.stop(loss)
        meter.print_result(parameters=training.parameters, version=version())


if __name__ == "__main__":
    main()
