"""Groupings: which family a language counts under, for ratios between families.

    branch         (the default) the branch of the table, or what the corpus's records say
    stock          the level above: Indo-European, Afro-Asiatic ...
    one_each       every language is a family of its own
    five_families  those of arXiv 2410.12883, from data/groupings/five_families.yaml
    PATH.yaml      the user's own, in the form of that file:

        north: [germanic, fi, et]     # families of the table or of the data, stocks, languages
        south: [romance, el]
        rest: drop                    # or keep; without it, a language of no group is an error

A language named by its code goes there whatever is said of its family, and a family so named goes
before its stock. What is a family is arguable: see data/language_families.py.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from data.language_families import LANGUAGES, find_language, near, unknown_language

logger = logging.getLogger(__name__)

GROUPINGS_FOLDER = Path(__file__).parent / "groupings"
REST = "rest"
RESTS = ("drop", "keep")


@dataclass(frozen=True)
class FamilyGrouping:
    """A way to put languages into families; `load_grouping` makes one.

    recorded: language -> family of the data at hand (what the token stores say). It decides where
    nothing else does, and lets a grouping name languages and families that the table lacks.
    """

    name: str
    family_or_none: Callable[[str], str | None]  # None: the language is left out
    recorded: Mapping[str, str] = field(default_factory=dict)

    def family_of(self, language: str) -> str | None:
        """The family a language counts under; None if this grouping leaves it out.

        Raises ValueError if it is in no group and nothing says what then, or unknown altogether.
        """
        return self.family_or_none(language)

    def families_of(self, languages: list[str]) -> dict[str, str]:
        """Language -> family of those that this grouping keeps, in the order given.

        Logs which it leaves out. Raises ValueError naming every language that is in no group, and
        if none is left.
        """
        kept: dict[str, str] = {}
        dropped, errors = [], []
        for language in languages:
            try:
                family = self.family_of(language)
            except NoGroupError:
                errors.append(language)
                continue
            if family is None:
                dropped.append(language)
            else:
                kept[language] = family
        if errors:
            raise NoGroupError(self.name, errors)
        if not kept:
            raise ValueError(
                f"data.families={self.name}: none of the languages {', '.join(languages)} is in "
                "one of its groups; add them, or set rest: keep"
            )
        if dropped:
            logger.warning(
                "data.families=%s leaves out %s (rest: drop)", self.name, ", ".join(dropped)
            )
        return kept


class NoGroupError(ValueError):
    """Languages that a user's grouping does not name."""

    def __init__(self, name: str, languages: list[str]):
        super().__init__(
            f"data.families={name}: {', '.join(languages)} in none of its groups; name them, their "
            f"families or their stocks there, or add a line `{REST}: drop` (leave them out) or "
            f"`{REST}: keep` (each under its own branch)"
        )


def load_grouping(
    name: str = "branch", recorded: Mapping[str, str] | None = None
) -> FamilyGrouping:
    """The grouping of this name, or of the YAML file at this path.

    recorded: language -> family as the data's token stores record it, which is the branch of the
    table unless the corpus said otherwise.

    Raises ValueError for a name that there is not, and for a file that is no table of lists, names
    an unknown language or family, or names one twice; FileNotFoundError for no such file.
    """
    recorded = dict(recorded or {})

    def branch(language: str) -> str:
        if family := recorded.get(language):
            return family
        if row := find_language(language):
            return row.family
        raise ValueError(unknown_language(language))

    def stock(language: str) -> str:
        # of a family that only the corpus knows, nobody knows the stock
        row = find_language(language)
        return row.stock.lower() if row else branch(language)

    computed = {"branch": branch, "stock": stock, "one_each": lambda language: language}
    if name in computed:
        return FamilyGrouping(name, computed[name], recorded)
    path = GROUPINGS_FOLDER / f"{name}.yaml"
    if not path.is_file():
        if not name.endswith((".yaml", ".yml")) and "/" not in name:
            names = [*computed, *sorted(file.stem for file in GROUPINGS_FOLDER.glob("*.yaml"))]
            meant = near(name, names)
            raise ValueError(
                f"data.families={name}: there is no such grouping"
                + (f"; did you mean {' or '.join(meant)}?" if meant else ".")
                + f" There are {', '.join(names)}, and YAML files by their path"
            )
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"data.families={name}: no such file")
    return _from_file(path, name, recorded, branch)


def _from_file(
    path: Path, name: str, recorded: Mapping[str, str], branch: Callable[[str], str]
) -> FamilyGrouping:
    groups, rest = _read(path, name)
    group_of: dict[str, str] = {}  # "language de", "family germanic" -> group
    for group, members in groups.items():
        for member in members:
            kind_and_name = _meaning(member, recorded)
            if kind_and_name is None:
                raise ValueError(f"data.families={name}: group {group}: {_unknown(member)}")
            if kind_and_name in group_of:
                other = group_of[kind_and_name]
                raise ValueError(
                    f"data.families={name}: {member} is named twice, in {other} and in {group}; "
                    "a language counts under one family"
                )
            group_of[kind_and_name] = group

    def family_or_none(language: str) -> str | None:
        row = find_language(language)
        keys = [f"language {language}"]
        keys += [f"language {row.code}"] if row else []
        keys += [f"family {branch(language)}"]
        keys += [f"family {row.stock.lower()}"] if row else []
        for key in keys:
            if key in group_of:
                return group_of[key]
        if rest == "keep":
            return branch(language)
        if rest == "drop":
            return None
        raise NoGroupError(name, [language])

    return FamilyGrouping(name, family_or_none, recorded)


def _read(path: Path, name: str) -> tuple[dict[str, list[str]], str]:
    """Groups and what becomes of other languages: drop, keep or "" (an error)."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.families={name}: not YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"data.families={name}: must be a table of lists, as in `north: [germanic, fi]`"
        )
    rest = content.pop(REST, "")
    if rest not in ("", *RESTS):
        raise ValueError(f"data.families={name}: {REST}: {rest} must be {' or '.join(RESTS)}")
    groups: dict[str, list[str]] = {}
    for group, members in content.items():
        if not isinstance(members, list) or not members:
            raise ValueError(
                f"data.families={name}: {group} must be a list of languages, families or stocks, "
                f"as in `{group}: [germanic, fi]`, and is {members!r}"
            )
        # YAML 1.1 reads a bare no as false, and a bare on as true
        groups[str(group)] = [_text(member) for member in members]
    return groups, rest


def _text(member: object) -> str:
    return {"False": "no", "True": "on"}.get(str(member), str(member))


def _meaning(member: str, recorded: Mapping[str, str]) -> str | None:
    """ "language de", "family germanic", "family indo-european"; None for none of them.

    Stocks share a namespace with families: a stock written as a branch (uralic) is that branch.
    """
    if member in recorded:
        return f"language {member}"
    if member in recorded.values():
        return f"family {member}"
    if member.lower() in _families_and_stocks():
        return f"family {member.lower()}"
    row = find_language(member)
    return f"language {row.code}" if row else None


def _unknown(member: str) -> str:
    meant = near(member, [*LANGUAGES, *_families_and_stocks()])
    return (
        f"{member!r} is neither a language nor a family nor a stock"
        + (f" (did you mean {' or '.join(map(repr, meant))}?)" if meant else "")
        + "; the families are those of data/language_families.py and of the data"
    )


def _families_and_stocks() -> dict[str, None]:
    rows = LANGUAGES.values()
    return dict.fromkeys([row.family for row in rows] + [row.stock.lower() for row in rows])
