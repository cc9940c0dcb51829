"""What holds for every test: one thread a process, no GPU unless asked for, and a clean end."""

import os
import signal

# before anything imports torch, and inherited by every process a test starts
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("WANDB_MODE", "offline")

from collections.abc import Iterator

import pytest

from tests.distributed import close_pool

# A shell's background jobs ignore Ctrl-C, and so would all that they start: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    # The gloo tests are CPU tests on every machine: where CUDA is visible the bridge stays off
    # and megatron-core would put tensors on the device.
    if not _gpu_run(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _gpu_run(config):
        import torch

        if torch.cuda.is_available():
            return
        reason = "no CUDA device"
    else:
        reason = "run with -m gpu"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def _gpu_run(config: pytest.Config) -> bool:
    return config.option.markexpr.strip() == "gpu"


@pytest.fixture(scope="session", autouse=True)
def gloo_pool() -> Iterator[None]:
    """The workers of `run_on_gloo` end with the session."""
    yield
    close_pool()
