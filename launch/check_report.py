"""What launch.check found, for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.findings import ERROR, NOTE, WARNING, Finding, many
from launch.origins import COMMAND_LINE, DEFAULT, Origin


@dataclass
class Report:
    processes: int
    how_many: str  # processes, in words
    model: str | None
    words: Sequence[str]  # as typed
    findings: list[Finding]
    origins: list[Origin] = field(default_factory=list)
    seconds: float = 0.0

    def of(self, severity: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == severity]


def describe(report: Report, *, everything: bool = False) -> list[str]:
    """The report for people: errors, warnings, notes, where values come from, the verdict."""
    lines = [
        f"{report.model or 'no model'} on {many(report.processes, 'process')} ({report.how_many})"
    ]
    where = {origin.setting: origin for origin in report.origins}
    typed = {word.lstrip("+~").partition("=")[0] for word in report.words}
    for severity in (ERROR, WARNING, NOTE):
        for finding in report.of(severity):
            first, *rest = finding.text.splitlines()
            lines.append(f"{severity + ':':<9}{finding.topic}: {first}")
            lines += [f"{'':9}{line}" for line in rest]
            lines += [f"{'':9}({line})" for line in _where_from(finding, where, typed)]
    lines += ["", *_table(report.origins, everything)]
    errors, warnings = len(report.of(ERROR)), len(report.of(WARNING))
    verdict = "sound" if not errors else "NOT SOUND"
    lines += [
        "",
        f"{verdict}: {many(errors, 'error')}, {many(warnings, 'warning')}, "
        f"in {report.seconds:.2f} s",
    ]
    return lines


def _where_from(finding: Finding, where: dict[str, Origin], typed: set[str]) -> list[str]:
    """Of the settings that an error or a warning names, those that nobody typed."""
    if finding.severity == NOTE:
        return []
    sources = {name: where[name].source for name in where if f"{name}=" in finding.text}
    return [
        f"{name} is the default" if source == DEFAULT else f"{name} is from {source}"
        for name, source in sources.items()
        if source != COMMAND_LINE and name not in typed
    ]


def _table(origins: Sequence[Origin], everything: bool) -> list[str]:
    shown = [
        origin
        for origin in origins
        # what nobody chose and has no default is of the model, where none is chosen
        if everything
        or origin.source == COMMAND_LINE
        or (origin.changed and origin.source != DEFAULT)
    ]
    if not shown:
        return ["all settings have their defaults"]
    rows = [(origin.setting, _value(origin.value), origin.source) for origin in shown]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    head = "settings" if everything else "settings that are not left at their defaults"
    return [f"{head}:"] + [f"  {a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows]


def _value(value: Any) -> str:
    text = str(value) if not isinstance(value, bool) else str(value).lower()
    text = "null" if value is None else getattr(value, "name", text)
    return text if len(text) <= 40 else text[:37] + "..."


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON types."""
    where = {origin.setting: origin for origin in report.origins}
    return {
        "sound": not report.of(ERROR),
        "model": report.model,
        "processes": report.processes,
        "seconds": round(report.seconds, 3),
        "findings": [
            {
                **asdict(finding),
                "settings": {
                    name: _as_json(where[name]) for name in where if f"{name}=" in finding.text
                },
            }
            for finding in report.findings
        ],
        "settings": {origin.setting: _as_json(origin) for origin in report.origins},
    }


def _as_json(origin: Origin) -> dict[str, Any]:
    value = getattr(origin.value, "name", origin.value)
    return {"value": value, "from": origin.source}
