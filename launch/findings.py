"""What a check found, and how it is said."""

import re
from collections.abc import Iterable
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
        kept = set(but)
        names = [re.compile(rf"(?<![\w.]){re.escape(setting)}=") for setting in settings]
        self.all[:] = [
            finding
            for finding in self.all
            if finding.text in kept or not any(name.search(finding.text) for name in names)
        ]

    def _add(self, severity: str, topic: str, texts: Iterable[str]) -> None:
        known = {(finding.severity, finding.text) for finding in self.all}
        for text in texts:
            if (severity, text) not in known:
                known.add((severity, text))
                self.all.append(Finding(severity, topic, text))
