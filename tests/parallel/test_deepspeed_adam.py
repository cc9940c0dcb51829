"""DeepSpeed's own CPU Adam (deepspeed.native_adam=true), compiled here, trains what ours trains.

Compiling it takes a minute and a half of CPU time, once for this file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.schema import load
from models.build import build_model
from parallel import adam, checkpoint_io
from parallel.config import OptimizerConfig
from parallel.deepspeed_config import DeepSpeedConfig
from parallel.deepspeed_engine import DeepSpeedEngine
from parallel.deepspeed_library import adam as deepspeed_adam
from parallel.deepspeed_library import library
from parallel.engine import checkpoint_metadata
from parallel.fast_paths import ADAM, FAST_PATHS, WITH_DEEPSPEED
from parallel.runtime import initialize
from pretrain import parity
from pretrain.parity import RankRecord, merge
from pretrain.run import accelerator_lines
from tests.distributed import close_pool, run_on_gloo
from tests.parallel.test_checkpoint_layouts import train
from tests.parallel.test_deepspeed_engine import DENSE, zero
from tests.parity import MODEL, OPTIMIZER, VOCAB, assert_same, layout, reference_of

COMPILE_SECONDS = 550.0  # a busy machine; alone it takes 60
STEPS = 3
run_on = partial(run_on_gloo, timeout=COMPILE_SECONDS)
needs_a_compiler = pytest.mark.skipif(
    not ((shutil.which("c++") or shutil.which("g++")) and shutil.which("ninja")),
    reason="DeepSpeed's CPU Adam is compiled with a C++ compiler and ninja: install g++ and ninja",
)


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where it is compiled to. Workers that have loaded it are not left to other tests."""
    folder = tmp_path_factory.mktemp("extensions")
    run_on(1, updates, folder, True)
    yield folder
    close_pool()


def start(index: int) -> Tensor:
    """Parameters of several sizes: whole vectors of the processor, and what is left over."""
    return torch.randn(17 + 1000 * index, generator=torch.Generator().manual_seed(index)) * 3


def updates(extensions: Path, native: bool, change: dict[str, Any] | None = None) -> list[Tensor]:
    """Weights and moments after `STEPS` updates from the same numbers."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    optimizer = OptimizerConfig(lr=1e-2, **(change or {}))
    parameters = [torch.nn.Parameter(start(index)) for index in range(4)]
    groups: list[dict[str, Any]] = [
        {"params": parameters[:2], "weight_decay": optimizer.weight_decay},
        {"params": parameters[2:], "weight_decay": 0.0},
    ]
    made: torch.optim.Optimizer
    if native:
        settings = DeepSpeedConfig(native_adam=True, offload_optimizer=True)
        made = deepspeed_adam(library(), groups, optimizer, settings)
    else:
        betas = (optimizer.adam_beta1, optimizer.adam_beta2)
        made = adam.FusedAdam(groups, lr=optimizer.lr, betas=betas, eps=optimizer.adam_eps)
    generator = torch.Generator().manual_seed(99)
    for _ in range(STEPS):
        for parameter in parameters:
            size = 10.0 ** torch.randint(-6, 2, parameter.shape, generator=generator)
            parameter.grad = torch.randn(parameter.shape, generator=generator) * size
        made.step()
    return [
        tensor.detach().clone()
        for parameter in parameters
        for tensor in (
            parameter,
            made.state[parameter]["exp_avg"],
            made.state[parameter]["exp_avg_sq"],
        )
    ]


U = 2.0**-24  # half a unit in the last place of fp32, relative


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest deviation of a weight, in units of what rounding explains.

    Rounding of the weight: each takes at most 3 roundings a step (decay, product, sum), together
    6 u |w|. Rounding of the update lr m / (sqrt(v) + eps): by Cauchy and Schwarz the mean of so few
    gradients, its terms taken without signs, is at most 1.02 times the root of the mean of their
    squares, so that errors of the terms of m and v count at most lr each. Moments take 3 roundings
    a step each, v counting half; dividing them takes 6. Theirs rounds beta to fp32 before it is
    taken from 1, which changes 1 - beta by u / 2 / (1 - beta), 5 u and 25 u (again half), in the
    moments and in their corrections. In all, for both, below 2 x (4.5 STEPS + 6) + 2 x (5 + 12.5).
    """
    update = 2 * (4.5 * STEPS + 6) + 2 * (5 + 12.5)
    worst = 0.0
    for weight, other in zip(ours[::3], theirs[::3], strict=True):
        largest = weight.abs() + STEPS * 1.1e-2  # on the way
        bound = STEPS * U * (6 * largest + 1.02e-2 * update)
        worst = max(worst, ((weight - other).abs() / bound).max().item())
    return worst


@pytest.mark.slow
@needs_a_compiler
def test_three_updates_from_the_same_numbers(extensions: Path) -> None:
    (theirs,) = run_on(1, updates, extensions, True)
    ours = updates(extensions, False)
    assert 0.0 < furthest(ours, theirs) < 1.0  # 0: it would be the same code
    for kind in (1, 2):
        for moment, other in zip(ours[kind::3], theirs[kind::3], strict=True):
            # a sum of terms of different signs; those are no larger than the largest gradient
            rounding = STEPS * (3 + 25) * U * moment.abs().max().item()
            torch.testing.assert_close(other, moment, rtol=STEPS * (3 + 25) * U, atol=rounding)


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.0}, {"adam_eps": 1e-6}, {"adam_beta2": 0.981}]
)
def test_the_bound_shows_another_adam(change: dict[str, Any], tmp_path: Path) -> None:
    """A run without decay, with another eps or beta lies far outside; ours is inside of itself."""
    ours = updates(tmp_path, False)
    assert furthest(ours, updates(tmp_path, False)) == 0.0
    assert furthest(ours, updates(tmp_path, False, change)) > 10.0


NATIVE = {
    "zero 1": zero(1, native_adam=True),
    "zero 2, offload": zero(2, native_adam=True, offload_optimizer=True),
    "zero 3, offload": zero(3, native_adam=True, offload_optimizer=True),
}


def train_natively(extensions: Path, settings: DeepSpeedConfig) -> RankRecord:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    return parity.train_on_rank(DENSE, layout(), settings)


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("name", NATIVE)
def test_trains_what_megatron_core_with_our_adam_trains(name: str, extensions: Path) -> None:
    """Three steps on two ranks; the bounds on losses, norms and weights are pretrain.parity's."""
    ranks = run_on(2, train_natively, extensions, NATIVE[name])
    assert_same(merge(ranks), reference_of(DENSE))


def resumed(extensions: Path, folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Weights after three steps, in one go and with a checkpoint after two."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    parallel, settings = layout(), NATIVE["zero 2, offload"]
    runtime = initialize(parallel, seed=1)

    def engine(seed: int) -> DeepSpeedEngine:
        chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=seed)
        return DeepSpeedEngine(chunks, parallel, OPTIMIZER, settings, runtime)

    straight, cut = engine(7), engine(8)
    for step in range(STEPS):
        if step == 2:
            state = straight.sharded_state_dict()
            checkpoint_io.save(state, folder, metadata=checkpoint_metadata())
            cut.load_state_dict(checkpoint_io.load(cut.sharded_state_dict(is_loading=True), folder))
            train(runtime, cut, step)  # type: ignore[arg-type]
        train(runtime, straight, step)  # type: ignore[arg-type]
    weights = [
        [parameter.detach().clone() for parameter in one.chunks[0].module.parameters()]
        for one in (straight, cut)
    ]
    return list(zip(*weights, strict=True))


@pytest.mark.slow
@needs_a_compiler
def test_a_resume_changes_nothing_but_a_rounding(extensions: Path, tmp_path: Path) -> None:
    """Its C++ object counts updates too, and starts at none. Having gone on it has multiplied fp32
    powers of beta step by step, and after a jump takes them anew: 2 u of beta^3, which are 34 u of
    1 - 0.98^3, and half of that of the update; then the weight is rounded once."""
    for pairs in run_on(2, resumed, extensions, tmp_path / "saved"):
        for straight, cut in pairs:
            bound = 2 * U * straight.abs() + 1.02 * OPTIMIZER.lr * (17 + 2 / (1 - 0.9**3)) * U
            assert (straight - cut).abs().le(bound).all()


# ---- what is said of it --------------------------------------------------------------------------


def log_lines(extensions: Path | None, *words: str) -> list[str]:
    """What the log of a start says of this engine."""
    if extensions is not None:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    config = load(["+model=magneto_tiny", "engine=deepspeed", *words])
    runtime = initialize(config.parallel, seed=1)
    chunks = build_model(MODEL, config.parallel, runtime, vocab_size=VOCAB, seed=1)
    engine = DeepSpeedEngine(chunks, config.parallel, OPTIMIZER, config.deepspeed, runtime)
    return accelerator_lines(config, runtime, engine)


def test_the_log_says_what_this_engine_uses() -> None:
    (lines,) = run_on_gloo(1, log_lines, None, "parallel.use_distributed_optimizer=false")
    paths, package, warning = lines
    found = dict(part.split(": ", 1) for part in paths.removeprefix("fast paths: ").split("; "))
    assert list(found) == list(FAST_PATHS)
    assert all(found[work] in who for work, who in WITH_DEEPSPEED.items())
    assert found[ADAM] == "torch"
    assert package.startswith("deepspeed: ") and "does the reduction of gradients" in package
    assert warning.startswith("warning: parallel.use_distributed_optimizer=false counts only with")


@pytest.mark.slow
@needs_a_compiler
def test_the_log_names_the_cpu_adam(extensions: Path) -> None:
    words = ["deepspeed.native_adam=true", "deepspeed.offload_optimizer=true"]
    (lines,) = run_on(1, log_lines, extensions, *words)
    who = "DeepSpeed's CPU Adam"
    assert lines[0].startswith(f"fast paths: {ADAM}: {who}; ") and who in WITH_DEEPSPEED[ADAM]
