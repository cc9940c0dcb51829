"""What a run goes on from, what it refuses to, and what it says of settings that changed."""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launch.schema import load
from models.config import ModelConfig
from models.moe_config import MoEConfig, RouterType, ScoreFunction, SecondExpertPolicy
from pretrain import run
from pretrain.config import PretrainConfig
from pretrain.events import read_events
from pretrain.run_identity import changed_settings, identity_problem, model_identity
from pretrain.run_status import RunStatus
from pretrain.stop_signal import StopSignal
from tests.distributed import run_on_gloo
from tests.parity import MODEL

TORCHSCALE = MoEConfig(num_experts=4, router=RouterType.torchscale, router_topk=2)


def problem(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    return identity_problem({"model": saved}, {"model": now}, Path("c"), ("model",), 0)


def model(moe: MoEConfig, **changes: Any) -> ModelConfig:
    return replace(MODEL, moe=replace(moe, **changes))


@pytest.mark.parametrize(
    ("moe", "setting", "value", "said"),
    [
        (MoEConfig(num_experts=4), "router_topk", 2, "1 saved, 2 now"),
        (
            MoEConfig(num_experts=4),
            "router_score_function",
            ScoreFunction.sigmoid,
            "'softmax' saved, 'sigmoid' now",
        ),
        (
            TORCHSCALE,
            "second_expert_policy",
            SecondExpertPolicy.all,
            "'random' saved, 'all' now",
        ),
        (TORCHSCALE, "normalize_gate_prob_before_dropping", False, "True saved, False now"),
    ],
)
def test_other_gates_are_another_model(
    moe: MoEConfig, setting: str, value: object, said: str
) -> None:
    saved, now = (model_identity(model(moe, **c), 64) for c in ({}, {setting: value}))
    assert f"model.moe.{setting}: {said}" in (problem(saved, now) or "")
    assert problem(saved, saved) is None
    older = {name: one for name, one in saved.items() if name != f"moe.{setting}"}
    assert problem(older, now) is None  # saved before that was compared


def test_a_dense_model_is_none_with_experts() -> None:
    dense, sparse = model_identity(MODEL, 64), model_identity(model(TORCHSCALE), 64)
    for saved, now in ((dense, sparse), (sparse, dense)):
        assert "model.moe.num_experts: " in (problem(saved, now) or "")


SMALL = [
    "+experiment=tiny_cpu",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "data.seq_length=32",
    "data.languages=[de]",
    "train.micro_batch_size=1",
    "train.global_batch_size=2",
    "train.eval_interval=0",
    "train.eval_sequences=1",
    "schedule.lr_warmup_steps=0",
]


def starts(folder: Path, settings: list[list[str]]) -> list[str]:
    """What each start of a run says, one after the other, with these settings."""
    from parallel.runtime import initialize, shutdown

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    said = []
    real, run.report = run.report, lambda *_: None  # pictures, which take most of the time
    try:
        for words in settings:
            config = replace(load([*SMALL, *words]), run_dir=str(folder / "run"))
            runtime = initialize(config.parallel, config.train.seed)
            with redirect_stdout(StringIO()) as output:
                run.train(config, runtime, StopSignal(announce=None), RunStatus())
            said.append(output.getvalue())
            shutdown(runtime)
    finally:
        run.report = real
    return said


def test_settings_that_a_resume_takes_are_named(tmp_path: Path) -> None:
    changes = ["optimizer.lr=0.5", "optimizer.weight_decay=0.25", "model.init_method_std=0.5"]
    settings = [
        ["train.train_steps=1"],
        ["train.train_steps=2", *changes],
        ["train.train_steps=3", *changes],
    ]
    first, second, third = run_on_gloo(1, starts, tmp_path, settings)[0]
    events = [e for e in read_events(tmp_path / "run") if e["kind"] == "settings_changed"]
    assert "settings changed" not in first
    assert events[0]["text"] in second and events[0]["step"] == 1
    assert events[0]["text"].startswith("settings changed since config.yaml, from step 1 on: ")
    for change in ("optimizer.lr 0.001 -> 0.5", "weight_decay 0.1 -> 0.25", "_std 0.02 -> 0.5"):
        assert change in events[0]["text"]
    assert events[1]["text"] in third and len(events) == 2
    assert events[1]["text"].endswith("from step 2 on: train.train_steps 2 -> 3")


def test_no_secret_is_told_and_what_cannot_be_read_is_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainConfig(model=MODEL)
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)).replace("demo", "<hidden>"))
    monkeypatch.setenv("SOME_API_KEY", "hunter2hunter2")
    config.wandb.project = "hunter2hunter2"
    [changed] = [line for line in changed_settings(config, file) if "project" in line]
    assert changed.endswith("-> <hidden>")
    for content in (b"\xff\xfe", b"a: [", b"[]"):
        file.write_bytes(content)
        assert changed_settings(config, file) == []
    assert changed_settings(config, tmp_path / "none") == []
