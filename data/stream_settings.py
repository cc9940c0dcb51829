"""Which samples a run will see, said without the launcher: for data.plan and data.inspect.

    read_settings([], run="runs/demo/DATE")                   # as the run wrote it down
    read_settings(["data.store_dir=stores", "train.train_steps=1000"])
    stream = open_stream(settings)

Words are SETTING=VALUE as on the launcher's command line, read by the same parser; the settings are
data.* and those of other rooms that the stream of samples depends on. Imports neither torch nor
megatron-core.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import DataConfig, MixtureConfig, Verify
from data.language_families import near
from data.mixture_file import read_mixture_file
from data.open_mixture import OpenedMixture, open_mixture, prepare
from data.run_folders import runs_below


@dataclass(kw_only=True)
class _Train:
    train_steps: int | None = None
    global_batch_size: int = 8  # pretrain/config.py


@dataclass(kw_only=True)
class _Model:
    max_position_embeddings: int | None = None


@dataclass(kw_only=True)
class _Settings:
    data: DataConfig = field(default_factory=DataConfig)
    train: _Train = field(default_factory=_Train)
    model: _Model = field(default_factory=_Model)


@dataclass(frozen=True)
class StreamSettings:
    data: DataConfig
    max_position_embeddings: int | None  # of the model; None: not said
    global_batch_size: int  # sequences in one optimizer step
    train_steps: int | None  # None: not said

    @property
    def seq_length(self) -> int:
        """Tokens in one training sequence; ValueError if nobody said how many."""
        length = self.data.seq_length or self.max_position_embeddings
        if length is None:
            raise ValueError(
                "the length of a training sequence is not said; add data.seq_length=2048, or the "
                "model's max_position_embeddings"
            )
        return length


def read_settings(
    words: Sequence[str] = (),
    *,
    run: Path | str | None = None,
    mixture: Path | str | None = None,
    values: Mapping[str, Any] | None = None,
) -> StreamSettings:
    """Settings from a run's folder (or a config.yaml), a file, words and values, in this order.

    mixture: a file that stands for data.mixture as a whole (data/mixture_file.py), as the word
    data/mixture=FILE.yaml does. values: by setting, as flags of a program give them.

    Raises FileNotFoundError for a file that is not there, ValueError for settings that do not
    exist, that a stream of samples does not depend on, or whose values break a rule.
    """
    cfg = cast(DictConfig, OmegaConf.structured(_Settings))
    if run is not None:
        path = run_config_path(run)
        content = _read_yaml(path)
        for section in ("data", "train", "model"):
            for name, value in (content.get(section) or {}).items():
                if section == "data" or name in cfg[section]:  # of the others we know a few
                    _set(cfg, f"{section}.{name}", value, f"{path}: {section}.{name}={value}")
    parsed = _parse(words)
    files = [value for setting, value, _ in parsed if _is_mixture_file(setting, value)]
    for path in [mixture, *files] if mixture is not None else files:
        cfg.data.mixture = OmegaConf.structured(MixtureConfig)  # the file stands for all of it
        _set(cfg, "data.mixture", read_mixture_file(Path(path).expanduser()), str(path))
    for setting, value, word in parsed:
        if not _is_mixture_file(setting, value):
            _set(cfg, setting, value, word)
    for setting, value in (values or {}).items():
        _set(cfg, setting, value, f"{setting}={value}")
    data = cast(DataConfig, OmegaConf.to_object(cfg.data))
    for setting in (
        "train.train_steps",
        "train.global_batch_size",
        "model.max_position_embeddings",
    ):
        value = OmegaConf.select(cfg, setting)
        if value is not None and value < 1:
            raise ValueError(f"{setting}={value} must be at least 1")
    return StreamSettings(
        data,
        cfg.model.max_position_embeddings,
        cfg.train.global_batch_size,
        cfg.train.train_steps,
    )


def open_stream(settings: StreamSettings) -> OpenedMixture:
    """The training stream of these settings; builds the token stores if they are missing.

    data.verify=full is left to the run: here stores are looked at as with data.verify=quick.
    """
    config = settings.data
    if config.verify is Verify.full:
        config = replace(config, verify=Verify.quick)
    prepare(config)
    return open_mixture(config, settings.seq_length, check_tokenizer=False)


def run_config_path(run: Path | str) -> Path:
    """The newest resolved configuration of a run folder; a YAML file stands for itself.

    A resumed run writes config.1.yaml, config.2.yaml ... next to the first.
    """
    run = Path(run).expanduser()
    if run.is_file():
        return run
    numbered = {
        int(found[1] or 0): path
        for path in run.glob("config*.yaml")
        if (found := re.fullmatch(r"config(?:\.(\d+))?\.yaml", path.name))
    }
    if not numbered:
        raise FileNotFoundError(
            f"{run}: no run folder, because there is no config.yaml in it{runs_below(run)}"
        )
    return numbered[max(numbered)]


def _parse(words: Sequence[str]) -> list[tuple[str, Any, str]]:
    """(setting, value, word as typed) of each word, by the launcher's own grammar."""
    if not words:
        return []
    # the parser takes a quarter of a second to import
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed = []
    parser = OverridesParser.create()
    for word in words:
        try:
            override = parser.parse_override(word)
        except HydraException:
            raise ValueError(f"{word} is not SETTING=VALUE") from None
        if not override.key_or_group:
            raise ValueError(f"{word} is not SETTING=VALUE")
        if override.is_sweep_override() or override.is_delete():
            raise ValueError(f"{word}: one value for one setting; write [a,b] for a list")
        parsed.append((override.key_or_group, override.value(), word))
    return parsed


def _is_mixture_file(setting: str, value: Any) -> bool:
    return setting == "data/mixture" and str(value).endswith((".yaml", ".yml"))


def _set(cfg: DictConfig, setting: str, value: Any, origin: str) -> None:
    section = setting.partition(".")[0]
    if "." not in setting and not isinstance(value, dict):
        raise ValueError(
            f"{origin}: files of settings ({setting}=NAME) are the launcher's: "
            "python -m launch.plan reads the launcher's words"
        )
    if section not in cfg:
        raise ValueError(
            f"{origin}: the stream of samples does not depend on {setting}; leave it out. It "
            "depends on data.*, train.train_steps, train.global_batch_size and "
            "model.max_position_embeddings"
        )
    try:
        OmegaConf.update(cfg, setting, value, merge=True)
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error, setting, origin)) from None


def _explain(error: OmegaConfBaseException, setting: str, origin: str) -> str:
    text = str(error)
    key = (re.search(r"full_key: (\S+)", text) or ["", setting])[1]
    if re.search(r"Key '.*' (is )?not in", text):
        names = _settings(_Settings(), "")
        meant = near(key, names)
        last_words = {name.rpartition(".")[2]: name for name in names}
        meant = meant or [last_words[word] for word in near(key.rpartition(".")[2], last_words)]
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        return f"{origin}: there is no setting {key}{hint}"
    return f"{origin}: {key} does not fit: {text.splitlines()[0]}"


def _settings(node: Any, prefix: str) -> list[str]:
    names = []
    for name, value in vars(node).items():
        if hasattr(value, "__dataclass_fields__"):
            names += _settings(value, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a table of settings")
    return content
