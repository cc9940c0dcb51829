"""Small runs with one poisoned document, for the tests of anomalies.

Two languages, each of documents of `LENGTH` tokens: the same few tokens in random order, so that a
tiny model knows all there is to know of them after a dozen steps, and its losses stand still.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.ledger import read_ledger, samples_of_step
from data.open_data import open_data
from data.store_writer import TokenStoreWriter
from data.tokenize_corpus import DEMO_TOKENIZER
from data.tokenizer import load_tokenizer
from models.config import ModelConfig
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.runtime import initialize, shutdown
from pretrain import run as run_module
from pretrain.anomaly_watch import AnomalyWatch
from pretrain.config import (
    AnomalyConfig,
    CheckpointConfig,
    DecayStyle,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
    WandbConfig,
    WandbMode,
)
from pretrain.run_status import RunStatus
from pretrain.stop_signal import StopSignal
from pretrain.train_state import TrainState
from pretrain.train_step import StepMetrics

LANGUAGES = ("de", "fr")
SEQ_LENGTH, LENGTH, DOCUMENTS, BATCH = 32, 11, 400, 4
RARE = 7000  # a token that only the poisoned document has
MODEL = ModelConfig(
    name="poisoned",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    max_position_embeddings=SEQ_LENGTH,
    make_vocab_size_divisible_by=8,
    share_embeddings_and_output_weights=False,
)


@dataclass(frozen=True)
class Poison:
    """Where the document is, and when it is met first."""

    language: str
    document: int
    sample: int


def write_stores(folder: Path, poison: Poison | None) -> None:
    """Stores of random clean documents; the poisoned one is random ids of the whole vocabulary, and
    has one RARE token in its middle."""
    tokenizer = load_tokenizer(DEMO_TOKENIZER)
    random = np.random.default_rng(0)
    for split, documents in (("train", DOCUMENTS), ("validation", 4)):
        for place, language in enumerate(LANGUAGES):
            writer = TokenStoreWriter(
                folder / split / language,
                language=language,
                family="germanic" if language == "de" else "romance",
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                source="made up",
            )
            with writer:
                for number in range(documents):
                    ids = 100 * (place + 1) + random.integers(0, 4, LENGTH - 1)
                    if poison and (split, language, number) == (
                        "train",
                        poison.language,
                        poison.document,
                    ):
                        ids = np.random.default_rng(1).integers(1000, 6000, LENGTH - 1)
                        ids[LENGTH // 2] = RARE
                    writer.add_document(ids, doc_id=f"{language}-{number}")


def data_config(folder: Path) -> DataConfig:
    return DataConfig(
        store_dir=str(folder),
        tokenizer=str(DEMO_TOKENIZER),
        cache_dir=str(folder / "cache"),
        seq_length=SEQ_LENGTH,
        prefetch=0,
    )


def poisoned_stores(folder: Path, step: int) -> Poison:
    """Writes them so that a sequence of the step (from 1) holds the document as its second one,
    whole, and no sequence before it does."""
    write_stores(folder / "clean", None)
    mixture = open_data(data_config(folder / "clean"), SEQ_LENGTH).mixture
    for sample in reversed(range(BATCH * (step - 1), BATCH * step)):
        language, number = mixture.locate_one(sample)
        store = mixture.stores[language]
        start, tokens = mixture.sequences[language].pieces(number)[1]
        poison = Poison(store.language, store.document_of(start), sample)
        seen = [mixture.locate_one(n) for n in range(sample)]
        if tokens == LENGTH and (language, number) not in seen:
            write_stores(folder, poison)
            return poison
    raise AssertionError("no sequence of the step has a whole document in its middle")


def config(folder: Path, run_dir: Path, **changes: Any) -> PretrainConfig:
    anomaly = changes.pop("anomaly", AnomalyConfig())
    parallel = changes.pop("parallel", ParallelConfig())
    model = changes.pop("model", MODEL)
    save_interval = changes.pop("save_interval", 0)
    return PretrainConfig(
        model=model,
        data=data_config(folder),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=3e-2),
        schedule=ScheduleConfig(lr_decay_style=DecayStyle.constant),
        train=TrainConfig(
            global_batch_size=BATCH,
            **{"eval_interval": 0, "eval_sequences": 1, **changes},
        ),
        checkpoint=CheckpointConfig(save_interval=save_interval),
        anomaly=anomaly,
        wandb=WandbConfig(mode=WandbMode.disabled),
        run_dir=str(run_dir),
    )


@dataclass
class Diary:
    """What one rank saw."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    samples: list[tuple[int, int]] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    error: str = ""

    def note(self, state: TrainState, metrics: StepMetrics) -> None:
        self.steps.append(state.step)
        self.losses.append(metrics.losses.mean())
        self.samples.append((state.consumed_sequences - BATCH, state.consumed_sequences))
        self.actions.append(metrics.verdict.action.value)


def train(settings: PretrainConfig, damage: str = "") -> Diary:
    """A whole run on the ranks of `run_on_gloo`, as pretrain.run does it.

    damage: "embedding": the RARE token's embedding is not finite. "gradient": its gradient is not.
    "once": one micro-batch is not, and would be another time. "weights": no weight of the embedding
    is.
    """
    diary = Diary()
    after_step, engine_class = AnomalyWatch.after_step, run_module.MegatronEngine

    def noting(watch: AnomalyWatch, state: TrainState, sequences: int, *rest: Any) -> None:
        diary.note(state, rest[0])
        after_step(watch, state, sequences, *rest)

    def damaged(chunks: Any, *rest: Any) -> Any:
        for chunk in chunks:
            if hasattr(chunk, "embedding") and damage:
                spoil(chunk.embedding.word_embeddings, damage)
        return engine_class(chunks, *rest)

    runtime = initialize(settings.parallel, settings.train.seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnomalyWatch, "after_step", noting)
        patch.setattr(run_module, "MegatronEngine", damaged)
        for slow in ("record_run", "report"):  # two seconds a run
            patch.setattr(run_module, slow, nothing)
        try:
            run_module.train(settings, runtime, StopSignal(), RunStatus())
        except RuntimeError as error:
            diary.error = f"{type(error).__name__}: {error}"
    shutdown(runtime)
    return diary


def nothing(*given: Any, **named: Any) -> None: ...


def spoil(embedding: Any, damage: str) -> None:
    """What `train` says, to a VocabParallelEmbedding."""
    weight = embedding.weight.data
    if damage == "weights":
        weight.fill_(float("nan"))
    elif damage == "embedding":
        first, end = embedding.vocab_start_index, embedding.vocab_end_index
        if first <= RARE < end:
            weight[RARE - first] = float("nan")
    else:
        embedding.register_forward_hook(AtRareTokens() if damage == "gradient" else Once())


class AtRareTokens:
    """A forward hook: the gradient is not finite where a sequence has the RARE token."""

    def __call__(self, module: Any, given: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if output.requires_grad and bool((given[0] == RARE).any()):
            output.register_hook(lambda gradient: gradient * float("inf"))


class Once:
    """A forward hook: the first micro-batch of the second step is not finite."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, module: Any, given: tuple[torch.Tensor], output: torch.Tensor) -> Any:
        self.passes += module.training
        on_two_ranks = BATCH // 2
        return output * float("nan") if self.passes == on_two_ranks + 1 else None


def report_of(run_dir: Path, step: int, more: str = "") -> dict[str, Any]:
    name = f"step_{step:08d}{more}.json"
    return json.loads((run_dir / "anomalies" / name).read_text(encoding="utf-8"))


def replayed(run_dir: Path, last_step: int) -> dict[int, tuple[int, int]]:
    entries = read_ledger(run_dir)
    return {step: samples_of_step(entries, step) for step in range(1, last_step + 1)}
