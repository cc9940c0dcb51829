"""X-Y pairs out of a corpus, for any two languages: a join by (doc_id, seg_id)."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.corpora.output import read_manifest

# Added to both lengths before their ratio is taken: among short segments, a word more is a lot.
_SLACK = 10


@dataclass(frozen=True)
class Pair:
    source_text: str
    target_text: str
    doc_id: str
    seg_id: str
    source: str
    license: str


@dataclass(frozen=True)
class Bitext:
    source_language: str
    target_language: str
    pairs: list[Pair]
    aligned: int  # segments both languages have
    identical: int  # dropped: the same text in both
    unequal: int  # dropped: one far longer than the other


def split_pair(text: str, languages: list[str]) -> tuple[str, str]:
    """("de", "hi") of "de-hi" or "de:hi"; hyphens within codes are told apart by the languages.

    Raises ValueError where that gives none, or more than one, pair of languages.
    """
    if ":" in text:
        splits = [tuple(text.split(":", 1))]
    else:
        words = text.split("-")
        splits = [("-".join(words[:i]), "-".join(words[i:])) for i in range(1, len(words))]
    fitting = [(x, y) for x, y in splits if x in languages and y in languages and x != y]
    if len(fitting) == 1:
        return fitting[0]
    raise ValueError(
        f"pair {text!r}: expected two different languages of the corpus, as de-hi or pt-BR:de; "
        f"it has {' '.join(languages)}"
    )


def bitext(corpus: Path, pair: str, *, max_ratio: float = 4.0) -> Bitext:
    """The pairs of segments of two languages, in the order of the first one's file.

    Pairs of identical texts (names, code) are left out, and those whose ratio of lengths in
    characters is more than max_ratio times above or below the median of all pairs: the median,
    because Chinese says in 10 characters what takes English 35. Raises ValueError for a pair the
    corpus does not have, FileNotFoundError where there is no finished corpus.
    """
    if not max_ratio > 1:
        raise ValueError(f"--max-ratio {max_ratio:g}: must be above 1; 4 is the default")
    languages = read_manifest(corpus)["languages"]
    x, y = split_pair(pair, list(languages))
    other = {
        (record["doc_id"], seg_id): text
        for record, seg_id, text in _segments(corpus / languages[y]["file"])
    }
    pairs, identical = [], 0
    for record, seg_id, text in _segments(corpus / languages[x]["file"]):
        translation = other.get((record["doc_id"], seg_id))
        if translation == text:
            identical += 1
        elif translation is not None:
            pairs.append(
                Pair(
                    text, translation, record["doc_id"], seg_id, record["source"], record["license"]
                )
            )
    ratios = [_log_ratio(pair) for pair in pairs]
    middle = statistics.median(ratios) if ratios else 0.0
    kept = [
        pair
        for pair, ratio in zip(pairs, ratios, strict=True)
        if abs(ratio - middle) <= math.log(max_ratio)
    ]
    return Bitext(x, y, kept, len(pairs) + identical, identical, len(pairs) - len(kept))


def _log_ratio(pair: Pair) -> float:
    return math.log((len(pair.source_text) + _SLACK) / (len(pair.target_text) + _SLACK))


def _segments(path: Path) -> Iterator[tuple[dict[str, Any], str, str]]:
    with open(path, encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            record = json.loads(line)
            if record["seg_ids"] is None:
                continue
            texts = record["text"].split("\n")
            if len(texts) != len(record["seg_ids"]):
                raise ValueError(
                    f"{path}, line {number}: {len(texts)} lines of text, "
                    f"{len(record['seg_ids'])} seg_ids; build the corpus again"
                )
            for seg_id, text in zip(record["seg_ids"], texts, strict=True):
                yield record, seg_id, text


def lines(result: Bitext) -> Iterator[str]:
    """One JSON line per pair."""
    for pair in result.pairs:
        record = {
            "source_language": result.source_language,
            "target_language": result.target_language,
            "source_text": pair.source_text,
            "target_text": pair.target_text,
            "doc_id": pair.doc_id,
            "seg_id": pair.seg_id,
            "source": pair.source,
            "license": pair.license,
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"
