"""From pages to the segments worth keeping: tidy, long enough, translated, and each once.

English decides. A segment is kept if its English is a sentence or more and has not come before in
the same source; so the choice is the same in every language and documents stay parallel. A
translation is then dropped where it is none: equal to some English segment, or English by its
letters or its words.
"""

import html
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from data.corpora.languages import NON_LATIN

# A segment's id within its page, the same in every language; None where only its place counts.
Segment = tuple[str | None, str]
Pages = dict[str, list[Segment]]  # page -> segments, in reading order

SHORTEST_ENGLISH = 15  # characters: shorter ones are labels and headings ("File", "See also")
SHORTEST_DOCUMENT = 40  # UTF-8 bytes
NON_ASCII_SHARE = 0.25  # of a segment's characters, in the languages of NON_LATIN

_SPACE = re.compile(r"\s+")
_TAG = re.compile(r"<[^>]+>")
# Controls, soft hyphens, byte-order and direction marks: layout, not text. U+200B (between Khmer
# words), U+200C and U+200D (inside Indic and Persian words) are text and stay.
_LAYOUT = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)
_WORD = re.compile(r"[^\W\d_]{2,}")
_ENGLISH_WORD = re.compile(r"\b(the|and|you|your|with|this|that|from|which|when|are|will)\b")


def tidy(text: str) -> str:
    """One line of NFC text, without layout characters.

    NFC because text in decomposed form costs a tokenizer two to three times the tokens.
    """
    return unicodedata.normalize("NFC", _SPACE.sub(" ", _LAYOUT.sub("", text))).strip()


def tidy_markup(markup: str) -> str:
    """`tidy` of HTML or XML: tags removed, entities resolved."""
    return tidy(html.unescape(_TAG.sub("", markup)))


def is_translated(language: str, text: str) -> bool:
    """Whether a segment is in the language, as far as its letters and English's words can tell."""
    if language == "en":
        return True
    if "\ufffd" in text:  # bytes that were not UTF-8
        return False
    if language in NON_LATIN:
        foreign = sum(not c.isascii() for c in text)
        # a page half translated ends in English sentences
        return foreign >= NON_ASCII_SHARE * len(text) and len(_english_words(text)) < 3
    return len(_english_words(text)) < 2  # one alone may be a name, or a word of both


def _english_words(text: str) -> set[str]:
    return set(_ENGLISH_WORD.findall(text))


@dataclass(frozen=True)
class KeptPage:
    page: str
    seg_ids: list[str] | None  # None: aligned with other languages as a whole only
    segments: list[str]


class English:
    """What the English side of one source says about all languages."""

    def __init__(self, pages: Pages) -> None:
        self.lengths = {page: len(segments) for page, segments in pages.items()}
        self.texts = {text for segments in pages.values() for _, text in segments}
        self.kept: set[tuple[str, str]] = set()
        seen: set[str] = set()
        for page, segments in pages.items():
            for place, (seg_id, text) in enumerate(segments):
                if text not in seen and is_sentence(text):
                    seen.add(text)
                    self.kept.add((page, str(place) if seg_id is None else seg_id))


def is_sentence(english: str) -> bool:
    return (
        len(english) >= SHORTEST_ENGLISH
        and len(_WORD.findall(english)) >= 2
        and "\ufffd" not in english
    )


def kept_pages(
    language: str, pages: Pages, english: English, *, by_page: bool
) -> Iterator[KeptPage]:
    """The pages of one language, with the segments worth keeping.

    A page is aligned segment by segment where segments have ids, or where there are as many as
    in English; other pages, and all of them if by_page, keep any segment not seen before.
    """
    seen: set[str] = set()
    for page, segments in pages.items():
        has_ids = bool(segments) and segments[0][0] is not None
        aligned = not by_page and (has_ids or len(segments) == english.lengths.get(page))
        ids, texts = [], []
        for place, (seg_id, text) in enumerate(segments):
            key = str(place) if seg_id is None else seg_id
            if aligned:
                if len(text) < 2 or (page, key) not in english.kept:
                    continue
            elif len(text) < SHORTEST_ENGLISH or text in seen:
                continue
            if (language != "en" and text in english.texts) or not is_translated(language, text):
                continue
            if not aligned:
                seen.add(text)
            ids.append(key)
            texts.append(text)
        if sum(len(text.encode()) + 1 for text in texts) > SHORTEST_DOCUMENT:
            yield KeptPage(page, ids if aligned else None, texts)
