"""Compiled chains give what the operations one by one give; where one rank cannot, none does."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import Activation, Normalization
from models.feed_forward import gelu, swiglu
from parallel import compiled
from parallel.compiled import _first_line, compiles
from parallel.config import CompileElementwise, ConfigError, ParallelConfig
from parallel.norm import normalize
from parallel.runtime import initialize
from parallel.sub_layernorm import normalize_shard, shard_gradients
from tests.distributed import run_on_gloo
from tests.parity import MODEL, MODELS, assert_same, layout, train, variant

ALWAYS = CompileElementwise.always
GATED = variant(activation=Activation.swiglu, normalization=Normalization.rms_norm)


def with_no_compiler_on(broken: list[int], wanted: CompileElementwise) -> tuple[bool, str]:
    """What `compiles` answers where these ranks have no C++ compiler; in a rank's process."""
    import torch._inductor.config as inductor

    runtime = initialize(ParallelConfig(), seed=1)
    before = inductor.cpp.cxx
    if runtime.rank in broken:
        inductor.cpp.cxx = (None, "no-such-compiler")
        inductor.force_disable_caches = True
    try:
        return compiles(wanted, runtime)
    except ConfigError as error:
        return False, str(error)
    finally:
        inductor.cpp.cxx, inductor.force_disable_caches = before, False


def with_a_compiler_that_cannot_bf16(folder: Path) -> str:
    """What `compiles` answers where no C++ with bfloat16 compiles; in a rank's process."""
    import torch._inductor.config as inductor

    runtime = initialize(ParallelConfig(), seed=1)
    before = inductor.cpp.cxx
    compiler = folder / "g++"
    # it leaves a mark: that it was the compiler in bf16 that was refused, after the one in fp32
    refuse = f"grep -qs 'BFloat16[*] in_ptr' -- \"$@\" && touch {folder}/refused && exit 1"
    compiler.write_text(f'#!/bin/sh\n{refuse}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    inductor.cpp.cxx = (None, str(compiler))
    inductor.force_disable_caches = True
    try:
        return compiles(CompileElementwise.always, runtime)[1]
    except ConfigError as error:
        return str(error)
    finally:
        inductor.cpp.cxx, inductor.force_disable_caches = before, False


@pytest.mark.slow
def test_a_compiler_that_cannot_bf16_is_found(tmp_path: Path) -> None:
    (said,) = run_on_gloo(1, with_a_compiler_that_cannot_bf16, tmp_path, timeout=180)
    assert said.startswith("parallel.compile_elementwise=always: torch.compile does not work")
    assert (tmp_path / "refused").exists()


def with_triton_on_rank_zero(wanted: CompileElementwise) -> tuple[bool, str]:
    """What `compiles` answers where one rank only has Triton, and no rank a GPU that works."""
    # on no rank: parallel.cpu_bridge, once an earlier test has put it there, gives a CPU for "cuda"
    broken: Any = SimpleNamespace(type="cuda")
    runtime = replace(initialize(ParallelConfig(), seed=1), device=broken)
    here = ModuleType("triton")
    here.__spec__ = ModuleSpec("triton", None)
    before = sys.modules.get("triton")
    sys.modules["triton"] = here if runtime.rank == 0 else None  # type: ignore[assignment]
    try:
        return compiles(wanted, runtime)
    except ConfigError as error:
        return False, str(error)
    finally:
        del sys.modules["triton"]
        if before is not None:
            sys.modules["triton"] = before


@pytest.mark.parametrize("wanted", [CompileElementwise.auto, ALWAYS])
def test_where_a_rank_has_no_triton_every_rank_is_told_alike(wanted: CompileElementwise) -> None:
    answers = run_on_gloo(2, with_triton_on_rank_zero, wanted, timeout=60)
    assert answers[0] == answers[1]
    assert not answers[0][0] and "torch.compile does not work here (rank 0: " in answers[0][1]
    refused = answers[0][1].startswith("parallel.compile_elementwise=always: ")
    assert refused == (wanted is ALWAYS)


@pytest.mark.parametrize("name", ["_trial", "_gated_trial"])
def test_a_compiler_that_gives_nan_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(compiled, name).plain

    def trial(is_compiled: bool, *tensors: Tensor) -> Tensor:
        return real(*tensors) * (torch.nan if is_compiled and name in wrong else 1.0)

    wrong: list[str] = []
    for one in ("_trial", "_gated_trial"):  # as if compiled: no compiler is loaded
        plain = getattr(compiled, one).plain
        monkeypatch.setattr(compiled, one, lambda _, *tensors, plain=plain: plain(*tensors))
    monkeypatch.setattr(compiled, name, trial)
    assert compiled._why_not(torch.device("cpu")) is None
    wrong.append(name)
    assert "wrong by nan" in (compiled._why_not(torch.device("cpu")) or "")


def test_an_error_without_a_message_has_a_line_too() -> None:
    assert _first_line(RuntimeError()) == _first_line(RuntimeError(" \n")) == "no message"
    assert _first_line(RuntimeError("\nthe compiler\nis gone")) == "the compiler"
    assert _first_line(RuntimeError("it raised:\n\nno g++\nhelp")) == "it raised: no g++"
    assert _first_line(RuntimeError("it raised:\n")) == "it raised:"


@pytest.mark.slow  # loads a compiler; the decision of all ranks is shown by those without Triton
def test_where_a_rank_cannot_compile_every_rank_is_told_alike() -> None:
    answers = run_on_gloo(2, with_no_compiler_on, [1], ALWAYS, timeout=180)
    assert answers[0] == answers[1]
    assert answers[0][1].startswith("parallel.compile_elementwise=always: torch.compile does not")
    assert "(rank 1: " in answers[0][1] and "never" in answers[0][1]


@pytest.mark.parametrize("wanted", [CompileElementwise.auto, CompileElementwise.never])
def test_nothing_is_compiled_on_a_cpu_unless_asked_for(wanted: CompileElementwise) -> None:
    ((compiled, why),) = run_on_gloo(1, with_no_compiler_on, [], wanted)
    assert not compiled
    assert "parallel.compile_elementwise" in why


def numbers(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator).to(device) for shape in shapes]


def results(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(*y.shape, generator=generator).to(y.device)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def rms_norm(x: Tensor, g: Tensor, *, compiled: bool) -> Tensor:
    return normalize(x, g, None, 1e-5, True, compiled=compiled)


def worst_differences(device: str) -> dict[str, float]:
    """Of each function: the largest difference that compiling makes, over the largest value."""
    x, g, b, per_row = numbers(device, (40, 3, 64), (64,), (64,), (4, 120))
    functions: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "gelu": (gelu, (x, b)),
        "swiglu": (swiglu, (x,)),
        "swiglu, bias": (swiglu, (x, b)),
        "rms norm": (rms_norm, (x, g)),
    }
    worst = {}
    for name, (function, inputs) in functions.items():
        plain, compiled = (results(partial(function, compiled=on), *inputs) for on in (False, True))
        worst[name] = largest(compiled, plain)
    rows, mean, rstd, mean_1, mean_2 = (x.flatten(0, 1), *per_row)
    rstd = rstd.exp()
    for rms in (False, True):
        bias = None if rms else b
        plain, compiled = (
            [
                normalize_shard(on, rows, mean, rstd, g, bias, rms),
                *shard_gradients(on, rows + 1, rows, g, mean, rstd, mean_1, mean_2, rms),
            ]
            for on in (False, True)
        )
        worst[f"shard, rms {rms}"] = largest(compiled, plain)
    return worst


def largest(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs if b is not None)


@pytest.mark.slow
def test_each_compiled_function_gives_the_same() -> None:
    (worst,) = run_on_gloo(1, worst_differences, "cpu", timeout=300)
    assert len(worst) == 6
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.gpu
def test_each_compiled_function_gives_the_same_on_a_gpu() -> None:
    assert max(worst_differences("cuda").values()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "model", "ranks"),
    [
        ({}, MODEL, 1),
        ({}, GATED, 1),
        ({"tp": 2, "sp": True}, MODEL, 2),
        ({"tp": 2}, GATED, 2),
        ({"tp": 2, "pp": 2}, MODEL, 4),
        ({}, MODELS["xmoe shared"], 1),
    ],
)
def test_a_compiled_model_trains_the_same(sizes: Any, model: Any, ranks: int) -> None:
    compiled = train(
        layout(**sizes, compile_elementwise=ALWAYS), model, world_size=ranks, timeout=280
    )
    assert_same(compiled, train(layout(**sizes), model, world_size=ranks))
