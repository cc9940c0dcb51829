"""What a start would refuse for its packages, paths and devices is told before; what it would
ignore too."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch import check_engine
from launch.check import Machines, check
from launch.findings import ERROR, WARNING
from launch.schema import load
from parallel.config import ConfigError
from parallel.deepspeed_config import without_effect
from pretrain.config import TrainConfig
from pretrain.memory import DEVICES
from tests.launch.broken_files import BrokenFiles

ROOT = Path(__file__).resolve().parents[2]
TINY = ["+model=magneto_tiny", "wandb.mode=disabled", "data.seq_length=64", "train.train_steps=10"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> BrokenFiles:
    return BrokenFiles(tmp_path_factory.mktemp("engine"))


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def told(kind: str, *words: str, device: str | None = None) -> list[str]:
    found = check([*TINY, *words], Machines(device=device))
    return [one.text for one in found.of(kind)]


# ---- where token stores are built ----------------------------------------------------------------


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    assert told(ERROR, f"data.cache_dir={tmp_path}/cache") == [
        f"data.cache_dir={tmp_path}/cache: {tmp_path}/cache is a file; name a folder"
    ]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a /proc, which takes no files")
def test_a_cache_on_a_file_system_that_takes_no_files() -> None:
    (text,) = told(ERROR, "data.cache_dir=/proc/foo")
    assert text.startswith("data.cache_dir=/proc/foo: ") and "choose another" in text


def test_a_cache_of_nobody() -> None:
    (text,) = told(ERROR, "data.cache_dir='~nobody-of-that-name/cache'")
    assert text.startswith("data.cache_dir=~nobody-of-that-name/cache: ")


def test_a_cache_that_is_not_written(files: BrokenFiles, tmp_path: Path) -> None:
    """Stores that are there are read where they lie, unless documents have to be packed."""
    (tmp_path / "cache").write_text("")
    words = [f"data.store_dir={files.path('stores')}", f"data.cache_dir={tmp_path}/cache"]
    assert told(ERROR, *words) == []
    (text,) = told(ERROR, *words, "data.packing.mode=best_fit")
    assert text.endswith("/cache is a file; name a folder")


# ---- packages, numbers, devices ------------------------------------------------------------------


def test_the_unrelated_apex(tmp_path: Path) -> None:
    """As another process finds it, which never imports it."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit(9)\n")
    ended = subprocess.run(
        [sys.executable, "-m", "launch.check", *TINY],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        timeout=60,
    )
    assert ended.returncode == 2, ended.stderr
    assert f"error:   settings: the package `apex` at {tmp_path}/apex is not NVIDIA's" in (
        ended.stdout
    )
    assert "fix: pip uninstall apex" in ended.stdout


def test_a_seed_that_no_generator_takes() -> None:
    seed = 99999999999999999999999
    (text,) = told(ERROR, f"train.seed={seed}")
    assert text.startswith(f"train.seed={seed} must be below 2^63 = 9223372036854775808; use ")
    with pytest.raises(ConfigError, match="must be below 2"):
        TrainConfig(seed=2**63)
    TrainConfig(seed=2**63 - 1)


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_bf16_on_devices_without_it(precision: str) -> None:
    typed = f"parallel.precision={precision}"
    for device in ("t4-16gb", "V100_32GB"):
        (text,) = (line for line in told(WARNING, typed, device=device) if typed in line)
        assert f"--device {device}" in text and text.endswith("use parallel.precision=fp32")
    for other, precisely in (("a100-40gb", typed), ("t4-16gb", "parallel.precision=fp32")):
        assert not [line for line in told(WARNING, precisely, device=other) if "precision" in line]


def test_devices_without_bf16_have_names_of_devices() -> None:
    assert set(check_engine._WITHOUT_BF16) < set(DEVICES)


# ---- settings that engine=deepspeed does not look at ---------------------------------------------


def test_settings_without_effect_on_deepspeed() -> None:
    words = ["parallel.use_distributed_optimizer=false", "deepspeed.param_persistence_threshold=7"]
    first, second = told(WARNING, "engine=deepspeed", *words)
    assert first.startswith(f"{words[0]} counts only with engine=megatron: deepspeed.zero_stage=1 ")
    assert second.startswith(f"{words[1]} counts only with deepspeed.zero_stage=3: with 1 every")
    (only,) = told(WARNING, "engine=deepspeed", "deepspeed.zero_stage=3", *words)
    assert only.startswith(words[0])
    assert told(WARNING, "engine=deepspeed") == []
    assert told(WARNING, words[0]) == []  # it means what it says to the other engine


def test_nothing_shared_out_twice() -> None:
    config = load(["+model=magneto_tiny", "engine=deepspeed", "deepspeed.zero_stage=0"])
    parallel = replace(config.parallel, use_distributed_optimizer=False)
    (text,) = without_effect(parallel, config.deepspeed)
    assert text.endswith("leave this one out") and "shares out nothing, is set too" in text
