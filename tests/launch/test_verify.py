"""launch/verify.py as a user starts it: the verdict, the exit status, and what is refused."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.schema import load
from pretrain.parity import NearTie
from pretrain.shrink import shrink
from pretrain.verify import RanksFailed, report, run_ranks
from tests.parity import EXERCISE, layout

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "verify.py")


def start(
    *words: str, folder: Path, python: tuple[str, ...] = (SCRIPT,), **environment: str
) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [sys.executable, *python, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert not list(folder.iterdir())  # a check leaves nothing behind
    return ended


def test_a_layout_that_is_right(tmp_path: Path) -> None:
    ended = start("+model=magneto_1b", "parallel=tp2", "verify.processes=2", folder=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "tensor parallel             2      2\n" in ended.stdout
    assert "data parallel                      1  not covered: too few processes" in ended.stdout
    assert "PASS: this layout trains the same model as one process" in ended.stdout
    assert "BEYOND" not in ended.stdout


@pytest.mark.slow
def test_axes_that_are_reduced_with_experts(tmp_path: Path) -> None:
    ended = start(
        "+model=xmoe_7b_64e", "parallel=tp4_pp4_ep8", "verify.processes=4", folder=tmp_path
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "tensor parallel             4      2  covered at 2" in ended.stdout
    assert "expert parallel             8      2  covered at 2" in ended.stdout
    assert "expert loads            0.0e+00  within" in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "stage", "words"),
    [
        ("magneto_1b", 3, ["parallel.tensor_model_parallel_size=2"]),
        ("magneto_1b", 1, ["parallel=cp2", "deepspeed.offload_optimizer=true"]),
        ("xmoe_7b_64e", 2, ["parallel=ep2", "parallel.precision=fp32"]),
    ],
)
def test_the_other_engine(model: str, stage: int, words: list[str], tmp_path: Path) -> None:
    ended = start(
        *(f"+model={model}", "engine=deepspeed", f"deepspeed.zero_stage={stage}", *words),
        "verify.processes=4",
        folder=tmp_path,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "PASS: this layout trains the same model as one process" in ended.stdout


DEFECT_OF_DEEPSPEED = """
from parallel.deepspeed_engine import DeepSpeedEngine
DeepSpeedEngine._sum_over_tensor_parallel_ranks = lambda *arguments: None
from launch.verify import main
main()
"""


DEFECT = """
import models.language_model
# the gradient in front of the output layer, of this rank's vocabulary only
models.language_model.copy_to_tensor_model_parallel_region = lambda hidden, group: hidden
from launch.verify import main
main()
"""


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        (DEFECT, []),
        (DEFECT_OF_DEEPSPEED, ["parallel.sequence_parallel=true", "engine=deepspeed"]),
    ],
    ids=["megatron", "deepspeed"],
)
def test_a_defect_ends_with_exit_status_1(defect: str, words: list[str], tmp_path: Path) -> None:
    ended = start(
        *("+model=magneto_tiny", "parallel=tp2", "verify.processes=2", *words),
        folder=tmp_path,
        python=("-c", defect),
        CUDA_VISIBLE_DEVICES="",
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "FAIL: this layout trains another model than one process" in ended.stdout
    assert "BEYOND" in ended.stdout and "initial weights         0.0e+00  within" in ended.stdout
    assert "losses                  " in ended.stdout and "gradients" in ended.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("parallel.tensor_model_parallel_size=3",), "must divide model.num_attention_heads"),
        (("parallel.pipeline_model_parallel_size=5",), "must divide model.num_layers"),
        (("parallel=tp2", "verify.processes=0"), "verify.processes=0 must be 1 or more"),
        (("verify.processes=two",), "verify.processes=two must be a whole number"),
        (("verify.timeout_seconds=x",), "verify.timeout_seconds=x must be a number"),
        (("verify.timeout_seconds=0",), "verify.timeout_seconds=0.0 must be a finite number above"),
        (("verify.rocesses=2",), "verify.rocesses=2: there is no setting verify.rocesses; there"),
        (
            ("engine=deepspeed", "deepspeed.zero_stage=0", "parallel.precision=bf16"),
            "deepspeed.zero_stage=0 adds gradients up in parallel.precision=bf16",
        ),
        (("train.step=2",), "did you mean train.train_steps"),
    ],
)
def test_what_does_not_fit_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    ended = start("+model=magneto_tiny", *words, folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1 and not ended.stdout


def test_torchrun_is_refused(tmp_path: Path) -> None:
    ended = start("+model=magneto_tiny", folder=tmp_path, WORLD_SIZE="2")
    assert ended.returncode == 2
    assert "error: WORLD_SIZE=2: launch/verify.py starts its processes itself" in ended.stderr


def test_nothing_heavy_is_imported_before_the_check(tmp_path: Path) -> None:
    ended = start(
        *("+model=magneto_tiny", "verify.processes=0"),
        folder=tmp_path,
        python=("-X", "importtime", SCRIPT),
    )
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "pretrain.shrink" in imported
    assert not imported & {"torch", "megatron", "numpy", "wandb", "pretrain.parity"}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RanksFailed("rank 1 of 2: why"), "rank 1 of 2: why\n\nFAIL: the training did not run"),
        (NearTie("two scores"), "No verdict: two scores."),
    ],
)
def test_no_verdict_is_no_pass(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("pretrain.verify.verify", fail)
    config = load(["+model=magneto_tiny", "parallel=tp2"])
    assert not report(config, shrink(config, 2), timeout=1.0)
    assert words in capsys.readouterr().out


def run(monkeypatch: pytest.MonkeyPatch, train: Callable[..., Any], timeout: float = 20.0) -> Any:
    monkeypatch.setattr("pretrain.verify.train_on_rank", train)
    return run_ranks(2, EXERCISE, layout(tp=2), timeout)


def test_each_rank_gives_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, lambda *arguments: os.environ["RANK"]) == ["0", "1"]


def test_a_rank_that_raises_is_named_and_the_others_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(*arguments: Any) -> None:
        if os.environ["RANK"] == "1":
            raise ValueError("seeded")
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)rank 0 of 2: stopped.*rank 1 of 2: .*seeded"):
        run(monkeypatch, train)
    assert time.monotonic() - began < 15


def test_a_rank_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*arguments: Any) -> None:
        if os.environ["RANK"] == "0":
            os._exit(3)
        time.sleep(60)

    with pytest.raises(RanksFailed, match="rank 0 of 2: ended with exit code 3"):
        run(monkeypatch, train)


def test_ranks_that_hang_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RanksFailed, match="rank 1 of 2: still busy when time was over"):
        run(monkeypatch, lambda *arguments: time.sleep(60), timeout=1.0)
