"""What a run's configuration says about the memory it will take, and how much devices have.

Imports neither torch nor megatron-core.
"""

import re

from models.memory import MemoryPrediction, predict_memory, worst_expert_load
from parallel.deepspeed_config import EngineKind
from parallel.rank_layout import RankLayout
from pretrain.config import PretrainConfig

_GB = 10**9
# What the names of these devices say, in bytes, by the vendor's own count of 10^9: an "80 GB" H100
# tells its programs of somewhat less than 80 GiB, and of somewhat more than 80 x 10^9 bytes.
DEVICES: dict[str, int] = {
    "v100-16gb": 16 * _GB,
    "v100-32gb": 32 * _GB,
    "t4-16gb": 16 * _GB,
    "a10-24gb": 24 * _GB,
    "l4-24gb": 24 * _GB,
    "l40s-48gb": 48 * _GB,
    "a100-40gb": 40 * _GB,
    "a100-80gb": 80 * _GB,
    "h100-80gb": 80 * _GB,
    "h200-141gb": 141 * _GB,
    "mi300x-192gb": 192 * _GB,
}
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": _GB, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def predict_memory_of_run(
    config: PretrainConfig,
    world_size: int,
    *,
    vocab_size: int | None = None,
    device: str = "cuda",
    expert_load: float | None = None,
) -> MemoryPrediction:
    """`models.memory.predict_memory` with the run's settings.

    Args:
        config: passed `pretrain.config_rules.validate` for this `world_size`.
        vocab_size: the tokenizer's; None takes `model.vocab_size`. Of two the larger counts.
        device: "cuda" or "cpu".
        expert_load: rows of the busiest rank's experts in multiples of the even share; None: 1.

    Raises ValueError where both vocabularies are None, and for another device.
    """
    replicas = RankLayout.of(config.parallel, world_size).data_parallel_size
    train = config.train
    return predict_memory(
        config.model,
        config.parallel,
        world_size=world_size,
        seq_length=config.seq_length,
        micro_batch_size=train.micro_batch_size,
        micro_batches=train.global_batch_size // (train.micro_batch_size * replicas),
        vocab_size=max(vocab_size or 0, config.model.vocab_size or 0) or None,
        device=device,
        expert_load=1.0 if expert_load is None else expert_load,
        resets_attention=config.data.packing.reset_attention,
        resets_positions=config.data.packing.reset_positions,
        deepspeed=config.deepspeed if config.engine is EngineKind.deepspeed else None,
    )


def worst_memory_of_run(
    config: PretrainConfig, world_size: int, *, vocab_size: int | None = None, device: str = "cuda"
) -> MemoryPrediction:
    """As `predict_memory_of_run`, with every token that can be sent to one rank's experts sent
    there; the same in a model without experts."""
    return predict_memory_of_run(
        config,
        world_size,
        vocab_size=vocab_size,
        device=device,
        expert_load=worst_expert_load(config.model, config.parallel),
    )


def device_memory_bytes(text: str) -> int:
    """Bytes of a device by its name in `DEVICES`, or of a size such as 80GiB, 40 GB, 81559MiB.

    Raises ValueError for anything else.
    """
    wanted = text.strip().lower().replace("_", "-")
    if wanted in DEVICES:
        return DEVICES[wanted]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", wanted)
    if size is None or size[2] not in _UNITS or float(size[1]) == 0:
        raise ValueError(
            f"{text!r} is no device memory: use a size with its unit, as in 80GiB, or one of "
            f"{', '.join(DEVICES)}"
        )
    return int(float(size[1]) * _UNITS[size[2]])
