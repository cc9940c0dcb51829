"""Rates that leave out what is not training, and peaks that say where they come from."""

import time

import pytest
import torch

from pretrain.throughput import (
    ThroughputMeter,
    measured_peak,
    peak_flops,
    peak_flops_of_run,
    peak_memory_bytes,
    vendor_peak,
)
from tests.distributed import close_pool, run_on_gloo


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H200 NVL", "bf16", 835e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GB200", "bf16", 2500e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40", "bf16", 181e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla T4", "fp16", 65e12),
        ("AMD Instinct MI300X", "bf16", 1307e12),
    ],
)
def test_vendor_peaks_are_dense(name: str, precision: str, expected: float):
    found = vendor_peak(name, precision)
    assert found is not None
    assert found[0] == expected
    assert found[1].endswith("data sheet")


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA A10G", "bf16"),  # not an A10
        ("Tesla V100-SXM2-16GB", "bf16"),  # no bf16 in its tensor cores
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16"),  # a slice under the whole GPU's name
        ("NVIDIA GeForce GTX 1080", "fp32"),
    ],
)
def test_what_the_table_does_not_know_is_left_to_measurement(name: str, precision: str):
    assert vendor_peak(name, precision) is None


def test_a_cpu_is_measured_and_its_thread_count_put_back():
    threads = torch.get_num_threads()
    start = time.perf_counter()
    rate, source = peak_flops("cpu", "bf16")
    assert time.perf_counter() - start < 20
    assert source == "measured"
    assert 1e8 < rate < 1e15
    assert torch.get_num_threads() == threads


def test_ranks_on_a_cpu_share_one_machine():
    one, _ = peak_flops_of_run("cpu", "fp32", world_size=1, ranks_per_host=1)
    ranks, _ = peak_flops_of_run("cpu", "fp32", world_size=1000, ranks_per_host=1000)
    hosts, _ = peak_flops_of_run("cpu", "fp32", world_size=1000, ranks_per_host=1)
    # wide margins: each is a measurement of its own, on a machine that may be busy
    assert ranks / one < 100 < hosts / one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_stays_below_its_vendor_peak():
    device = torch.device("cuda")
    found = vendor_peak(torch.cuda.get_device_name(device), "bf16")
    if found is None:
        pytest.skip("GPU not in the table")
    measured = measured_peak(device, "bf16")
    assert 0.3 * found[0] < measured < 1.05 * found[0]
    assert peak_flops(device, "bf16") == found
    assert peak_flops_of_run(device, "bf16", world_size=8, ranks_per_host=8)[0] == 8 * found[0]


def measured_on_this_rank() -> float:
    return measured_peak(torch.device("cpu"), "fp32", seconds=0.01)


def test_measuring_leaves_no_threads_that_a_fork_would_miss():
    """Else the first large matmul of a forked process waits for threads it does not have."""
    threads = torch.get_num_threads()
    assert measured_on_this_rank() > 0
    assert torch.get_num_threads() == threads
    close_pool()  # workers forked from now on
    assert run_on_gloo(1, measured_on_this_rank, timeout=30.0)[0] > 0


def test_refuses_an_unknown_precision():
    with pytest.raises(ValueError, match="precision=auto"):
        peak_flops("cpu", "auto")


def test_peak_memory_counts_bytes_of_this_process():
    block = torch.ones(8 << 20)  # 32 MiB
    peak = peak_memory_bytes("cpu")
    assert block.nbytes < peak < 64 << 30


def test_meter_counts_steps_and_nothing_between_them():
    meter = ThroughputMeter(flops_per_token=50.0, peak_flops_per_second=1e6)
    assert meter.metrics() == {}
    for _ in range(3):
        with meter.step(tokens=100):
            time.sleep(0.02)
        time.sleep(0.1)  # evaluation, saving
    metrics = meter.metrics()
    assert set(metrics) == {
        "throughput/tokens_per_second",
        "throughput/step_seconds",
        "throughput/data_wait_seconds",
        "throughput/model_flops_utilisation",
    }
    assert 0.02 <= metrics["throughput/step_seconds"] < 0.1
    assert metrics["throughput/tokens_per_second"] == pytest.approx(
        100 / metrics["throughput/step_seconds"]
    )
    assert metrics["throughput/model_flops_utilisation"] == pytest.approx(
        metrics["throughput/tokens_per_second"] * 50 / 1e6
    )


def test_meter_forgets_steps_outside_its_window_and_steps_that_raised():
    meter = ThroughputMeter(flops_per_token=1.0, window=2)
    with meter.step(tokens=1):
        time.sleep(0.2)
    for _ in range(2):
        with meter.step(tokens=1):
            time.sleep(0.001)
    with pytest.raises(RuntimeError), meter.step(tokens=10**9):
        raise RuntimeError
    metrics = meter.metrics()
    assert metrics["throughput/step_seconds"] < 0.1
    assert metrics["throughput/tokens_per_second"] < 1e6
    assert "throughput/model_flops_utilisation" not in metrics
