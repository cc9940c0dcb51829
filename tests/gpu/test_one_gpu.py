"""On one CUDA device (`pytest -m gpu`): the CPU path's numbers, on NCCL and without the bridge.

Each test runs in this process, as a world of one.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.gpu


@pytest.fixture
def runtime() -> Iterator:
    from parallel.config import ParallelConfig
    from parallel.runtime import initialize, shutdown

    found = initialize(ParallelConfig(), seed=1)
    yield found
    shutdown(found)


def test_the_bridge_is_off() -> None:
    import parallel.megatron  # noqa: F401
    from parallel import cpu_bridge

    assert not cpu_bridge.needed() and not cpu_bridge._installed


def test_initial_weights_are_those_of_the_cpu() -> None:
    from models.initialize import counter_normal, parameter_key

    index = torch.arange(1 << 20)
    key = parameter_key(1, "w")
    there = counter_normal(key, index.cuda()).cpu()
    assert torch.allclose(there, counter_normal(key, index), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_cross_entropy_equals_torchs(runtime, dtype: torch.dtype, bound: float) -> None:
    from parallel.layers import vocab_parallel_linear_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(1000, 64, device="cuda") / 8).to(dtype).requires_grad_()
    labels = torch.randint(0, 1000, (300,), device="cuda")
    mask = (torch.rand(300, device="cuda") > 0.2).float()
    loss, per_token = vocab_parallel_linear_cross_entropy(
        hidden, weight, labels, mask, tp_group=runtime.groups.tp, chunk_tokens=128
    )
    loss.backward()
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy(F.linear(*exact), labels, reduction="none")
    (expected * mask).sum().backward()
    assert torch.allclose(per_token, expected.detach(), atol=10 * bound)
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert (ours.grad.float() - theirs.grad).norm() < bound * theirs.grad.norm()


def train(runtime, precision: str) -> list[float]:
    from models.build import build_model
    from parallel.config import OptimizerConfig, ParallelConfig, Precision
    from parallel.engine import MegatronEngine
    from pretrain.train_step import train_step
    from tests.parity import LANGUAGES, MODEL, VOCAB, micro_batches

    parallel = ParallelConfig(precision=Precision[precision])
    chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=7)
    engine = MegatronEngine(chunks, parallel, OptimizerConfig(lr=1e-2), runtime)
    losses = []
    for step in range(4):
        metrics = train_step(
            engine,
            micro_batches(step, 2, 0, 1),
            runtime,
            learning_rate=1e-2,
            languages=LANGUAGES,
            stop_requested=False,
        )
        losses.append(metrics.losses.mean())
    return losses


# the losses of the same four steps on a CPU, fp32
CPU_LOSSES = [5.26126, 5.16788, 5.1315, 5.29439]


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_training_follows_the_cpu(runtime, precision: str, bound: float) -> None:
    assert train(runtime, precision) == pytest.approx(CPU_LOSSES, abs=bound)


def test_checkpoint_round_trip(runtime, tmp_path: Path) -> None:
    from models.build import build_model
    from parallel.config import OptimizerConfig, ParallelConfig
    from parallel.engine import MegatronEngine
    from pretrain.checkpoint import Checkpoints
    from pretrain.config import CheckpointConfig
    from pretrain.train_state import TrainState
    from tests.parity import MODEL, VOCAB

    def engine(seed: int) -> MegatronEngine:
        parallel = ParallelConfig()
        chunks = build_model(MODEL, parallel, runtime, vocab_size=VOCAB, seed=seed)
        return MegatronEngine(chunks, parallel, OptimizerConfig(), runtime)

    first, second = engine(7), engine(8)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), {})
    checkpoints.save(first, TrainState(step=3))
    assert checkpoints.resume(second) == TrainState(step=3)
    pairs = zip(first.chunks[0].parameters(), second.chunks[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
