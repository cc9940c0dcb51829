"""What a finished run suggests works where it was started."""

import subprocess
from pathlib import Path

import pytest

from pretrain.config import PretrainConfig
from pretrain.ending import next_steps
from tests.parity import MODEL


def test_suggestions_work_from_any_folder_and_set_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["+model=a", "wandb.mode=disabled", "data.x={a: 1}", "wandb.mode=offline", "run_dir=r"]
    monkeypatch.setattr("sys.argv", ["launch/pretrain.py", *typed])
    monkeypatch.chdir(tmp_path)
    generate, other, longer = next_steps(Path("r"), PretrainConfig(model=MODEL))
    for command in (other, longer):
        assert "wandb.mode=disabled" not in command and command.count("run_dir=") == 1
        assert "+model=a wandb.mode=offline 'data.x={a: 1}'" in command
        assert Path(next(w for w in command.split() if w.endswith("pretrain.py"))).is_file()
    help_of = generate.replace(' r "The page you"', " --help")
    done = subprocess.run(help_of, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Sample from a checkpoint" in done.stdout
