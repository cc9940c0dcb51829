"""The launcher as a user starts it, up to the point where torch would be imported."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.utils import get_class

from models.config import nearest_divisor
from parallel.rank_layout import RankLayout

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "pretrain.py")
SILENT = ("hydra.cc", "HYDRA_FULL_ERROR", "Traceback", "Error executing job")


def start(
    *words: str,
    folder: Path,
    world_size: int = 1,
    local_rank: int = 0,
    python: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Runs `python launch/pretrain.py WORDS` in `folder`, as torchrun would one of its ranks."""
    ranks = {"WORLD_SIZE": world_size, "RANK": local_rank, "LOCAL_RANK": local_rank}
    if world_size == 1:
        ranks = {}  # no torchrun
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, *(python or (SCRIPT,)), *words],
        cwd=folder,
        env=os.environ | {name: str(value) for name, value in ranks.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    print(f"{time.monotonic() - began:.2f} s: {' '.join(words)}")
    assert not [word for word in SILENT if word in ended.stderr], ended.stderr
    assert not list(folder.iterdir())  # nothing is written before the run itself starts
    return ended


def test_no_model(tmp_path: Path) -> None:
    ended = start(folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no model is chosen; add +model=NAME")
    assert "magneto_70b" in ended.stderr


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("parallel.tensor_parallel_size=2", "did you mean parallel.tensor_model_parallel_size"),
        ("model=magneto_1b", "write +model=magneto_1b"),
        ("train.train_steps=abc", "must be a whole number"),
        ("parallel=2", "names no file of conf/parallel"),
        ("parallel.context_parallel_size=0", "parallel.context_parallel_size=0 must be 1 or more"),
    ],
)
def test_wrong_words(word: str, words: str, tmp_path: Path) -> None:
    model = () if word.startswith("model") else ("+model=magneto_tiny",)
    ended = start(*model, word, folder=tmp_path)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith(f"error: {word}")
    assert words in ended.stderr


@pytest.mark.parametrize("more", [(), ("train.train_steps=1,2", "--multirun")], ids=str)
def test_a_switch_where_text_belongs(more: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nrun_dir: off\n"
    )
    (tmp_path / "here").mkdir()
    words = ("+model=magneto_tiny", "+experiment=mine", *more)
    ended = start("--config-dir", str(tmp_path / "own"), *words, folder=tmp_path / "here")
    assert ended.returncode == 2
    (told,) = ended.stderr.splitlines()  # OmegaConf would have a run in a folder named False
    assert told.startswith("error: experiment/mine.yaml line 2: run_dir must be text")


def test_layout_against_the_number_of_processes(tmp_path: Path) -> None:
    words = ("+model=magneto_tiny", "parallel=tp2_pp2", "data.seq_length=512")
    first = start(*words, folder=tmp_path, world_size=6)
    assert first.returncode == 2
    wrong_world, wrong_sequence = first.stderr.splitlines()
    assert "6 processes were started; start 4 or 8" in wrong_world
    assert "data.seq_length=512 must not exceed" in wrong_sequence

    second = start(*words, folder=tmp_path, world_size=6, local_rank=1)
    assert (second.returncode, second.stderr) == (2, "")  # once on each node, but all leave


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", SCRIPT)
    ended = subprocess.run(
        [sys.executable, *torchrun, "+model=magneto_tiny", "parallel=tp2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode != 0
    told = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "3 processes were started; start 2 or 4 with torchrun" in told[0]


@pytest.mark.slow
def test_a_refusal_of_the_run_is_a_message_too(tmp_path: Path) -> None:
    ended = start("+experiment=tiny_cpu", f"data.corpus={tmp_path}/none", folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.strip().startswith(f"error on rank 0: data.corpus={tmp_path}/none: no such")


def test_only_what_we_raise_ourselves_is_said_without_a_traceback() -> None:
    from launch.pretrain import raised_by_us

    def caught(function: Callable[[], object]) -> Exception:
        try:
            function()
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    assert raised_by_us(caught(lambda: RankLayout(world_size=0)))
    assert not raised_by_us(caught(lambda: nearest_divisor(0, 1)))  # min() of nothing
    assert not raised_by_us(caught(lambda: int("a")))
    # a library's own `raise`, even where the virtual environment lies inside the repository
    assert not raised_by_us(caught(lambda: get_class("nowhere")))


def test_folders_of_a_sweep() -> None:
    from launch.pretrain import LONGEST_FOLDER, folder_of_job

    assert folder_of_job("optimizer.lr=1e-3,train.seed=2") == "optimizer.lr_1e-3_train.seed_2"
    long, other = ("data.languages=[de,hi]," * 20 + f"train.seed={seed}" for seed in (1, 2))
    assert len(folder_of_job(long)) == LONGEST_FOLDER
    assert folder_of_job(long) != folder_of_job(other)


def test_every_problem_has_a_line(tmp_path: Path) -> None:
    ended = start("+model=magneto_tiny", "optimizer.lr=0", "data.seed=-1", folder=tmp_path)
    assert ended.returncode == 2
    assert sorted(line[:20] for line in ended.stderr.splitlines()) == [
        "error: data.seed=-1:",
        "error: optimizer.lr=",
    ]


def test_cfg_job_prints_every_setting(tmp_path: Path) -> None:
    ended = start(
        *("--cfg", "job", "--resolve", "+model=magneto_1b", "optimizer.lr=5e-4"), folder=tmp_path
    )
    assert ended.returncode == 0
    for line in (
        "  hidden_size: 2048",
        "  lr: 0.0005",
        "  xpos_scale_base: 512.0",
        "run_dir: runs/magneto_1b",
    ):
        assert line in ended.stdout.splitlines()


def test_help_and_info(tmp_path: Path) -> None:
    helped = start("--help", folder=tmp_path)
    assert helped.returncode == 0
    assert "torchrun" in helped.stdout and "magneto_70b" in helped.stdout
    informed = start("--info", "defaults", "+model=pre_ln_tiny", folder=tmp_path)
    assert informed.returncode == 0
    assert "model/pre_ln_tiny" in informed.stdout


def test_unknown_flag(tmp_path: Path) -> None:
    ended = start("--modle", folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --modle: there is no such option; ")


def test_as_a_module(tmp_path: Path) -> None:
    at_home = subprocess.run(
        [sys.executable, "-m", "launch.pretrain", "train.step=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert at_home.returncode == 2
    assert "did you mean train.train_steps" in at_home.stderr


def test_what_a_start_imports_is_not_searched_for_garbage() -> None:
    code = """
import gc
from launch.pretrain import imports_that_stay

with imports_that_stay():
    assert not gc.isenabled()
    import pretrain.run
    kept = [[] for _ in range(1000)]
frozen = gc.get_freeze_count()
assert gc.isenabled() and frozen > 1000
with imports_that_stay():  # the next job of a sweep
    assert gc.isenabled()
    kept += [[] for _ in range(1000)]
assert gc.get_freeze_count() <= frozen
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "words", [(), ("--help",), ("train.step=5",), ("+model=magneto_tiny", "parallel=tp2")]
)
def test_nothing_heavy_is_imported_before_the_run(words: tuple[str, ...], tmp_path: Path) -> None:
    ended = start(*words, folder=tmp_path, python=("-X", "importtime", SCRIPT))
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "megatron", "megatron.core", "numpy", "wandb", "pretrain.run"}
