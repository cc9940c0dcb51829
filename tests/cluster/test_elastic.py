"""torchrun starts a run again after a rank or a host is lost, and it goes on where it was saved.

Real processes, and real hosts where namespaces can be made: everything here is as a user starts it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks.recovery import workers_of
from pretrain.events import read_events
from pretrain.metrics_file import read_metrics
from tests.cluster.hosts import Hosts, why_not

ROOT = Path(__file__).resolve().parents[2]
SAVE_INTERVAL = 10
SETTINGS = [
    "+experiment=tiny_cpu",
    "train.eval_sequences=1",
    f"checkpoint.save_interval={SAVE_INTERVAL}",
]
needs_hosts = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def torchrun(*words: str, run_dir: Path, steps: int) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", *words]
    start += [str(ROOT / "launch" / "pretrain.py"), *SETTINGS]
    return [*start, f"train.train_steps={steps}", f"run_dir={run_dir}"]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; every step must be there once."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return {}
    lines = [(r["step"], r["train/loss"]) for r in read_metrics(path) if "train/loss" in r]
    assert len(dict(lines)) == len(lines)
    return dict(lines)


def wait_for(what: Callable[[], object], seconds: float, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it took too long"
        assert process.poll() is None, f"it ended with exit code {process.returncode}"
        time.sleep(0.02)


def between_two_saves(run_dir: Path) -> bool:
    """A step or two have been made since the newest checkpoint, and will have to be made again."""
    step = max(losses(run_dir), default=0)
    return step > SAVE_INTERVAL and 2 <= step % SAVE_INTERVAL <= 6


@contextmanager
def killed_with_its_children(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            process.kill()
        process.wait()


def check_what_was_made_again(
    run_dir: Path, before: dict[int, float], steps: int, tolerance: float = 0.0
) -> None:
    """Each step stands there once; those made twice came out the same."""
    after = losses(run_dir)
    assert list(after) == list(range(1, steps + 1))
    (resumed,) = [event for event in read_events(run_dir) if event["kind"] == "resume"]
    assert resumed["step"] % SAVE_INTERVAL == 0
    again = [step for step in before if step > resumed["step"]]
    assert again
    for step in again:
        assert after[step] == pytest.approx(before[step], rel=tolerance, abs=0.0)


@pytest.mark.timeout(900)  # seconds on an idle machine, minutes on a busy one
@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank_and_the_run_goes_on(tmp_path: Path) -> None:
    run_dir, steps = tmp_path / "run", 40
    words = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    batch = ["train.micro_batch_size=2"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            torchrun(*words, run_dir=run_dir, steps=steps) + batch,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        with killed_with_its_children(process):
            wait_for(lambda: between_two_saves(run_dir), 300, process)
            victim = workers_of(process.pid)[1]
            os.kill(victim, signal.SIGKILL)
            killed = time.time()
            before = losses(run_dir)
            assert process.wait(300) == 0, (tmp_path / "log").read_text()
    check_what_was_made_again(run_dir, before, steps)
    (death,) = [event for event in read_events(run_dir) if event["kind"] == "rank_dead"]
    assert "rank 1 on " in death["text"] and "its process has ended" in death["text"]
    assert death["time"] - killed < 10
    said = (tmp_path / "log").read_text()
    assert "error on rank 0: rank 1 on " in said or "PeerFailed: rank 1 on " in said


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_hosts
@pytest.mark.parametrize("fault", ["kill", "cut"])
def test_a_run_goes_on_with_fewer_hosts(fault: str, tmp_path: Path) -> None:
    run_dir, steps, lost = tmp_path / "run", 60, "h3"
    # One rendezvous round costs the slowest start of all hosts: on a busy machine torch alone takes
    # seconds to import, so the last call must be long enough for stragglers.
    words = ["--nnodes=2:3", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=test"]
    words += ["--rdzv-backend=c10d", "--rdzv-endpoint=h1:29400"]
    conf = "last_call_timeout=8,keep_alive_interval=2,keep_alive_max_attempt=3,join_timeout=120"
    command = torchrun(*words, f"--rdzv-conf={conf}", run_dir=run_dir, steps=steps)
    command += ["train.micro_batch_size=2", "train.global_batch_size=12"]
    with Hosts(3) as hosts, ExitStack() as files:
        processes = {}
        for name in hosts.names:
            log = files.enter_context(open(tmp_path / f"{name}.log", "w"))
            environment = {"GLOO_SOCKET_IFNAME": "eth0"}
            processes[name] = hosts.start(name, command, log, environment)
        wait_for(lambda: between_two_saves(run_dir), 600, processes["h1"])
        getattr(hosts, fault)(lost)
        broken = time.time()
        before = losses(run_dir)
        for name in ("h1", "h2"):
            assert processes[name].wait(900) == 0, (tmp_path / f"{name}.log").read_text()
    # another number of ranks adds up in another order
    check_what_was_made_again(run_dir, before, steps, tolerance=1e-4)
    (death,) = [event for event in read_events(run_dir) if event["kind"] == "rank_dead"]
    assert f"on {lost} died: no sign of life" in death["text"]
    noticed = death["time"] - broken
    (resumed,) = [event for event in read_events(run_dir) if event["kind"] == "resume"]
    print(f"{fault}: noticed after {noticed:.1f} s, again after {resumed['time'] - broken:.1f} s")
    assert noticed < 10
    assert json.loads((run_dir / "status.json").read_text())["world_size"] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_hosts
def test_both_sides_of_a_cut_cable_end_and_say_what_they_see(tmp_path: Path) -> None:
    """h1, cut off, has rank 0 and the store; nobody gets a reset, and no agent helps."""
    script = [sys.executable, str(ROOT / "tests" / "cluster" / "steps.py")]
    places = {0: "h1", 1: "h2", 2: "h2"}
    with Hosts(2) as hosts, ExitStack() as files:
        ranks = {}
        for rank, name in places.items():
            environment = {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank % 2)}
            environment |= {
                "MASTER_ADDR": "h1",
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": "eth0",
            }
            log = files.enter_context(open(tmp_path / f"log{rank}", "w"))
            ranks[rank] = hosts.start(name, script, log, environment)

        def said(rank: int) -> str:
            return (tmp_path / f"log{rank}").read_text()

        wait_for(lambda: all("under way" in said(rank) for rank in ranks), 600, ranks[0])
        hosts.cut("h1")
        cut = time.monotonic()
        ended: dict[int, float] = {}
        while len(ended) < 3:
            assert time.monotonic() - cut < 60, [said(rank) for rank in ranks]
            for rank, process in ranks.items():
                if rank not in ended and process.poll() is not None:
                    assert process.returncode == 1
                    ended[rank] = time.monotonic() - cut
            time.sleep(0.02)
    print("ended after", {rank: f"{seconds:.1f} s" for rank, seconds in sorted(ended.items())})
    assert "PeerFailed: ranks 1-2 on h2 died: no sign of life for" in said(0)
    assert "found by rank 0 on h1" in said(0)
    for rank in (1, 2):
        assert "PeerFailed: the store on h1:29500 is out of reach: no answer for" in said(rank)
        assert "or the network between it and h2 is cut" in said(rank)
    assert max(ended.values()) < 10.5
