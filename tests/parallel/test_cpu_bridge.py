"""The bridge patches names inside megatron-core and torch: this fails when one of them moves."""

import inspect
import logging
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from parallel import cpu_bridge
from tests.distributed import run_on_gloo

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the bridge is off with CUDA")


def source(name: str) -> str:
    module, _, attribute = name.partition(":")
    __import__(module)
    found = sys.modules[module]
    return inspect.getsource(getattr(found, attribute) if attribute else found)


def test_every_patched_name_of_megatron_core_is_where_it_was() -> None:
    import parallel.megatron  # noqa: F401

    dispatcher = "megatron.core.transformer.moe.token_dispatcher"
    assert "maybe_move_tensor_to_cpu(" in source(dispatcher)
    assert "te_general_gemm" in source("megatron.core.transformer.moe.moe_utils")
    assert "'torch.cuda.FloatTensor'" in source("megatron.core.optimizer.optimizer")
    adam = source("megatron.core.optimizer.distrib_optimizer")
    assert "isinstance(optimizer, (Adam, torch.optim.AdamW, HybridDeviceOptimizer))" in adam
    assert "HAVE_APEX_OR_TE" in adam and "USING_APEX_OPTIMIZER" in adam
    assert "USING_PYTORCH_OPTIMIZER" in source("megatron.core.optimizer")
    layers = source("megatron.core.tensor_parallel.layers")
    assert "fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(" in layers
    assert "_grad_accum_fusion_available" in layers


def test_every_substitution_has_its_reason() -> None:
    assert len(cpu_bridge.SUBSTITUTIONS) >= 10
    assert all(len(reason) > 20 for reason in cpu_bridge.SUBSTITUTIONS.values())


def test_cuda_devices_become_the_cpu() -> None:
    import parallel.megatron  # noqa: F401

    cpu = torch.device("cpu")
    x = torch.empty(2, 3, device="cuda")
    assert x.device == cpu
    assert torch.zeros(2, device=torch.cuda.current_device()).device == cpu
    assert x.new_zeros(2, device=torch.device("cuda", 0)).device == cpu
    assert x.to("cuda").device == cpu and x.to(device="cuda:0").device == cpu
    assert x.to("cuda", dtype=torch.float64).dtype is torch.float64
    assert x.to(torch.float64).dtype is torch.float64
    assert torch.nn.Linear(2, 2).to("cuda").weight.device == cpu
    assert x.cuda() is x and x.pin_memory() is x
    assert x.type() == "torch.cuda.FloatTensor"
    assert x.type("torch.cuda.DoubleTensor").dtype is torch.float64
    assert not torch.cuda.is_available()  # others branch on it


def test_random_state_is_the_cpus() -> None:
    import parallel.megatron  # noqa: F401

    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    assert torch.cuda.default_generators[0] is torch.default_generator


def test_torch_compile_still_accepts_the_stand_ins() -> None:
    """torch._dynamo refuses one function under two names (seen with a shared no-op)."""
    import parallel.megatron  # noqa: F401

    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]


def gather_uneven() -> list[list[float]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    targets = [torch.zeros(r + 1, 2) for r in range(size)]
    dist.all_gather(targets, torch.full((rank + 1, 2), float(rank)))
    return [target[:, 0].tolist() for target in targets]


def test_dropout_on_a_cpu_does_not_warn_of_the_cpus_random_state() -> None:
    import parallel.megatron  # noqa: F401

    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    told = [
        logger.filter(logging.makeLogRecord({"msg": text}))
        for text in ("CPU RNG state changed within GPU RNG context", "something else")
    ]
    assert [bool(kept) for kept in told] == [False, True]


def test_all_gather_takes_uneven_sizes() -> None:
    assert run_on_gloo(3, gather_uneven) == [[[0.0], [1.0, 1.0], [2.0, 2.0, 2.0]]] * 3


def test_bridge_must_come_before_megatron_core() -> None:
    code = (
        "import sys, types; sys.modules['megatron.core'] = types.ModuleType('x');"
        "from parallel import cpu_bridge; cpu_bridge.install()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "was imported before parallel.cpu_bridge" in done.stderr


def test_import_leaves_wandb_and_the_compiler_alone() -> None:
    code = (
        "import torch; real = torch.compile; import parallel.megatron, sys;"
        "assert torch.compile is real; assert 'wandb' not in sys.modules;"
        "assert 'torch.utils.tensorboard' not in sys.modules;"
        "assert 'torch._inductor.compile_fx' not in sys.modules; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr
