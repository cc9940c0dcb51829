"""Ctrl-C while commands are at work, as a terminal sends it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data.tokenize_corpus import DEMO_TOKENIZER

ROOT = Path(__file__).resolve().parents[2]


def interrupted(words: list[str], folder: Path, at_work: Callable[[psutil.Process], bool]) -> None:
    """Starts the command, sends SIGINT once it is at work, and looks at how it ends."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        seen = psutil.Process(process.pid)
        until = time.monotonic() + 60
        while not at_work(seen) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert said.splitlines()[-1:] == ["interrupted"], said
    assert "Traceback" not in said and process.returncode == 130


def has_open(name: str) -> Callable[[psutil.Process], bool]:
    return lambda process: any(file.path.endswith(name) for file in process.open_files())


def has_loaded(name: str) -> Callable[[psutil.Process], bool]:
    return lambda process: any(name in part.path for part in process.memory_maps())


@pytest.mark.parametrize("command", ["train_tokenizer", "tokenizer_report"])
def test_amid_the_work(command: str, tmp_path: Path) -> None:
    line = '{"text": "Wort für Wort.", "language": "de", "doc_id": "1"}\n'
    (tmp_path / "text.jsonl").write_text(line * 1_000_000)  # seconds, only to read
    more = [] if command == "train_tokenizer" else ["--tokenizer", str(DEMO_TOKENIZER)]
    words = ["-m", f"data.{command}", "text.jsonl", "--out", "out", *more]
    interrupted(words, tmp_path, has_open("text.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.parametrize("command", [[str(ROOT / "launch/pretrain.py")], ["-m", "launch.check"]])
def test_amid_the_imports(command: list[str], tmp_path: Path) -> None:
    interrupted([*command, "+model=magneto_tiny"], tmp_path, has_loaded("yaml"))


def test_other_errors_are_told_as_ever() -> None:
    code = "from data.interrupted import say_interrupted; say_interrupted(); 1 / 0"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1 and "ZeroDivisionError: division by zero" in ended.stderr


def test_none_is_lost_in_a_finalizer() -> None:
    code = """
import signal, time
from data.interrupted import say_interrupted

class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)

say_interrupted()
Finalized()
for _ in range(100):
    time.sleep(0.1)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_other_errors_in_a_finalizer_are_told_as_ever() -> None:
    code = """
from data.interrupted import say_interrupted

class Finalized:
    def __del__(self):
        1 / 0

say_interrupted()
Finalized()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0
    assert ended.stderr.startswith("Exception ignored") and "ZeroDivisionError" in ended.stderr
