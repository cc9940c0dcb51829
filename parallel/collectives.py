"""Two of torch's collectives under the name this torch wants them called by.

torch 2.13 renamed them, and the old names warn at every call; older ones have only those.
"""

from typing import Any

import torch
import torch.distributed as dist

# (output, input, group=...), sizes equal on all ranks, concatenated along the first axis
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def skip_collectives_of_one_rank() -> None:
    """Let megatron-core's gradient and parameter buffers alone where there is nobody to share with.

    Its distributed optimizer reduces and gathers in place; over a group of one rank that copies
    each buffer onto itself, three times a step (4 % of a step of 7 M parameters on a CPU).
    """
    import megatron.core.distributed.param_and_grad_buffer as buffers

    for name, collective in (
        ("dist_all_gather_func", all_gather),
        ("dist_reduce_scatter_func", reduce_scatter),
    ):
        if not hasattr(getattr(buffers, name), "skips_one_rank"):
            setattr(buffers, name, _unless_alone(collective))


def _unless_alone(collective: Any) -> Any:
    def run(
        output: torch.Tensor, source: torch.Tensor, *, group: Any = None, **options: Any
    ) -> Any:
        if dist.get_world_size(group) == 1 and output.data_ptr() == source.data_ptr():
            return None
        return collective(output, source, group=group, **options)

    run.skips_one_rank = True  # type: ignore[attr-defined]
    return run
