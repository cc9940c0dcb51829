"""Trains the same decoder in this project and in its peers, side by side, on a CPU.

    python -m benchmarks.train_step --job small --rounds 3 --steps 6

Every framework runs in its own process and its own virtual environment, and beside each runs the
plain loop: one step of the framework, one of the plain loop, and so on, never both at once. On a
shared machine the speed changes by a third within a minute, but neighbouring steps share it, so
their ratio is what to quote. Each step is also compared with an fp32 matmul timed right before and
after it in the same process. Prints a table; writes the figures of every single step as JSON, and
the table as Markdown beside it. docs/benchmarks.md: how to read it.
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import IO

from benchmarks import peer_venvs
from benchmarks.jobs import JOBS, Job
from benchmarks.peer_venvs import Environment

REPOSITORY = Path(__file__).resolve().parents[1]
# as in peers/measure.py, which imports torch
RESULT_MARK = "BENCHMARK_RESULT "
READY_MARK = "BENCHMARK_READY"
TURNS_VARIABLE = "BENCHMARK_TURNS"
BASELINE = "plain"
INSTALL_TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True)
class Peer:
    name: str
    module: str  # in benchmarks/peers/
    environment: Environment
    variant: str = ""


PEERS = {
    peer.name: peer
    for peer in (
        Peer("magnetron", "magnetron", peer_venvs.OWN, "magneto"),
        Peer("magnetron-pre-ln", "magnetron", peer_venvs.OWN, "pre_ln"),
        Peer("plain", "plain", peer_venvs.OWN),
        Peer("megatron-core", "megatron_core", peer_venvs.OWN),
        Peer("litgpt", "litgpt", peer_venvs.LITGPT),
        Peer("torchscale-subln", "torchscale", peer_venvs.TORCHSCALE, "subln"),
        Peer("torchscale-subln-xpos", "torchscale", peer_venvs.TORCHSCALE, "subln_xpos"),
        Peer("hf-gpt2", "transformers", peer_venvs.TRANSFORMERS, "gpt2"),
        Peer("hf-llama", "transformers", peer_venvs.TRANSFORMERS, "llama"),
        Peer("torchtitan-llama3", "torchtitan", peer_venvs.TORCHTITAN),
    )
}


@dataclass(frozen=True)
class Row:
    """One peer's line of the table, over all its rounds."""

    peer: str
    version: str
    parameters_millions: float
    tokens_per_second: float  # median over steps
    best_tokens_per_second: float
    cpu_seconds_per_step: float  # median over steps
    ratio_to_plain: float | None  # plain's CPU-seconds / this peer's: above 1 is cheaper
    waited_seconds_per_step: float  # median: ready to run, and other processes had the cores
    share_of_matmul: float  # median over steps of model FLOP/s / matmul FLOP/s around that step
    peak_rss_mb: float  # highest of the rounds
    first_loss: float | None
    last_loss: float | None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class PeerProcess:
    """A peer's process, which waits before every step until it is told to take it."""

    def __init__(self, peer: Peer, job: Job, *, steps: int, warmup: int, venvs: Path) -> None:
        command = [
            str(peer_venvs.python_of(peer.environment, venvs)),
            *("-W", "ignore", "-m", f"benchmarks.peers.{peer.module}"),
            *("--job", job.name, "--steps", str(steps), "--warmup", str(warmup)),
            *("--variant", peer.variant),
        ]
        environment = os.environ | {
            TURNS_VARIABLE: "1",
            "OMP_NUM_THREADS": str(job.threads),
            "MKL_NUM_THREADS": str(job.threads),
            # what torchrun would set; the peers that need no process group take no notice
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        self._stderr: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in stop()
        self._process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self.result: dict | None = None

    def wait_until_ready(self) -> bool:
        """Until the next step could begin; False if there is none, and `result` is set."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(READY_MARK):
                return True
            if line.startswith(RESULT_MARK):
                self.result = json.loads(line.removeprefix(RESULT_MARK))
                return False
        return False

    def take_step(self) -> bool:
        """One step, to its end; as `wait_until_ready`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        return self.wait_until_ready()

    def kill(self) -> None:
        self._process.kill()

    def stop(self, limit: str) -> dict:
        """The line StepMeter.print_result wrote, or {"failed": reason, "stderr": ...}."""
        if self.result is None and self._process.poll() is None:
            self.kill()
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._stderr.seek(0)
        stderr = self._stderr.read()
        self._stderr.close()
        if self.result is not None:
            return self.result
        last_lines = stderr.strip().splitlines()[-1:] or [f"no output, or no result within {limit}"]
        return {"failed": f"exit status {status}: {last_lines[0]}", "stderr": stderr}


def run_in_turns(
    peers: list[Peer], job: Job, *, steps: int, warmup: int, venvs: Path, timeout_seconds: float
) -> list[dict]:
    """The results of `peers`, each in its process, taking a step each in turns.

    Two peers of the large job hold up to 6 GB together.
    """
    processes = [PeerProcess(p, job, steps=steps, warmup=warmup, venvs=venvs) for p in peers]
    watchdog = threading.Timer(timeout_seconds, lambda: [p.kill() for p in processes])
    watchdog.start()
    try:
        running = [process for process in processes if process.wait_until_ready()]
        while running:
            running = [process for process in running if process.take_step()]
    finally:
        watchdog.cancel()
        results = [process.stop(f"{timeout_seconds:.0f} s") for process in processes]
    return results


def summarize(job: Job, name: str, runs: list[dict], beside: list[dict]) -> Row:
    """Puts one peer's rounds together; `beside` are the plain loop's runs beside them, or empty.

    The ratio is taken step by step, then its median: neighbours in time share the machine's mood.
    """
    wall = [seconds for run in runs for seconds in run["wall_seconds"]]
    matmul = [rate for run in runs for rate in run["matmul_gflops"]]
    gflop_per_step = job.flops_per_token() * job.tokens_per_step / 1e9
    ratios = [
        theirs / ours
        for run, base in zip(runs, beside, strict=False)
        for ours, theirs in zip(run["cpu_seconds"], base["cpu_seconds"], strict=True)
    ]
    losses = runs[0]["losses"]
    return Row(
        peer=name,
        version=runs[0]["version"],
        parameters_millions=runs[0]["parameters"] / 1e6,
        tokens_per_second=job.tokens_per_step / median(wall),
        best_tokens_per_second=job.tokens_per_step / min(wall),
        cpu_seconds_per_step=median(seconds for run in runs for seconds in run["cpu_seconds"]),
        ratio_to_plain=median(ratios) if ratios else None,
        waited_seconds_per_step=median(s for run in runs for s in run["waited_seconds"]),
        share_of_matmul=median(
            gflop_per_step / seconds / rate for seconds, rate in zip(wall, matmul, strict=True)
        ),
        peak_rss_mb=max(run["peak_rss_mb"] for run in runs),
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
    )


def is_held_up(row: Row, job: Job) -> bool:
    """Its steps waited for a core for more than a twentieth of their wall time."""
    seconds_per_step = job.tokens_per_step / row.tokens_per_second
    return row.waited_seconds_per_step > 0.05 * seconds_per_step


def markdown_table(rows: list[Row]) -> str:
    def number(value: float | None, places: int) -> str:
        return "-" if value is None else f"{value:.{places}f}"

    lines = [
        "| peer | version | M params | tok/s median | best | CPU-s/step | vs plain (CPU) "
        "| waited s/step | share of matmul | peak RSS MB | loss first → last |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        cells = [
            row.peer,
            row.version,
            number(row.parameters_millions, 1),
            number(row.tokens_per_second, 0),
            number(row.best_tokens_per_second, 0),
            number(row.cpu_seconds_per_step, 2),
            number(row.ratio_to_plain, 2),
            number(row.waited_seconds_per_step, 2),
            number(row.share_of_matmul, 2),
            number(row.peak_rss_mb, 0),
            f"{number(row.first_loss, 3)} → {number(row.last_loss, 3)}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cpu_name() -> str:
    """The processor's model as the kernel names it; the architecture where it does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def describe_job(job: Job) -> str:
    gflop = job.flops_per_token() * job.tokens_per_step / 1e9
    return (
        f"`{job.name}`: {job.num_layers} layers, hidden {job.hidden_size}, ffn "
        f"{job.ffn_hidden_size}, {job.num_attention_heads} heads, vocabulary {job.vocab_size}, "
        f"{job.micro_batch_size} sequences of {job.seq_length} tokens, fp32, untied embeddings, "
        f"{job.threads} thread(s), {gflop:.0f} GFLOP a step"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=JOBS, default="small")
    parser.add_argument("--rounds", type=int, default=3, help="times every peer has its turn")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of one turn")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    peer_venvs.add_peer_arguments(parser, PEERS, "environments")
    parser.add_argument(
        "--json", type=Path, default=None,
        help="where the figures go, and the table with the suffix .md "
        "(default: outputs/benchmarks/train_step_JOB.json)",
    )  # fmt: skip
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one turn")
    return peer_venvs.parse_with_at_least_one(parser, None, "rounds", "steps")


def main() -> int:
    given = parse_arguments()
    job = JOBS[given.job]
    given.venvs = given.venvs.expanduser().resolve()
    peers = [PEERS[name] for name in given.peers]
    failures = peer_venvs.install_peers(
        {peer.name: peer.environment for peer in peers}, given.venvs, INSTALL_TIMEOUT_SECONDS
    )
    started = datetime.now(UTC).isoformat(timespec="seconds")
    runs, beside = run_all(given, job, peers, failures)
    rows = [summarize(job, name, done, beside[name]) for name, done in runs.items() if done]
    machine = f"{cpu_name()}, {os.cpu_count()} CPUs, {started}"
    machine += f", {given.rounds} rounds x {given.steps} steps"
    text = describe(job, machine, rows, failures)
    print(text, flush=True)

    path = given.json or Path("outputs/benchmarks") / f"train_step_{job.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "started": started,
        "machine": machine,
        "job": asdict(job) | {"flops_per_token": job.flops_per_token()},
        "rows": [asdict(row) for row in rows],
        "runs": runs,
        "failures": failures,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\nwritten: {path}, {path.with_suffix('.md')}", file=sys.stderr)
    return 1 if failures else 0


def run_all(
    given: argparse.Namespace, job: Job, peers: list[Peer], failures: dict[str, str]
) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """Every peer's turns, and those of the plain loop beside it; adds to `failures`.

    The plain loop's own row is made of all of its turns.
    """
    runs: dict[str, list[dict]] = {peer.name: [] for peer in peers}
    beside: dict[str, list[dict]] = {peer.name: [] for peer in peers}
    baseline = PEERS[BASELINE]
    alone = given.peers == [BASELINE]
    for round_number in range(1, given.rounds + 1):
        for peer in peers:
            if peer.name in failures or (peer is baseline and not alone):
                continue
            result, *plain = run_in_turns(
                [peer] if peer is baseline else [peer, baseline],
                job,
                steps=given.steps,
                warmup=given.warmup,
                venvs=given.venvs,
                timeout_seconds=given.timeout,
            )
            where = f"round {round_number}/{given.rounds} {peer.name}"
            result = next((r for r in (result, *plain) if "failed" in r), result)
            if "failed" in result:
                failures[peer.name] = result["failed"]
                runs[peer.name].clear()
                beside[peer.name].clear()
                print(f"{where}: FAILED\n{result.get('stderr', result['failed'])}", file=sys.stderr)
                continue
            runs[peer.name].append(result)
            beside[peer.name] += plain
            rate = job.tokens_per_step / median(result["wall_seconds"])
            cpu = median(result["cpu_seconds"])
            against = f", plain {median(plain[0]['cpu_seconds']):.2f}" if plain else ""
            print(f"{where}: {rate:.0f} tok/s, {cpu:.2f} CPU-s/step{against}", file=sys.stderr)
    if BASELINE in runs and not alone:
        runs[BASELINE] = beside[BASELINE] = [run for done in beside.values() for run in done]
    return runs, beside


def describe(job: Job, machine: str, rows: list[Row], failures: dict[str, str]) -> str:
    text = "\n\n".join([describe_job(job), machine, markdown_table(rows)])
    held_up = [row.peer for row in rows if is_held_up(row, job)]
    if held_up:
        text += (
            f"\n\nOther processes held up {', '.join(held_up)}: tok/s and share of matmul do not "
            "compare in this table, CPU-seconds do."
        )
    if failures:
        text += "\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in failures.items())
    return text


if __name__ == "__main__":
    sys.exit(main())
