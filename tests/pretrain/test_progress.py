"""Plain lines with a clock of our own; the live line on a real pseudo-terminal."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.progress import Progress, format_duration

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.4, "0:07"), (754, "12:34"), (12345, "3:25:45"), (185100, "2d 03:25")],
)
def test_durations(seconds: float, text: str):
    assert format_duration(seconds) == text


def run(progress: Progress, clock: Clock, first: int, last: int, seconds: float) -> None:
    for step in range(first, last + 1):
        clock.now += seconds
        metrics = {"train/loss": 10.0 / step, "throughput/tokens_per_second": 12345.6}
        progress.update(step, metrics)


def test_plain_lines_first_last_and_rarely_in_between():
    out, clock = io.StringIO(), Clock()
    progress = Progress(95, file=out, clock=clock, log_interval=10, min_seconds=30)
    run(progress, clock, 1, 95, seconds=1.0)
    progress.close()
    lines = out.getvalue().splitlines()
    # the first; then every 30 s, at the next multiple of 10; the last
    assert [line.split("/")[0] for line in lines] == ["step  1", "step 40", "step 70", "step 95"]
    assert lines[0] == "step  1/95  loss 10.0000  12,346 tokens/s  1:34 left"
    assert lines[-1] == "step 95/95  loss 0.1053  12,346 tokens/s  done"


def test_remaining_time_does_not_see_an_evaluation():
    out, clock = io.StringIO(), Clock()
    progress = Progress(100, start_step=40, file=out, clock=clock, min_seconds=0)
    run(progress, clock, 41, 45, seconds=2.0)
    clock.now += 500  # evaluation
    run(progress, clock, 46, 50, seconds=2.0)
    assert out.getvalue().splitlines()[-1].endswith("1:40 left")  # 50 steps of 2 s


def test_updates_several_steps_apart():
    out, clock = io.StringIO(), Clock()
    progress = Progress(100, file=out, clock=clock, min_seconds=0)
    clock.now += 30
    progress.update(10, {})
    assert out.getvalue() == "step  10/100  4:30 left\n"


def test_messages_and_silence():
    out = io.StringIO()
    progress = Progress(10, file=out)
    progress.message("saved [bold]step 5")
    assert out.getvalue() == "saved [bold]step 5\n"
    progress.close()
    progress.close()
    progress.message("after the end")
    silent = Progress(10, enabled=False, file=out)
    silent.update(1, {})
    silent.message("nobody")
    silent.close()
    assert out.getvalue() == "saved [bold]step 5\n"


def test_live_line_on_a_terminal():
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pretrain.progress import Progress\n"
        "p = Progress(4, start_step=1)\n"
        "for step in (2, 3, 4):\n"
        "    time.sleep(0.05)\n"
        "    p.update(step, {'train/loss': 2.5, 'throughput/tokens_per_second': 1000.0})\n"
        "    p.message(f'saved [bold]{step}')\n"
        "p.close()\n"
    )
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT)], stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    output = b""
    try:
        while block := os.read(master, 65536):
            output += block
    except OSError:  # Linux reports the closed terminal as EIO
        pass
    os.close(master)
    assert process.wait(timeout=20) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    assert "saved [bold]3" in text
    last = [line for line in re.split(r"[\r\n]+", text) if line.startswith("step")][-1]
    assert re.search(r"4/4\s+━+\s+loss 2\.5000  1,000 tokens/s  done", last)
    assert len(last.rstrip()) <= 100
