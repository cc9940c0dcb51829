"""What is written down about an anomaly: run_dir/anomalies/step_00000123.json, and .md to read.

And rollback.json, what the checkpoint that a run went back to does not know of the rollback.

Imports neither torch nor megatron-core.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.provenance import atomic_write_text

ANOMALIES_FOLDER = "anomalies"
ROLLBACK_FILE = "rollback.json"


@dataclass
class DocumentRow:
    """A document, as far as it lies in one sequence of the step."""

    sample: int  # of the stream
    language: str
    family: str
    store: str  # prefix of the token store
    first_token: int  # in the store
    tokens: int
    labels: int  # of its tokens that count in the loss
    mean_loss: float  # nats per label; NaN without labels
    expected_loss: float  # of its language, over the steps before
    contribution: float  # its part of the step's mean loss
    excess: float  # its contribution, less what its language usually has
    nonfinite_labels: int
    alone: str = ""  # "finite" or "not finite", if it was run by itself
    gradient_norm: float | None = None  # of its own mean loss, if it was run by itself
    # what is looked up for the documents of a report only
    document: int = -1  # number in the store
    doc_id: str = ""  # empty where the store records none
    source: str = ""
    text: str = ""

    @property
    def place(self) -> str:
        number = f"document {self.document}" if self.document >= 0 else None
        return f"{number or f'the document at token {self.first_token}'} of {self.store}"


@dataclass
class LanguageRow:
    language: str
    family: str
    loss: float
    expected_loss: float
    tokens: int


@dataclass
class SequenceRow:
    """A sequence that was run again by itself."""

    sample: int
    language: str
    gradient_norm: float  # of its own mean loss
    gradient_share: float  # the same, times its share of the step's labels


@dataclass
class EarlierStep:
    step: int
    samples: list[int]  # [first, end)
    loss: float
    documents: list[DocumentRow]


@dataclass
class Findings:
    """What was found out about a step's documents."""

    remarks: list[str] = field(default_factory=list)
    no_culprit: str = ""  # why no document is to blame, if that was found out
    languages: list[LanguageRow] = field(default_factory=list)
    documents: list[DocumentRow] = field(default_factory=list)  # the most suspicious one first
    nonfinite_samples: list[int] = field(default_factory=list)
    sequences: list[SequenceRow] = field(default_factory=list)
    gradient_share_by_language: dict[str, float] = field(default_factory=dict)
    earlier: list[EarlierStep] = field(default_factory=list)  # the last one first


@dataclass
class AnomalyReport:
    step: int
    kind: str  # "nonfinite" or "spike"
    decision: str  # pretrain.anomaly.Action
    why: str
    samples: list[int]  # [first, end) of the step
    loss: float
    grad_norm: float
    loss_z: float
    grad_norm_z: float
    learning_rate: float
    findings: Findings


def write_report(run_dir: Path, report: AnomalyReport) -> Path:
    """Write both files; returns the readable one.

    A step that is met again after a rollback, with other data, gets files of its own.
    """
    folder = run_dir / ANOMALIES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step_{report.step:08d}"
    number = 1
    while _is_of_other_samples(folder / f"{name}.json", report.samples):
        number += 1
        name = f"step_{report.step:08d}.{number}"
    text = json.dumps(_plain(asdict(report)), ensure_ascii=False, indent=1, allow_nan=False)
    atomic_write_text(folder / f"{name}.json", printable(text) + "\n")
    readable = folder / f"{name}.md"
    atomic_write_text(readable, printable(markdown(report)))
    return readable


def printable(text: str) -> str:
    """Halves of surrogate pairs, which data may hold and no file takes, become "?"."""
    return text.encode("utf-8", "replace").decode()


def write_rollback(run_dir: Path, rollback: dict[str, Any]) -> None:
    """Keep the last `TrainState.rollback`, in place of one before. Raises OSError."""
    folder = run_dir / ANOMALIES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / ROLLBACK_FILE, json.dumps(rollback, indent=1) + "\n")


def read_rollback(run_dir: Path) -> dict[str, Any] | None:
    """What `write_rollback` wrote last; None where no file is. Raises OSError and ValueError."""
    path = run_dir / ANOMALIES_FOLDER / ROLLBACK_FILE
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.keys() != _OF_A_ROLLBACK:
        raise ValueError(f"{path} is not what a run wrote: expected {sorted(_OF_A_ROLLBACK)}")
    return found


def forget_rollback(run_dir: Path) -> None:
    """Raises OSError."""
    (run_dir / ANOMALIES_FOLDER / ROLLBACK_FILE).unlink(missing_ok=True)


_OF_A_ROLLBACK = {"step", "count", "rollbacks", "left_out_samples"}


def markdown(report: AnomalyReport) -> str:
    """The report for a person."""
    found = report.findings
    first, end = report.samples
    lines = [
        f"# Step {report.step}: {report.kind}",
        "",
        f"{report.why}.",
        "",
        f"- decision: {_DECISIONS[report.decision]}",
        f"- samples {first} to {end - 1} of the stream; learning rate {report.learning_rate:.4g}",
        f"- loss {report.loss:.4f}{_z(report.loss_z)}, "
        f"gradient norm {report.grad_norm:.4g}{_z(report.grad_norm_z)}",
        *(f"- {remark}" for remark in [*found.remarks, found.no_culprit] if remark),
    ]
    if found.documents:
        lines += ["", "## Documents, the most suspicious one first", ""]
        lines += _documents(found.documents, texts=True)
    if found.sequences:
        lines += ["", "## Sequences run again by themselves", ""]
        rows = [
            [str(s.sample), s.language, f"{s.gradient_norm:.4g}", f"{s.gradient_share:.4g}"]
            for s in found.sequences
        ]
        lines += _table(["sample", "language", "gradient norm", "weighted"], rows)
        shares = found.gradient_share_by_language.items()
        lines += ["", "By language: " + ", ".join(f"{code} {share:.4g}" for code, share in shares)]
    lines += ["", "## Loss by language", ""]
    lines += _table(
        ["language", "family", "loss", "before", "tokens"],
        [
            [r.language, r.family, f"{r.loss:.4f}", f"{r.expected_loss:.4f}", str(r.tokens)]
            for r in found.languages
        ],
    )
    for step in found.earlier:
        lines += ["", f"## Step {step.step} before it: loss {step.loss:.4f}", ""]
        lines += _documents(step.documents, texts=False)
    return "\n".join(lines) + "\n"


_DECISIONS = {
    "apply": "the update was made",
    "skip": "the update was skipped; the step counts as taken",
    "rollback": "back to the newest regular save, and on without this data",
    "stop": "no update, and the run ends",
}


def _z(score: float) -> str:
    return f" (z {score:.1f})" if math.isfinite(score) else ""


def _documents(documents: list[DocumentRow], *, texts: bool) -> list[str]:
    lines = []
    for number, row in enumerate(documents, 1):
        named = f"`{row.doc_id}`, " if row.doc_id else ""
        source = f" from {row.source}" if row.source else ""
        lines.append(
            f"{number}. {named}{row.place} ({row.language}, {row.family}){source}, "
            f"{row.tokens} tokens in sample {row.sample}: " + "; ".join(_what_is_known(row))
        )
        excerpt = " ".join(row.text.replace("`", "'").split())
        if excerpt and texts:
            lines += ["", f"   `{excerpt}`", ""]
    return lines


def _what_is_known(row: DocumentRow) -> list[str]:
    known = []
    if row.nonfinite_labels:
        known.append(f"{row.nonfinite_labels} of {row.labels} losses not finite")
    elif row.labels:
        known.append(
            f"mean loss {row.mean_loss:.3f}, usual {row.expected_loss:.3f}; "
            f"{row.contribution:.4f} of the step's loss, {row.excess:+.4f} against usual"
        )
    if row.alone:
        known.append(f"**{row.alone}** when run by itself")
    if row.gradient_norm is not None:
        known.append(f"gradient norm {row.gradient_norm:.4g} by itself")
    return known or ["no loss counts"]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---"] * len(head)
    return ["| " + " | ".join(cells) + " |" for cells in [head, rule, *rows]]


def _is_of_other_samples(path: Path, samples: list[int]) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["samples"] != samples
    except (OSError, ValueError, KeyError):
        return False


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
