"""`data/mixture=FILE.yaml` on a command line: the settings that the word stands for.

    data/mixture=uniform              a file of conf/data/mixture
    data/mixture=mine                 or of data/mixture in a --config-dir, which comes first
    data/mixture=sweep/optimum.yaml   any other of your own (data/mixture_file.py)

Hydra could merge such a file only; here it replaces data.mixture as a whole: settings that the file
does not name go back to their defaults. The word becomes two of Hydra's own, so that
everything that follows (--cfg, --multirun, records) sees plain settings, and words like
data.mixture.max_epochs=4 win over the file wherever they stand. Imports neither torch nor numpy.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.language_families import near
from data.mixture_file import read_mixture_file
from parallel.config import ConfigError

WORD = "data/mixture"
SETTING = "data.mixture"
SHIPPED = Path(__file__).resolve().parent.parent / "conf" / "data" / "mixture"
_PLAIN = re.compile(r"[A-Za-z/][\w./@%+-]*", re.ASCII)  # text that Hydra reads without quotes
_NOT_TEXT = ("true", "false", "null", "inf", "nan")
FORGET = f"{SETTING}=???"  # a missing value; what is merged into it starts from the defaults


def with_mixture_files(words: Sequence[str]) -> list[str]:
    """`words` with data/mixture=A.yaml replaced by data.mixture=??? data.mixture={...}; with
    A.yaml,B.yaml (for --multirun) by data.mixture={...},{...}.

    They stand where the first word about data.mixture stood. Raises ConfigError.
    """
    given = [word for word in words if _name(word) == WORD]
    if not given:
        return list(words)
    (word, *more) = given
    if more:
        raise ConfigError(f"{' '.join(given)}: one mixture at a time; keep one of these words")
    if word.startswith("~"):
        raise ConfigError(f"{word}: write {WORD}={word.partition('=')[2] or 'FILE.yaml'}")
    values = word.partition("=")[2].split(",")
    mixtures = ",".join(_as_word(_read(value, words), value) for value in values)
    about = [i for i, other in enumerate(words) if _is_about_mixture(_name(other))]
    others = list(words)
    others.remove(word)
    return [*others[: about[0]], FORGET, f"{SETTING}={mixtures}", *others[about[0] :]]


def short_name(word: str) -> str | None:
    """A few letters for a word data.mixture={...}, for names of folders; None for other words."""
    word = word.lstrip("+")
    if not word.startswith(f"{SETTING}=") or word == FORGET:
        return None
    from hashlib import sha256

    weighting = re.search(r"weighting:\s*'?(\w+)", word)
    kind = f"{weighting[1]}-" if weighting else ""
    return f"{SETTING}={kind}{sha256(word.encode()).hexdigest()[:8]}"


def _name(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _is_about_mixture(name: str) -> bool:
    return name in (WORD, SETTING) or name.startswith(f"{SETTING}.")


def mixture_path(value: str, words: Sequence[str]) -> Path | None:
    """The file that data/mixture=`value` means among `words`; None for a name that there is not.

    Raises RuntimeError for ~NAME of nobody.
    """
    if Path(value).suffix in (".yaml", ".yml"):
        return Path(value).expanduser()
    places = (folder / f"{value}.yaml" for folder in _folders(words))
    return next((path for path in places if path.is_file()), None)


def _folders(words: Sequence[str]) -> list[Path]:
    """Where a name is looked up: those of --config-dir and hydra.searchpath, then the shipped."""
    return [*(Path(folder).expanduser() / WORD for folder in _searched(words)), SHIPPED]


def _searched(words: Sequence[str]) -> Iterator[str]:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            yield value if equals else after
        elif _name(word) == "hydra.searchpath":
            from hydra.core.override_parser.overrides_parser import OverridesParser
            from hydra.errors import HydraException

            try:
                places = OverridesParser.create().parse_override(word).value()
            except HydraException:  # which Hydra will say
                continue
            for place in places if isinstance(places, list) else []:
                scheme, _, path = str(place).rpartition("://")
                if scheme in ("", "file"):  # what lies in packages is not looked into
                    yield path


def _read(value: str, words: Sequence[str]) -> dict[str, Any]:
    try:
        path = mixture_path(value, words)
        if path is None:
            raise ConfigError(_no_such_name(value, words))
        return read_mixture_file(path)
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(*(f"{WORD}={line}" for line in str(error).splitlines())) from None


def _no_such_name(value: str, words: Sequence[str]) -> str:
    there = sorted({path.stem for folder in _folders(words) for path in folder.glob("*.yaml")})
    meant = [f"{WORD}={name}" for name in near(value, there)]
    hint = f"; did you mean {' or '.join(meant)}?" if meant else "."
    return (
        f"{WORD}={value}: there is no conf/{WORD}/{value}.yaml{hint} There are "
        f"{', '.join(there)}; or give the path of a file of your own, as mine.yaml"
    )


def _as_word(settings: dict[str, Any], value: str) -> str:
    """The settings as Hydra's grammar writes a table. Raises ConfigError for what it cannot say."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, problems = OverridesParser.create(), []
    for name, setting in settings.items():
        text = _written({name: setting})
        try:
            read = parser.parse_override(f"{SETTING}={text}").value()
        except HydraException:
            read = None
        if read != {name: setting}:
            problems.append(
                f"{WORD}={value}: {name}: {setting} cannot be written on a command line; names may "
                "have letters, digits, spaces and any of - _ . / ( ) [ ] { } : = ,"
            )
    if problems:
        raise ConfigError(*problems)
    return _written(settings)


def _written(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{_escaped(name)}:{_written(item)}" for name, item in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str) and (value.lower() in _NOT_TEXT or not _PLAIN.fullmatch(value)):
        # backslashes are doubled in front of a quote, and only there
        escaped = re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + (r"\'" if m[2] else ""), value)
        return f"'{escaped}'"
    return str(value)


def _escaped(name: str) -> str:
    return re.sub(r"([\\()\[\]{}:=,\s])", r"\\\1", name)
