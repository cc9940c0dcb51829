"""What has been tokenized so far, and whether it is fit to be made into stores."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.language_families import did_you_mean
from data.store_folder import SPLITS
from data.token_parts import PartSection, check_family, read_header
from data.tokenize_worker import result_of

logger = logging.getLogger(__name__)


class BadDocumentError(ValueError):
    """More bad documents than allowed."""


class UnusableCorpusError(ValueError):
    """The corpus has not what the arguments ask for; nothing of the work helps another call."""


@dataclass
class Progress:
    """Told again and again while stores are made."""

    stage: Literal["tokenizing", "writing"]
    done: int  # of the corpus's bytes on disk while tokenizing, of tokens while writing
    total: int
    resumed: int  # how much of `done` an earlier run had left
    documents: int
    tokens: int


Report = Callable[[Progress], None]


class Collected:
    """What the parts are, in the order of the corpus."""

    def __init__(self, skip_bad: int, total: int, report: Report | None):
        self.sections: dict[tuple[str, str], list[PartSection]] = {}
        self.families: dict[str, str] = {}
        self.present: set[str] = set()
        self.bad = 0
        self.first_bad: list[str] = []
        self.total = total
        self.digest = hashlib.blake2b(digest_size=16)
        self._skip_bad = skip_bad
        self._report = report or (lambda progress: None)
        self._progress = Progress("tokenizing", 0, total, 0, 0, 0)

    def add(self, path: Path, on_disk: int, future: Future | None) -> None:
        """Waits for a part. Raises what went wrong with it."""
        bad = [] if future is None else result_of(future)
        header = read_header(path)
        if header is None and not bad:
            raise OSError(f"{path}: this piece of the work has vanished; run the command again")
        for what in bad if header is None else header.bad:
            self.bad += 1
            if self.bad > self._skip_bad:
                raise BadDocumentError(self._too_many(what))
            if len(self.first_bad) < 100:
                self.first_bad.append(what)
        assert header is not None
        self.digest.update(path.stem.encode())
        self.present.update(header.present)
        progress = self._progress
        progress.done += on_disk
        progress.resumed += on_disk if future is None else 0
        for section in header.sections:
            before = self.families.setdefault(section.language, section.family)
            check_family(section.language, before, section.family, section.example)
            self.sections.setdefault((section.language, section.split), []).append(section)
            progress.documents += section.documents
            progress.tokens += section.tokens + section.documents
        self._report(progress)

    def largest_first(self) -> list[tuple[tuple[str, str], list[PartSection]]]:
        """The order that keeps all processes busy to the end."""
        return sorted(
            self.sections.items(), key=lambda item: (-sum(s.tokens for s in item[1]), item[0])
        )

    def start_writing(self) -> None:
        self._progress = Progress(
            "writing", 0, self._progress.tokens, 0, self._progress.documents, self._progress.tokens
        )
        self._report(self._progress)

    def written(self, tokens: int) -> None:
        self._progress.done += tokens
        self._report(self._progress)

    def _too_many(self, what: str) -> str:
        if not self._skip_bad:
            return (
                f"{what}. Mend it, or leave out up to N bad documents with --skip-bad N"
                " of python -m data.tokenize, whose --out is then data.store_dir"
            )
        return (
            f"{what}. That is bad document number {self.bad}, and --skip-bad {self._skip_bad} "
            "allows no more"
        )

    def check(self, validation_fraction: float, languages: Sequence[str], corpus: Path) -> None:
        missing = sorted(set(languages) - self.present)
        if missing:
            raise UnusableCorpusError(
                f"data.languages: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
                f"not in data.corpus={corpus}{did_you_mean(missing, sorted(self.present)) or '.'} "
                f"There are {', '.join(sorted(self.present))}"
            )
        documents = self._progress.documents
        if not documents:
            raise UnusableCorpusError(f"data.corpus={corpus}: there is no document with text in it")
        of_split = {
            s: {language for language, split in self.sections if split == s} for s in SPLITS
        }
        for split in SPLITS:
            if not of_split[split]:
                raise UnusableCorpusError(
                    f"data.validation_fraction={validation_fraction} leaves none of the "
                    f"{documents} documents of {corpus} for {split}; "
                    + ("raise it" if split == "validation" else "lower it")
                    + ", or give more documents"
                )
        for split, other in (SPLITS, SPLITS[::-1]):
            lacking = sorted(of_split[other] - of_split[split])
            if lacking:
                logger.warning("%s: no %s document of %s", corpus, split, ", ".join(lacking))
        if self.bad:
            logger.warning("%s: %d bad documents were left out", corpus, self.bad)

    def by_split(self) -> dict[str, dict[str, dict[str, int]]]:
        """Split -> language -> counts."""
        return {
            split: {
                language: {
                    name: sum(getattr(section, name) for section in sections)
                    for name in ("documents", "tokens", "characters", "utf8_bytes")
                }
                for (language, of), sections in sorted(self.sections.items())
                if of == split
            }
            for split in SPLITS
        }
