"""What a check found, and how it is said."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """error: the run would be refused, or end before its time. warning: it would start, and most
    likely not do what was meant. note: a fact worth knowing."""

    severity: str
    topic: str  # settings, layout, data, checkpoints, ...
    text: str


@dataclass
class Findings:
    """All of them, in the order found; the same one is kept once."""

    all: list[Finding] = field(default_factory=list)

    def errors(self, topic: str, texts: Iterable[str]) -> None:
        self._add(ERROR, topic, texts)

    def warnings(self, topic: str, texts: Iterable[str]) -> None:
        self._add(WARNING, topic, texts)

    def notes(self, topic: str, texts: Iterable[str]) -> None:
        self._add(NOTE, topic, texts)

    def of(self, severity: str) -> list[Finding]:
        return [finding for finding in self.all if finding.severity == severity]

    def forget_about(self, settings: Iterable[str], but: Iterable[str]) -> None:
        """Drops what names one of these settings: its value is not what somebody typed. `but` the
        texts that say why."""
        kept, named = set(but), naming(settings)
        self.all[:] = [one for one in self.all if one.text in kept or not named(one.text)]

    def _add(self, severity: str, topic: str, texts: Iterable[str]) -> None:
        known = {(finding.severity, finding.text) for finding in self.all}
        for text in texts:
            if (severity, text) not in known:
                known.add((severity, text))
                self.all.append(Finding(severity, topic, text))


def naming(settings: Iterable[str]) -> Callable[[str], bool]:
    """Whether a text names one of these settings with a value."""
    names = [re.compile(rf"(?<![\w.]){re.escape(setting)}=") for setting in settings]
    return lambda text: any(name.search(text) for name in names)


def accused(problems: Iterable[str]) -> set[str]:
    """The settings whose own values break a rule: those that these texts begin with."""
    found = (re.match(r"([\w.]+)=", problem) for problem in problems)
    return {match[1] for match in found if match}


def many(count: int, one: str) -> str:
    """1 error, 2 errors; 2 processes."""
    return f"{count} {one}" + ("es" if one.endswith("s") else "s") * (count != 1)
