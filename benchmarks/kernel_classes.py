"""Where a GPU's time goes, by what its kernels are for, from the names in a torch.profiler trace.

Standard library only, so that a trace taken on one machine can be read on another.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class KernelClass(Enum):
    attention = "attention"
    matmul = "matmul"
    norm_elementwise = "norm/elementwise"
    optimizer = "optimizer"
    communication = "communication"
    memory_copy = "memory copy"
    other = "other"


# Parts of kernel names in lower case; the first class that has one decides. The order matters:
# attention kernels are built from CUTLASS and cuDNN pieces that are named gemm, the optimizer's and
# the gradient norm's kernels are elementwise and reductions in form.
_PARTS: tuple[tuple[KernelClass, tuple[str, ...]], ...] = (
    (
        KernelClass.communication,
        ("nccl", "allreduce", "all_reduce", "all_gather"),
    ),
    (
        KernelClass.attention,
        ("flash_fwd", "flash_bwd", "flash::", "fmha", "sdpa", "attention"),
    ),
    (KernelClass.optimizer, ("adam", "multi_tensor_apply", "l2norm", "normtwoops")),
    (
        # nvjet: cuBLAS on Hopper and later; splitk: the sum over a product's slices
        KernelClass.matmul,
        ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "triton_mm", "xmma", "wgmma"),
    ),
    (KernelClass.memory_copy, ("memcpy", "memset")),
    (
        KernelClass.norm_elementwise,
        (
            "layer_norm",
            "layernorm",
            "gammabeta",
            "rmsnorm",
            "rms_norm",
            "elementwise",
            "reduce_kernel",
            "softmax",
            "embedding",
            "index",
            "scatter_gather",
            "gather_kernel",
            "catarray",
            "copy_kernel",
            "fill",
            "triton_",
            "distribution_",
            "radixsort",
            "cub::",
            "gelu",
        ),
    ),
)

# the categories under which torch.profiler's trace lists what ran on the device
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


def kernel_class(name: str) -> KernelClass:
    """The class of a CUDA kernel by its name, as the profiler prints it (demangled or not)."""
    lower = name.lower()
    for kind, parts in _PARTS:
        if any(part in lower for part in parts):
            return kind
    return KernelClass.other


@dataclass(frozen=True)
class DeviceTime:
    """Microseconds on one device, from the begin of its first kernel to the end of its last.

    Kernels on different streams overlap (communication behind computation): the classes may add up
    to more than `busy`.
    """

    by_class: dict[KernelClass, float]
    by_kernel: dict[str, float]
    span: float
    busy: float  # at least one kernel runs

    @property
    def idle(self) -> float:
        """No kernel runs: the host is late, or waits."""
        return self.span - self.busy


def device_time(trace_events: Iterable[Mapping[str, Any]]) -> DeviceTime:
    """Adds up the device's entries of a Chrome trace (its `traceEvents`); the rest is left out."""
    intervals: list[tuple[float, float]] = []
    by_class = dict.fromkeys(KernelClass, 0.0)
    by_kernel: dict[str, float] = {}
    for event in trace_events:
        if event.get("ph") != "X" or event.get("cat") not in DEVICE_CATEGORIES:
            continue
        begin, duration, name = float(event["ts"]), float(event["dur"]), str(event["name"])
        intervals.append((begin, begin + duration))
        by_class[kernel_class(name)] += duration
        by_kernel[name] = by_kernel.get(name, 0.0) + duration
    if not intervals:
        return DeviceTime(by_class, by_kernel, span=0.0, busy=0.0)
    intervals.sort()
    busy, reached = 0.0, intervals[0][0]
    for begin, end in intervals:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return DeviceTime(by_class, by_kernel, span=reached - intervals[0][0], busy=busy)


def table(time: DeviceTime, steps: int, kernels: int = 12) -> str:
    """Lines for people: classes and idle time per step and in shares of the span, top kernels."""
    if time.span == 0:
        return "no kernel in the trace"
    lines = [f"{'class':20}{'ms/step':>10}{'share':>8}"]

    def line(label: str, microseconds: float) -> str:
        share = 100 * microseconds / time.span
        return f"{label:20}{microseconds / 1000 / steps:10.2f}{share:7.1f}%"

    ordered = sorted(time.by_class.items(), key=lambda item: -item[1])
    lines += [line(kind.value, microseconds) for kind, microseconds in ordered if microseconds]
    lines += [line("idle", time.idle), line("span", time.span), "", "longest kernels:"]
    for name, microseconds in sorted(time.by_kernel.items(), key=lambda item: -item[1])[:kernels]:
        lines.append(f"{line(kernel_class(name).value, microseconds)}  {name[:90]}")
    return "\n".join(lines)
