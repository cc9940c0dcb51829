"""What tokenizers make of a corpus: `python -m data.tokenizer_report CORPUS --tokenizer A --out D`.

Bytes and characters per token by language and family, tokens against English on parallel documents,
and what does not come back when ids are decoded: as a table, tokenizer_report.json and a picture.
"""

import argparse
import hashlib
import json
import math
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from data.corpora.files import check_writable, write_text
from data.corpus import read_documents
from data.documents import Document
from data.interrupted import say_interrupted
from data.language_families import LANGUAGES, family_of
from data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from rich.table import Table

REFERENCE = "en"
MEGABYTES_PER_LANGUAGE = 1.0
_BATCH_BYTES = 4_000_000  # of text, tokenized on all cores at once


@dataclass
class Counts:
    """What a tokenizer makes of some text; the counts of two texts add up.

    parallel_tokens, reference_tokens: of the same documents in this language and in the reference
        language (same doc_id, same number of lines: half a translation would look short).
    normalized: documents that come back in NFC where they were not. lossy: documents that do not
        come back otherwise.
    """

    documents: int = 0
    characters: int = 0
    utf8_bytes: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    fragment_tokens: int = 0
    normalized: int = 0
    lossy: int = 0
    parallel_tokens: int = 0
    reference_tokens: int = 0

    def add(self, other: "Counts") -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @property
    def bytes_per_token(self) -> float:
        return _ratio(self.utf8_bytes, self.tokens)

    @property
    def characters_per_token(self) -> float:
        return _ratio(self.characters, self.tokens)

    @property
    def against_reference(self) -> float:
        """Tokens for the same content, 1 for the reference language: the premium of
        arXiv 2305.15425; nan without parallel documents."""
        return _ratio(self.parallel_tokens, self.reference_tokens)

    @property
    def unknown_share(self) -> float:
        """Tokens that stand for text the vocabulary cannot hold."""
        return _ratio(self.unknown_tokens, self.tokens)

    @property
    def fragment_share(self) -> float:
        """Tokens that hold only a part of a character (byte fallback, in SentencePiece's words)."""
        return _ratio(self.fragment_tokens, self.tokens)

    def as_json(self) -> dict[str, Any]:
        names = ("bytes_per_token", "characters_per_token", "against_reference")
        shares = ("unknown_share", "fragment_share")
        rates = {name: getattr(self, name) for name in (*names, *shares)}
        return asdict(self) | {k: None if math.isnan(v) else v for k, v in rates.items()}


@dataclass
class TokenizerCounts:
    tokenizer: Tokenizer
    languages: dict[str, Counts] = field(default_factory=dict)
    families: dict[str, Counts] = field(default_factory=dict)
    all: Counts = field(default_factory=Counts)
    encode_seconds: float = 0.0


@dataclass
class Report:
    corpus: str
    reference: str
    family_of: dict[str, str]  # language -> family, sorted by family, then language
    tokenizers: list[TokenizerCounts]

    def as_json(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus,
            "reference": self.reference,
            "family_of": self.family_of,
            "tokenizers": [
                {
                    "path": each.tokenizer.path,
                    "kind": each.tokenizer.kind,
                    "vocab_size": each.tokenizer.vocab_size,
                    "fingerprint": each.tokenizer.fingerprint,
                    "encode_seconds": round(each.encode_seconds, 3),
                    "all": each.all.as_json(),
                    "families": {name: c.as_json() for name, c in each.families.items()},
                    "languages": {code: c.as_json() for code, c in each.languages.items()},
                }
                for each in self.tokenizers
            ],
        }


def measure(
    corpus: Path,
    tokenizers: Sequence[Tokenizer],
    *,
    reference: str = REFERENCE,
    megabytes_per_language: float = MEGABYTES_PER_LANGUAGE,
) -> Report:
    """Tokenizes about megabytes_per_language of each language (0: everything) with each tokenizer.

    Where a language has more, documents are chosen by a hash of their doc_id, so that translations
    are chosen together. The corpus is read twice; memory holds a number for each document read.
    The reference language itself is left out of the families' tokens against it. Raises ValueError
    for a corpus without text, for records that cannot be read and for a language of no known
    family.
    """
    if megabytes_per_language < 0:
        raise ValueError(f"megabytes_per_language={megabytes_per_language}: must be 0 or more")
    size, lowest = _survey(read_documents(corpus, setting=""))
    if not size:
        raise ValueError(f"{corpus}: no text in it")
    limit = megabytes_per_language * 1e6 or math.inf
    # at least the document with the lowest hash, however long it is
    highest = {code: max(limit / size[code], lowest[code]) for code in size}
    chosen = (
        document
        for document in read_documents(corpus, setting="")
        if document.text and _hash(document.doc_id) <= highest[document.language]
    )
    family: dict[str, str] = {}
    tallies = [_Tally(tokenizer) for tokenizer in tokenizers]
    for batch in _batches(chosen):
        for document in batch:
            if document.language not in family:
                family[document.language] = document.family or family_of(document.language)
        for tally in tallies:
            tally.take(batch)
    order = sorted(family, key=lambda code: (family[code], code))
    family = {code: family[code] for code in order}
    return Report(
        str(corpus), reference, family, [tally.counts(family, reference) for tally in tallies]
    )


class _Tally:
    """The counts of one tokenizer while documents come in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._languages: dict[str, Counts] = {}
        self._tokens: dict[str, dict[tuple[str, int], int]] = {}  # by language, doc_id and lines
        self._unknown, self._fragment = (
            _mask(ids, tokenizer.vocab_size)
            for ids in (tokenizer.unknown_ids, tokenizer.fragment_ids)
        )
        self._seconds = 0.0

    def take(self, documents: Sequence[Document]) -> None:
        start = time.perf_counter()
        encoded = self._tokenizer.encode_batch([document.text for document in documents])
        self._seconds += time.perf_counter() - start
        for document, ids in zip(documents, encoded, strict=True):
            text, code = document.text, document.language
            flat = np.asarray(ids, np.int64)
            back = self._tokenizer.decode(ids)
            normalized = back != text and back == unicodedata.normalize("NFC", text)
            self._languages.setdefault(code, Counts()).add(
                Counts(
                    documents=1,
                    characters=len(text),
                    utf8_bytes=len(text.encode()),
                    tokens=len(ids),
                    unknown_tokens=int(self._unknown[flat].sum()),
                    fragment_tokens=int(self._fragment[flat].sum()),
                    normalized=int(normalized),
                    lossy=int(back != text and not normalized),
                )
            )
            key = (document.doc_id, text.count("\n"))
            self._tokens.setdefault(code, {}).setdefault(key, len(ids))

    def counts(self, family: Mapping[str, str], reference: str) -> TokenizerCounts:
        result = TokenizerCounts(self._tokenizer, encode_seconds=self._seconds)
        of_reference = self._tokens.get(reference, {})
        for code in family:
            counts = result.languages[code] = self._languages[code]
            pooled = [result.families.setdefault(family[code], Counts()), result.all]
            for total in pooled:
                total.add(counts)
            shared = self._tokens[code].keys() & of_reference.keys()
            counts.parallel_tokens = sum(self._tokens[code][key] for key in shared)
            counts.reference_tokens = sum(of_reference[key] for key in shared)
            if code != reference:
                for total in pooled:
                    total.parallel_tokens += counts.parallel_tokens
                    total.reference_tokens += counts.reference_tokens
        return result


def table(report: Report) -> "Table":
    """Languages under their families; for each measure a column for each tokenizer: A, B, ..."""
    from rich import box
    from rich.table import Table

    letters = [_letter(i) for i in range(len(report.tokenizers))]
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("family, language", no_wrap=True)
    result.add_column("kB", justify="right", no_wrap=True)
    for heading in (
        "bytes per\ntoken",
        "characters\nper token",
        f"tokens\nagainst {report.reference}",
    ):
        for i, letter in enumerate(letters):
            lines = heading.split("\n") if i == 0 else ["", ""]
            result.add_column(
                "\n".join([*lines, letter] if len(letters) > 1 else lines),
                justify="right",
                no_wrap=True,
            )

    def row(label: str, counts: list[Counts], style: str | None = None) -> None:
        names = ("bytes_per_token", "characters_per_token", "against_reference")
        values = [_number(getattr(c, name)) for name in names for c in counts]
        result.add_row(label, f"{counts[0].utf8_bytes / 1e3:,.0f}", *values, style=style)

    for family in dict.fromkeys(report.family_of.values()):
        members = [code for code, of in report.family_of.items() if of == family]
        alone = f": {_label(members[0])}" if len(members) == 1 else ""
        row(family + alone, [each.families[family] for each in report.tokenizers], "bold")
        for code in members if len(members) > 1 else ():
            row(f"  {_label(code)}", [each.languages[code] for each in report.tokenizers])
    result.add_section()
    row("all", [each.all for each in report.tokenizers], "bold")
    return result


def print_report(report: Report, file: TextIO | None = None) -> None:
    """Prints the table, then a line or two about each tokenizer, to `file` (None: stdout)."""
    from rich.console import Console

    file = sys.stdout if file is None else file
    console = Console(file=file, highlight=False)
    # Of many tokenizers the lines get long: longer than the terminal rather than without numbers.
    shown = table(report)
    console.width = max(
        80, console.measure(shown, options=console.options.update(width=999)).maximum
    )
    console.print(shown)
    for i, each in enumerate(report.tokenizers):
        counts, tokenizer = each.all, each.tokenizer
        speed = _ratio(counts.utf8_bytes / 1e6, each.encode_seconds)
        lines = [
            f"{_letter(i)}  {tokenizer.path}",
            f"   {tokenizer.kind}, {tokenizer.vocab_size:,} entries, {speed:.1f} MB/s; tokens that "
            f"are unknown {counts.unknown_share:.3%}, a part of a character "
            f"{counts.fragment_share:.2%}",
            f"   documents that come back exactly "
            f"{counts.documents - counts.normalized - counts.lossy:,} of {counts.documents:,}, in "
            f"NFC {counts.normalized:,}, changed {counts.lossy:,}",
        ]
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)


def plot(report: Report, png_path: Path) -> None:
    """A dot for each language and tokenizer, families in bands: bytes and characters per token,
    and tokens against the reference language where there are parallel documents."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    codes = list(report.family_of)
    parallel = any(
        not math.isnan(each.languages[code].against_reference)
        for each in report.tokenizers
        for code in codes
    )
    panels = [
        ("bytes_per_token", "bytes per token"),
        ("characters_per_token", "characters per token"),
    ]
    if parallel:
        panels.append(("against_reference", f"tokens against {_label(report.reference)}"))
    # a Figure with its own canvas: pyplot would keep global state and choose a display
    figure = Figure(figsize=(4.2 * len(panels) + 2.5, 1.8 + 0.2 * len(codes)), dpi=110)
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, title) in zip(all_axes, panels, strict=True):
        _draw_bands(axes, report.family_of)
        for i, each in enumerate(report.tokenizers):
            axes.plot(
                [getattr(each.languages[code], name) for code in codes],
                range(len(codes)),
                linestyle="none",
                marker="os^Dv"[i % 5],
                markersize=5,
                alpha=0.85,
                label=f"{_letter(i)}  {Path(each.tokenizer.path).name} "
                f"({each.tokenizer.vocab_size:,})",
            )
        if name == "against_reference":
            axes.axvline(1.0, color="0.4", linewidth=0.8)
            axes.set_xscale("log", base=2)  # scripts that fall to bytes are an order away
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.set_xlim(left=0)
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(axis="x", alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    first, last = all_axes[0], all_axes[-1]
    first.set_yticks(range(len(codes)), [_label(code) for code in codes], fontsize=8)
    first.set_ylim(len(codes) - 0.5, -0.5)
    for family, middle in _middles(report.family_of):
        last.text(
            1.02, middle, family, transform=last.get_yaxis_transform(), fontsize=8, va="center"
        )
    figure.legend(
        *first.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    partial = png_path.with_name(f".{png_path.name}.partial")
    figure.savefig(partial, format="png", bbox_inches="tight")
    partial.replace(png_path)


def _draw_bands(axes: Any, family_of: Mapping[str, str]) -> None:
    families = list(dict.fromkeys(family_of.values()))
    for row, family in enumerate(family_of.values()):
        if families.index(family) % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="0.94", linewidth=0, zorder=0)


def _middles(family_of: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    rows = list(family_of.values())
    for family in dict.fromkeys(rows):
        first = rows.index(family)
        yield family, first + (rows.count(family) - 1) / 2


def _survey(documents: Iterable[Document]) -> tuple[dict[str, int], dict[str, float]]:
    """UTF-8 bytes and the lowest hash of a document, by language."""
    size: dict[str, int] = {}
    lowest: dict[str, float] = {}
    for document in documents:
        if document.text:
            code = document.language
            size[code] = size.get(code, 0) + len(document.text.encode())
            lowest[code] = min(lowest.get(code, 1.0), _hash(document.doc_id))
    return size, lowest


def _hash(doc_id: str) -> float:
    digest = hashlib.blake2b(doc_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _mask(ids: frozenset[int], size: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[list(ids)] = True
    return mask


def _letter(number: int) -> str:
    return chr(ord("A") + number)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _label(code: str) -> str:
    return f"{code} {LANGUAGES[code].name}" if code in LANGUAGES else code


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.tokenizer_report", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("corpus", type=Path, help="a file or folder of documents")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        action="append",
        required=True,
        help="a tokenizer.json, SentencePiece model or tekken file; give several to compare",
    )
    parser.add_argument("--eod-token", default="", help="the token that ends a document")
    parser.add_argument("--reference", default=REFERENCE, help="default: %(default)s")
    parser.add_argument(
        "--megabytes-per-language",
        type=float,
        default=MEGABYTES_PER_LANGUAGE,
        help="how much to tokenize, 0 for everything (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON and the PNG")
    given = parser.parse_args(arguments)
    json_path = given.out / "tokenizer_report.json"
    try:
        check_writable(f"--out {given.out}", json_path)  # measuring may take hours
        report = measure(
            given.corpus,
            [load_tokenizer(path, given.eod_token) for path in given.tokenizer],
            reference=given.reference,
            megabytes_per_language=given.megabytes_per_language,
        )
        given.out.mkdir(parents=True, exist_ok=True)
        write_text(json_path, json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n")
        plot(report, given.out / "tokenizer_report.png")
    except (OSError, ValueError, ModuleNotFoundError) as error:
        message = str(error).replace("data.tokenizer=", "--tokenizer ")
        message = message.replace("data.eod_token=", "--eod-token ")
        parser.exit(2, f"error: {message.replace('data.eod_token', '--eod-token')}\n")
    print_report(report)
    print(f"\n{json_path}\n{given.out / 'tokenizer_report.png'}")
    return 0


if __name__ == "__main__":
    say_interrupted()
    sys.exit(main())
