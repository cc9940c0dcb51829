"""Trains the shapes of magneto_1b on one GPU in bf16, on random tokens, and says where time goes.

    python -m benchmarks.gpu_train --steps 10 --micro-batch-size 4

The framework's own step (model, megatron-core engine, fused AdamW, reduction of losses) without
data loading, logging and checkpoints. Prints tokens/s, model FLOPs utilisation against the vendor's
peak, peak memory, and GPU time by class of kernel over a few profiled steps.

Written without a GPU at hand: it HAS NOT RUN ON ONE YET. `--allow-cpu` walks the same path on a
CPU, with the small shapes that have to be given beside it.

Exit status 3: out of GPU memory, so that a caller can try a smaller micro-batch.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks import kernel_classes
from benchmarks.own_training import OwnTraining
from models.config import ModelConfig
from models.parameter_count import flops_per_token
from parallel.config import ParallelConfig, Precision, RecomputeGranularity
from pretrain.throughput import peak_flops, peak_memory_bytes

OUT_OF_MEMORY = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--ffn-hidden-size", type=int, default=8192)
    parser.add_argument("--num-attention-heads", type=int, default=32)
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--micro-batch-size", type=int, default=4, help="sequences")
    parser.add_argument("--micro-batches", type=int, default=1, help="per optimizer step")
    parser.add_argument(
        "--recompute",
        choices=[choice.name for choice in RecomputeGranularity],
        default=RecomputeGranularity.none.name,
    )
    parser.add_argument("--steps", type=int, default=10, help="measured")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--profile-steps", type=int, default=3, help="after them; 0: no profile")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/gpu"))
    parser.add_argument("--allow-cpu", action="store_true", help="try the script without a GPU")
    given = parser.parse_args()
    if not (torch.cuda.is_available() or given.allow_cpu):
        parser.error("no CUDA device is visible to torch; --allow-cpu tries the script on a CPU")
    return given


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(training: OwnTraining, steps: int, folder: Path) -> kernel_classes.DeviceTime:
    """Profiles some steps, leaves the trace in `folder`, and adds up the device's time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if training.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            training.step()
        synchronize(training.device)
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    return kernel_classes.device_time(json.loads(trace.read_text())["traceEvents"])


def measure(training: OwnTraining, given: argparse.Namespace) -> dict:
    device = training.device
    losses = [training.step() for _ in range(given.warmup)]
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(given.steps):
        begin = time.perf_counter()
        losses.append(training.step())
        synchronize(device)
        seconds.append(time.perf_counter() - begin)

    peak, peak_source = peak_flops(device, training.precision)
    tokens_per_second = training.tokens_per_step / median(seconds)
    flops = flops_per_token(training.model_config, given.seq_length)
    causal_flops = flops_per_token(training.model_config, given.seq_length, causal=True)
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "precision": training.precision,
        "parameters": training.parameters,
        "micro_batch_size": given.micro_batch_size,
        "micro_batches": given.micro_batches,
        "seq_length": given.seq_length,
        "step_seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "flops_per_token": flops,
        "peak_flops": peak,
        "peak_source": peak_source,
        "model_flops_utilisation": tokens_per_second * flops / peak,
        "model_flops_utilisation_causal": tokens_per_second * causal_flops / peak,
        "peak_memory_bytes": peak_memory_bytes(device),
        "losses": losses,
    }


def describe(result: dict) -> str:
    return "\n".join(
        [
            f"{result['device']}, torch {result['torch']}, {result['precision']}, "
            f"{result['parameters'] / 1e6:.0f} M parameters, "
            f"{result['micro_batches']} x {result['micro_batch_size']} sequences of "
            f"{result['seq_length']} tokens a step",
            f"tokens/s          {result['tokens_per_second']:.0f}",
            f"step              {1000 * median(result['step_seconds']):.1f} ms median, "
            f"{1000 * min(result['step_seconds']):.1f} ms best of {len(result['step_seconds'])}",
            f"MFU               {100 * result['model_flops_utilisation']:.1f} % of "
            f"{result['peak_flops'] / 1e12:.3g} TFLOP/s ({result['peak_source']}); "
            f"{100 * result['model_flops_utilisation_causal']:.1f} % with causal attention "
            "counted by half",
            f"peak memory       {result['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"loss              {result['losses'][0]:.3f} -> {result['losses'][-1]:.3f}",
        ]
    )


def main() -> int:
    given = parse_arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    model = ModelConfig(
        name="magneto_1b",
        num_layers=given.num_layers,
        hidden_size=given.hidden_size,
        ffn_hidden_size=given.ffn_hidden_size,
        num_attention_heads=given.num_attention_heads,
        max_position_embeddings=given.seq_length,
        vocab_size=given.vocab_size,
    )
    parallel = ParallelConfig(
        precision=Precision.bf16 if torch.cuda.is_available() else Precision.fp32,
        recompute_granularity=RecomputeGranularity[given.recompute],
    )
    try:
        with OwnTraining(
            model,
            parallel,
            seq_length=given.seq_length,
            micro_batch_size=given.micro_batch_size,
            micro_batches=given.micro_batches,
        ) as training:
            result = measure(training, given)
            print(describe(result), flush=True)
            (given.out / "gpu_train.json").write_text(json.dumps(result, indent=2) + "\n")
            if given.profile_steps:
                device_time = profile(training, given.profile_steps, given.out)
                text = kernel_classes.table(device_time, given.profile_steps)
                (given.out / "kernels.txt").write_text(text + "\n")
                print(f"\nGPU time over {given.profile_steps} profiled steps\n{text}")
    except torch.OutOfMemoryError as error:
        print(
            f"--micro-batch-size={given.micro_batch_size}: out of GPU memory; take a smaller one, "
            f"or --recompute=selective or full\n{str(error).splitlines()[0]}",
            file=sys.stderr,
        )
        return OUT_OF_MEMORY
    return 0


if __name__ == "__main__":
    sys.exit(main())
