"""Runs megatron-core on a machine without CUDA, over gloo, with no file of it edited.

megatron-core names the CUDA device literally (``torch.empty(..., device="cuda")``,
``torch.cuda.current_device()``) and assumes NCCL's abilities. `install` gives each such name a
CPU meaning; `SUBSTITUTIONS` lists them with the reason, and ``tests/parallel/test_cpu_bridge.py``
fails when megatron-core moves one of the things patched here.

It installs nothing where CUDA is available, so one program serves laptop and cluster.
``torch.cuda.is_available()`` keeps saying False: torch and megatron-core branch on it, rightly.
Other libraries in the same process see the stand-ins too: keep CPU runs to themselves.

Cost: nothing on ordinary operations, about half a microsecond on each wrapped factory call.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")

# what is replaced -> why. Read by the documentation and by the test that guards each of them.
SUBSTITUTIONS: dict[str, str] = {
    "torch.cuda.{streams, events, rng, memory, nvtx}": "called unconditionally; no-ops here, "
    "random state is that of the CPU generator",
    "torch.cuda.current_device -> 0": "used as device=...; an int because some callers format it",
    "factories and Tensor.new_* with a CUDA device": "literal device='cuda' -> CPU",
    "Tensor.to, Tensor.cuda, Module.to, Module.cuda, pin_memory": "the move is to the CPU",
    "Tensor.type() -> 'torch.cuda.*'": "the optimizer picks parameters by that name",
    "torch.distributed.all_gather": "gloo refuses the uneven sizes of expert dispatch: padded",
    "moe_utils.te_general_gemm": "upstream leaves the name undefined without Transformer Engine",
    "maybe_move_tensor_to_cpu": "upstream converts split sizes to numpy only `if tensor.is_cuda`",
    "torch.optim.Optimizer": "its methods import torch._dynamo (0.9 s a process) to disable it",
    "torch.compile during import": "about 60 functions are compiled at import (5 s), unused here",
    "wandb during import": "imported by an inference module (2 s) that is not used",
    "torch.utils.tensorboard during import": "imported by timers (0.1 s) that are not used",
}

_FACTORIES = (
    "empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "empty_like",
    "zeros_like", "ones_like", "full_like", "eye", "linspace", "empty_strided", "as_tensor",
    "randperm", "scalar_tensor",
)  # fmt: skip
_METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")

_installed = False


def needed() -> bool:
    """True on a machine without CUDA."""
    return not torch.cuda.is_available()


def install() -> None:
    """Give torch's CUDA names a CPU meaning. Does nothing with CUDA, or the second time.

    Must run before megatron-core is imported (it copies references at import);
    ``parallel.megatron`` sees to that.
    """
    global _installed
    if _installed or not needed():
        return
    if "megatron.core" in sys.modules:
        raise ImportError(
            "megatron.core was imported before parallel.cpu_bridge; import it through "
            "parallel.megatron only"
        )
    _replace_cuda_namespace()
    _replace_tensor_type()
    for name in _FACTORIES:
        _wrap_factory(torch, name)
    for name in _METHODS:
        _wrap_factory(torch.Tensor, name)
    for owner in (torch.Tensor, torch.nn.Module):
        _wrap_to(owner)
    _pad_uneven_all_gather()
    _keep_dynamo_out_of_optimizers()
    _installed = True


@contextlib.contextmanager
def fast_import() -> Iterator[None]:
    """Import megatron-core in a second instead of six to twelve.

    Its ~60 module-level ``torch.compile`` calls pull in dynamo and inductor (5 s), an inference
    module pulls in wandb (2 s), its timers TensorBoard (0.1 s). Inside this context
    ``torch.compile`` compiles at the first call (with CUDA) or not at all (without), and importing
    the other two fails, which upstream handles.
    """
    real_compile = torch.compile
    kept_out = [name for name in ("wandb", "torch.utils.tensorboard") if name not in sys.modules]

    def deferred(function: Callable | None = None, *args: Any, **kwargs: Any) -> Callable:
        if function is None:
            return lambda f: deferred(f, *args, **kwargs)
        if needed():
            return function
        compiled: list[Callable] = []

        @functools.wraps(function)
        def first_call_compiles(*call_args: Any, **call_kwargs: Any) -> Any:
            if not compiled:
                compiled.append(real_compile(function, *args, **kwargs))
            return compiled[0](*call_args, **call_kwargs)

        return first_call_compiles

    torch.compile = deferred  # type: ignore[assignment]
    for name in kept_out:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it -> ImportError
    try:
        yield
    finally:
        torch.compile = real_compile
        for name in kept_out:
            sys.modules.pop(name, None)


def repair_megatron() -> None:
    """Close the gaps of an imported megatron-core that show without CUDA or Transformer Engine."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not needed():
        return
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes
    moe_utils.maybe_move_tensor_to_cpu = split_sizes
    # Each dropout of a forked generator would warn that it drew from the CPU's, which it is to do.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _means_cuda(device: Any) -> bool:
    if device is None or device is CPU:
        return False
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)  # a CUDA ordinal


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Stream:
    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...


class _Generators:
    """Every device's default generator is the CPU's."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _no_op() -> Callable:
    """A new function each time: torch.compile keys its rules by function object, one rule each."""

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    return nothing


def _replace_cuda_namespace() -> None:
    stream = _Stream()
    stand_ins: dict[str, Any] = {
        "_lazy_init": _no_op(),
        "_lazy_call": lambda callback, **kwargs: callback(),
        "default_generators": _Generators(),
        "current_device": lambda: 0,
        "set_device": _no_op(),
        "device": lambda *args: contextlib.nullcontext(),
        "synchronize": _no_op(),
        "Stream": _Stream,
        "ExternalStream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "set_stream": _no_op(),
        "stream": lambda *args: contextlib.nullcontext(),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "empty_cache": _no_op(),
        "ipc_collect": _no_op(),
        "memory_allocated": lambda *args: 0,
        "memory_reserved": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "max_memory_reserved": lambda *args: 0,
        "reset_peak_memory_stats": _no_op(),
        "memory_stats": lambda *args: {},
        "get_device_capability": lambda *args: (0, 0),
        "get_device_name": lambda *args: "cpu",
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.random.get_rng_state = stand_ins["get_rng_state"]
    torch.cuda.random.set_rng_state = stand_ins["set_rng_state"]
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _no_op())

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    torch.Tensor.cuda = stay  # type: ignore[method-assign]
    torch.Tensor.pin_memory = stay  # type: ignore[method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign]


def _replace_tensor_type() -> None:
    original = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name = original(self)
            return name if "cuda" in name else name.replace("torch.", "torch.cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _wrap_factory(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs and _means_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # there is no pinned allocator without CUDA
        return original(*args, **kwargs)

    setattr(owner, name, on_cpu)


def _wrap_to(owner: type) -> None:
    original = owner.to  # type: ignore[attr-defined]

    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and not isinstance(args[0], torch.dtype | torch.Tensor) and _means_cuda(args[0]):
            args = (CPU, *args[1:])
        elif _means_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    owner.to = to  # type: ignore[attr-defined]


def _keep_dynamo_out_of_optimizers() -> None:
    """torch.optim imports torch._dynamo at its first call, just to switch it off for that call."""
    for method in vars(torch.optim.Optimizer).values():
        inner = getattr(method, "__wrapped__", None)
        if inner is not None and not hasattr(inner, "__dynamo_disable"):
            setattr(inner, "__dynamo_disable", inner)


def _pad_uneven_all_gather() -> None:
    import torch.distributed as dist

    original = dist.all_gather

    @functools.wraps(original)
    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        lengths = [t.shape[0] if t.dim() else 0 for t in tensor_list]
        if len(set(lengths)) == 1 or async_op or dist.get_backend(group) != "gloo":
            return original(tensor_list, tensor, group, async_op)
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: tensor.shape[0]].copy_(tensor)
        gathered = [torch.empty_like(padded) for _ in lengths]
        original(gathered, padded, group)
        for target, source in zip(tensor_list, gathered, strict=True):
            target.copy_(source[: target.shape[0]])
        return None

    dist.all_gather = all_gather
    torch.distributed.distributed_c10d.all_gather = all_gather
