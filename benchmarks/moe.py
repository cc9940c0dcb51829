"""One sparse layer, forward and backward: this project's, TorchScale's X-MoE, megatron-core's own.

    python -m benchmarks.moe --tokens 1024 2048 4096 8192 --topk 1 2 --rounds 7

All layers live in one process and take a step each in turns, on the same tokens: on a shared
machine the speed changes within seconds, neighbouring steps share it, and the ratio of their
CPU-seconds (with CUDA: of their seconds) is what to quote. Two more take their turns: the matrix
products alone, which no layer of this size can go below, and this project's layer with experts that
do nothing, which is what routing, sorting and summing cost.

GELU; fp32 on a CPU, bf16 with CUDA. `magnetron` has what TorchScale's layer has: X-MoE's router,
sub-LayerNorm, biases. `magnetron-plain` has what megatron-core's has: a linear router, neither of
those. Ours adds its weight gradients to buffers that are there already, as it trains; the others
make new ones, which a training would still have to add to its buffers. TorchScale drops tokens
beyond an expert's capacity, the others drop none. Prints a table for each number of tokens and of
experts a token; writes every single figure as JSON, and the tables as Markdown beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.torchscale import stand_in_for_timm
from benchmarks.train_step import cpu_name, free_port
from models.config import LayerNormPlacement, ModelConfig
from models.experts import expert_spec
from models.moe_config import MoEConfig, RouterType
from models.moe_layer import MoELayer
from models.router import build_router
from parallel.config import ParallelConfig
from parallel.grouped_linear import Block, GradientSum, grouped_matmul
from parallel.megatron import (
    ColumnParallelLinear,
    MLPSubmodules,
    ModuleSpec,
    MoESubmodules,
    ProcessGroupCollection,
    RowParallelLinear,
    TransformerConfig,
)
from parallel.runtime import initialize, shutdown

OURS = "magnetron"
PRODUCTS, ROUTING = "matrix products alone", "routing, sorting, summing alone"
TORCHSCALE, PLAIN, MEGATRON = "torchscale-xmoe", "magnetron-plain", "megatron-core"
PEERS = (TORCHSCALE, PLAIN, MEGATRON)
BALANCE_COEFFICIENT = 0.01
SEQUENCES = 4  # the tokens are [tokens / SEQUENCES, SEQUENCES, hidden]


@dataclass(frozen=True)
class Size:
    """What every layer is given."""

    tokens: int
    topk: int
    hidden_size: int
    ffn_hidden_size: int
    num_experts: int

    @property
    def gflop(self) -> float:
        """Of all products forward and backward, without the router's: 12 T h f."""
        rows = self.tokens * self.topk
        return 12 * rows * self.hidden_size * self.ffn_hidden_size / 1e9


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    seconds: float  # median; CPU-seconds on a CPU
    ratio: float  # median over rounds of its seconds / ours in the same round
    share_of_products: float  # median over rounds of the products' seconds / its
    peak_mb: float  # above what was resident before the step; NaN where the system does not say


Step = Callable[[], None]


def transformer_config(size: Size, dtype: torch.dtype, *, biases: bool) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=size.hidden_size,
        num_attention_heads=1,
        ffn_hidden_size=size.ffn_hidden_size,
        num_moe_experts=size.num_experts,
        moe_ffn_hidden_size=size.ffn_hidden_size,
        moe_router_topk=size.topk,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_aux_loss_coeff=BALANCE_COEFFICIENT,
        moe_token_dispatcher_type="alltoall",
        activation_func=F.gelu,
        add_bias_linear=biases,
        params_dtype=dtype,
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,
        cuda_graph_scope=[],
    )


def our_layer(size: Size, dtype: torch.dtype, placement: LayerNormPlacement) -> nn.Module:
    """Like TorchScale's: X-MoE's router, sub-LayerNorm, biases; or like megatron-core's."""
    torchscale = placement is LayerNormPlacement.sub_ln
    model = ModelConfig(
        name="benchmark",
        num_layers=1,
        hidden_size=size.hidden_size,
        ffn_hidden_size=size.ffn_hidden_size,
        num_attention_heads=1,
        layer_norm_placement=placement,
        moe=MoEConfig(
            num_experts=size.num_experts,
            layer_freq=1,
            router=RouterType.xmoe if torchscale else RouterType.linear,
            router_topk=size.topk,
            aux_loss_coeff=BALANCE_COEFFICIENT,
        ),
    )
    submodules = MoESubmodules(router=build_router(model.moe), experts=expert_spec(model))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = transformer_config(size, dtype, biases=torchscale)
    config.gradient_accumulation_fusion = True
    layer = MoELayer(config, submodules, 1, groups)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("temperature"):
                parameter.fill_(model.moe.temperature)
            elif "norm" not in name and "bias" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    for parameter in layer.experts.parameters():  # DistributedDataParallel's part
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    return layer


def megatron_layer(size: Size, dtype: torch.dtype) -> nn.Module:
    """megatron-core's MoELayer: its linear router, all-to-all dispatcher and SequentialMLP.

    Without biases: on one rank it adds them in place to a view of autograd's, which torch refuses.
    """
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
    from megatron.core.transformer.moe.router import TopKRouter

    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    submodules = MoESubmodules(
        router=TopKRouter, experts=ModuleSpec(module=SequentialMLP, submodules=linears)
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = transformer_config(size, dtype, biases=False)
    layer = MegatronMoELayer(config, submodules, 1, groups)
    layer.set_layer_number(1)
    return layer


def torchscale_layer(size: Size, dtype: torch.dtype) -> nn.Module:
    """TorchScale's MOELayer with use_xmoe and subln; its experts are nn.Linear's."""
    stand_in_for_timm()
    component = partial(importlib.import_module, package="torchscale.component")
    make_experts = component(".feedforward_network").make_experts
    routing = component(".xmoe.routing")
    if not torch.cuda.is_available():
        _let_histc_take_integers()
    arguments = SimpleNamespace(
        moe_expert_count=size.num_experts,
        ddp_rank=0,
        activation_fn="gelu",
        dropout=0.0,
        activation_dropout=0.0,
        layernorm_eps=1e-5,
        subln=True,
    )
    width, number = size.hidden_size, size.num_experts
    if size.topk == 1:
        gate = routing.Top1Gate(width, number, use_fp32=True, use_xmoe=True)
    else:  # what its configuration makes of use_xmoe
        gate = routing.Top2Gate(width, number, True, "random", True, use_xmoe=True)
    experts = make_experts(arguments, width, size.ffn_hidden_size)
    layer = component(".xmoe.moe_layer").MOELayer(gate, experts, arguments)
    return layer.to(device=_device(), dtype=dtype)


def _let_histc_take_integers() -> None:
    """TorchScale's router counts with histc, which torch has for floats only on a CPU."""
    original: Any = torch.histc
    if not hasattr(original, "takes_integers"):

        def histc(values: Tensor, *arguments: Any, **settings: Any) -> Tensor:
            return original(values.float(), *arguments, **settings)

        histc.takes_integers = True  # type: ignore[attr-defined]
        torch.histc = histc  # type: ignore[assignment]


class NoExperts(nn.Module):
    """Experts that give back what they get, times the gate."""

    def forward(self, rows: Tensor, tokens_per_expert: Any, gates: Tensor) -> tuple[Tensor, None]:
        return (rows * gates.unsqueeze(-1)).to(rows.dtype), None


def layers(size: Size, dtype: torch.dtype) -> dict[str, Callable[[], nn.Module]]:
    """What takes its turns, by name."""

    def without_experts() -> nn.Module:
        layer = our_layer(size, dtype, LayerNormPlacement.sub_ln)
        layer.experts = NoExperts()
        return layer

    return {
        OURS: partial(our_layer, size, dtype, LayerNormPlacement.sub_ln),
        TORCHSCALE: partial(torchscale_layer, size, dtype),
        PLAIN: partial(our_layer, size, dtype, LayerNormPlacement.pre_ln),
        MEGATRON: partial(megatron_layer, size, dtype),
        ROUTING: without_experts,
    }


def layer_step(layer: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """Forward and backward of a layer that gives (output, balance loss or None)."""

    def step() -> None:
        y, balance_loss = layer(x)
        if balance_loss is None:  # attached to the output already
            y.backward(dy)
        else:
            torch.autograd.backward([y, BALANCE_COEFFICIENT * balance_loss], [dy, None])

    return step


def products_step(size: Size, dtype: torch.dtype) -> Step:
    """The six products of evenly loaded experts, into memory that is there already."""
    h, f, e = size.hidden_size, size.ffn_hidden_size, size.num_experts
    rows = [size.tokens * size.topk // e] * e
    place: dict[str, Any] = {"dtype": dtype, "device": _device()}
    x, y = torch.randn(2, sum(rows), h, **place)
    u, z = torch.randn(2, sum(rows), f, **place)
    w1, w2 = torch.randn(e, f, h, **place), torch.randn(e, h, f, **place)
    sums = [
        GradientSum(w.requires_grad_(), torch.zeros(w.shape, device=w.device)) for w in (w1, w2)
    ]
    block = Block(slice(0, sum(rows)), slice(0, e), rows)

    @torch.no_grad()
    def step() -> None:
        grouped_matmul(x, w1.transpose(1, 2), rows, out=u)
        grouped_matmul(z, w2.transpose(1, 2), rows, out=y)
        grouped_matmul(y, w2, rows, out=z)
        grouped_matmul(u, w1, rows, out=x)
        sums[0].add_product(block, x, u)
        sums[1].add_product(block, z, y)

    return step


def seconds_of(step: Step) -> float:
    if not torch.cuda.is_available():
        begin = time.process_time()
        step()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_mb(step: Step) -> float:
    """Memory of a step above what is there before it; NaN where the system does not say."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with contextlib.suppress(OSError, AttributeError):  # Linux with glibc
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed, and would be taken again
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        resident = _status_mb("VmRSS")
        step()
        return _status_mb("VmHWM") - resident
    return float("nan")


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}")


def measure(
    size: Size, rounds: int, peers: Sequence[str] = PEERS
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds of every step, peak memory) by name; a peer that is not installed is left out."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    torch.manual_seed(0)
    shape = (size.tokens // SEQUENCES, SEQUENCES, size.hidden_size)
    x, dy = torch.randn(2, *shape, dtype=dtype, device=_device())
    x.requires_grad_()
    steps: dict[str, Step] = {}
    modules: list[nn.Module] = []
    for name, build in layers(size, dtype).items():
        if name in PEERS and name not in peers:
            continue
        try:
            modules.append(build())
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        steps[name] = layer_step(modules[-1], x, dy)
    steps[PRODUCTS] = products_step(size, dtype)

    def forget_gradients() -> None:
        x.grad = None
        for module in modules:
            module.zero_grad(set_to_none=True)

    peaks = {}
    for name, step in steps.items():
        step()  # warm-up
        forget_gradients()
        peaks[name] = peak_mb(step)
        forget_gradients()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step))
            forget_gradients()
    return seconds, peaks


def summarize(seconds: dict[str, list[float]], peaks: dict[str, float]) -> list[Row]:
    """Ratios are taken round by round, then their median."""
    ours, products = seconds[OURS], seconds[PRODUCTS]
    return [
        Row(
            name=name,
            seconds=median(own),
            ratio=median(s / o for s, o in zip(own, ours, strict=True)),
            share_of_products=median(p / s for s, p in zip(own, products, strict=True)),
            peak_mb=peaks[name],
        )
        for name, own in seconds.items()
    ]


def markdown_table(size: Size, rows: list[Row]) -> str:
    unit = "s" if torch.cuda.is_available() else "CPU-s"
    lines = [
        f"{size.tokens} tokens, top-{size.topk} of {size.num_experts} experts, hidden "
        f"{size.hidden_size}, ffn {size.ffn_hidden_size}, {size.gflop:.1f} GFLOP",
        "",
        f"| layer | {unit} | against {OURS} | µs/token | products' share | peak MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        share = "-" if row.name == ROUTING else f"{row.share_of_products:.2f}"
        lines.append(
            f"| {row.name} | {row.seconds:.4f} | {row.ratio:.2f} | "
            f"{1e6 * row.seconds / size.tokens:.1f} | {share} | {row.peak_mb:.0f} |"
        )
    return "\n".join(lines)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """The process groups that all three kinds of layer ask for."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    runtime = initialize(ParallelConfig(), seed=0)
    try:
        yield
    finally:
        shutdown(runtime)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--topk", type=int, nargs="+", default=[1, 2], help="experts a token")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--ffn-hidden-size", type=int, default=1024)
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each layer, in turns")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=PEERS, metavar="PEER",
        help="beside magnetron, any of: " + ", ".join(PEERS),
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument(
        "--json", type=Path, default=Path("outputs/benchmarks/moe.json"),
        help="where the figures go, and the tables with the suffix .md (default: %(default)s)",
    )  # fmt: skip
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds={given.rounds}: at least 1 is needed")
    for tokens in given.tokens:
        if tokens % (SEQUENCES * given.num_experts):
            parser.error(
                f"--tokens={tokens} must be a multiple of {SEQUENCES * given.num_experts}, "
                f"{SEQUENCES} sequences x --num-experts"
            )
    return given


def main() -> int:
    given = parse_arguments()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(given.threads)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    machine = f"{device}, torch {torch.__version__}, {started}, {given.rounds} rounds"
    tables, results = [machine], []
    print(machine, flush=True)
    with world_of_one():
        for topk in given.topk:
            for tokens in given.tokens:
                size = Size(
                    tokens, topk, given.hidden_size, given.ffn_hidden_size, given.num_experts
                )
                seconds, peaks = measure(size, given.rounds, given.peers)
                rows = summarize(seconds, peaks)
                tables.append(markdown_table(size, rows))
                print(f"\n{tables[-1]}", flush=True)
                results.append(
                    {"size": asdict(size), "rows": [asdict(r) for r in rows], "seconds": seconds}
                )
    given.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine, "results": results}
    given.json.write_text(json.dumps(document, indent=2) + "\n")
    given.json.with_suffix(".md").write_text("\n\n".join(tables) + "\n")
    print(f"\nwritten: {given.json}, {given.json.with_suffix('.md')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
