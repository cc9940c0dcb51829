"""Draws the same multilingual mixture with this project's loader and with its peers, side by side.

    python -m benchmarks.data --rounds 5

23 languages of 18.1 million tokens in all, 236 to 1 in size, 2048-token samples, ratios ~ n^0.3.
Every loader runs in a process of its own, most in a virtual environment of their own, and they take
turns: one draws for a while, then the next, and so on round by round, never two at once. Prints
Markdown tables; writes all figures as JSON, and the tables with the suffix .md beside them.
docs/benchmarks.md: how to read them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import IO, Any

from benchmarks import peer_venvs
from benchmarks.peer_venvs import Environment
from benchmarks.train_step import INSTALL_TIMEOUT_SECONDS, cpu_name

REPOSITORY = Path(__file__).resolve().parents[1]
RESULT_MARK = "BENCHMARK_RESULT "  # as in data_peers/measure.py, which runs elsewhere
PREPARED = "prepared.json"  # holds what was prepared by what, and how long it took; written last
PREFIXES_CHECKED = 4000  # every prefix up to here, by drawing the samples
FAR_PREFIXES = [10**5, 10**6 + 7, 10**7, 10**8 + 63, 10**9, 10**10 - 1, 10**10]  # by formula
PLANNED = [10**6, 10**8, 10**10]
NOT_RUN, SAME = "not run", "same"
START_LIMIT_SECONDS, START_LIMIT_MB = 0.05, 20.0
COPYING, OURS, OURS_LOADER = "copying", "magnetron", "magnetron-loader"


@dataclass(frozen=True)
class Peer:
    name: str
    module: str  # in benchmarks/data_peers/
    environment: Environment
    variant: str = ""
    mixes: bool = True  # at ratios that are asked for
    ceiling: bool = False  # no loader at all
    starts: bool = True  # start-up and resume are measured; False: they are another row's


PEERS = {
    peer.name: peer
    for peer in (
        Peer(COPYING, "copying", peer_venvs.OWN, mixes=False, ceiling=True, starts=False),
        Peer(
            "copying-block",
            "copying",
            peer_venvs.OWN,
            "block",
            mixes=False,
            ceiling=True,
            starts=False,
        ),
        Peer(OURS, "magnetron", peer_venvs.OWN, "mixture"),
        Peer(OURS_LOADER, "magnetron", peer_venvs.OWN, "loader", starts=False),
        Peer("megatron-core", "megatron_core", peer_venvs.OWN),
        Peer("mosaicml-streaming", "streaming", peer_venvs.STREAMING),
        Peer("litdata", "litdata", peer_venvs.LITDATA),
        Peer("datasets-map", "datasets", peer_venvs.DATASETS, "map"),
        Peer("datasets-iterable", "datasets", peer_venvs.DATASETS, "iterable"),
        Peer("torchdata", "torchdata", peer_venvs.TORCHDATA),
        Peer("torchdata-random-sampler", "torchdata", peer_venvs.TORCHDATA, "random-sampler"),
        Peer("datatrove", "datatrove", peer_venvs.DATATROVE, mixes=False),
    )
}


@dataclass
class Figures:
    """All that was measured of one peer."""

    version: str = ""
    length: str = ""  # "asked", "endless" or "data": data_peers.measure.Loader
    prepare_seconds: float = 0.0
    worst_error: float | None = None  # samples, at any prefix up to PREFIXES_CHECKED
    far_errors: list[float] | None = None  # samples, at FAR_PREFIXES
    singles: list[dict[str, float]] = field(default_factory=list)  # a turn each
    batches: list[dict[str, float]] = field(default_factory=list)
    anywhere: list[dict[str, float]] = field(default_factory=list)  # singles at random numbers
    starts: dict[int, dict[str, float]] = field(default_factory=dict)  # by planned samples
    resume: dict[str, Any] = field(default_factory=dict)

    def middle(self, kind: str, what: str) -> float:
        """Median over the turns of "singles", "batches" or "anywhere"; NaN without any."""
        turns = getattr(self, kind)
        return median(turn[what] for turn in turns) if turns else float("nan")


class PeerProcess:
    """A peer that serves: it waits for a command, carries it out, and answers."""

    def __init__(self, command: list[str], timeout_seconds: float):
        self._timeout = timeout_seconds
        self._stderr: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in stop()
        self._process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        """The next answer; RuntimeError with the last line of stderr if there is none in time."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(self._timeout, self._process.kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                if line.startswith(RESULT_MARK):
                    return json.loads(line.removeprefix(RESULT_MARK))
        finally:
            watchdog.cancel()
        status = self._process.wait()
        self._stderr.seek(0)
        last_line = self._stderr.read().strip().splitlines()[-1:] or [
            f"no output, or no result within {self._timeout:.0f} s"
        ]
        raise RuntimeError(f"exit status {status}: {last_line[0]}")

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, and `answer` says of what
            self._process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stderr.close()
        self._process.stdout.close()
        with suppress(BrokenPipeError):  # a command it was too late for
            self._process.stdin.close()


@dataclass(frozen=True)
class Bench:
    """Where everything lies, and how long things may take."""

    venvs: Path
    root: Path  # the raw data, and a folder for each peer
    seconds: float  # of one turn
    timeout_seconds: float  # of one answer

    def command(self, peer: Peer, task: str, *options: object) -> list[str]:
        return [
            str(peer_venvs.python_of(peer.environment, self.venvs)),
            *("-W", "ignore", "-m", f"benchmarks.data_peers.{peer.module}"),
            *("--raw", str(self.root / "raw"), "--work", str(self.work(peer))),
            *("--variant", peer.variant, "--task", task, "--seconds", str(self.seconds)),
            *map(str, options),
        ]

    def work(self, peer: Peer) -> Path:
        return self.root / peer.module

    def once(self, peer: Peer, task: str, *options: object) -> dict[str, Any]:
        """One task in a process of its own. RuntimeError where it fails."""
        process = PeerProcess(self.command(peer, task, *options), self.timeout_seconds)
        try:
            return process.answer()
        finally:
            process.stop()

    def prepare(self, peer: Peer) -> float:
        """Seconds it took to write the peer's format, now or when it was last done."""
        stamp = self.work(peer) / PREPARED
        wanted = [peer_venvs.TORCH, *peer.environment.requirements]
        if peer.environment != peer_venvs.OWN and stamp.is_file():
            record = json.loads(stamp.read_text())
            if record["requirements"] == wanted:
                return record["seconds"]
        # what runs in our own environment is always written anew: our format may have changed
        shutil.rmtree(self.work(peer), ignore_errors=True)
        seconds = self.once(peer, "prepare")["seconds"]
        stamp.write_text(json.dumps({"requirements": wanted, "seconds": seconds}) + "\n")
        return seconds


def measure_rates(
    bench: Bench,
    peers: list[Peer],
    figures: dict[str, Figures],
    failures: dict[str, str],
    rounds: int,
) -> None:
    """Ratios once, then rounds in which each peer draws singles and batches in turn."""
    processes: dict[str, PeerProcess] = {}
    try:
        for peer in peers:
            with _noting_failure(peer, failures):
                process = PeerProcess(bench.command(peer, "serve"), bench.timeout_seconds)
                processes[peer.name] = process
                found = figures[peer.name]
                about = process.answer()
                found.version, found.length = about["version"], about["length"]
                ratios = process.ask("ratios", samples=PREFIXES_CHECKED)
                found.worst_error = None if peer.ceiling else ratios["worst_error"]
                if peer.name == OURS:
                    far = process.ask("counts", prefixes=FAR_PREFIXES)
                    found.far_errors = far["worst_errors"]
                # a turn that does not count: caches, and what is made on first use
                for kind in ("singles", "batches", "anywhere"):
                    process.ask(kind)
        for round_number in range(1, rounds + 1):
            for peer in peers:
                if peer.name in failures:
                    continue
                with _noting_failure(peer, failures):
                    found = figures[peer.name]
                    found.singles.append(processes[peer.name].ask("singles"))
                    found.batches.append(processes[peer.name].ask("batches"))
                    anywhere = processes[peer.name].ask("anywhere")
                    if anywhere:
                        found.anywhere.append(anywhere)
                    print(
                        f"round {round_number}/{rounds} {peer.name}: "
                        f"{found.singles[-1]['samples_per_second']:.0f} singles/s, "
                        f"{found.batches[-1]['samples_per_second']:.0f} samples/s in batches",
                        file=sys.stderr,
                    )
    finally:
        for process in processes.values():
            process.stop()


def measure_start(bench: Bench, peer: Peer, found: Figures, *, repeats: int, full: bool) -> None:
    """Start-up, for each number of planned samples where that number means something.

    Wall time of the quickest of the repeats, and its CPU time.
    """
    if peer.name == OURS:
        planned = PLANNED
    else:
        planned = PLANNED[: 2 if full and found.length == "asked" else 1]
    for samples in planned:
        runs = [bench.once(peer, "start", "--planned", samples)]
        while len(runs) < repeats and runs[-1]["seconds"] < 5:
            runs.append(bench.once(peer, "start", "--planned", samples))
        found.starts[samples] = min(runs, key=lambda run: run["seconds"])
        print(f"start of {peer.name} at {samples:.0e}: {found.starts[samples]}", file=sys.stderr)


def measure_resume(bench: Bench, peer: Peer, found: Figures) -> None:
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.pickle"
        saved = bench.once(peer, "save", "--state", state)
        resumed = bench.once(peer, "resume", "--state", state)
    found.resume = {
        "exact": saved["digest"] == resumed["digest"],
        "seconds": resumed["seconds"],
        "state_bytes": saved["state_bytes"],
    }


def rate_table(figures: dict[str, Figures]) -> str:
    lines = [
        "| loader | version | singles: CPU µs/sample | samples/s (best) | at random numbers: CPU "
        "µs/sample | batches of 64: CPU µs/sample | samples/s (best) | of the copying rate "
        "| waited | worst language off by (samples) |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in figures.items():
        anywhere = found.middle("anywhere", "cpu_us_per_sample")
        cells = [
            name,
            found.version,
            *_rates(found, "singles"),
            f"{anywhere:.1f}" if found.anywhere else "-",
            *_rates(found, "batches"),
        ]
        cells.append(f"{found.middle('batches', 'share_of_copying'):.2f}")
        cells.append(f"{found.middle('batches', 'waited_share'):.0%}")
        cells.append("-" if found.worst_error is None else f"{found.worst_error:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rates(found: Figures, kind: str) -> list[str]:
    best = max(turn["samples_per_second"] for turn in getattr(found, kind))
    rate = found.middle(kind, "samples_per_second")
    return [f"{found.middle(kind, 'cpu_us_per_sample'):.1f}", f"{rate:,.0f} ({best:,.0f})"]


def start_table(figures: dict[str, Figures]) -> str:
    planned_columns = [f"{n:.0e} planned: s (CPU) / MB memory / MB on disk" for n in PLANNED]
    lines = [
        "| loader | "
        + " | ".join(planned_columns)
        + " | length | writing its format, s | resume | s | state, bytes |",
        "|---|" + "--:|" * len(PLANNED) + "---|--:|---|--:|--:|",
    ]
    for name, found in figures.items():
        if not found.starts:
            continue
        cells = [name]
        for planned in PLANNED:
            start = found.starts.get(planned)
            if start is None:
                cells.append(NOT_RUN if found.length == "asked" else SAME)
                continue
            cell = f"{start['seconds']:.3f} ({start['cpu_seconds']:.3f}) / "
            cell += f"{start['memory_mb']:.1f} / {start['disk_mb']:.1f}"
            if "seconds_from_disk" in start:
                cell += f"; again {start['seconds_from_disk']:.3f}"
            cells.append(cell)
        resume = found.resume
        cells += [found.length, f"{found.prepare_seconds:.1f}"]
        if resume:
            exact = "exact" if resume["exact"] else "**wrong**"
            cells += [exact, f"{resume['seconds']:.4f}", f"{resume['state_bytes']}"]
        else:
            cells += ["-", "-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Target:
    text: str
    met: bool


def targets(figures: dict[str, Figures]) -> list[Target]:
    """What this project sets out to reach, against what was measured in this very run.

    Speeds are compared in CPU time: on a machine with other work on it, it is what compares.
    """
    ours = figures.get(OURS)
    if ours is None or not ours.singles:
        return []
    lines: list[Target] = []
    if ours.starts:
        slowest = max(start["seconds"] for start in ours.starts.values())
        cpu = max(start["cpu_seconds"] for start in ours.starts.values())
        largest = max(start["memory_mb"] for start in ours.starts.values())
        disk = max(start["disk_mb"] for start in ours.starts.values())
        lines += [
            Target(
                f"start-up at most {slowest * 1e3:.0f} ms at any length, {cpu * 1e3:.0f} of CPU "
                f"(below {START_LIMIT_SECONDS * 1e3:.0f})",
                slowest < START_LIMIT_SECONDS,
            ),
            Target(f"memory grown by {largest:.1f} MB (below {START_LIMIT_MB:.0f})",
                   largest < START_LIMIT_MB),
            Target(f"{disk:.1f} MB on disk (0)", disk == 0),
        ]  # fmt: skip
    if ours.worst_error is not None:
        errors = [ours.worst_error, *(ours.far_errors or [])]
        lines.append(
            Target(
                f"languages at most {max(errors):.4f} samples off at every prefix to "
                f"{PREFIXES_CHECKED} and at {len(errors) - 1} up to {PLANNED[-1]:.0e} (1)",
                max(errors) <= 1,
            )
        )
    if ours.resume:
        lines.append(Target("resume exact", ours.resume["exact"]))
    peers = {
        name: found.middle("singles", "cpu_us_per_sample")
        for name, found in figures.items()
        if PEERS[name].mixes and PEERS[name].environment != peer_venvs.OWN and found.singles
    }
    if peers:
        fastest = min(peers, key=lambda name: peers[name])
        single = ours.middle("singles", "cpu_us_per_sample")
        batch = ours.middle("batches", "cpu_us_per_sample")
        lines += [
            Target(
                f"single samples at {1e6 / single:,.0f}/s of CPU time, the fastest mixing peer "
                f"({fastest}) {1e6 / peers[fastest]:,.0f}/s (no slower)",
                single <= peers[fastest],
            ),
            Target(
                f"batches at {peers[fastest] / batch:.2f} times that peer's single samples (2)",
                batch * 2 <= peers[fastest],
            ),
        ]
    return lines


def describe(figures: dict[str, Figures]) -> str:
    lines = [f"- {'reached' if target.met else '**missed**'}: {target.text}"
             for target in targets(figures)]  # fmt: skip
    far = figures[OURS].far_errors if OURS in figures else None
    if far:
        each = ", ".join(f"{e:.3f} at {n:,}" for n, e in zip(FAR_PREFIXES, far, strict=True))
        lines.append(f"- {OURS}, worst language off by (samples): {each}")
    return "\n".join(lines)


class _noting_failure:
    """Keeps one peer's failure from ending the others."""

    def __init__(self, peer: Peer, failures: dict[str, str]):
        self._peer, self._failures = peer, failures

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, RuntimeError):
            return False
        self._failures[self._peer.name] = str(error)
        print(f"{self._peer.name}: FAILED: {error}", file=sys.stderr)
        return True


def _environment() -> dict[str, str]:
    # one thread each: what a rank has, and what makes CPU time comparable
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
    return os.environ | one_thread | {"HF_HUB_OFFLINE": "1"}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns every loader has")
    parser.add_argument("--seconds", type=float, default=0.4, help="of singles, and of batches")
    parser.add_argument("--starts", type=int, default=3, help="times each start-up is measured")
    parser.add_argument(
        "--full", action="store_true",
        help="also 1e8 planned samples for peers that build an index: minutes and gigabytes each",
    )  # fmt: skip
    peer_venvs.add_peer_arguments(parser, PEERS, "environments and data")
    parser.add_argument(
        "--json", type=Path, default=None,
        help="where the figures go, and the tables with the suffix .md "
        "(default: outputs/benchmarks/data.json)",
    )  # fmt: skip
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one answer")
    return peer_venvs.parse_with_at_least_one(parser, arguments, "rounds", "starts")


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    venvs = given.venvs.expanduser().resolve()
    peers = [PEERS[name] for name in given.peers]
    bench = Bench(venvs, venvs / "loader-data", given.seconds, given.timeout)
    failures = peer_venvs.install_peers(
        {peer.name: peer.environment for peer in peers}, venvs, INSTALL_TIMEOUT_SECONDS
    )
    started = datetime.now(UTC).isoformat(timespec="seconds")
    figures = {peer.name: Figures() for peer in peers}
    prepared: dict[str, float] = {}
    for peer in peers:
        if peer.name not in failures:
            with _noting_failure(peer, failures):
                if peer.module not in prepared:
                    prepared[peer.module] = bench.prepare(peer)
                figures[peer.name].prepare_seconds = prepared[peer.module]

    measure_rates(
        bench, [p for p in peers if p.name not in failures], figures, failures, given.rounds
    )
    for peer in peers:
        if peer.name in failures or not peer.starts:
            continue
        with _noting_failure(peer, failures):
            found = figures[peer.name]
            measure_start(bench, peer, found, repeats=given.starts, full=given.full)
            measure_resume(bench, peer, found)

    done = {name: found for name, found in figures.items() if found.singles}
    about = (
        f"{cpu_name()}, {os.cpu_count()} CPUs, {started}, {given.rounds} rounds of "
        f"{given.seconds} s each, one thread"
    )
    text = "\n\n".join([about, rate_table(done), start_table(done), describe(done)])
    for name, reason in failures.items():
        text += f"\n\n{name} has failed: {reason}"
    print(text)
    target = given.json or REPOSITORY / "outputs" / "benchmarks" / "data.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "about": about,
        "figures": {name: asdict(found) for name, found in figures.items()},
        "failures": failures,
    }
    target.write_text(json.dumps(record, indent=1) + "\n")
    target.with_suffix(".md").write_text(text + "\n")
    print(f"written to {target} and {target.with_suffix('.md')}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
