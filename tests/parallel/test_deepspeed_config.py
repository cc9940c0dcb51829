"""What engine=deepspeed refuses, in words a user can act on, and what docs/engines.md says."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import check as launch_check
from launch.schema import load
from parallel.config import ConfigError, OptimizerConfig, ParallelConfig, Precision
from parallel.deepspeed_config import (
    REFUSALS,
    DeepSpeedConfig,
    EngineKind,
    Refusal,
    with_tables,
)
from parallel.deepspeed_engine import check
from parallel.deepspeed_library import adam, library
from pretrain.config_rules import validate
from tests.distributed import run_on_gloo

DOC = Path(__file__).resolve().parents[2] / "docs" / "engines.md"
MODEL = "+model=magneto_tiny"


def problems(*typed: str) -> list[str]:
    if not any(setting.startswith("+model") for setting in typed):
        typed = (MODEL, *typed)
    with pytest.raises(ConfigError) as caught:
        validate(load(["train.global_batch_size=8", *typed]), world_size=2)
    return list(caught.value.problems)


def test_what_is_typed_is_taken() -> None:
    typed = ["engine=deepspeed", "deepspeed.zero_stage=2", "deepspeed.offload_optimizer=true"]
    config = load([MODEL, *typed])
    validate(config, 2)
    assert config.engine is EngineKind.deepspeed
    assert config.deepspeed == DeepSpeedConfig(zero_stage=2, offload_optimizer=True)
    assert load([MODEL]).engine is EngineKind.megatron


@pytest.mark.parametrize("refusal", REFUSALS, ids=[" ".join(r.example) for r in REFUSALS])
def test_each_refusal_is_answered_as_documented(refusal: Refusal) -> None:
    answers = problems("engine=deepspeed", *refusal.example)
    (answer,) = (answer for answer in answers if answer in DOC.read_text(encoding="utf-8"))
    assert any(setting in answer for setting in refusal.example) and "use " in answer


def test_experts_under_zero_3() -> None:
    """One rank of tensor parallelism is no reason; more is, even without expert parallelism."""
    typed = ["engine=deepspeed", "deepspeed.zero_stage=3", "+model=xmoe_tiny"]
    validate(load(typed), 2)
    tensor = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    (answer,) = problems(*typed, *tensor)
    assert "parallel.expert_tensor_parallel_size=1 under" in answer


def test_settings_of_an_engine_that_does_not_train() -> None:
    assert problems("deepspeed.zero_stage=2", "deepspeed.overlap_comm=true") == [
        "deepspeed.zero_stage=2 counts only with engine=deepspeed; add that",
        "deepspeed.overlap_comm=true counts only with engine=deepspeed; add that",
    ]


def test_numbers_without_a_meaning() -> None:
    with pytest.raises(ConfigError) as caught:
        DeepSpeedConfig(zero_stage=4, reduce_bucket_size=0, param_persistence_threshold=-1)
    assert list(caught.value.problems) == [
        "deepspeed.zero_stage=4 must be 0, 1, 2 or 3",
        "deepspeed.reduce_bucket_size=0 must be 1 or more",
        "deepspeed.param_persistence_threshold=-1 must be 0 or more",
    ]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    (answer,) = problems("engine=deepspeed")
    assert "which is not installed; install magnetron[deepspeed]" in answer


def test_the_type_that_auto_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known in the process that trains: bf16 on a GPU, fp32 elsewhere."""
    check(ParallelConfig(), DeepSpeedConfig(zero_stage=0), 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"in parallel.precision=auto \(bf16 on a GPU\) and"):
        check(ParallelConfig(), DeepSpeedConfig(zero_stage=0), 0)
    check(ParallelConfig(precision=Precision.fp32), DeepSpeedConfig(zero_stage=0), 0)


def told(*typed: str, device: str | None = None) -> list[tuple[str, str]]:
    words = [MODEL, "engine=deepspeed", "deepspeed.zero_stage=0", "wandb.mode=disabled", *typed]
    found = launch_check.check(words, launch_check.Machines(device=device)).findings
    return [(one.severity, one.text) for one in found if "auto (bf16" in one.text]


def test_what_is_refused_on_a_gpu_is_told_before() -> None:
    """An error where it is known that there will be GPUs, a warning where nobody has said."""
    ((severity, text),) = told()
    assert severity == "warning" and text.startswith("refused on a GPU: deepspeed.zero_stage=0")
    ((severity, text),) = told(device="h100-80gb")
    assert severity == "error" and text.endswith("or parallel.precision=fp32")
    assert [severity for severity, _ in told("cluster=gpu8_infiniband")] == ["error"]
    assert told("cluster=generic") == []
    assert told("parallel.precision=fp32", device="h100-80gb") == []
    assert told("deepspeed.zero_stage=1", device="h100-80gb") == []


def test_the_document_says_what_the_code_does() -> None:
    """Else: python -m parallel.deepspeed_config"""
    document = DOC.read_text(encoding="utf-8")
    assert with_tables(document) == document


def without_a_compiler() -> str:
    groups: list[dict[str, Any]] = [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
    settings = DeepSpeedConfig(native_adam=True)
    with pytest.MonkeyPatch.context() as patch:  # this process goes on to other tests
        patch.setenv("PATH", "")
        with pytest.raises(RuntimeError) as caught:
            adam(library(), groups, OptimizerConfig(), settings)
    return str(caught.value)


def test_an_adam_that_cannot_be_compiled() -> None:
    (text,) = run_on_gloo(1, without_a_compiler)
    assert text.startswith("deepspeed.native_adam=true: DeepSpeed's Adam cannot be compiled here")
    assert text.endswith("use deepspeed.native_adam=false")
