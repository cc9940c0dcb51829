"""Records that are complete, never overwritten, and hold no secret."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from pretrain.provenance import (
    HIDDEN,
    atomic_write_text,
    git_state,
    hide_secret_values,
    is_secret_name,
    without_secrets,
    write_run_record,
)


def test_secret_names():
    for name in ["WANDB_API_KEY", "HF_TOKEN", "aws_secret_access_key", "password", "SLURM_JWT"]:
        assert is_secret_name(name), name
    for name in ["tokenizer", "consumed_tokens", "tokenize", "kv_channels", "seed"]:
        assert not is_secret_name(name), name


def test_secrets_go_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("SHORT_KEY", "en")
    config = {
        "data": {"tokenizer": "t.json", "token": "x", "languages": ["en", "de"]},
        "wandb": {"api_key": "k", "tags": ["a", "with hf_abcdefgh inside"]},
        "steps": 3,
    }
    assert without_secrets(config) == {
        "data": {"tokenizer": "t.json", "languages": ["en", "de"]},
        "wandb": {"tags": ["a", f"with {HIDDEN} inside"]},
        "steps": 3,
    }
    assert hide_secret_values("children of hf_abcdefgh") == f"children of {HIDDEN}"


def test_atomic_write_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path):
    path = tmp_path / "a.json"
    atomic_write_text(path, "old")
    atomic_write_text(path, "new ünicode")
    assert path.read_text(encoding="utf-8") == "new ünicode"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(UnicodeEncodeError):  # a write that fails half-way
        atomic_write_text(path, "x" * 100_000 + "\ud800")
    assert path.read_text(encoding="utf-8") == "new ünicode"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def test_git_state_changes_with_every_change_of_the_code(tmp_path: Path):
    assert git_state(tmp_path) is None  # no work tree
    git(tmp_path, "init", "-b", "trunk")
    assert git_state(tmp_path) is None  # no commit
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("a = 1\n")
    (tmp_path / ".gitignore").write_text("runs/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "branch": "trunk", "dirty_sha256": None}
    assert git_state(tmp_path / "code") == clean

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log").write_text("ignored")
    assert git_state(tmp_path / "code") == clean
    assert git_state(tmp_path / "runs") is None  # the code itself is ignored: not this repository's

    hashes = set()
    for name, text in [("a.py", "a = 2\n"), ("a.py", "a = 3\n"), ("new.py", "1"), ("new.py", "2")]:
        (tmp_path / "code" / name).write_text(text)
        state = git_state(tmp_path / "code")
        assert state is not None and state["commit"] == clean["commit"]
        hashes.add(state["dirty_sha256"])
    assert len(hashes) == 4 and None not in hashes


def test_record_holds_what_a_run_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JWT", "jwt-of-somebody")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("UNRELATED", "xyz")
    run_dir = tmp_path / "runs" / "a"
    path = write_run_record(
        run_dir,
        "seed: 1\nnote: 0123456789abcdef\n",
        {"corpus": "sha256:1"},
        extra={"resumed_step": None},
        arguments=["pretrain.py", "+x.api_key=zzzz", "note=a b"],
    )
    assert path == run_dir / "run.json"
    record = json.loads(path.read_text())
    assert record["data_fingerprint"] == {"corpus": "sha256:1"}
    assert record["resumed_step"] is None
    assert record["command"] == f"pretrain.py '+x.api_key={HIDDEN}' 'note=a b'"
    assert record["environment"]["SLURM_JOB_ID"] == "42"
    assert record["environment"]["WORLD_SIZE"] == "8"
    assert not {"UNRELATED", "SLURM_JWT"} & set(record["environment"])
    assert {"torch", "megatron-core"} <= set(record["packages"])
    assert record["started"].endswith("+00:00")
    assert {"git", "host", "python", "platform", "cpus", "working_directory"} <= set(record)
    assert (run_dir / record["config"]).read_text() == f"seed: 1\nnote: {HIDDEN}\n"
    written = b"".join(file.read_bytes() for file in run_dir.iterdir())
    for secret in (b"0123456789abcdef", b"jwt-of-somebody", b"zzzz"):
        assert secret not in written


def test_resumed_runs_add_records(tmp_path: Path):
    for number in range(3):
        write_run_record(tmp_path, f"start: {number}\n", None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.1.yaml",
        "config.2.yaml",
        "config.yaml",
        "run.1.json",
        "run.2.json",
        "run.json",
    ]
    assert (tmp_path / "config.yaml").read_text() == "start: 0\n"
    assert json.loads((tmp_path / "run.2.json").read_text())["config"] == "config.2.yaml"
    assert (tmp_path / "config.2.yaml").read_text() == "start: 2\n"
