"""Does this layout train the same model as one process? Minutes here may save days on a cluster.

    python launch/verify.py +model=magneto_1b parallel=tp2_pp2

Takes what launch/pretrain.py takes, checks it as that does, and trains a small copy of the model,
with the same structure, layout and engine, for two steps on processes of this machine's CPU; then
compares losses, every gradient, and weights with one process of engine=megatron. Two settings are
its own:

    verify.processes=8          at most so many processes; longer axes are made shorter to fit
    verify.timeout_seconds=600  for each of the two trainings

Exit status: 0 the layout is right, 1 it is not, 2 the settings do not fit.
"""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

# before launch/, where `import pretrain` would find pretrain.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.interrupted import say_interrupted

if __name__ == "__main__":
    say_interrupted()  # also amid the imports below, which take a second

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from launch.file_keys import explained
from launch.mixture_file import with_mixture_files
from launch.pretrain import refuse
from launch.schema import register, to_pretrain_config
from launch.setting_names import CONF
from parallel.config import ConfigError
from pretrain.config_rules import validate
from pretrain.shrink import processes_needed, shrink


@dataclass(frozen=True)
class VerifySettings:
    processes: int = 8
    timeout_seconds: float = 600.0


def main() -> None:
    try:
        settings, words = own_settings(sys.argv[1:])
        sys.argv[1:] = with_mixture_files(words)
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ConfigError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}: launch/verify.py starts its processes "
                "itself; call it with python instead of torchrun"
            )
    except ConfigError as error:
        refuse(error)

    def check(cfg: DictConfig) -> None:
        _check(cfg, settings)

    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on instead of wording them itself
    try:
        with explained(sys.argv[1:]):
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="pretrain")(check)()
    except ConfigError as error:
        refuse(error)


def own_settings(words: list[str]) -> tuple[VerifySettings, list[str]]:
    """The settings named verify.*, and the other words. Raises ConfigError."""
    values: dict[str, Any] = {}
    others = []
    kinds = {"processes": int, "timeout_seconds": float}
    for word in words:
        name, _, value = word.partition("=")
        if not name.startswith("verify."):
            others.append(word)
            continue
        kind = kinds.get(name.removeprefix("verify."))
        if kind is None:
            known = " and ".join(f"verify.{name}" for name in kinds)
            raise ConfigError(f"{word}: there is no setting {name}; there are {known}")
        try:
            values[name.removeprefix("verify.")] = kind(value)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{word} must be {what}") from None
    settings = VerifySettings(**values)
    if not (math.isfinite(settings.timeout_seconds) and settings.timeout_seconds > 0):
        raise ConfigError(
            f"verify.timeout_seconds={settings.timeout_seconds} must be a finite number above 0"
        )
    return settings, others


def _check(cfg: DictConfig, settings: VerifySettings) -> None:
    try:
        typed = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        config = to_pretrain_config(cfg, cast(list[str], typed))
        validate(config, world_size=processes_needed(config.parallel))
        small = shrink(config, settings.processes)
    except ConfigError as error:
        refuse(error)
    # one thread a rank, on the CPU also where there are GPUs: before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from pretrain.verify import report  # imports torch and megatron-core, which takes seconds

    if not report(config, small, timeout=settings.timeout_seconds):
        sys.exit(1)


if __name__ == "__main__":
    main()
