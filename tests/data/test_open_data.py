import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.config import DataConfig, MixtureConfig, Weighting
from data.open_data import open_data, prepare
from data.packing_config import PackingConfig, PackingMode
from data.tokenize_corpus import DEMO_CORPUS
from data.tokenizer import train_tokenizer


@pytest.fixture
def config(demo_cache: Path) -> DataConfig:
    return DataConfig(cache_dir=str(demo_cache))


def test_the_whole_way_with_defaults(config: DataConfig) -> None:
    folder = prepare(config)
    data = open_data(config, seq_length=64)
    assert data.folder == folder
    assert len(data.languages) == 38 and len(data.families) == 18
    assert data.family_of["hi"] == "indic" and data.languages == sorted(data.languages)
    loader = data.train_loader(
        micro_batch_size=4, global_batch_size=16, data_parallel_rank=0, data_parallel_size=2
    )
    (first, _second) = loader.micro_batches(0)
    assert first.tokens.shape == (4, 64)
    assert int(first.tokens.max()) < data.tokenizer.vocab_size
    text = data.tokenizer.decode(first.tokens[0].tolist())
    assert len(text) > 50

    validation = data.validation_set(
        sequences_per_language=2, micro_batch_size=4, data_parallel_rank=0, data_parallel_size=1
    )
    seen = torch.cat([batch.language_ids for batch in validation.micro_batches()])[
        : len(validation)
    ]
    assert torch.bincount(seen).tolist() == [2] * 38


def test_train_and_validation_share_no_document(config: DataConfig) -> None:
    data = open_data(config, seq_length=64)
    for train, validation in zip(data.mixture.stores, data.validation_stores, strict=True):
        assert train.language == validation.language
        documents = {train.document(i).tobytes() for i in range(train.documents)}
        assert all(
            validation.document(i).tobytes() not in documents for i in range(validation.documents)
        )


def test_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"have not been built; data.open_mixture.prepare"):
        open_data(DataConfig(cache_dir=str(tmp_path)), 64)


def test_a_corpus_that_needs_options_a_run_has_not(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "Ein Satz."}\n')
    with pytest.raises(ValueError) as refused:
        prepare(DataConfig(corpus=str(tmp_path / "text.jsonl"), cache_dir=str(tmp_path / "cache")))
    said = str(refused.value)
    assert "language of all such text (--language of python -m data.tokenize)" in said
    assert said.endswith(
        "--skip-bad N of python -m data.tokenize, whose --out is then data.store_dir"
    )


def test_cache_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = prepare(DataConfig(languages=["de"]))
    assert folder.parent == tmp_path / "cache" / "magnetron" / "token_stores"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = prepare(DataConfig(languages=["de"]))
    assert folder.parent == tmp_path / "home" / ".cache" / "magnetron" / "token_stores"


def test_store_dir_overrides_the_corpus(demo_folder: Path, tmp_path: Path) -> None:
    config = DataConfig(store_dir=str(demo_folder), corpus="ignored", languages=["de", "hi"])
    assert prepare(config) == demo_folder
    assert open_data(config, 32).languages == ["de", "hi"]
    with pytest.raises(FileNotFoundError, match=r"data.store_dir=.*no folder with a train/"):
        prepare(DataConfig(store_dir=str(tmp_path)))


def test_stores_of_another_tokenizer(demo_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_tokenizer(["some text"], 258).save(str(path))
    with pytest.raises(
        ValueError, match=r"8192 entries, but data.tokenizer=.*tokenizer.json is .* 258"
    ):
        open_data(DataConfig(store_dir=str(demo_folder), tokenizer=str(path)), 32)


def test_a_language_without_validation_is_reported(
    demo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(demo_folder, tmp_path / "stores")
    for file in (tmp_path / "stores" / "validation").glob("hi.*"):
        file.unlink()
    with caplog.at_level(logging.WARNING):
        data = open_data(DataConfig(store_dir=str(tmp_path / "stores")), 32)
    assert "no validation store of hi" in caplog.text
    assert len(data.validation_stores) == 37 and len(data.languages) == 38


def test_settings_reach_the_mixture(config: DataConfig) -> None:
    mixture = MixtureConfig(weighting=Weighting.ratios, ratios={"germanic": 0.25, "indic": 0.75})
    data = open_data(
        replace(
            config, store_dir=str(prepare(config)), languages=["de", "hi"], mixture=mixture, seed=9
        ),
        32,
    )
    assert data.mixture.weights == {"de": 0.25, "hi": 0.75}
    assert data.mixture.seed == 9


def test_the_demo_corpus_given_by_path_is_the_default(config: DataConfig) -> None:
    assert prepare(replace(config, corpus=str(DEMO_CORPUS))) == prepare(config)


def test_packing_plans_are_built_once(demo_cache: Path, tmp_path: Path) -> None:
    """What one rank builds beforehand: then opening loaders adds nothing."""
    (tmp_path / "cache").symlink_to(demo_cache)
    config = DataConfig(
        cache_dir=str(tmp_path / "cache"),
        languages=["de", "hi"],
        packing=PackingConfig(mode=PackingMode.best_fit),
    )
    prepare(config)
    data = open_data(config, 48)
    data.build_packing_plans()
    plans = data.mixture.plan_folder
    assert plans is not None
    built = {path: path.stat().st_ino for path in plans.rglob("*")}
    again = open_data(config, 48)
    again.validation_set(
        sequences_per_language=4, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1
    )
    assert {path: path.stat().st_ino for path in plans.rglob("*")} == built
    assert len([p for p in plans.iterdir() if "-48-" in p.name]) == 4  # two languages, two splits
