"""Languages and families that the settings name, where there are no token stores to look into."""

from collections import Counter
from collections.abc import Iterator
from functools import cache

from data.config import DataConfig, RatioRule
from data.corpus import read_documents
from data.family_grouping import FamilyGrouping, NoGroupError, load_grouping
from data.language_families import LANGUAGES, find_language, near, unknown_language
from data.language_mixture import language_shares
from data.tokenize_corpus import DEMO_CORPUS


def chosen(config: DataConfig) -> bool:
    """Whether somebody named languages or families: none are by default."""
    return bool(config.languages or config.mixture.language_max_epochs) or any(
        rule.drop_languages or rule.language_shares or rule.ratios or rule.gamma or rule.losses
        for _, rule in _rules(config)
    )


def of_shipped_text(config: DataConfig) -> list[str]:
    """What the run would refuse of the settings for the text that ships with the package."""
    there = _characters()
    found = []
    if missing := [code for code in config.languages if code not in there]:
        found.append(
            f"data.languages: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in "
            f"the text that ships with the package, which has {', '.join(there)}"
            + _did_you_mean(missing, there)
        )
    sizes = {
        code: n for code, n in there.items() if not config.languages or code in config.languages
    }
    if not sizes:
        return found
    try:
        families = load_grouping(config.families).families_of(list(sizes))
    except (OSError, ValueError) as error:
        return [*found, str(error)]
    sizes = {code: sizes[code] for code in families}
    if unknown := sorted(set(config.mixture.language_max_epochs) - set(sizes)):
        found.append(
            f"data.mixture.language_max_epochs names {', '.join(unknown)}, but the data has "
            f"{', '.join(sizes)}"
        )
    most = config.mixture.max_epochs
    for setting, rule in _rules(config):
        if rule.problems(setting, most):  # told already
            continue
        try:
            language_shares(rule, sizes, families, most, setting)
        except ValueError as error:
            found.append(str(error))
    return found


def not_of_the_table(config: DataConfig) -> list[str]:
    """Names that the table of languages does not know; a corpus may have languages of its own."""
    found = [_unknown("data.languages", code) for code in config.languages if not _known(code)]
    found += [
        _unknown(f"{setting}.{name}", code)
        for setting, rule in _rules(config)
        for name in ("drop_languages", "language_shares")
        for code in getattr(rule, name)
        if not _known(code)
    ]
    found += [
        _unknown("data.mixture.language_max_epochs", code)
        for code in config.mixture.language_max_epochs
        if not _known(code)
    ]
    families = _families(load_grouping(config.families))
    for setting, rule in _rules(config):
        for name in ("ratios", "gamma", "losses"):
            if unknown := sorted(set(getattr(rule, name)) - families):
                meant = [f for family in unknown for f in near(family, sorted(families))]
                found.append(
                    f"{setting}.{name} names {', '.join(unknown)}, which data.families="
                    f"{config.families} makes of no language of data/language_families.py"
                    + (f"; did you mean {', '.join(meant)}?" if meant else "")
                )
    return found


def _rules(config: DataConfig) -> Iterator[tuple[str, RatioRule]]:
    for number, (_, _, rule) in enumerate(config.mixture.rules()):
        yield f"data.mixture.stages[{number - 1}]" if number else "data.mixture", rule


@cache
def _characters() -> dict[str, int]:
    """Language -> characters of the text that ships, which takes 0.05 s to read."""
    sizes: Counter[str] = Counter()
    for document in read_documents(DEMO_CORPUS):
        sizes[document.language] += len(document.text)
    return dict(sorted(sizes.items()))


def _did_you_mean(codes: list[str], there: dict[str, int]) -> str:
    """By another code of the same language (rus), or by what its code or name looks like."""
    spelled = {LANGUAGES[code].name: code for code in there} | {code: code for code in there}
    meant = []
    for code in codes:
        row = find_language(code)
        if row is not None:
            meant += [row.code] * (row.code in there)
        else:
            meant += [spelled[name] for name in near(code, spelled)]
    return f"; did you mean {', '.join(dict.fromkeys(meant))}?" if meant else ""


def _known(code: str) -> bool:
    return find_language(code) is not None


def _unknown(setting: str, code: str) -> str:
    return f"{setting}: {unknown_language(code)}"


def _families(grouping: FamilyGrouping) -> set[str]:
    """All that this grouping can make of languages of the table."""
    found = set()
    for code in LANGUAGES:
        try:
            found.add(grouping.family_of(code))
        except NoGroupError:
            continue
    return {family for family in found if family is not None}
