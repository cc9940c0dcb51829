"""How fast `python -m data.tokenize` is, beside the tokenizers library alone.

    python -m benchmarks.tokenize CORPUS [--tokenizer FILE] [--workers N] [--rounds 5]

Ours is the whole command: start of Python, reading and parsing the corpus, normalising, tokenizing
and writing checked stores. The library's is `encode_batch` over the same texts, already in memory,
a thousand at a time on as many threads, with the ids read out; its start and the reading of the
corpus are not counted. `encode_batch_fast` leaves out the offsets, which nobody asks for here. All
run in turns, so that a busy machine is busy for each of them; CPU-seconds are for comparing where
it is busy.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from data.corpus import read_documents
from data.documents import ReadOptions
from data.tokenize import usable_cores
from data.tokenize_corpus import DEMO_TOKENIZER

_LIBRARY = ("encode_batch", "encode_batch_fast")
_BATCH = 1000


def library(method: str, corpus: Path, tokenizer: Path) -> None:
    """In a process of its own: prints seconds, CPU-seconds, bytes of text and tokens."""
    import tokenizers

    options = ReadOptions()
    texts = [unicodedata.normalize("NFC", d.text) for d in read_documents(corpus, options)]
    loaded = tokenizers.Tokenizer.from_file(str(tokenizer))
    loaded.encode_special_tokens = True
    encode = getattr(loaded, method)
    encode(texts[:10])  # starts the threads
    tokens = 0
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), _BATCH):
        batch = encode(texts[start : start + _BATCH], add_special_tokens=False)
        tokens += sum(len(encoding.ids) for encoding in batch)  # as whoever stores them must
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps([wall, cpu, sum(len(text.encode()) for text in texts), tokens]))


def run_library(method: str, given: argparse.Namespace) -> tuple[float, float, int, int]:
    code = "import sys; from pathlib import Path; from benchmarks.tokenize import library; "
    code += "library(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))"
    threads = {"RAYON_NUM_THREADS": str(given.workers), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", code, method, str(given.corpus), str(given.tokenizer)]
    done = subprocess.run(
        command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True
    )
    wall, cpu, size, tokens = json.loads(done.stdout)
    return wall, cpu, size, tokens


def run_ours(given: argparse.Namespace, folder: Path) -> tuple[float, float, int, int]:
    """Seconds, CPU-seconds, tokens, and the most memory its processes had together, in bytes."""
    out = folder / "stores"
    command = [sys.executable, "-m", "data.tokenize", str(given.corpus), "--out", str(out)]
    command += ["--tokenizer", str(given.tokenizer), "--workers", str(given.workers), "--quiet"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, most))
    watcher.start()
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    manifest = json.loads((out / "manifest.json").read_text())
    counts = [of for split in manifest["splits"].values() for of in split.values()]
    shutil.rmtree(out)
    return wall, used.ru_utime + used.ru_stime, sum(of["tokens"] for of in counts), most[0]


def _watch(pid: int, most: list[int]) -> None:
    """Proportional set sizes: pages that processes share count once."""
    try:
        root = psutil.Process(pid)
        while root.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            most[0] = max(most[0], total)
            time.sleep(0.25)
    except psutil.Error:
        return


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tokenize", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=DEMO_TOKENIZER, help="a tokenizer.json")
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)

    walls: dict[str, list[float]] = {name: [] for name in (*_LIBRARY, "ours")}
    cpus: dict[str, list[float]] = {name: [] for name in walls}
    peaks = []
    print(f"{'round':<7}{'who':<20}{'s':>8}{'CPU-s':>8}{'MB/s':>8}{'MB/CPU-s':>10}")
    for number in range(1, given.rounds + 1):
        for name in _LIBRARY:
            wall, cpu, size, expected = run_library(name, given)
            _say(number, name, wall, cpu, size)
            walls[name].append(wall)
            cpus[name].append(cpu)
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu, tokens, peak = run_ours(given, Path(folder))
        if tokens != expected:
            raise SystemExit(f"we gave {tokens} tokens, the library {expected}")
        _say(number, "ours", wall, cpu, size)
        walls["ours"].append(wall)
        cpus["ours"].append(cpu)
        peaks.append(peak)
    print(
        f"\n{size / 1e6:.1f} MB of text, {tokens:,} tokens, {given.workers} workers; our memory "
        f"{statistics.median(peaks) / 2**20:.0f} MiB at most (all processes)"
    )
    for name in _LIBRARY:
        for unit, of in (("seconds", walls), ("CPU-seconds", cpus)):
            ratios = [theirs / ours for theirs, ours in zip(of[name], of["ours"], strict=True)]
            print(
                f"our speed / {name}'s by {unit}: median {statistics.median(ratios):.2f}"
                f" ({', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))})"
            )
    return 0


def _say(number: int, name: str, wall: float, cpu: float, size: int) -> None:
    print(
        f"{number:<7}{name:<20}{wall:>8.1f}{cpu:>8.1f}{size / wall / 1e6:>8.2f}"
        f"{size / cpu / 1e6:>10.2f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
