"""What data.verify says, and where; that it finds everything is test_store_fuzz's business."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.checksums import CHUNK_BYTES
from data.store_format import StoreInfo, read_sidecar, sidecar_bytes
from data.store_writer import TokenStoreWriter
from data.token_store import TokenStore
from data.verify import check_stores, find_stores, inspect_stores, main, verify_store, verify_stores
from tests.data.test_token_store import as_version_1

ABOUT: dict[str, Any] = {"tokenizer_fingerprint": "f" * 64, "vocab_size": 8192, "eod_id": 0}


def write(folder: Path, name: str, documents: int = 50, **about: Any) -> Path:
    prefix = folder / name
    draw = np.random.default_rng(len(name) + documents)
    settings = {"language": name, "family": "some"} | ABOUT | about
    with TokenStoreWriter(prefix, source="web", license="CC0", **settings) as writer:
        for number in range(documents):
            ids = draw.integers(1, 8192, int(draw.integers(1, 3000)))
            writer.add_document(ids, doc_id=f"{name}/{number}", characters=9, utf8_bytes=12)
    return prefix


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three training stores and one for validation, of several chunks each."""
    for language in ("de", "fr", "zh.v2"):
        write(tmp_path / "train", language)
    write(tmp_path / "validation", "de", documents=3)
    (tmp_path / "manifest.json").write_text("{}")
    return tmp_path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def sentences(folder: Path, full: bool = True) -> list[str]:
    return [f"{p.store.name}: {p.what}" for p in verify_stores(folder, full)]


def test_whole_stores_are_fine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_stores(folder, full=True) == verify_stores(folder, full=False) == []
    assert main([str(folder)]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert lines[0].split() == ["store", "tokens", "documents", "MB", "result"]
    assert [line.split()[0] for line in lines[1:5]] == [
        "train/de",
        "train/fr",
        "train/zh.v2",
        "validation/de",
    ]
    assert all(line.endswith("   ok") for line in lines[1:5])
    assert lines[5].startswith("4 stores, 0 bad; read ") and lines[5].endswith(" MB/s")
    report = inspect_stores(folder, full=True)
    every = [*(folder / "train").iterdir(), *(folder / "validation").iterdir()]
    data = [path for path in every if path.suffix != ".json"]
    assert report.bytes_read == sum(path.stat().st_size for path in data)

    assert main([str(folder), "--quick", "--threads", "1"]) == 0
    assert capsys.readouterr().out.strip().endswith("not everything was read (--quick)")
    for one in "de", "de.bin", "de.json", "zh.v2":
        assert main([str(folder / "train" / one)]) == 0
        assert "1 stores, 0 bad" in capsys.readouterr().out


def test_the_place_of_a_change_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = TokenStore(folder / "train" / "de")
    flip(folder / "train" / "de.bin", CHUNK_BYTES + 77)
    per_chunk = CHUNK_BYTES // 2
    first, last = store.document_of(per_chunk), store.document_of(2 * per_chunk - 1)
    assert 0 < first < last < store.documents - 1
    what = (
        "de: .bin: bytes 65,536 to 131,071 have changed: tokens 32,768 to 65,535, "
        f"documents {first} ('de/{first}') to {last} ('de/{last}')"
    )
    assert what in sentences(folder)
    assert sentences(folder, full=False) == []  # in the middle: quick cannot know
    assert main([str(folder)]) == 1
    output = capsys.readouterr().out
    assert "BAD\n    .bin: bytes 65,536 to 131,071" in output and "4 stores, 1 bad" in output
    with pytest.raises(ValueError, match=r"mixed-up store: .bin: bytes 65,536 to"):
        store.verify()


def test_the_place_in_the_other_files_is_told(folder: Path) -> None:
    train = folder / "train"
    flip(train / "de.idx", 34 + 4 * 7)  # the length of sequence 7
    found = sentences(folder)
    changed = (
        "de: .idx: bytes 0 to 1,041 have changed: header 0 to 0, lengths of sequences 0 to 49, "
        "offsets of sequences 0 to 49, boundaries of documents 0 to 50"
    )
    assert found[0] == changed
    assert "de: .idx: sequence 8 begins at byte" in found[1]
    flip(train / "de.idx", 34 + 4 * 7)
    assert sentences(folder) == []

    flip(train / "de.docs", 10)
    assert sentences(folder) == [
        "de: .docs: bytes 0 to 755 have changed: text of the ids 0 to 247, places of the ids of "
        "documents 0 to 50, sources of documents 0 to 49"
    ]
    flip(train / "de.docs", 10)

    flip(train / "de.sums", 3)
    assert sentences(folder) == ["de: .sums: has changed"]
    flip(train / "de.bin", 3)
    assert sentences(folder)[0] == (
        "de: .bin: has changed; .sums, which knows where, has changed, too"
    )


def test_a_damaged_index_does_not_disturb_the_check_of_the_ids(folder: Path) -> None:
    flip(folder / "train" / "de.idx", 34 + 200 + 8 * 20)
    flip(folder / "train" / "de.bin", 5)
    found = sentences(folder)
    assert "de: .bin: bytes 0 to 65,535 have changed: tokens 0 to 32,767" in found


def test_many_places_are_counted(tmp_path: Path) -> None:
    prefix = tmp_path / "de"
    with TokenStoreWriter(prefix, language="de", family="some", **ABOUT) as writer:
        writer.add_document(np.ones(16 * CHUNK_BYTES, np.uint16))
    for chunk in range(0, 28, 2):
        flip(tmp_path / "de.bin", chunk * CHUNK_BYTES)
    found = sentences(tmp_path)
    assert len(found) == 6 and found[5] == "de: .bin: and 9 more places"


def test_quick_sees_files_of_other_stores(folder: Path) -> None:
    """Of the same size: everything else agrees."""
    for name, value in ("it", 1), ("sv", 2):
        with TokenStoreWriter(
            folder / "train" / name, language=name, family="some", **ABOUT
        ) as writer:
            for number in range(20):
                length = 100 + number if value == 1 else 119 - number
                writer.add_document(np.full(length, value), doc_id=f"{name}{number:02d}")
    assert sentences(folder, full=False) == []
    train = folder / "train"
    for suffix in (".bin", ".idx", ".docs", ".sums", ".json"):
        for _ in range(2):  # swapped, then swapped back
            os.replace(train / f"it{suffix}", train / "between")
            os.replace(train / f"sv{suffix}", train / f"it{suffix}")
            os.replace(train / "between", train / f"sv{suffix}")
            found = sentences(folder, full=False)
            if _ == 1:
                assert found == []
            elif suffix == ".sums":  # only says where a change is
                assert found == [] and sentences(folder) == [
                    "it: .sums: has changed",
                    "sv: .sums: has changed",
                ]
            else:
                for name in "it", "sv":
                    assert any(sentence.startswith(f"{name}: ") for sentence in found)
                if suffix != ".json":
                    assert found[0].endswith(
                        "its first 64 KiB have changed, or it is the file of another store"
                    )
    for suffix in (".bin", ".idx", ".docs", ".sums", ".json"):  # all of them at once
        os.replace(train / f"it{suffix}", train / "between")
        os.replace(train / f"sv{suffix}", train / f"it{suffix}")
        os.replace(train / "between", train / f"sv{suffix}")
    assert sentences(folder, full=False) == [
        "it: holds language 'sv': it was swapped with another store",
        "sv: holds language 'it': it was swapped with another store",
    ]


def test_quick_sees_the_last_chunk(folder: Path) -> None:
    flip(folder / "train" / "de.bin", -1)
    assert sentences(folder, full=False) == [
        "de: .bin: its last 64 KiB have changed, or it is the file of another store"
    ]


def test_stores_that_do_not_fit_together(tmp_path: Path) -> None:
    train = tmp_path / "train"
    for language in ("de", "fr", "it"):
        write(train, language, documents=2)
    write(train, "es", documents=2, tokenizer_fingerprint="0" * 64)
    write(train, "pt", documents=2, eod_id=1)
    write(train, "de2", documents=2, language="de")
    write(tmp_path / "validation", "it", documents=2, family="other")
    found = sentences(tmp_path, full=False)
    assert [sentence.split(":")[0] for sentence in found] == ["de", "de2", "es", "pt", "it"]
    assert found[0] == "de: more than one store of language 'de': de, de2"
    usual = f"but {train / 'de'} has ffffffffffffffff of 8192 entries, end of document 0, stored as"
    assert found[2].startswith("es: tokenizer 0000000000000000 of 8192") and usual in found[2]
    assert "end of document 1" in found[3]
    assert found[4].startswith("it: family 'other', but ")


def test_training_and_validation_data_cannot_change_places(folder: Path) -> None:
    os.rename(folder / "train", folder / "between")
    os.rename(folder / "validation", folder / "train")
    os.rename(folder / "between", folder / "validation")
    for full in True, False:
        assert sentences(folder, full) == [
            "de: was written as validation data and lies in train",
            *(
                f"{name}: was written as train data and lies in validation"
                for name in ("de", "fr", "zh.v2")
            ),
        ]
    os.rename(folder / "train", folder / "elsewhere")  # a user's own folders mean nothing to us
    assert "validation data" not in str(sentences(folder))


def test_what_the_manifest_lists_has_to_be_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = folder / "manifest.json"
    train = {name: {"documents": 50} for name in ("de", "fr", "zh.v2")}
    splits = {"train": train, "validation": {"de": {"documents": 3}}}
    manifest.write_text(json.dumps({"splits": splits}))
    assert sentences(folder) == []
    for path in (folder / "train").glob("fr.*"):
        path.unlink()
    train["de"]["documents"] = 51
    manifest.write_text(json.dumps({"splits": splits}))
    assert sentences(folder, full=False) == [
        "de: 50 documents, but 51 in manifest.json",
        "fr: listed in manifest.json, but nothing of it is there",
    ]
    assert main([str(folder)]) == 1
    assert "train/fr" in capsys.readouterr().out
    for content in ("{", "[]", '{"splits": {"train": {"de": 3}}}'):
        manifest.write_text(content)
        assert any("manifest.json cannot be read" in s for s in sentences(folder, full=False))
    assert main([str(folder), "--quick"]) == 1


def reseal(prefix: Path, **changes: Any) -> None:
    """A sidecar that is wrong but whole: what only a faulty writer can do."""
    info: StoreInfo = replace(read_sidecar(prefix), **changes)
    (prefix.parent / f"{prefix.name}.json").write_bytes(sidecar_bytes(info))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 100}, r"\.bin: id \d+ is outside the vocabulary of 100, at token \d+, doc"),
        ({"eod_id": 5}, r"\.bin: 50 documents do not end in 5, the first is document 0 \('de/0'\)"),
        ({"eod_id": 9000}, "end of document 9000 is outside the vocabulary 8192"),
        ({"sources": []}, r"\.docs: a source is outside the sidecar's list of 0"),
        ({"characters": 1}, "450 characters in its list of sources, 1"),
    ],
)
def test_faulty_writers_are_found_out(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    prefix = write(tmp_path, "de")
    reseal(prefix, **changes)
    with pytest.raises(ValueError, match=words):
        TokenStore(prefix).verify()


def test_counts_by_source_and_sizes_of_the_sidecar_are_checked(tmp_path: Path) -> None:
    prefix = write(tmp_path, "de")
    info = read_sidecar(prefix)
    two = [info.sources[0] | {"documents": 49}, info.sources[0] | {"documents": 1, "tokens": 0}]
    two[1] |= {"characters": 0, "utf8_bytes": 0}
    reseal(prefix, sources=two)
    assert "de: .docs: its documents by source are not as many as the sidecar says" in sentences(
        tmp_path
    )
    reseal(prefix, sources=info.sources, files=info.files | {".idx": info.files[".docs"]})
    assert any("the sidecar contradicts itself: a .idx of" in s for s in sentences(tmp_path))


def rewrite_index(
    prefix: Path, change: Callable[[np.ndarray, np.ndarray, np.ndarray], None]
) -> None:
    path = prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    flat, count = np.frombuffer(content, np.uint8), TokenStore(prefix).documents
    change(
        flat[34 : 34 + 4 * count].view("<i4"),
        flat[34 + 4 * count : 34 + 12 * count].view("<i8"),
        flat[34 + 12 * count :].view("<i8"),
    )
    path.write_bytes(content)


INDEX_CHANGES: list[tuple[Callable[..., Any], str]] = [
    (lambda lengths, offsets, _: lengths.__setitem__(3, lengths[3] + 1), "sequence 4 begins at"),
    (lambda lengths, offsets, _: offsets.__setitem__(0, 2), "sequence 0 begins at byte 2"),
    (lambda lengths, offsets, _: lengths.__setitem__(3, -1), "sequence 3 has a negative length"),
    (lambda _, __, boundaries: boundaries.__setitem__(0, 1), "do not increase from 0"),
    (lambda _, __, boundaries: boundaries.__setitem__(9, 7), "do not increase from 0"),
    (lambda _, __, boundaries: boundaries.__setitem__(-1, 50 + 3), "end at sequence 53 of 50"),
]


@pytest.mark.parametrize(("change", "words"), INDEX_CHANGES)
def test_boundaries_that_do_not_add_up(
    tmp_path: Path, change: Callable[..., Any], words: str
) -> None:
    """Also in stores of version 1, whose one checksum of the whole file says nothing of this."""
    prefix = write(tmp_path, "de")
    rewrite_index(prefix, change)
    assert any(words in sentence for sentence in sentences(tmp_path))
    as_version_1(prefix)
    assert any(words in sentence for sentence in sentences(tmp_path))
    assert any(".idx: its sha256 is not the sidecar's" in s for s in sentences(tmp_path))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, b"X", "does not begin as it should"),
        (-100 - 8 * 51 + 8, b"\xff" * 8, "the places of the ids do not increase from 0"),
        (-100 - 8, b"\x00\x10", "its ids end at byte 4,096, its tables begin at"),
    ],
)
def test_tables_of_document_ids_that_do_not_add_up(
    tmp_path: Path, place: int, value: bytes, words: str
) -> None:
    prefix = write(tmp_path, "de")
    path = prefix.with_suffix(".docs")
    content = bytearray(path.read_bytes())
    at = place % len(content)
    content[at : at + len(value)] = value
    path.write_bytes(content)
    assert any(words in sentence for sentence in sentences(tmp_path))


def test_version_1_is_checked_as_far_as_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path, "de")
    as_version_1(prefix)
    assert verify_stores(tmp_path, full=True) == verify_stores(tmp_path, full=False) == []
    assert main([str(tmp_path)]) == 0
    assert "ok (version 1: less is checked)" in capsys.readouterr().out
    flip(prefix.with_suffix(".bin"), 1000)
    assert ".bin: its sha256 is not the sidecar's" in verify_store(TokenStore(prefix))[0].what


def test_changes_during_the_check_are_changes(folder: Path) -> None:
    """Cut off, lengthened, or gone after the stores were opened: no SIGBUS, no traceback."""
    for change, words in [
        (lambda path: os.truncate(path, 1000), ".bin: bytes 0 to"),
        (lambda path: os.truncate(path, path.stat().st_size + 1), ".bin: bytes"),
        (lambda path: path.unlink(), "cannot be read: "),
    ]:
        stores = [TokenStore(prefix) for prefix in find_stores(folder)]
        path = folder / "train" / "de.bin"
        content = path.read_bytes()
        change(path)
        for full in True, False:
            problems = check_stores(stores, full)
            assert problems and all(problem.store.name == "de" for problem in problems)
            assert not full or any(words in problem.what for problem in problems)
        path.write_bytes(content)

    for version_1 in False, True:
        store = TokenStore(folder / "train" / "fr")
        for suffix in [".idx"] if version_1 else [".sums"]:
            (folder / "train" / f"fr{suffix}").unlink()
        assert any("cannot be read" in problem.what for problem in verify_store(store))
        write(tmp := folder / "again", "fr")
        for path in tmp.iterdir():
            os.replace(path, folder / "train" / path.name)
        as_version_1(folder / "train" / "fr")

    prefix = folder / "whole"
    with TokenStoreWriter(prefix, language="nl", family="some", **ABOUT) as writer:
        writer.add_document(np.ones(CHUNK_BYTES // 2 - 1, np.int64))  # one chunk to the byte
    store = TokenStore(prefix)
    with open(folder / "whole.bin", "ab") as file:
        file.write(bytes(2))
    assert [problem.what for problem in verify_store(store)] == [".bin: has changed"]


def test_stores_that_do_not_open_are_in_the_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train" / "de.json").unlink()
    os.truncate(folder / "train" / "fr.bin", 100)
    for suffix in (".bin", ".idx", ".docs", ".sums"):
        (folder / "validation" / f"de{suffix}").unlink()
    (folder / "train" / ".it.bin.1-2.tmp").write_bytes(b"")
    assert main([str(folder)]) == 1
    output = capsys.readouterr().out
    assert "train/de.json: no such file, so there is no complete store" in output
    assert "fr.bin: 100 bytes where" in output
    assert "validation/de.idx: no such file, but a store needs it" in output
    assert ".it.bin.1-2.tmp: left by a writer that was killed, or is still at work" in output
    assert "4 stores, 3 bad" in output


def test_nothing_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "there is no token store in this folder" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder, and no token store of that name" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--threads", "-1"])
    assert "--threads=-1: must be at least 1" in capsys.readouterr().err


def test_as_a_command_without_torch(folder: Path) -> None:
    script = (
        "import sys; from data.verify import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    flip(folder / "train" / "fr.idx", 60)
    for command in ["-m", "data.verify"], ["-c", script]:
        result = subprocess.run(
            [sys.executable, *command, str(folder)], capture_output=True, text=True
        )
        assert (result.returncode, result.stderr) == (1, "")
        assert "train/fr" in result.stdout and "BAD" in result.stdout
