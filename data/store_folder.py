"""A folder of token stores: one per language and split.

    FOLDER/train/LANGUAGE.{bin,idx,json,...}
    FOLDER/validation/LANGUAGE.{bin,idx,json,...}
    FOLDER/manifest.json                what it was made from
    .building-FOLDER/                   beside it while it is made: the lock, the parts

The manifest is written last, so a folder is complete exactly if it has one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.language_families import did_you_mean
from data.token_store import TokenStore

SPLITS = ("train", "validation")
MANIFEST = "manifest.json"


def is_complete(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text("utf-8"))


def building_folder(folder: Path) -> Path:
    """Where the stores of `folder` are made, and finished work is kept if that fails."""
    return folder.with_name(f".building-{folder.name}")


def open_stores(folder: Path, split: str, languages: Sequence[str] = ()) -> list[TokenStore]:
    """The stores of one split, sorted by language; only those of `languages` if any are named.

    An absent split is an empty list. Raises ValueError if a named language has no training store.
    """
    # also by .idx: a store without its sidecar is an error, not a language less
    files = [*(folder / split).glob("*.json"), *(folder / split).glob("*.idx")]
    stores = [TokenStore(prefix) for prefix in {path.with_suffix("") for path in files}]
    found = {store.language for store in stores}
    missing = sorted(set(languages) - found)
    if missing and split == "train":
        raise ValueError(
            f"data.languages: {folder} has no training store of {', '.join(missing)}"
            f"{did_you_mean(missing, sorted(found)) or '.'} It has {', '.join(sorted(found))}"
        )
    return sorted(
        (s for s in stores if not languages or s.language in languages), key=lambda s: s.language
    )
