"""A rank that does nothing but all-reduce, under a failure watch with its default times.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them; says "under way" when it is.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.failure_watch import FailureWatch
from parallel.progress_beacon import beacon
from parallel.runtime import initialize


def main() -> None:
    runtime = initialize(ParallelConfig(), seed=1)
    with FailureWatch(runtime):
        step = 0
        while True:
            with beacon.stage("forward_backward", step):
                dist.all_reduce(torch.ones(1))
            if step == 100:
                print("under way", flush=True)
            step += 1
            time.sleep(0.05)


if __name__ == "__main__":
    main()
