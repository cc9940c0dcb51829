"""Real signals to real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pretrain.stop_signal import REPEAT_SECONDS, StopSignal, stop_signal

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
    import os, sys, threading, time
    sys.path.insert(0, {root!r})
    from pretrain.stop_signal import StopSignal

    with StopSignal() as stop:
        os.write(1, b"ready\\n")  # print would write the end of a line by itself under torchrun
        {wait}
    os.write(1, f"clean exit after {{stop.requested}}\\n".encode())
"""
# C code that lets other threads run but no signal handler, for half a minute: like a collective
STUCK = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 100_000_000)"
UNTIL_REQUESTED = "exec('while not stop.requested: time.sleep(0.01)'); time.sleep(0.3)"
LONG_SAVE = "exec('while not stop.requested: time.sleep(0.01)'); time.sleep(5)"


def start(wait: str) -> subprocess.Popen[str]:
    code = textwrap.dedent(WORKER).format(root=str(ROOT), wait=wait)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_first_signal_sets_the_flag_and_tells_once(number: signal.Signals):
    said: list[str] = []
    with StopSignal(announce=said.append) as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # the same request, arriving twice
        assert stop.requested == number.name
        deadline = time.monotonic() + 5
        while not said and time.monotonic() < deadline:
            time.sleep(0.005)
    assert len(said) == 1
    assert said[0].startswith(f"{number.name}: stopping after this step")


def test_handlers_and_wakeup_descriptor_are_put_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyError), StopSignal(announce=None):
        raise KeyError("a step failed")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_process_ends_cleanly_after_its_step():
    process = start(UNTIL_REQUESTED)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert out == "clean exit after SIGINT\n"
    assert "Press Ctrl-C again" in err
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)],  # shell; torchrun
)
@pytest.mark.parametrize("wait", [LONG_SAVE, STUCK])
def test_second_signal_after_ctrl_c_aborts_even_in_blocking_code(
    first: signal.Signals, second: signal.Signals, wait: str
):
    process = start(wait)
    process.send_signal(first)
    time.sleep(REPEAT_SECONDS + 0.3)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(second)
    out, _ = process.communicate(timeout=20)
    assert time.monotonic() - sent < 2
    assert process.returncode == 128 + second
    assert out == ""


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGUSR1, signal.SIGTERM),
    ],
)
def test_what_a_batch_system_repeats_does_not_abort(first: signal.Signals, later: signal.Signals):
    process = start("exec('while not stop.requested: time.sleep(0.01)'); time.sleep(2)")
    process.send_signal(first)
    process.send_signal(first)
    time.sleep(REPEAT_SECONDS + 0.3)
    process.send_signal(later)
    out, _ = process.communicate(timeout=20)
    assert out == f"clean exit after {first.name}\n"
    assert process.returncode == 0


def test_a_handler_of_its_own_overrides_inherited_ignoring():
    """As torchrun's workers inherit it from `trap '' USR1`; what came before is lost."""
    code = textwrap.dedent(WORKER).format(root=str(ROOT), wait=UNTIL_REQUESTED)
    early = f"import os; os.kill(os.getpid(), {int(signal.SIGUSR1)})\n"
    process = subprocess.Popen(
        ["bash", "-c", 'trap "" USR1; exec "$0" -c "$1"', sys.executable, early + code],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=20)
    assert out == "clean exit after SIGUSR1\n"


def test_rank_0_speaks_for_the_run(monkeypatch: pytest.MonkeyPatch):
    assert stop_signal()._announce is not None
    monkeypatch.setenv("RANK", "1")
    assert stop_signal()._announce is None


def test_two_sigints_at_once_count_as_one():
    process = start(UNTIL_REQUESTED)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert out == "clean exit after SIGINT\n"


def test_torchrun_forwards_sigint_to_its_workers_and_waits_for_them(tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER).format(root=str(ROOT), wait=UNTIL_REQUESTED))
    agent = subprocess.Popen(
        [
            *[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
            str(script),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert agent.stdout is not None
    assert [agent.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    agent.send_signal(signal.SIGINT)  # to the agent alone, as a terminal does
    out, err = agent.communicate(timeout=60)
    assert out.count("clean exit after SIGINT") == 2
    assert agent.returncode == 1 and "SignalException" in err


def test_leaving_does_not_wait_for_children_that_hold_the_pipe() -> None:
    """A child forked meanwhile (the checkpoint writer's) has the pipe's write end too."""
    with StopSignal(announce=None):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        started = time.monotonic()
    try:
        assert time.monotonic() - started < 2
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
