"""How much a launch computes in each step. Imports neither torch nor megatron-core."""

from launch.findings import Findings
from models.parameter_count import flops_per_step, flops_per_token
from parallel.config import RecomputeGranularity
from pretrain.config import PretrainConfig

TOPIC = "compute"


def check_flops(
    config: PretrainConfig | None, processes: int, vocab_size: int | None, findings: Findings
) -> None:
    """Notes model FLOPs of a token and of a step, a process's share, and what recomputation adds.

    Counted as throughput/model_flops_utilisation counts them, every token seeing whole sequences.
    config: None, and vocab_size None without model.vocab_size: nothing is noted.
    """
    if config is None or (vocab_size is None and config.model.vocab_size is None):
        return
    vocabulary = max(vocab_size or 0, config.model.vocab_size or 0)
    model, length, batch = config.model, config.seq_length, config.train.global_batch_size
    recompute = config.parallel.recompute_granularity
    needed = flops_per_step(model, length, batch, vocabulary)
    text = (
        f"a step of {batch * length:,} tokens is {needed:.3g} model FLOPs, "
        f"{flops_per_token(model, length, vocabulary):.3g} a token"
    )
    if processes > 1:
        text += f" and {needed / processes:.3g} a step on each of {processes} processes"
    if recompute is not RecomputeGranularity.none:
        done = flops_per_step(model, length, batch, vocabulary, recompute=recompute)
        text += (
            f"; parallel.recompute_granularity={recompute.value} makes them {done:.3g}, "
            f"{(done - needed) / needed:.1%} more"
        )
    findings.notes(TOPIC, [text])
