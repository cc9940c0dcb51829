"""What a run was: the first thing a run writes, before anything can fail.

run.json and config.yaml in the run folder; when the run is resumed, run.1.json and config.1.yaml
beside them, and so on, so that nothing is ever overwritten. Nothing secret is written.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RUN_RECORD = "run.json"  # of a run's first start
HIDDEN = "<hidden>"

# "token" but neither "tokens" nor "tokenizer", which are this project's daily words
_SECRET_NAME = re.compile(r"key|secret|passw|credential|jwt|token(?!s|i[sz])", re.IGNORECASE)
_ENVIRONMENT = re.compile(
    r"(SLURM|NCCL|GLOO|TORCHELASTIC|TORCH_ELASTIC)_.*|CUDA_VISIBLE_DEVICES|CUDA_DEVICE_MAX_CONNECTIONS"
    r"|OMP_NUM_THREADS|(LOCAL_|GROUP_)?(WORLD_SIZE|RANK)|MASTER_(ADDR|PORT)"
)


def is_secret_name(name: str) -> bool:
    """Whether a setting or environment variable of this name is taken to hold a secret."""
    return _SECRET_NAME.search(name) is not None


def hide_secret_values(text: str) -> str:
    """`text` with the value of every secretly named environment variable replaced.

    Values shorter than eight characters are left alone: they would hide ordinary words.
    """
    for name, value in os.environ.items():
        if is_secret_name(name) and len(value) >= 8:
            text = text.replace(value, HIDDEN)
    return text


def without_secrets(value: Any) -> Any:
    """A copy of nested mappings and lists without secretly named keys, secret values replaced."""
    if isinstance(value, Mapping):
        return {
            key: without_secrets(item)
            for key, item in value.items()
            if not is_secret_name(str(key))
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return hide_secret_values(value) if isinstance(value, str) else value


def atomic_write_text(path: Path, text: str) -> None:
    """Write UTF-8 so that `path` holds either its old content or all of the new, after a crash too.

    A temporary file in the same folder, flushed to disk, is renamed over `path`, and the folder is
    flushed as well. Costs two disk flushes.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would shut out the rest of the group
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and local changes of the git work tree that `folder` is in.

    None where there is no git, no work tree, no commit, or where git ignores the folder (a package
    installed into a virtual environment inside somebody else's repository).

    `dirty_sha256` hashes the difference of tracked files to the commit together with names and
    contents of untracked files that git does not ignore; None: the tree is clean.
    """

    def git(*arguments: str) -> bytes:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, timeout=20, check=True
        ).stdout

    try:
        root = Path(git("rev-parse", "--show-toplevel").decode().strip())
        commit = git("rev-parse", "HEAD").decode().strip()
        branch = git("rev-parse", "--abbrev-ref", "HEAD").decode().strip()
        with contextlib.suppress(subprocess.CalledProcessError):  # exit status 1: not ignored
            git("check-ignore", "--quiet", str(folder))
            return None
        changes = git("diff", "HEAD", "--binary", "--no-ext-diff")
        listing = git("ls-files", "--others", "--exclude-standard", "-z", "--full-name", str(root))
    except (OSError, subprocess.SubprocessError):
        return None
    untracked = sorted(os.fsdecode(name) for name in listing.split(b"\0") if name)
    digest = hashlib.sha256(changes)
    for name in untracked:
        digest.update(b"\0" + os.fsencode(name) + b"\0")
        with contextlib.suppress(OSError), open(root / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return {
        "commit": commit,
        "branch": branch,
        "dirty_sha256": digest.hexdigest() if changes or untracked else None,
    }


def write_run_record(
    run_dir: str | Path,
    resolved_config_yaml: str,
    data_fingerprint: Any,
    *,
    extra: Mapping[str, Any] | None = None,
    arguments: Sequence[str] | None = None,
) -> Path:
    """Write the record of this start of the run; returns the path of its JSON file.

    Call it on one rank, first thing; makes `run_dir`.

    Args:
        resolved_config_yaml: the whole configuration, every interpolation resolved.
        data_fingerprint: whatever the loader identifies its data by; JSON types.
        extra: further entries, such as the parallel layout or the step resumed from; JSON types.
        arguments: the command line; None: this process's.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    suffix, number = "", 0
    while (run_dir / f"run{suffix}.json").exists():
        number += 1
        suffix = f".{number}"

    arguments = [sys.executable, *sys.argv] if arguments is None else list(arguments)
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": hide_secret_values(shlex.join(_hide_secret_argument(a) for a in arguments)),
        "working_directory": os.getcwd(),
        "config": f"config{suffix}.yaml",
        "data_fingerprint": data_fingerprint,
        "git": git_state(Path(__file__).resolve().parent),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": _package_versions(),
        "environment": {
            name: hide_secret_values(value)
            for name, value in sorted(os.environ.items())
            if _ENVIRONMENT.fullmatch(name) and not is_secret_name(name)
        },
        **(extra or {}),
    }
    atomic_write_text(run_dir / f"config{suffix}.yaml", hide_secret_values(resolved_config_yaml))
    path = run_dir / f"run{suffix}.json"
    atomic_write_text(path, json.dumps(record, indent=2) + "\n")
    return path


def _hide_secret_argument(argument: str) -> str:
    name, equals, _ = argument.partition("=")
    return f"{name}={HIDDEN}" if equals and is_secret_name(name) else argument


def _package_versions() -> dict[str, str]:
    found = importlib.metadata.distributions()
    versions = {package.metadata["Name"]: package.version for package in found}
    return dict(sorted((name, version) for name, version in versions.items() if name))
