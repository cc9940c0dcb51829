"""Activations and norms one operation at a time, and compiled (parallel.compile_elementwise).

    python -m benchmarks.elementwise --rounds 8

Two copies of each model train in one process on random tokens, a step of the one, a step of the
other. Prints CPU-seconds a step (on a GPU seconds), their ratio, which is what to quote, and how
long the first step took, in which everything is compiled that torch's cache on disk does not hold.
Then the same for the norms and activations by themselves, forward and backward, beside torch's own
operations. Figures: docs/benchmarks.md.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import own_training
from benchmarks.own_training import OwnTraining
from models.config import Activation, LayerNormPlacement, ModelConfig, Normalization
from models.feed_forward import gelu, swiglu
from parallel.config import CompileElementwise, ParallelConfig
from parallel.norm import normalize
from parallel.runtime import Runtime, initialize, shutdown

LLAMA: dict[str, Any] = {
    "layer_norm_placement": LayerNormPlacement.pre_ln,
    "normalization": Normalization.rms_norm,
    "activation": Activation.swiglu,
    "add_bias_linear": False,
}
MODELS: dict[str, tuple[int, int, dict[str, Any]]] = {  # hidden size, feed-forward, the rest
    "Magneto, hidden 256": (256, 1024, {}),
    "Magneto, hidden 512": (512, 2048, {}),
    "pre-LN, RMSNorm, SwiGLU, hidden 256": (256, 680, LLAMA),
    "pre-LN, RMSNorm, SwiGLU, hidden 512": (512, 1360, LLAMA),
}
MODES = (CompileElementwise.never, CompileElementwise.always)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="steps of each (default 8)")
    given = parser.parse_args()
    runtime = initialize(ParallelConfig(), seed=0)
    print("| model | one by one | compiled | gain | first step | compiled |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in MODELS:
        print(row_of_model(name, runtime, given.rounds), flush=True)
    print("\n| function | torch's operations | ours | ours compiled | gain |")
    print("|---|--:|--:|--:|--:|")
    for name, functions in functions_of(runtime.device).items():
        print(row_of_functions(name, functions, given.rounds), flush=True)
    shutdown(runtime)


def row_of_model(name: str, runtime: Runtime, rounds: int) -> str:
    hidden, ffn, rest = MODELS[name]
    model = ModelConfig(
        name="elementwise",
        num_layers=6,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=hidden // 64,
        vocab_size=8192,
        **rest,
    )
    own_training.initialize = lambda *_: runtime  # two trainings of a process share its groups
    steps, first = [], []
    for mode in MODES:
        parallel = ParallelConfig(compile_elementwise=mode)
        training = OwnTraining(model, parallel, seq_length=512, micro_batch_size=4)
        start = time.perf_counter()
        training.step()
        first.append(time.perf_counter() - start)
        steps.append(training.step)
    one_by_one, compiled = interleaved(steps, rounds, runtime.device)
    return (
        f"| {name} | {one_by_one:.3f} s | {compiled:.3f} s | {one_by_one / compiled:.2f} | "
        f"{first[0]:.0f} s | {first[1]:.0f} s |"
    )


def functions_of(device: torch.device) -> dict[str, list[Callable[[], None]]]:
    """Of each: forward and backward pass with torch's operations, with ours, with ours compiled."""
    functions = {}
    for tokens, width in ((512, 1024), (2048, 4096)):
        x = torch.randn(tokens, 1, width, device=device, requires_grad=True)
        b, g = (torch.randn(width, device=device, requires_grad=True) for _ in range(2))
        dy = torch.randn(tokens, 1, width, device=device)
        size = f"{tokens} x {width}"
        half = dy.chunk(2, -1)[0].contiguous()
        functions[f"GELU with bias, {size}"] = [
            run(lambda x, b: F.gelu(x + b), (x, b), dy),
            *(run(lambda x, b, on=on: gelu(x, b, compiled=on), (x, b), dy) for on in (False, True)),
        ]
        functions[f"SwiGLU, {size}"] = [
            run(lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], (x,), half),
            *(run(lambda x, on=on: swiglu(x, compiled=on), (x,), half) for on in (False, True)),
        ]
        functions[f"RMSNorm, {size}"] = [
            run(lambda x, g: F.rms_norm(x, g.shape, g, 1e-5), (x, g), dy),
            *(
                run(lambda x, g, on=on: normalize(x, g, None, 1e-5, True, compiled=on), (x, g), dy)
                for on in (False, True)
            ),
        ]
    return functions


def run(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor
) -> Callable[[], None]:
    def both_ways() -> None:
        torch.autograd.grad(function(*inputs), inputs, dy)

    return both_ways


def row_of_functions(name: str, functions: list[Callable[[], None]], rounds: int) -> str:
    for function in functions:
        function()
    seconds = interleaved(functions, 4 * rounds, torch.get_default_device())
    cells = " | ".join(f"{1000 * each:.1f} ms" for each in seconds)
    return f"| {name} | {cells} | {seconds[0] / seconds[-1]:.2f} |"


def interleaved(
    functions: list[Callable[[], Any]], rounds: int, device: torch.device
) -> list[float]:
    """Median seconds of each, called in turns: of the CPU, or of a GPU's clock on the wall."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, seconds in zip(functions, taken, strict=True):
            start = clock()
            function()
            if device.type != "cpu":
                torch.cuda.synchronize()
            seconds.append(clock() - start)
    return [median(seconds) for seconds in taken]


if __name__ == "__main__":
    main()
