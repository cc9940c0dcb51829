"""Stores, corpora, tokenizers and checkpoints for launch.check, each really broken in one way."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from data.folder_lock import LockFile
from data.open_mixture import DEMO_TOKENIZER, open_mixture
from data.store_format import read_sidecar, sidecar_bytes
from data.store_writer import TokenStoreWriter
from data.tokenizer import load_tokenizer
from launch.schema import load
from pretrain.config import PretrainConfig
from pretrain.run_identity import FORMAT, identity
from pretrain.train_state import TrainState
from tests.distributed import run_on_gloo

FAMILIES = {"de": "germanic", "hi": "indic", "ru": "slavic"}
DOCUMENTS = {"de": 60, "hi": 40, "ru": 20}  # of 200 tokens
# a model whose checkpoint takes 4 MB
SMALL = [
    "+model=magneto_tiny",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=2",
    "data.seq_length=64",
    "wandb.mode=disabled",
]


def write_stores(folder: Path, *, fingerprint: str = "", splits: tuple[str, ...] = ()) -> Path:
    """Three languages of 4,000 to 12,000 tokens, in the demo's tokenizer."""
    tokenizer = load_tokenizer(DEMO_TOKENIZER)
    draw = np.random.default_rng(0)
    for split in splits or ("train", "validation"):
        for language, family in FAMILIES.items():
            with TokenStoreWriter(
                folder / split / language,
                language=language,
                family=family,
                tokenizer_fingerprint=fingerprint or tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
            ) as writer:
                for number in range(DOCUMENTS[language]):
                    ids = draw.integers(2, tokenizer.vocab_size, 200)
                    writer.add_document(ids, doc_id=f"{split}-{number}")
    return folder


def write_checkpoints(run: Path, config: PretrainConfig, values: dict[str, Any]) -> None:
    """Of steps 10 and 20, with an optimizer; on one rank (`run_on_gloo`)."""
    from models.build import build_model
    from parallel import checkpoint_io
    from parallel.engine import MegatronEngine, checkpoint_metadata
    from parallel.runtime import initialize, shutdown

    runtime = initialize(config.parallel, 1)
    size = values["identity"]["model"]["vocab_size"]
    chunks = build_model(config.model, config.parallel, runtime, vocab_size=size, seed=1)
    engine = MegatronEngine(chunks, config.parallel, config.optimizer, runtime)
    for step in (10, 20):
        state = TrainState(step, 8 * step, 8 * 64 * step)
        checkpoint_io.save(
            {**engine.sharded_state_dict(), **values, "train_state": state.to_dict()},
            run / "checkpoints" / f"step_{step:08d}",
            metadata=checkpoint_metadata(),
        )
    shutdown(runtime)


@dataclass
class BrokenFiles:
    """Makes what it is asked for by name, once."""

    folder: Path

    def path(self, name: str) -> Path:
        made = self.folder / name
        if not made.exists():
            getattr(self, name)(made)
        return made

    # ---- token stores

    def stores(self, to: Path) -> None:
        write_stores(to)
        counts = {
            split: {language: {"documents": count} for language, count in DOCUMENTS.items()}
            for split in ("train", "validation")
        }
        (to / "manifest.json").write_text(json.dumps({"splits": counts}))

    def _stores(self, to: Path) -> Path:
        shutil.copytree(self.path("stores"), to)
        return to / "train" / "de"

    def stores_truncated(self, to: Path) -> None:
        path = self._stores(to).with_suffix(".bin")
        os.truncate(path, path.stat().st_size - 100)

    def stores_flipped(self, to: Path) -> None:
        path = self._stores(to).with_suffix(".bin")
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)

    def stores_swapped(self, to: Path) -> None:
        de = self._stores(to)
        for suffix in (".idx", ".bin"):
            shutil.copy(de.with_name("ru").with_suffix(suffix), de.with_suffix(suffix))

    def stores_without_index(self, to: Path) -> None:
        self._stores(to).with_suffix(".idx").unlink()

    def stores_without_sidecar(self, to: Path) -> None:
        self._stores(to).with_suffix(".json").unlink()

    def stores_language_gone(self, to: Path) -> None:
        for path in self._stores(to).parent.glob("ru.*"):
            path.unlink()

    def stores_two_tokenizers(self, to: Path) -> None:
        self._stores(to)
        write_stores(self.folder / "other", fingerprint="f" * 64, splits=("validation",))
        for path in (self.folder / "other" / "validation").glob("ru.*"):
            shutil.copy(path, to / "validation" / path.name)

    def stores_ids_outside(self, to: Path) -> None:
        """As a converter leaves them that was told the wrong vocabulary."""
        self._with_vocabulary(to, 1000)

    def stores_narrow(self, to: Path) -> None:
        self._with_vocabulary(to, 128_000)

    def _with_vocabulary(self, to: Path, size: int) -> None:
        self._stores(to)
        for sidecar in to.glob("*/*.json"):
            info = replace(read_sidecar(sidecar.with_suffix("")), vocab_size=size)
            sidecar.write_bytes(sidecar_bytes(info))

    def stores_without_validation(self, to: Path) -> None:
        self._stores(to)
        shutil.rmtree(to / "validation")
        (to / "manifest.json").unlink()

    # ---- corpora and tokenizers

    def corpus_bad_json(self, to: Path) -> None:
        _lines(to, ['{"text": "Guten Tag", "language": "de"}', '{"text": "abge'])

    def corpus_other_field(self, to: Path) -> None:
        _lines(to, ['{"content": "Guten Tag", "language": "de"}'])

    def corpus_latin1(self, to: Path) -> None:
        to.mkdir()
        content = '{"text": "Grüße", "language": "de"}\n'.encode("latin-1")
        (to / "text.jsonl").write_bytes(content)

    def corpus_unknown_language(self, to: Path) -> None:
        _lines(to, ['{"text": "nuqneH", "language": "xx-klingon"}'])

    def empty_folder(self, to: Path) -> None:
        to.mkdir()

    def lfs_pointer(self, to: Path) -> None:
        to.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")

    def torn_tokenizer(self, to: Path) -> None:
        to.write_bytes(DEMO_TOKENIZER.read_bytes()[:5000])

    def tokenizer_folder(self, to: Path) -> None:
        to.mkdir()
        shutil.copy(DEMO_TOKENIZER, to)

    def other_tokenizer(self, to: Path) -> None:
        content = json.loads(DEMO_TOKENIZER.read_bytes())
        content["model"]["merges"] = content["model"]["merges"][:-1]
        to.write_text(json.dumps(content))

    def own_conf(self, to: Path) -> None:
        (to / "parallel").mkdir(parents=True)
        (to / "parallel" / "typo.yaml").write_text("tensor_parallel_size: 2\n")
        (to / "parallel" / "torn.yaml").write_text("precision: [bf16\nfoo: {\n")
        (to / "experiment").mkdir()
        (to / "experiment" / "slips.yaml").write_text(
            "# @package _global_\n"
            "defaults: [override /parallel: tp2]\n"
            "data: {seq_len: 128}\n"
            "train: {train_stps: 10, micro_batch_size: 2.5}\n"
            "optimizer: {betas: [0.9, 0.95]}\n"
            "schedule: {lr_warmup_steps: 10k}\n"
        )
        (to / "model").mkdir()
        (to / "model" / "slips.yaml").write_text(
            "name: slips\nnum_layers: twelve\nhidden_size: 64\nffn_size: 256\n"
            "ffn_hidden_size: 256\nnum_attention_heads: 4\nmax_position_embeddings: 256\n"
        )

    def nowhere(self, to: Path) -> None:
        pass

    # ---- runs

    def run(self, to: Path) -> None:
        self._save(to)

    def _save(
        self, to: Path, change: Callable[[dict[str, Any]], None] = lambda values: None
    ) -> None:
        config = load([*SMALL, f"data.store_dir={self.path('stores')}"])
        mixture = open_mixture(config.data, config.seq_length).mixture
        vocabulary = load_tokenizer(DEMO_TOKENIZER).vocab_size
        known = identity(config, vocabulary, mixture.fingerprint())
        values: dict[str, Any] = {"format": FORMAT, "identity": known}
        change(values)
        run_on_gloo(1, write_checkpoints, to, config, values)
        (to / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))

    def _run(self, to: Path) -> Path:
        shutil.copytree(self.path("run"), to)
        return to / "checkpoints" / "step_00000020"

    def run_truncated(self, to: Path) -> None:
        path = max(self._run(to).glob("*.distcp"), key=lambda file: file.stat().st_size)
        os.truncate(path, path.stat().st_size // 2)

    def run_all_damaged(self, to: Path) -> None:
        for folder in self._run(to).parent.iterdir():
            (folder / ".metadata").unlink()

    def run_lost_piece(self, to: Path) -> None:
        next(self._run(to).glob("*.distcp")).unlink()

    def run_without_manifest(self, to: Path) -> None:
        (self._run(to) / "manifest.json").unlink()

    def run_torn_values(self, to: Path) -> None:
        path = self._run(to) / "common.pt"
        content = bytearray(path.read_bytes())
        content[-40:] = bytes(40)  # the size is what it was
        path.write_bytes(content)

    def run_set_aside(self, to: Path) -> None:
        checkpoint = self._run(to)
        shutil.rmtree(checkpoint.with_name("step_00000010"))
        checkpoint.rename(checkpoint.with_name("step_00000020.damaged"))

    def run_without_optimizer(self, to: Path) -> None:
        from pretrain.convert_checkpoint import to_checkpoint

        source = self.path("run") / "checkpoints" / "step_00000020"
        (to / "checkpoints").mkdir(parents=True)
        target = to / "checkpoints" / source.name
        to_checkpoint(source, target, dtype=None, weights_only=True)

    def run_with_fewer_weights(self, to: Path) -> None:
        """The identity is that of a model of 4 layers, and 2 of them are in the files."""

        def change(values: dict[str, Any]) -> None:
            values["identity"]["model"]["num_layers"] = 4

        self._save(to, change)

    def run_of_newer_version(self, to: Path) -> None:
        self._save(to, lambda values: values.update(format=99))

    def run_with_more_values(self, to: Path) -> None:
        self._save(to, lambda values: values.update(scheduler={"steps": 1}))

    def run_in_use(self, to: Path) -> None:
        to.mkdir()
        LockFile(to / "lock", since=0.0).take(lambda path, holder: False)

    def slow_run(self, to: Path) -> None:
        to.mkdir()
        record = {"step": 5, "train/loss": 3.0, "throughput/step_seconds": 60.0}
        (to / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def _lines(to: Path, lines: list[str]) -> None:
    to.mkdir()
    (to / "text.jsonl").write_text("\n".join(lines) + "\n")


def names_in(text: str) -> Iterator[str]:
    """What is asked for as {NAME}."""
    return (name for name in dir(BrokenFiles) if f"{{{name}}}" in text)
