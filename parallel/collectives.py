"""Two of torch's collectives under the name this torch wants them called by.

torch 2.13 renamed them, and the old names warn at every call; older ones have only those.
"""

import torch.distributed as dist

# (output, input, group=...), sizes equal on all ranks, concatenated along the first axis
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
