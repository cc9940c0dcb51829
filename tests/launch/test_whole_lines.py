"""Lines of several ranks that torchrun started, with `python -u`, on one terminal."""

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RANK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from launch.whole_lines import write_whole_lines
WHOLE
print("step", 1)
print("two\\nlines\\n", end="", file=sys.stderr)
print("half a ", end="")
print("line")
raise ValueError("told at the end")
"""


def writes(*words: str, status: int = 1) -> list[str]:
    """What `python -u WORDS` writes, a piece for each call of the kernel: over a socket that keeps
    them apart."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            ended = subprocess.run(
                [sys.executable, "-u", *words],
                cwd=ROOT,
                stdout=theirs,
                stderr=theirs,
                timeout=60,
            )
        assert ended.returncode == status
        return [piece.decode() for piece in iter(lambda: ours.recv(65536), b"") if piece]


def test_every_write_is_a_whole_line() -> None:
    pieces = writes("-c", RANK.replace("WHOLE", "write_whole_lines()"))
    assert pieces[:3] == ["step 1\n", "two\nlines\n", "half a line\n"]
    assert "ValueError: told at the end\n" in pieces


def test_the_launcher_writes_whole_lines() -> None:
    words = ("+model=magneto_tiny", "optimizer.lr=0", "data.seed=-1")
    pieces = writes("launch/pretrain.py", *words, status=2)
    assert len(pieces) == 2
    assert all(piece.startswith("error: ") and piece.endswith("\n") for piece in pieces)


def test_without_it_lines_come_in_parts() -> None:
    """Should this fail, Python has changed and launch/whole_lines.py is not needed any longer."""
    assert writes("-c", RANK.replace("WHOLE", ""))[:4] == ["step", " ", "1", "\n"]
