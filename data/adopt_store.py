"""Makes a token store of .bin and .idx files that Megatron's own tools have written."""

import os
import uuid
from dataclasses import replace
from pathlib import Path

from data.checksums import hash_file
from data.durable_files import sync_folder, write_synced
from data.store_format import (
    ENTRIES_AT_ONCE,
    StoreInfo,
    read_index_header,
    sidecar_bytes,
    with_suffix,
)
from data.token_store import TokenStore
from data.verify import verify_store


def adopt(
    prefix: Path | str,
    *,
    language: str,
    family: str,
    tokenizer_fingerprint: str,
    vocab_size: int,
    eod_id: int,
    source: str = "",
    license: str = "",
) -> TokenStore:
    """Writes sidecar and checksums for .bin/.idx files of Megatron's own tools; opens the store.

    Reads everything twice. Whether documents end in eod_id is the other writer's business: the
    sidecar only records whether all do. Raises FileExistsError if there is a sidecar already,
    ValueError if an id is outside the vocabulary or the files do not fit together.
    """
    prefix = Path(prefix)
    sidecar = with_suffix(prefix, ".json")
    if sidecar.exists():
        raise FileExistsError(f"{prefix}: there is a complete store of this name already")
    _, boundaries, dtype = read_index_header(prefix)
    idx, idx_leaves, idx_sha256 = hash_file(with_suffix(prefix, ".idx"))
    bin_, bin_leaves, bin_sha256 = hash_file(with_suffix(prefix, ".bin"))
    tokens = bin_.bytes // dtype.itemsize
    if not tokens:
        raise ValueError(f"{prefix}: there is no token in it, and a memory map cannot be empty")
    info = StoreInfo(
        language=language,
        family=family,
        tokenizer_fingerprint=tokenizer_fingerprint,
        vocab_size=vocab_size,
        eod_id=eod_id,
        source=source,
        license=license,
        documents=boundaries - 1,
        tokens=tokens,
        dtype=dtype.name,
        bin_sha256=bin_sha256,
        idx_sha256=idx_sha256,
        split=prefix.parent.name,
        ends_in_eod=False,
        sources=[
            {"source": source, "license": license, "documents": boundaries - 1, "tokens": tokens}
            | {"characters": 0, "utf8_bytes": 0}
        ],
        files={".bin": bin_, ".idx": idx},
    )
    unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = prefix.with_name(f".{prefix.name}.json.{unique}.tmp")
    try:
        write_synced(temporary, bin_leaves + idx_leaves)
        os.replace(temporary, with_suffix(prefix, ".sums"))  # means nothing without the sidecar
        store = TokenStore(prefix, _info=info)
        problems = verify_store(store)
        if problems:
            raise ValueError(f"{prefix}: " + "; ".join(problem.what for problem in problems))
        info = replace(info, ends_in_eod=_all_end_in_eod(store))
        write_synced(temporary, sidecar_bytes(info))
        os.replace(temporary, sidecar)
    except BaseException:
        with_suffix(prefix, ".sums").unlink(missing_ok=True)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(prefix.parent)
    return TokenStore(prefix)


def _all_end_in_eod(store: TokenStore) -> bool:
    for start in range(0, store.tokens, ENTRIES_AT_ONCE):
        stop = min(start + ENTRIES_AT_ONCE, store.tokens)
        _, ends = store.documents_ending(start, stop)
        if (store.read(start, stop)[ends - 1 - start] != store.info.eod_id).any():
            return False
    return True
