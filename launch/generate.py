"""Sample from a checkpoint.

    python -m launch.generate runs/demo/DATE "The page you"
    torchrun --nproc-per-node 2 launch/generate.py runs/demo/DATE "The page you" \\
        --tensor-model-parallel-size 2

A path may be a run folder, its checkpoints folder, one checkpoint, or a copy by launch.checkpoint;
of several the newest is taken.
The layout need not be the one the run was trained with, and does not change the text.
"""

import argparse
import os
import sys
from pathlib import Path

# before launch/, where `import pretrain` would find pretrain.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.interrupted import say_interrupted


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, help="run folder, checkpoints folder or checkpoint")
    parser.add_argument("prompt", nargs="+", help="text to continue; several may be given")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="0: the whole vocabulary")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--tokenizer", default="", help="its file; default: the run's")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    options = parser.parse_args()
    try:
        _generate(options)
    except (ValueError, OSError, RuntimeError) as error:  # CheckpointError is a RuntimeError
        from pretrain.checkpoint_list import DamagedCheckpointError

        # what a rank finds by itself; everything else all find alike
        alone = isinstance(error, DamagedCheckpointError | OSError)
        if alone or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _generate(options: argparse.Namespace) -> None:
    from parallel.config import ParallelConfig

    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    needed = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size != needed:
        raise ValueError(
            f"{world_size} process(es) started, but --tensor-model-parallel-size times "
            f"--pipeline-model-parallel-size is {needed}: start {needed} with "
            f"torchrun --nproc-per-node {needed}"
        )
    from pretrain.generate import SamplingConfig, generate

    sampling = SamplingConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    texts = generate(options.path, options.prompt, parallel, sampling, options.tokenizer)
    if os.environ.get("RANK", "0") == "0":
        for text in texts:
            print(text)


if __name__ == "__main__":
    say_interrupted()
    main()
