"""Prints the documents that an optimizer step was trained on.

    python -m data.replay runs/demo/DATE --step 120                # every sample of the step
    python -m data.replay runs/demo/DATE --step 120 --sample 3 --text 500
    python -m data.replay runs/demo/DATE --step 120 --json

Everything follows from the run's own configuration and its ledger; no index and no log of samples
is needed. A step that is still to come is computed with the batch size of the last start. For each
sample: its number in the stream, language and family, which sequence of which pass over the
language it is, and its documents with their source and place in the token store.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from data.command_line import run_command
from data.interrupted import say_interrupted
from data.language_mixture import LanguageMixture
from data.ledger import read_ledger, samples_of_step
from data.open_mixture import open_mixture
from data.stream_settings import read_settings
from data.tokenizer import Tokenizer


class Replayable(Protocol):
    """What is replayed: data.open_mixture.OpenedMixture, or data.open_data.Data of a run."""

    @property
    def mixture(self) -> LanguageMixture: ...

    @property
    def tokenizer(self) -> Tokenizer: ...


@dataclass(frozen=True)
class ReplayedPiece:
    """Part of a document, or all of it, as it stood in a sample."""

    document: int  # its number in the token store
    doc_id: str  # empty where the store does not record it
    source: str
    start: int  # first token, in the store
    tokens: int
    text: str


@dataclass(frozen=True)
class ReplayedSample:
    sample: int  # in the stream, from 0
    family: str
    language: str
    sequence: int  # of the language
    epoch: int  # pass over the language, from 0
    pieces: list[ReplayedPiece]


def replay_sample(opened: Replayable, sample: int) -> ReplayedSample:
    """What sample number `sample` of the stream holds."""
    mixture = opened.mixture
    language_id, sequence = mixture.locate_one(sample)
    language, packed = mixture.languages[language_id], mixture.sequences[language_id]
    pieces = []
    for start, tokens in packed.pieces(sequence):
        document = packed.store.document_of(start)
        doc_id, source = packed.store.document_source(document)
        text = opened.tokenizer.decode(packed.store.read(start, start + tokens).tolist())
        pieces.append(ReplayedPiece(document, doc_id, source, start, tokens, text))
    family, epoch = mixture.family_of[language], mixture.epoch_of(sample)
    return ReplayedSample(sample, family, language, sequence, epoch, pieces)


def describe(sample: ReplayedSample, characters: int) -> Iterator[str]:
    """Lines for a terminal, with up to `characters` of every document's text."""
    yield (
        f"sample {sample.sample}: {sample.language} ({sample.family}), sequence {sample.sequence}, "
        f"pass {sample.epoch + 1}"
    )
    for piece in sample.pieces:
        named = piece.doc_id or f"document {piece.document}"
        source = f" [{piece.source}]" if piece.source else ""
        yield f"  {named}{source}, tokens {piece.start} to {piece.start + piece.tokens - 1}"
        text = piece.text if len(piece.text) <= characters else piece.text[:characters] + " ..."
        if characters:
            yield from (f"    {line}" for line in text.splitlines())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.replay", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--step", type=int, required=True, help="optimizer step, from 1")
    parser.add_argument("--sample", type=int, help="only this one of the step, from 0")
    parser.add_argument("--text", type=int, default=200, help="characters of each document shown")
    parser.add_argument("--json", action="store_true", help="whole documents, one sample a line")
    given = parser.parse_args(arguments)

    def command() -> int:
        for line in _replay(given):
            print(line)
        return 0

    return run_command("python -m data.replay", command)


def _replay(given: Any) -> Iterator[str]:
    settings = read_settings(run=given.run)
    first, end = samples_of_step(read_ledger(given.run), given.step)
    opened = open_mixture(settings.data, settings.seq_length)
    last = opened.mixture.end
    if last is not None and end > last:
        raise ValueError(f"--step={given.step}: the data ends at sample {last}, before this step")
    samples = range(first, end)
    if given.sample is not None:
        if not 0 <= given.sample < len(samples):
            raise ValueError(
                f"--sample={given.sample}: the step has samples 0 to {len(samples) - 1}"
            )
        samples = samples[given.sample : given.sample + 1]
    if not given.json:
        yield f"step {given.step} of {given.run}: samples {first} to {end - 1} of the stream"
    for number in samples:
        replayed = replay_sample(opened, number)
        if given.json:
            yield json.dumps(asdict(replayed), ensure_ascii=False)
        else:
            yield from describe(replayed, max(0, given.text))


if __name__ == "__main__":
    say_interrupted()
    sys.exit(main())
