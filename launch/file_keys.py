"""Composing YAML files without those of their keys that do not fit, so that each of them is told.

Hydra stops at the first. Imports neither torch nor megatron-core.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from omegaconf import DictConfig, OmegaConf

from launch.file_entries import take_out_slips, take_out_switches

# GROUP/NAME of a file and the full name of a setting, as Hydra names them
Key = tuple[str, str]


class LeftOut:
    """Keys of files that Hydra is to read as if they were not there."""

    def __init__(self) -> None:
        self._wanted: set[Key] = set()
        self._found: set[Key] = set()
        self.problems: list[str] = []  # that Hydra would pass, or tell one by one

    @property
    def settings(self) -> list[str]:
        return sorted({setting for _, setting in self._found})

    def add(self, key: Key) -> None:
        self._wanted.add(key)

    def is_new(self, key: Key) -> bool:
        """Whether leaving it out may change anything: it has not been tried."""
        return key not in self._wanted

    def _take_out(self, config: Any, name: str, folder: str) -> None:
        path = Path(folder.removeprefix("file://"), f"{name}.yaml")
        told = take_out_slips(config, name, path) | take_out_switches(config, name, path)
        for setting, slips in told.items():
            self._found.add((name, setting))
            self.problems += [slip for slip in slips if slip not in self.problems]

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """While this lasts."""
        original = ConfigRepository.load_config

        def load_config(repository: ConfigRepository, config_path: str) -> Any:
            result = original(repository, config_path)
            name = config_path.removesuffix(".yaml")
            for key in self._wanted:
                if result is not None and key[0] == name and _drop(result.config, key[1]):
                    self._found.add(key)
            if result is not None and result.path.startswith("file://"):
                self._take_out(result.config, name, result.path)
            return result

        setattr(ConfigRepository, "load_config", load_config)  # noqa: B010
        try:
            yield
        finally:
            setattr(ConfigRepository, "load_config", original)  # noqa: B010


def accused(error: Exception) -> Key | None:
    """The key of a file that Hydra's error is about."""
    text = f"{error}\n{error.__cause__ or ''}"
    file = re.search(r"In '([^']+)': \w+ raised while composing", text)
    setting = re.search(r"full_key: (\S+)", text)
    return (file[1], re.sub(r"\[.*", "", setting[1])) if file and setting else None


def _drop(config: Any, setting: str) -> bool:
    """Takes `setting` out of a file's content; whether it was there. A file of the group train says
    train_steps for train.train_steps."""
    parts = setting.split(".")
    for first in range(len(parts)):
        above = ".".join(parts[first:-1])
        node = OmegaConf.select(config, above) if above else config
        if isinstance(node, DictConfig) and parts[-1] in node:
            del node[parts[-1]]
            return True
    return False
