"""How fast a run is: tokens per second, model FLOPs utilisation, peak memory.

torch is imported only where a device is asked about.
"""

import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense peaks in FLOP/s from the vendors' data sheets; data sheets that print the rate with 2:4
# sparsity are halved. fp32 is the rate outside the tensor cores (TF32 is off by default in torch).
# A row matches a device whose name holds all its words; the first match wins, so H100 NVL stands
# before H100. A precision left out (its published figures disagree, or the tensor cores lack it)
# is measured.
_VENDOR_PEAKS: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("GB200", "NVIDIA GB200 NVL72 data sheet", {"bf16": 2500e12, "fp16": 2500e12}),
    ("B200", "NVIDIA HGX B200 data sheet", {"bf16": 2250e12, "fp16": 2250e12}),
    ("H200 NVL", "NVIDIA H200 data sheet", {"bf16": 835e12, "fp16": 835e12, "fp32": 60e12}),
    ("H200", "NVIDIA H200 data sheet", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    ("H100 NVL", "NVIDIA H100 data sheet", {"bf16": 835e12, "fp16": 835e12, "fp32": 60e12}),
    ("H100 PCIe", "NVIDIA H100 data sheet", {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12}),
    ("H100", "NVIDIA H100 data sheet", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    ("A100", "NVIDIA A100 data sheet", {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}),
    ("A30", "NVIDIA A30 data sheet", {"bf16": 165e12, "fp16": 165e12, "fp32": 10.3e12}),
    ("A10", "NVIDIA A10 data sheet", {"bf16": 125e12, "fp16": 125e12, "fp32": 31.2e12}),
    ("L40S", "NVIDIA L40S data sheet", {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12}),
    ("L40", "NVIDIA L40 data sheet", {"bf16": 181e12, "fp16": 181e12, "fp32": 90.5e12}),
    ("L4", "NVIDIA L4 data sheet", {"bf16": 121e12, "fp16": 121e12, "fp32": 30.3e12}),
    ("V100-SXM2", "NVIDIA V100 data sheet", {"fp16": 125e12, "fp32": 15.7e12}),
    ("V100-PCIE", "NVIDIA V100 data sheet", {"fp16": 112e12, "fp32": 14e12}),
    ("T4", "NVIDIA T4 data sheet", {"fp16": 65e12, "fp32": 8.1e12}),
    (
        "MI300X",
        "AMD Instinct MI300X data sheet",
        {"bf16": 1307e12, "fp16": 1307e12, "fp32": 163e12},
    ),
)

_PRECISIONS = ("fp32", "bf16", "fp16")


def vendor_peak(device_name: str, precision: str) -> tuple[float, str] | None:
    """(dense FLOP/s, data sheet) of a GPU by the name torch gives it; None where not in the table.

    None also for a MIG slice, which has the name of the whole GPU and a fraction of its rate.
    """
    words = device_name.replace("-", " ").split()
    if "MIG" in words:
        return None
    for key, source, peaks in _VENDOR_PEAKS:
        wanted = key.replace("-", " ").split()
        if all(word in words for word in wanted):
            return (peaks[precision], source) if precision in peaks else None
    return None


def measured_peak(device: "torch.device", precision: str, seconds: float = 0.2) -> float:
    """Best rate in FLOP/s of square matmuls repeated for `seconds` (but at least three times).

    1024^3 in fp32 on a CPU whatever the precision of the run, with every core this process may
    use, so that the answer is the machine's. 8192^3 in the given precision on an accelerator.
    """
    if device.type != "cpu":
        return _measured_peak(device, precision, seconds)
    # OpenMP keeps the threads of a region until the thread that opened it ends. Left in a process
    # that forks later, they hang the first large matmul of the child, which has none of them.
    with ThreadPoolExecutor(1, "measured_peak") as passing_thread:
        return passing_thread.submit(_measured_peak, device, precision, seconds).result()


def _measured_peak(device: "torch.device", precision: str, seconds: float) -> float:
    import torch

    on_cpu = device.type == "cpu"
    n = 1024 if on_cpu else 8192
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = torch.float32 if on_cpu else dtypes[precision]

    def synchronize() -> None:
        if not on_cpu:
            torch.accelerator.synchronize()

    threads = torch.get_num_threads()
    try:
        if on_cpu:
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype)
        out = torch.mm(a, b)  # warm-up: threads, kernel choice
        synchronize()
        best, repeats, end = float("inf"), 0, time.perf_counter() + seconds
        while repeats < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            synchronize()
            best = min(best, time.perf_counter() - start)
            repeats += 1
    finally:
        torch.set_num_threads(threads)
    return 2 * n**3 / best


def peak_flops(device: "torch.device | str", precision: str) -> tuple[float, str]:
    """(peak FLOP/s, where the number comes from) of one GPU, or of the whole machine for "cpu".

    GPUs of the table get the vendor's dense peak; others, and CPUs, the best measured matmul
    rate, source "measured": a rate that was really reached, not a peak, so utilisation against it
    reads high. The two sources do not compare.

    Ranks on a CPU share its cores, so the machine is one device: call this on one rank while the
    others wait, and multiply by the number of hosts, not of ranks (`peak_flops_of_run`).

    Args:
        precision: "fp32", "bf16" or "fp16". Where TF32 is allowed, fp32 is measured.

    Raises ValueError on another precision.
    """
    import torch

    if precision not in _PRECISIONS:
        raise ValueError(f"precision={precision}: peak FLOP/s are known for {_PRECISIONS} only.")
    device = torch.device(device)
    if device.type == "cuda":
        uses_tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
        found = vendor_peak(torch.cuda.get_device_name(device), precision)
        if found is not None and not uses_tf32:
            return found
    return measured_peak(device, precision), "measured"


def peak_flops_of_run(
    device: "torch.device | str", precision: str, *, world_size: int, ranks_per_host: int
) -> tuple[float, str]:
    """(peak FLOP/s of all devices, source): one GPU per rank, or one CPU machine per host.

    Takes every device to be like this one. Called on one rank (see `peak_flops`).
    """
    import torch

    peak, source = peak_flops(device, precision)
    on_cpu = torch.device(device).type == "cpu"
    devices = max(1, world_size // ranks_per_host) if on_cpu else world_size
    return peak * devices, source


def peak_memory_bytes(device: "torch.device | str") -> int:
    """Most memory held at once: torch's allocator on a GPU, this process (resident) on a CPU."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def memory_metrics(device: "torch.device") -> dict[str, float]:
    """What this process holds, in bytes, under the names trackers use; costs 20 µs on Linux."""
    import psutil  # type: ignore[import-untyped]
    import torch

    metrics = {
        "memory/peak_bytes": float(peak_memory_bytes(device)),
        "memory/host_bytes": float(psutil.Process().memory_info().rss),
    }
    if device.type == "cuda":
        metrics["memory/reserved_bytes"] = float(torch.cuda.max_memory_reserved(device))
    return metrics


def pipeline_bubble(stages: int, chunks_per_stage: int, micro_batches: int) -> float:
    """Share of a step in which a stage idles while a pipeline fills and drains:
    (p - 1) / (v m + p - 1), of the (interleaved) 1F1B schedule (arXiv 2104.04473 section 2.2, which
    divides by the useful time instead). Takes stages to be equally long and messages to be free.
    """
    idle = stages - 1
    return idle / (chunks_per_stage * micro_batches + idle)


class ThroughputMeter:
    """Rates over the last `window` steps. Only the inside of `step` counts.

    Evaluation, saving and logging happen outside `step`, so they change no rate; loading the
    batch belongs inside. A GPU works behind the host's back: single steps are right if the step
    ends by reading a result (loss or gradient norm), otherwise only the mean over a window is.

    Model FLOPs utilisation (arXiv 2204.02311 section 4.1): FLOP/s that the model's mathematics
    needs for the observed tokens per second, over the peak of all devices. Recomputed activations
    are no model FLOPs.

    Args:
        flops_per_token: forward and backward pass, model FLOPs.
        peak_flops_per_second: of all devices of the run together; None leaves utilisation out.
        window: steps.
        pipeline_bubble: see the function; 0 leaves it out.
    """

    def __init__(
        self,
        flops_per_token: float,
        peak_flops_per_second: float | None = None,
        window: int = 20,
        pipeline_bubble: float = 0.0,
    ) -> None:
        self._flops_per_token = flops_per_token
        self._peak = peak_flops_per_second
        self._pipeline_bubble = pipeline_bubble
        # (tokens, seconds, of which waited for data)
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=window)
        self._waited = 0.0

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Times one optimizer step over `tokens` tokens of all ranks; a step that raises is not
        counted."""
        self._waited = 0.0
        start = time.perf_counter()
        yield
        self._steps.append((tokens, time.perf_counter() - start, self._waited))

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around what fetches the batch, inside `step`."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Rates over the window under the names trackers use; empty before the first step."""
        seconds = sum(seconds for _, seconds, _ in self._steps)
        if seconds == 0:
            return {}
        tokens_per_second = sum(tokens for tokens, _, _ in self._steps) / seconds
        waited = sum(waited for _, _, waited in self._steps)
        metrics = {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/step_seconds": seconds / len(self._steps),
            "throughput/data_wait_seconds": waited / len(self._steps),
        }
        if self._pipeline_bubble:
            metrics["throughput/pipeline_bubble"] = self._pipeline_bubble
        if self._peak is not None:
            metrics["throughput/model_flops_utilisation"] = (
                tokens_per_second * self._flops_per_token / self._peak
            )
        return metrics
