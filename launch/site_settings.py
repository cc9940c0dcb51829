"""A site with SLURM: its file of conf/cluster, changed by cluster.SETTING=VALUE.

Imports neither torch nor megatron-core.
"""

import json
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.config import ClusterConfig
from launch.near_names import closest
from launch.setting_names import CONF, rule_of
from launch.setting_names import SITES as GROUP
from parallel.config import ConfigError

SITES = CONF / GROUP


def load_cluster(name: str | None, settings: Sequence[str]) -> ClusterConfig:
    """A site's settings from conf/cluster, or from a file of one's own, changed by `settings`.

    Raises ConfigError.
    """
    cluster, problems = cluster_that_fits(name, settings)
    if problems:
        raise ConfigError(*problems)
    return cluster


def cluster_that_fits(name: str | None, settings: Sequence[str]) -> tuple[ClusterConfig, list[str]]:
    """The site changed by those of `settings` that fit it, and what is wrong with the others.

    Raises ConfigError where the site itself cannot be had.
    """
    values, of_file = values_that_fit(name, site_file(name))
    try:
        cluster = _changed(name, values, [])
    except ConfigError as error:
        raise ConfigError(*of_file, *error.problems) from None
    kept: list[str] = []
    left = list(settings)
    while left:
        wrong = {}
        try:  # all of them: some fit only together
            return _changed(name, values, [*kept, *left]), of_file
        except ConfigError:
            pass
        for word in left:
            try:
                cluster = _changed(name, values, [*kept, word])
                kept.append(word)
            except ConfigError as error:
                wrong[word] = error.problems
        if len(wrong) == len(left):
            return cluster, of_file + [line for lines in wrong.values() for line in lines]
        left = list(wrong)
    return cluster, of_file


def values_that_fit(name: str | None, path: Path) -> tuple[DictConfig, list[str]]:
    """What a site's file says, without the entries that no setting takes, and what is wrong with
    those. Raises ConfigError where the file holds no settings."""
    try:
        values = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cluster={name}: {' '.join(str(error).split())}") from None
    if not isinstance(values, DictConfig):
        raise ConfigError(f"cluster={name}: {path} must hold settings, as in nodes of generic.yaml")
    schema = OmegaConf.structured(ClusterConfig)
    wrong = {}
    for key in map(str, values):
        if key not in schema:
            wrong[key] = _unknown(key, f"{path.name}: ", [str(one) for one in schema])
            continue
        try:
            OmegaConf.merge(schema, {key: values[key]})  # raises for ??? and ${...} too
        except OmegaConfBaseException:
            rule = rule_of(typing.get_type_hints(ClusterConfig)[key])[0]
            given = values._get_node(key)
            wrong[key] = f"{path.name}: {key}={given} must be {rule}"
    for key in wrong:
        del values[key]
    return values, list(wrong.values())


def _changed(name: str | None, values: DictConfig, settings: Sequence[str]) -> ClusterConfig:
    schema = OmegaConf.structured(ClusterConfig)
    known = [str(key) for key in schema]
    try:
        changes = OmegaConf.from_dotlist([as_text(word) for word in settings])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cluster={name}: {' '.join(str(error).split())}") from None
    unknown = [_unknown(word, "cluster.", known) for word in settings if _key(word) not in known]
    if unknown:
        raise ConfigError(*unknown)
    try:
        merged = OmegaConf.merge(schema, values, changes)
        return typing.cast(ClusterConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_does_not_fit(error, settings)) from None


def _key(word: str) -> str:
    return word.partition("=")[0].partition(".")[0]


def _does_not_fit(error: OmegaConfBaseException, settings: Sequence[str]) -> str:
    key = str(getattr(error, "full_key", None)).partition("[")[0]
    typed = next((word for word in reversed(settings) if _key(word) == _key(key)), None)
    annotation = typing.get_type_hints(ClusterConfig).get(key)
    if typed is None or annotation is None:
        return f"cluster.{typed or key}: {str(error).splitlines()[0]}"
    return f"cluster.{typed} must be {rule_of(annotation)[0]}"


def as_text(word: str) -> str:
    """A word whose value is text whatever it looks like; YAML reads 12:00:00 as 43200, off as no.

    In quotes, then, where it is not yet.
    """
    name, equals, value = word.partition("=")
    if not equals or value.startswith(('"', "'")):
        return word
    if name != "walltime" and not name.startswith("environment."):
        return word
    return f"{name}={json.dumps(value, ensure_ascii=False)}"  # what JSON quotes, YAML reads


def site_file(name: str | None) -> Path:
    """The file of cluster=NAME. Raises ConfigError where there is none."""
    there = sorted(path.stem for path in SITES.glob("*.yaml"))
    shipped = f"There are {', '.join(there)}; or give the path of a file of your own, as mine.yaml"
    if not name:
        raise ConfigError(f"no site is chosen; add cluster=NAME. {shipped}")
    path = Path(name) if name.endswith(".yaml") else SITES / f"{name}.yaml"
    if not path.is_file():
        meant = [f"cluster={site}" for site in closest(name, there)]
        hint = f"; did you mean {' or '.join(meant)}?" if meant else "."
        raise ConfigError(f"cluster={name}: there is no {path}{hint} {shipped}")
    return path


def _unknown(word: str, where: str, known: Sequence[str]) -> str:
    """word: KEY, or KEY=VALUE as typed."""
    key = _key(word)
    meant = [f"cluster.{name}" for name in closest(key, known)]
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"there are {', '.join(known)}"
    typed = f"{where}{word}: " if "=" in word else where
    return f"{typed}there is no setting cluster.{key}; {hint}"
