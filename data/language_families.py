"""Language code -> name, family and stock: the table behind family-level sampling.

`family` is the branch (Germanic, Indic, Slavic ...), because ratios between branches are what the
multilingual scaling law controls (arXiv 2410.12883 section 2); `stock` is the level above
(Indo-European ...). "indic" here means Indo-Aryan only: Kannada, Tamil, Telugu and Malayalam are
under "dravidian", where the paper counts Kannada as Indic. A corpus that wants another grouping
writes its own "family" into its records, and that wins.
"""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    code: str  # BCP 47, as in the corpus's "language" field
    name: str
    family: str  # branch, lower case
    stock: str  # top-level family


_BRANCHES = {
    # family: (stock, "code Name, code Name, ...")
    "germanic": (
        "Indo-European",
        "en English, de German, nl Dutch, sv Swedish, da Danish, nb Norwegian Bokmål, "
        "nn Norwegian Nynorsk, af Afrikaans, is Icelandic, fo Faroese, lb Luxembourgish, "
        "yi Yiddish, fy West Frisian",
    ),
    "romance": (
        "Indo-European",
        "fr French, es Spanish, it Italian, pt Portuguese, pt-BR Brazilian Portuguese, "
        "ro Romanian, ca Catalan, gl Galician, oc Occitan",
    ),
    "slavic": (
        "Indo-European",
        "ru Russian, uk Ukrainian, be Belarusian, pl Polish, cs Czech, sk Slovak, sl Slovenian, "
        "hr Croatian, sr Serbian, sr-Latn Serbian (Latin), bs Bosnian, bg Bulgarian, mk Macedonian",
    ),
    "baltic": ("Indo-European", "lt Lithuanian, lv Latvian"),
    "hellenic": ("Indo-European", "el Greek"),
    "celtic": ("Indo-European", "cy Welsh, ga Irish, gd Scottish Gaelic, br Breton"),
    "albanian": ("Indo-European", "sq Albanian"),
    "armenian": ("Indo-European", "hy Armenian"),
    "indic": (
        "Indo-European",
        "hi Hindi, bn Bengali, gu Gujarati, mr Marathi, ur Urdu, as Assamese, pa Punjabi, "
        "ne Nepali, or Odia, si Sinhala, sd Sindhi, sa Sanskrit",
    ),
    "iranian": (
        "Indo-European",
        "fa Persian, ps Pashto, ku Kurdish, ckb Central Kurdish, tg Tajik",
    ),
    "dravidian": ("Dravidian", "ta Tamil, te Telugu, kn Kannada, ml Malayalam"),
    "semitic": ("Afro-Asiatic", "ar Arabic, he Hebrew, am Amharic, ti Tigrinya, mt Maltese"),
    "cushitic": ("Afro-Asiatic", "om Oromo, so Somali"),
    "chadic": ("Afro-Asiatic", "ha Hausa"),
    "uralic": ("Uralic", "fi Finnish, hu Hungarian, et Estonian, se Northern Sami"),
    "turkic": (
        "Turkic",
        "tr Turkish, az Azerbaijani, kk Kazakh, ky Kyrgyz, uz Uzbek, ug Uyghur, tt Tatar, "
        "tk Turkmen",
    ),
    "mongolic": ("Mongolic", "mn Mongolian"),
    "kartvelian": ("Kartvelian", "ka Georgian"),
    "basque": ("Basque", "eu Basque"),
    "sino-tibetan": (
        "Sino-Tibetan",
        "zh Chinese, zh-Hant Chinese (traditional), yue Cantonese, dz Dzongkha, my Burmese, "
        "bo Tibetan",
    ),
    "japonic": ("Japonic", "ja Japanese"),
    "koreanic": ("Koreanic", "ko Korean"),
    "austronesian": (
        "Austronesian",
        "id Indonesian, ms Malay, fil Filipino, tl Tagalog, jv Javanese, su Sundanese, "
        "ceb Cebuano, mg Malagasy, mi Maori, haw Hawaiian",
    ),
    "austroasiatic": ("Austroasiatic", "vi Vietnamese, km Khmer"),
    "kra-dai": ("Kra-Dai", "th Thai, lo Lao"),
    "bantu": (
        "Niger-Congo",
        "sw Swahili, zu Zulu, xh Xhosa, st Southern Sotho, sn Shona, rw Kinyarwanda, ny Chichewa",
    ),
    "volta-niger": ("Niger-Congo", "yo Yoruba, ig Igbo"),
}

LANGUAGES: dict[str, Language] = {
    code: Language(code, name, family, stock)
    for family, (stock, members) in _BRANCHES.items()
    for code, name in (member.split(" ", 1) for member in members.split(", "))
}


def family_of(code: str) -> str:
    """The branch-level family of a language code; ValueError if it is not in the table."""
    if code in LANGUAGES:
        return LANGUAGES[code].family
    close = difflib.get_close_matches(code, LANGUAGES, n=1)
    raise ValueError(
        f"language {code!r} is not in the family table of data/language_families.py"
        + (f" (did you mean {close[0]!r}?)" if close else "")
        + '; add it there, or give the corpus records a "family" field, which always wins'
    )
