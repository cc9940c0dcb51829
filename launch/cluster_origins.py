"""Where each value of a job comes from: the site's settings, how many nodes, how many jobs.

Imports neither torch nor megatron-core.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.config import ClusterConfig
from launch.origins import COMMAND_LINE, DEFAULT, Origin, shown
from launch.site_settings import as_text, site_file, values_that_fit
from launch.slurm import Wish
from launch.yaml_lines import in_file

# what is changed one by one, by cluster.environment.NAME=VALUE
_TABLE = "environment"
OF_OPTIONS = "--processes and --gpus-per-node"


def cluster_origins(cluster: ClusterConfig, wish: Wish) -> list[Origin]:
    """Of each setting of the site, which `wish` chose and changed. A file's have the line."""
    path = site_file(wish.cluster)
    values = values_that_fit(wish.cluster, path)[0]
    default = ClusterConfig()
    found = [Origin("cluster", wish.cluster, COMMAND_LINE, True)]
    for field in dataclasses.fields(ClusterConfig):
        value, unset = getattr(cluster, field.name), getattr(default, field.name)
        entries = {field.name: (value, unset)}
        if field.name == _TABLE and value:
            entries = {f"{_TABLE}.{name}": (value[name], None) for name in value}
        for key, (entry, without) in entries.items():
            source = DEFAULT
            if OmegaConf.select(values, key, default=_NOWHERE) is not _NOWHERE:
                source = in_file(shown(path), path, key)
            if any(_gave(word, key, entry) for word in wish.settings):
                source = COMMAND_LINE
            found.append(Origin(f"cluster.{key}", entry, source, entry != without))
    return found


def job_origins(
    words: Sequence[str], nodes: int | None, options: Sequence[str], chain: int
) -> list[Origin]:
    """Of the numbers of nodes (None: nobody said) and jobs; options: those on the command line
    besides `words`. A word that was refused is not where a value comes from."""
    found = []
    for name, value in (("nodes", nodes), ("chain", chain)):
        if value is None:
            continue
        source = DEFAULT if value == 1 else OF_OPTIONS
        if f"{name}={value}" in words or name in options:
            source = COMMAND_LINE
        found.append(Origin(name, value, source, value != 1))
    return found


_NOWHERE = object()


def _gave(word: str, key: str, value: Any) -> bool:
    """Whether `word` (without "cluster.") is where `value` of the site's `key` comes from.

    A word that was refused has another value than the site then has.
    """
    try:
        typed = OmegaConf.from_dotlist([as_text(word)])
        if OmegaConf.select(typed, key, default=_NOWHERE) is _NOWHERE:
            return False
        merged = OmegaConf.merge(OmegaConf.structured(ClusterConfig), typed)
        return bool(OmegaConf.select(merged, key) == value)
    except (yaml.YAMLError, OmegaConfBaseException):
        return False
