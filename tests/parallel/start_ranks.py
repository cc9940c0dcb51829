"""Starts ranks that behave, stay away, fail or hang, for test_runtime.py.

    torchrun start_ranks.py TIMEOUT ROLE [ROLE ...]     is one rank, playing its role
    python start_ranks.py                               serves the test

As a server it imports megatron-core once and reads a line {"roles", "timeout", "port"} from
stdin; it forks one rank a role, each of which then ends as any Python process does: exit code,
atexit handlers and destructors are the real ones. It answers with one JSON line: for each rank
its exit code (null: it had to be killed), what it wrote, and the seconds it lived.

Roles: "well"; "absent"; "late:SECONDS"; and, after the work of a start-up stage, "leave:STAGE",
"hang:STAGE", "fail:STAGE", "fail_once:STAGE" (only in the first of torchrun's attempts); or
"skip:STAGE": sleep instead of that work, so that the others are stuck inside it.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.whole_lines import write_whole_lines
from parallel import runtime
from parallel.config import ParallelConfig

_PATIENCE = 40.0  # seconds before a rank counts as hung

_WORK = {
    "rendezvous": (runtime, "_choose_device"),
    "process group": (runtime.dist, "init_process_group"),
    "model-parallel groups": (runtime.parallel_state, "initialize_model_parallel"),
    "first collective": (runtime, "_first_collective"),
}


def misbehave(how: str) -> None:
    if how == "leave":
        os._exit(0)
    if how == "hang":
        time.sleep(1000)
    if how == "fail" or os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        raise ArithmeticError("made to fail")


def play(role: str, timeout: float) -> None:
    how, _, where = role.partition(":")
    if how == "absent":
        return
    if how == "late":
        time.sleep(float(where))
    elif how != "well":
        module, name = _WORK[where]
        work = getattr(module, name)

        def then_misbehave(*args: object, **kwargs: object) -> object:
            if how == "skip":
                time.sleep(1000)
            result = work(*args, **kwargs)
            misbehave(how)
            return result

        setattr(module, name, then_misbehave)
    config = ParallelConfig(startup_timeout_seconds=timeout, collective_timeout_seconds=60.0)
    running = runtime.initialize(config, seed=1)
    print(running.describe(), flush=True)
    runtime.shutdown(running)


def start(roles: list[str], port: int, timeout: float) -> list[dict] | None:
    """Fork one process a role. Returns their reports, or None inside a forked rank at its end."""
    started = time.monotonic()
    logs, pids = [], []
    for rank, role in enumerate(roles):
        log = tempfile.TemporaryFile()  # noqa: SIM115 - read at the end
        pid = os.fork()
        if pid == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(len(roles)),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            play(role, timeout)
            return None
        logs.append(log)
        pids.append(pid)
    reports: dict[int, dict] = {}
    while len(reports) < len(pids):
        hung = time.monotonic() - started > _PATIENCE
        for rank, pid in enumerate(pids):
            if rank in reports:
                continue
            if hung:
                os.kill(pid, 9)
            done, status = os.waitpid(pid, 0 if hung else os.WNOHANG)
            if not done:
                continue
            logs[rank].seek(0)
            reports[rank] = {
                "code": None if hung else os.waitstatus_to_exitcode(status),
                "text": logs[rank].read().decode(errors="replace"),
                "seconds": time.monotonic() - started,
            }
        time.sleep(0.01)
    return [reports[rank] for rank in range(len(pids))]


def main() -> None:
    if "RANK" in os.environ:
        write_whole_lines()  # as the launcher does
        timeout, *roles = sys.argv[1:]
        play(roles[int(os.environ["RANK"])], float(timeout))
        return
    for line in sys.stdin:
        job = json.loads(line)
        reports = start(job["roles"], job["port"], job["timeout"])
        if reports is None:  # a forked rank, at the end of its role
            return
        print(json.dumps(reports), flush=True)


if __name__ == "__main__":
    main()
