import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.packing_config import PackingConfig, PackingMode
from data.packing_plan import best_fit_decreasing, cut, open_plan, plan_folder
from data.token_store import TokenStore

BEST_FIT = PackingConfig(mode=PackingMode.best_fit)


def one_by_one(lengths: np.ndarray, capacity: int) -> list[int]:
    """Best-fit decreasing as the paper writes it; returns how full the bins are."""
    free: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [(space, place) for place, space in enumerate(free) if space >= length]
        if fits:
            free[min(fits)[1]] -= length
        else:
            free.append(capacity - length)
    return sorted(capacity - space for space in free)


def test_groups_are_packed_as_single_items_would_be() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        capacity = int(rng.integers(1, 40))
        lengths = rng.integers(1, capacity + 1, rng.integers(1, 80))
        full = np.bincount(best_fit_decreasing(lengths, capacity), weights=lengths)
        assert sorted(full.astype(int).tolist()) == one_by_one(lengths, capacity)


def test_much_text_leaves_little_padding_and_is_packed_fast() -> None:
    """Documents with the lengths of web text: log-normal, median 400 tokens, up to 100 000."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, 100_000), 2, 100_000).astype(np.int64)
    _, pieces = cut(np.cumsum(lengths) - lengths, lengths, 2048)
    bins = best_fit_decreasing(pieces, 2049)
    assert 1 - pieces.sum() / ((bins.max() + 1) * 2049) < 1e-3


def test_a_plan_is_computed_once(make_store: Callable[..., TokenStore], tmp_path: Path) -> None:
    store, folder = make_store("de", "germanic", 3000), tmp_path / "plans"
    first = open_plan(store, 64, BEST_FIT, drop_tail=True, folder=folder)
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = open_plan(store, 64, BEST_FIT, drop_tail=False, folder=folder)  # same for both tails
    assert [first.pieces(i) for i in range(first.sequences)] == [
        again.pieces(i) for i in range(again.sequences)
    ]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == made
    assert len(list(folder.iterdir())) == 1  # nothing temporary is left


def test_a_plan_is_named_by_all_it_depends_on(make_store, tmp_path: Path) -> None:
    one, other = make_store("de", "germanic", 3000), make_store("nl", "germanic", 3001)
    short = PackingConfig(max_document_tokens=5)
    names = {
        plan_folder(store, length, packing, drop_tail, tmp_path)
        for store in (one, other)
        for length in (64, 65)
        for packing in (short, PackingConfig(max_document_tokens=6))
        for drop_tail in (True, False)
    }
    assert len(names) == 16
    assert plan_folder(one, 64, BEST_FIT, True, tmp_path) == plan_folder(
        one, 64, PackingConfig(mode=PackingMode.best_fit, reset_attention=True), False, tmp_path
    )


def test_many_at_once_make_one_plan(make_store: Callable[..., TokenStore], tmp_path: Path) -> None:
    store, folder, found = make_store("de", "germanic", 5000), tmp_path / "plans", []

    def work() -> None:
        found.append(open_plan(store, 64, BEST_FIT, drop_tail=True, folder=folder).sequences)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 8 and len(set(found)) == 1 and len(list(folder.iterdir())) == 1


def test_beside_the_store_by_default(make_store: Callable[..., TokenStore]) -> None:
    store = make_store("de", "germanic", 300)
    open_plan(store, 64, BEST_FIT, drop_tail=True)
    assert list((store.prefix.parent / ".packing").iterdir())


def test_a_cut_plan_is_found(make_store: Callable[..., TokenStore], tmp_path: Path) -> None:
    store = make_store("de", "germanic", 3000)
    open_plan(store, 64, BEST_FIT, drop_tail=True, folder=tmp_path / "plans")
    (folder,) = (tmp_path / "plans").iterdir()
    starts = folder / "starts"
    starts.write_bytes(starts.read_bytes()[:-8])
    entries = json.loads((folder / "plan.json").read_text())["starts"]
    with pytest.raises(ValueError, match=f"starts: {entries - 1} entries where {entries} are"):
        open_plan(store, 64, BEST_FIT, drop_tail=True, folder=tmp_path / "plans")


def test_a_folder_that_cannot_be_written(make_store, tmp_path: Path) -> None:
    store = make_store("de", "germanic", 300)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the packing of .*set data\.cache_dir"):
        open_plan(store, 64, BEST_FIT, drop_tail=True, folder=tmp_path / "file")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_document_tokens": 1}, r"data\.packing\.max_document_tokens=1: must be at least 2"),
        ({"reset_positions": True}, r"reset_positions=true needs data\.packing\.reset_attention"),
    ],
)
def test_settings_refuse(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PackingConfig(**settings)


def test_fingerprint_holds_every_setting() -> None:
    plain = PackingConfig().fingerprint()
    for change in (
        {"mode": PackingMode.best_fit},
        {"max_document_tokens": 9},
        {"reset_attention": True},
        {"reset_attention": True, "reset_positions": True},
        {"mask_boundary_loss": True},
    ):
        assert PackingConfig(**change).fingerprint() != plain
    json.dumps(plain)
