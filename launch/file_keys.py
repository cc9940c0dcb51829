"""The YAML files that Hydra reads, looked at on the way: what it would pass unseen is refused.

OmegaConf makes the text "False" of run_dir: off (looked for where a file's package is its folder or
_global_), and Hydra does not say in which entry of a list a key does not fit, or in which line.
`launch.check` composes files without the keys that do not fit, so that each of them is told; Hydra
stops at the first. Imports neither torch nor megatron-core.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from omegaconf import DictConfig, OmegaConf

from launch.explain import CompositionError, explain
from launch.file_entries import take_out_slips, take_out_switches
from parallel.config import ConfigError

# GROUP/NAME of a file and the full name of a setting, as Hydra names them
Key = tuple[str, str]


class FilesRead:
    """The files that Hydra reads while they are `watched`."""

    def __init__(self) -> None:
        self.paths: dict[str, Path] = {}  # by GROUP/NAME

    @contextmanager
    def watched(self) -> Iterator[None]:
        original = ConfigRepository.load_config

        def load_config(repository: ConfigRepository, config_path: str) -> Any:
            name = config_path.removesuffix(".yaml")
            try:
                result = original(repository, config_path)
            except UnicodeDecodeError as error:
                raise ConfigError(f"{name}.yaml: it is not UTF-8: {error}") from None
            if result is not None and result.path.startswith("file://"):
                self.paths[name] = Path(result.path.removeprefix("file://"), f"{name}.yaml")
                if isinstance(result.config, DictConfig):  # or Hydra will say that it is none
                    self._look_at(result.config, name)
            return result

        setattr(ConfigRepository, "load_config", load_config)  # noqa: B010
        try:
            yield
        finally:
            setattr(ConfigRepository, "load_config", original)  # noqa: B010

    def _look_at(self, config: DictConfig, name: str) -> None:
        """Raises ConfigError with everything in the file that Hydra would pass or tell badly."""
        told = self._slips(config, name)
        if told:
            raise ConfigError(*(slip for slips in told.values() for slip in slips))

    def _slips(self, config: DictConfig, name: str) -> dict[str, list[str]]:
        path = self.paths[name]
        return take_out_slips(config, name, path) | take_out_switches(config, name, path)


@contextmanager
def explained(words: Sequence[str]) -> Iterator[None]:
    """While this lasts, what keeps `words` and their files from fitting together is a ConfigError.

    Raises ConfigError as the launcher prints it.
    """
    files = FilesRead()
    try:
        with files.watched():
            yield
    except CompositionError as error:
        raise explain(error, words, files.paths) from None


class LeftOut(FilesRead):
    """Keys of files that Hydra is to read as if they were not there, while they are `watched`."""

    def __init__(self) -> None:
        super().__init__()
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

    def _look_at(self, config: DictConfig, name: str) -> None:
        for key in self._wanted:
            if key[0] == name and _drop(config, key[1]):
                self._found.add(key)
        for setting, slips in self._slips(config, name).items():
            self._found.add((name, setting))
            self.problems += [slip for slip in slips if slip not in self.problems]


def accused(error: Exception) -> Key | None:
    """The key of a file that Hydra's error is about."""
    text = f"{error}\n{error.__cause__ or ''}"
    file = re.search(r"In '([^']+)': \w+ raised while composing", text)
    setting = re.search(r"full_key: (\S+)", text)
    return (file[1], re.sub(r"\[.*", "", setting[1])) if file and setting else None


def _drop(config: DictConfig, setting: str) -> bool:
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
