"""Stands in for Python in a job (cluster.python), and trains nothing: a start takes 0.2 s.

What is under test is launch/slurm_job.sh on a real SLURM. The agent does with its worker what
torchrun does: a session of its own, its exit status, TERM passed on and an exit status of 1 after
it, no word about USR1. The worker counts steps
and leaves behind what a run does, through the run's own RunLock and RunStatus.

Environment: HOLD_AT=STEP, to wait there for USR1 or TERM at the first start, and HOLD_AT=STEP,STEP
at the second too, at start DEAF for ever, as in a step that takes too long; FAIL_AT=STEP, to fail
there on the second node while the first waits for it as in a collective, with FAIL_ONCE only at the
first start.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pretrain.run_lock import RunLock
from pretrain.run_status import FINISHED, RunStatus, read_status

SAVE_INTERVAL = 5  # steps
FIRST_START = "SLURM_RESTART_COUNT" not in os.environ
HOLD_AT = dict(enumerate(map(int, os.environ.get("HOLD_AT", "-1").split(","))))
START = os.environ.get("SLURM_RESTART_COUNT", "0")
HOLDS = HOLD_AT.get(int(START), -1)
DEAF = os.environ.get("DEAF") == START
FAILS = int(os.environ.get("FAIL_AT", "-1")) if FIRST_START or "FAIL_ONCE" not in os.environ else -1


def agent(words: list[str]) -> int:
    worker = subprocess.Popen([sys.executable, __file__, *words], start_new_session=True)
    told: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        told.append(number)
        worker.terminate()

    signal.signal(signal.SIGTERM, pass_on)
    code = worker.wait()
    return 1 if told else code


def worker(words: list[str]) -> int:
    stopped: list[int] = []
    for sent in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(sent, lambda number, frame: stopped.append(number))
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    run_dir, steps = Path(settings["run_dir"]), int(settings["train.train_steps"])
    if os.environ["SLURM_NODEID"] != "0":
        return follow(run_dir, stopped)
    with RunLock(run_dir) as lock:
        status = RunStatus(run_dir, lock)
        first = max(saved_steps(run_dir), default=0)
        status.starting(first, steps, world_size=2)
        for step in range(first + 1, steps + 1):
            time.sleep(0.02)
            status.running(step)
            status.heartbeat()
            with open(run_dir / "steps", "a") as file:
                file.write(f"{step} {os.environ.get('SLURM_RESTART_COUNT', '0')}\n")
            if step == FAILS:  # in a collective that never ends, no word is heard
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            while step == FAILS or (step == HOLDS and (DEAF or not stopped)):
                time.sleep(0.02)
            if step % SAVE_INTERVAL == 0 or stopped or step == steps:
                (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
            if stopped:
                status.ended("SIGUSR1")
                return 0
        status.ended(None)
    return 0


def follow(run_dir: Path, stopped: list[int]) -> int:
    """Another rank: ends when it is told to, when the first has ended, or with a failure."""
    while not stopped:
        status = read_status(run_dir) or {"state": "", "step": 0}
        if status["state"] == FINISHED:
            break
        if status["step"] == FAILS:
            print("no memory left", file=sys.stderr)
            return 1
        time.sleep(0.02)
    return 0


def saved_steps(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/step_*")]


if __name__ == "__main__":
    if sys.argv[1] == "-m":
        sys.exit(agent(sys.argv[2:]))
    code = worker(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as StopSignal leaves it; it may come again
    sys.exit(code)
