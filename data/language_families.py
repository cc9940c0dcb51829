"""Language code -> name, ISO 639 codes, scripts, family and stock: the table behind families.

`family` is the branch (Germanic, Indic, Slavic ...), because ratios between branches are what the
multilingual scaling law controls (arXiv 2410.12883, abstract); `stock` is the level above
(Indo-European ...). Both are arguable, and some choices here are of convenience: "indic" means
Indo-Aryan only, so Kannada, Tamil, Telugu and Malayalam are under "dravidian", where the paper, as
its reviews quote, counts Kannada as Indic; Sinitic and Tibeto-Burman share "sino-tibetan"; Finnic,
Ugric and Sami share "uralic"; a creole is under "creole", not with the language that gave it its
words; Altaic is not a stock. Nothing depends on the choice but names and the default grouping:
another one is a few lines of YAML (data/family_grouping.py), and a "family" in the corpus's own
records wins over this.

Imports the standard library only.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    code: str  # BCP 47, as in the corpus's "language" field
    name: str
    family: str  # branch, lower case
    stock: str  # top-level family
    iso639_1: str  # two letters; empty where ISO 639-1 has none
    iso639_3: str  # three letters; of the macrolanguage where the two-letter code names one (zho)
    scripts: tuple[str, ...]  # ISO 15924, the usual one first; Jpan, Kore, Hans, Hant as in BCP 47


# family: (stock, lines of "code ISO-639-3 Script[+Script] Name"). A code of two letters in its
# first part is also the ISO 639-1 code.
_BRANCHES = {
    "germanic": (
        "Indo-European",
        """
        en eng Latn English
        de deu Latn German
        nl nld Latn Dutch
        sv swe Latn Swedish
        da dan Latn Danish
        nb nob Latn Norwegian Bokmål
        nn nno Latn Norwegian Nynorsk
        af afr Latn Afrikaans
        is isl Latn Icelandic
        fo fao Latn Faroese
        lb ltz Latn Luxembourgish
        yi yid Hebr Yiddish
        fy fry Latn West Frisian
        li lim Latn Limburgish
        nds nds Latn Low German
        """,
    ),
    "romance": (
        "Indo-European",
        """
        fr fra Latn French
        es spa Latn Spanish
        it ita Latn Italian
        pt por Latn Portuguese
        pt-BR por Latn Brazilian Portuguese
        ro ron Latn Romanian
        ca cat Latn Catalan
        gl glg Latn Galician
        oc oci Latn Occitan
        ast ast Latn Asturian
        co cos Latn Corsican
        sc srd Latn Sardinian
        rm roh Latn Romansh
        scn scn Latn Sicilian
        fur fur Latn Friulian
        """,
    ),
    "italic": ("Indo-European", "la lat Latn Latin"),
    "slavic": (
        "Indo-European",
        """
        ru rus Cyrl Russian
        uk ukr Cyrl Ukrainian
        be bel Cyrl Belarusian
        pl pol Latn Polish
        cs ces Latn Czech
        sk slk Latn Slovak
        sl slv Latn Slovenian
        hr hrv Latn Croatian
        sr srp Cyrl Serbian
        sr-Latn srp Latn Serbian (Latin)
        bs bos Latn Bosnian
        bg bul Cyrl Bulgarian
        mk mkd Cyrl Macedonian
        hsb hsb Latn Upper Sorbian
        """,
    ),
    "baltic": ("Indo-European", "lt lit Latn Lithuanian\nlv lav Latn Latvian"),
    "hellenic": ("Indo-European", "el ell Grek Greek"),
    "celtic": (
        "Indo-European",
        """
        cy cym Latn Welsh
        ga gle Latn Irish
        gd gla Latn Scottish Gaelic
        br bre Latn Breton
        """,
    ),
    "albanian": ("Indo-European", "sq sqi Latn Albanian"),
    "armenian": ("Indo-European", "hy hye Armn Armenian"),
    "indic": (
        "Indo-European",
        """
        hi hin Deva Hindi
        bn ben Beng Bengali
        gu guj Gujr Gujarati
        mr mar Deva Marathi
        ur urd Arab Urdu
        as asm Beng Assamese
        pa pan Guru+Arab Punjabi
        ne nep Deva Nepali
        or ori Orya Odia
        si sin Sinh Sinhala
        sd snd Arab+Deva Sindhi
        sa san Deva Sanskrit
        dv div Thaa Dhivehi
        ks kas Arab+Deva Kashmiri
        bho bho Deva Bhojpuri
        mai mai Deva Maithili
        kok kok Deva Konkani
        """,
    ),
    "iranian": (
        "Indo-European",
        """
        fa fas Arab Persian
        ps pus Arab Pashto
        ku kur Latn+Arab Kurdish
        ckb ckb Arab Central Kurdish
        tg tgk Cyrl Tajik
        os oss Cyrl Ossetian
        """,
    ),
    "dravidian": (
        "Dravidian",
        """
        ta tam Taml Tamil
        te tel Telu Telugu
        kn kan Knda Kannada
        ml mal Mlym Malayalam
        tcy tcy Knda Tulu
        """,
    ),
    "semitic": (
        "Afro-Asiatic",
        """
        ar ara Arab Arabic
        arz arz Arab Egyptian Arabic
        he heb Hebr Hebrew
        am amh Ethi Amharic
        ti tir Ethi Tigrinya
        mt mlt Latn Maltese
        """,
    ),
    "cushitic": ("Afro-Asiatic", "om orm Latn Oromo\nso som Latn Somali"),
    "chadic": ("Afro-Asiatic", "ha hau Latn+Arab Hausa"),
    "berber": ("Afro-Asiatic", "kab kab Latn Kabyle\nzgh zgh Tfng Standard Moroccan Tamazight"),
    "uralic": (
        "Uralic",
        """
        fi fin Latn Finnish
        hu hun Latn Hungarian
        et est Latn Estonian
        se sme Latn Northern Sami
        """,
    ),
    "turkic": (
        "Turkic",
        """
        tr tur Latn Turkish
        az aze Latn+Cyrl Azerbaijani
        kk kaz Cyrl Kazakh
        ky kir Cyrl Kyrgyz
        uz uzb Latn+Cyrl Uzbek
        ug uig Arab Uyghur
        tt tat Cyrl Tatar
        tk tuk Latn Turkmen
        ba bak Cyrl Bashkir
        cv chv Cyrl Chuvash
        sah sah Cyrl Yakut
        """,
    ),
    "mongolic": ("Mongolic", "mn mon Cyrl+Mong Mongolian"),
    "kartvelian": ("Kartvelian", "ka kat Geor Georgian"),
    "nakh-dagestanian": ("Nakh-Dagestanian", "ce che Cyrl Chechen\nav ava Cyrl Avaric"),
    "abkhaz-adyghe": ("Abkhaz-Adyghe", "ab abk Cyrl Abkhazian"),
    "basque": ("Basque", "eu eus Latn Basque"),
    "sino-tibetan": (
        "Sino-Tibetan",
        """
        zh zho Hans Chinese
        zh-Hant zho Hant Chinese (traditional)
        yue yue Hant+Hans Cantonese
        dz dzo Tibt Dzongkha
        my mya Mymr Burmese
        bo bod Tibt Tibetan
        """,
    ),
    "japonic": ("Japonic", "ja jpn Jpan Japanese"),
    "koreanic": ("Koreanic", "ko kor Kore Korean"),
    "austronesian": (
        "Austronesian",
        """
        id ind Latn Indonesian
        ms msa Latn Malay
        fil fil Latn Filipino
        jv jav Latn Javanese
        su sun Latn Sundanese
        ceb ceb Latn Cebuano
        ilo ilo Latn Iloko
        war war Latn Waray
        mg mlg Latn Malagasy
        mi mri Latn Maori
        haw haw Latn Hawaiian
        sm smo Latn Samoan
        to ton Latn Tongan
        fj fij Latn Fijian
        """,
    ),
    "austroasiatic": ("Austroasiatic", "vi vie Latn Vietnamese\nkm khm Khmr Khmer"),
    "munda": ("Austroasiatic", "sat sat Olck Santali"),
    "kra-dai": ("Kra-Dai", "th tha Thai Thai\nlo lao Laoo Lao"),
    "hmong-mien": ("Hmong-Mien", "hmn hmn Latn Hmong"),
    "bantu": (
        "Niger-Congo",
        """
        sw swa Latn Swahili
        zu zul Latn Zulu
        xh xho Latn Xhosa
        st sot Latn Southern Sotho
        tn tsn Latn Tswana
        nso nso Latn Northern Sotho
        ss ssw Latn Swati
        ts tso Latn Tsonga
        sn sna Latn Shona
        rw kin Latn Kinyarwanda
        rn run Latn Rundi
        ny nya Latn Chichewa
        lg lug Latn Ganda
        ln lin Latn Lingala
        ki kik Latn Kikuyu
        """,
    ),
    "volta-niger": ("Niger-Congo", "yo yor Latn Yoruba\nig ibo Latn Igbo"),
    "kwa": ("Niger-Congo", "ak aka Latn Akan\nee ewe Latn Ewe"),
    "atlantic": ("Niger-Congo", "wo wol Latn Wolof\nff ful Latn+Adlm Fulah"),
    "mande": ("Mande", "bm bam Latn+Nkoo Bambara"),
    "nilotic": ("Nilo-Saharan", "luo luo Latn Luo"),
    "quechuan": ("Quechuan", "qu que Latn Quechua"),
    "aymaran": ("Aymaran", "ay aym Latn Aymara"),
    "tupian": ("Tupian", "gn grn Latn Guarani"),
    "uto-aztecan": ("Uto-Aztecan", "nhe nhe Latn Eastern Huasteca Nahuatl"),
    "mayan": ("Mayan", "yua yua Latn Yucatec Maya"),
    "iroquoian": ("Iroquoian", "chr chr Cher Cherokee"),
    "eskimo-aleut": ("Eskimo-Aleut", "kl kal Latn Greenlandic\niu iku Cans+Latn Inuktitut"),
    "creole": (
        "Creole",
        """
        ht hat Latn Haitian Creole
        pap pap Latn Papiamento
        tpi tpi Latn Tok Pisin
        """,
    ),
    "constructed": ("Constructed", "eo epo Latn Esperanto\nia ina Latn Interlingua"),
}


def _language(line: str, family: str, stock: str) -> Language:
    code, iso639_3, scripts, name = line.split(maxsplit=3)
    base = code.partition("-")[0]
    iso639_1 = base if len(base) == 2 else ""
    return Language(code, name, family, stock, iso639_1, iso639_3, tuple(scripts.split("+")))


LANGUAGES: dict[str, Language] = {
    language.code: language
    for family, (stock, lines) in _BRANCHES.items()
    for line in lines.strip().splitlines()
    for language in [_language(line.strip(), family, stock)]
}

# Other ways to write a code of the table. Besides these, every ISO 639-3 code of the table is one.
_ALIASES = {
    code: meant
    for meant, codes in {
        # withdrawn from ISO 639-1
        "he": "iw",
        "id": "in",
        "yi": "ji ydd",
        "jv": "jw",
        "ro": "mo mol",
        "sr-Latn": "sh hbs",
        # "no" is Norwegian of either form; corpora that say no mean Bokmål nearly always
        "nb": "no nor",
        # Filipino is the standardised Tagalog, and corpora use the two codes for the same text
        "fil": "tl tgl",
        # Chinese by region, where the script follows from it
        "zh": "cmn zh-CN zh-SG zh-MY zh-Hans",
        "zh-Hant": "zh-TW zh-HK zh-MO",
        # the member of a macrolanguage that its two-letter code stands for in corpora
        "ar": "arb",
        "az": "azj",
        "et": "ekk",
        "fa": "pes",
        "gn": "gug",
        "kok": "gom",
        "ku": "kmr",
        "lv": "lvs",
        "mg": "plt",
        "mn": "khk",
        "ms": "zsm",
        "ne": "npi",
        "om": "gaz",
        "or": "ory",
        "ps": "pbt",
        "qu": "quy quz",
        "sq": "als",  # Tosk Albanian in ISO 639-3; an old Wikipedia used it for Alemannic
        "sw": "swh",
        "uz": "uzn",
        "ak": "tw twi",
        # ISO 639-2/B, of library catalogues
        "bo": "tib",
        "cs": "cze",
        "cy": "wel",
        "de": "ger",
        "el": "gre",
        "eu": "baq",
        "fr": "fre",
        "hy": "arm",
        "is": "ice",
        "ka": "geo",
        "mi": "mao",
        "mk": "mac",
        "my": "bur",
        "nl": "dut",
        "sk": "slo",
    }.items()
    for code in codes.split()
} | {"chi": "zh", "per": "fa", "may": "ms", "rum": "ro", "alb": "sq"}

_CODE_OF: dict[str, str] = (
    {language.iso639_3: code for code, language in LANGUAGES.items() if "-" not in code}
    | {code.lower(): meant for code, meant in _ALIASES.items()}
    | {code.lower(): code for code in LANGUAGES}
)
_SCRIPT_OR_REGION = re.compile(r"[a-z]{4}|[a-z]{2}|[0-9]{3}")


def find_language(code: str) -> Language | None:
    """The row of the table that a code means, None if it means none.

    Case and "_" for "-" do not matter. Codes of ISO 639-3 and 639-2/B (deu, ger), withdrawn ones
    (iw), those of FLORES (deu_Latn) and regions (de-AT, zh-TW) are understood: as in BCP 47 lookup
    (RFC 4647 section 3.4), a script or region that has no row of its own is left off, so the row
    of uz-Cyrl is that of uz, and that of pt-PT is pt.
    """
    first, *rest = code.strip().lower().replace("_", "-").split("-")
    if not all(_SCRIPT_OR_REGION.fullmatch(part) for part in rest):
        return None
    parts = [_CODE_OF.get(first, first).lower(), *rest]
    while parts:
        if found := _CODE_OF.get("-".join(parts)):
            return LANGUAGES[found]
        parts.pop()
    return None


def canonical_code(code: str) -> str:
    """The code as the table writes it (no -> nb, zh_TW -> zh-Hant); ValueError if there is none."""
    if language := find_language(code):
        return language.code
    raise ValueError(unknown_language(code))


def family_of(code: str) -> str:
    """The branch-level family of a language code; ValueError if it means none of the table."""
    return LANGUAGES[canonical_code(code)].family


def unknown_language(code: str) -> str:
    """What to tell the user about a code that the table does not have."""
    spelled = {row.name: row.code for row in LANGUAGES.values()} | {c: c for c in LANGUAGES}
    meant = list(dict.fromkeys(spelled[word] for word in near(code, spelled)))
    return (
        f"language {code!r} is not in the family table of data/language_families.py"
        + (f" (did you mean {' or '.join(map(repr, meant))}?)" if meant else "")
        + '; add it there, or give the corpus records a "family" field, which always wins'
    )


def did_you_mean(unknown: Iterable[str], there: Iterable[str]) -> str:
    """ "; did you mean de for german, ru for rus?", of the language codes `there`; empty where no
    other code, name or spelling of theirs comes near."""
    codes, wishes = list(there), list(unknown)
    names = {LANGUAGES[c].name: c for c in codes if c in LANGUAGES} | {c: c for c in codes}
    found = []
    for wish in wishes:
        row = find_language(wish)
        meant = [code for code in codes if row is not None and find_language(code) == row]
        meant = meant or list(dict.fromkeys(names[word] for word in near(wish, names)))
        if meant:
            found.append(" or ".join(meant) + f" for {wish}" * (len(wishes) > 1))
    return f"; did you mean {', '.join(found)}?" if found else ""


def near(wish: str, names: Iterable[str]) -> list[str]:
    """At most three of `names` that look like `wish`, nearest first."""
    by_lower = {name.lower(): name for name in names}
    found = difflib.get_close_matches(wish.lower(), by_lower, n=3, cutoff=0.7)
    return [by_lower[name] for name in found]
