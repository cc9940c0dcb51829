"""Which implementation does what in this process; results of two differ by rounding at most."""

from typing import Any

import pytest
import torch

from parallel.config import OptimizerConfig, ParallelConfig
from parallel.fast_paths import ADAM, EXPERTS, FAST_PATHS, NORM, WEIGHT_GRADIENTS, _package, in_use
from tests.distributed import run_on_gloo


def found_on_rank() -> dict[str, str]:
    from models.build import build_model
    from parallel.engine import MegatronEngine
    from parallel.runtime import initialize
    from tests.parity import MODEL, VOCAB

    parallel = ParallelConfig()
    runtime = initialize(parallel, seed=1)
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=1)
    MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)
    return in_use(runtime.device, compiled=chunks[0].config.compile_elementwise)


def test_what_an_engine_uses_is_in_the_table() -> None:
    (found,) = run_on_gloo(1, found_on_rank)
    assert list(found) == list(FAST_PATHS)
    for work, who in found.items():
        assert who in FAST_PATHS[work].on_cpu, work
    assert found[ADAM] == found[NORM] == found[WEIGHT_GRADIENTS] == "torch"
    assert found[EXPERTS] == "loop"


def test_packages_are_known_by_their_modules() -> None:
    class Elsewhere:
        pass

    for module, package in {
        "transformer_engine.pytorch.optimizers.fused_adam": "transformer_engine",
        "transformer_engine_torch": "transformer_engine",
        "apex.optimizers.fused_adam": "apex",
        "amp_C": "apex",
        "parallel.adam": "torch",
        "torch.optim.adamw": "torch",
    }.items():
        Elsewhere.__module__ = module
        assert _package(Elsewhere) == package


@pytest.mark.gpu
@pytest.mark.parametrize("package", ["apex.optimizers", "transformer_engine.pytorch.optimizers"])
def test_their_adam_is_ours(package: str) -> None:
    """On a GPU where the package is installed: five updates from the same numbers."""
    theirs = pytest.importorskip(package, reason=f"{package} is not installed").FusedAdam
    from parallel.adam import FusedAdam

    settings: Any = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    generator = torch.Generator("cuda").manual_seed(1)
    start = torch.randn(1000, device="cuda", generator=generator)
    ours, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [FusedAdam([ours], **settings), theirs([other], adam_w_mode=True, **settings)]
    for _ in range(5):
        gradient = torch.randn(1000, device="cuda", generator=generator)
        for parameter, optimizer in zip((ours, other), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
