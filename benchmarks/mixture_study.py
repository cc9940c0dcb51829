"""Does the multilingual scaling law (arXiv 2410.12883) hold for small models on this machine?

    python -m benchmarks.mixture_study --corpus CORPUS --out STUDY            # all of it, in order
    python -m benchmarks.mixture_study --corpus CORPUS --out STUDY --only phase1

Given again, the same command goes on where it was stopped. Stages, each of which can be named:

    prepare   two corpora of 23 languages in five families, a tokenizer, token stores
    phase1    the sweeps `main` (grid of ratios, single families, pairs at fixed ratios) and
              `disjoint` (the pairs again, with no document in two families), run and collected
    phase2    the law fitted to phase 1; its optimum against other mixtures at two sizes, run
    report    tables and figures (benchmarks/mixture_report.py), into --report

CORPUS is a folder that `python -m data.corpora build --tier xl` made. Its documents are
translations of each other, under one doc_id: the same documents are held out in all languages. In
the disjoint corpus each doc_id is kept in one family alone, so that a family cannot profit from
having seen the same text in another. docs/science.md says what came out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from benchmarks.mixture_report import report
from data.sampling_weights import proportional, temperature, uniform
from data.scaling_law.design import PlannedRun
from data.scaling_law.fit import fit_law
from data.scaling_law.law import ScalingLaw
from data.scaling_law.optimum import Goal, Objective, optimal_ratios
from data.scaling_law.runs_table import read_runs
from data.train_tokenizer import train_on_corpus
from launch import sweep
from launch.sweep_collect import family_tokens
from launch.sweep_folder import TABLE_FILE, compose_run, read_sweep_folder

STAGES = ("prepare", "phase1", "phase2", "report")
# In each family languages alike; those with text for a single-family run without many repeats.
LANGUAGES = {
    "germanic": ("da", "de", "en", "nl", "sv"),
    "indic": ("bn", "gu", "hi", "kn", "mr", "ta"),
    "romance": ("ca", "es", "fr", "it", "pt"),
    "sino-tibetan": ("zh", "zh-Hant"),
    "slavic": ("cs", "pl", "ru", "sl", "uk"),
}
# Share of all doc_ids that a family keeps in the disjoint corpus: more where there is less text.
DISJOINT_SHARES = {
    "germanic": 0.12,
    "romance": 0.12,
    "slavic": 0.14,
    "indic": 0.31,
    "sino-tibetan": 0.31,
}
TOKENIZER_CHARACTERS = 1_500_000  # of each family
VOCAB_SIZE = 4096

SMALL, MIDDLE, LARGE = "n125k", "n340k", "n1m"


def model(layers: int, width: int, heads: int, lr: float) -> dict[str, Any]:
    shape = {"num_layers": layers, "hidden_size": width, "ffn_hidden_size": 4 * width}
    return {
        "base": "magneto_tiny",
        "settings": {"model": {**shape, "num_attention_heads": heads}, "optimizer": {"lr": lr}},
    }


MODELS = {
    SMALL: model(2, 72, 2, lr=8e-3),
    MIDDLE: model(3, 96, 3, lr=6e-3),
    LARGE: model(4, 144, 4, lr=4e-3),
}
FAMILIES = list(LANGUAGES)
CONFIRM_CELLS = {SMALL: [6e5], LARGE: [6e5]}
TEMPERATURE_ALPHA = 0.7  # XLM-E's (arXiv 2106.16138), the launcher's default
CORPORA = ("main", "disjoint")


def settings(out: Path, corpus: str) -> dict[str, Any]:
    """Of every run on the corpus."""
    return {
        "data": {
            "corpus": str(out / "corpora" / corpus),
            "tokenizer": str(out / "tokenizer.json"),
            "cache_dir": str(out / "stores"),
            "families": "five_families",
            "validation_fraction": 0.1,
            "seq_length": 128,
            "mixture": {"within_family": "uniform"},
        },
        "train": {
            "micro_batch_size": 16,
            "global_batch_size": 16,
            "eval_sequences": 40,
            "log_interval": 20,
            "gradient_norm_interval": 0,
        },
        "wandb": {"mode": "disabled"},
        "profile": {"straggler_interval": 0},
    }


def sweeps(out: Path) -> dict[str, dict[str, Any]]:
    """The sweeps of phase 1 by name, the most important first."""
    common = {
        "families": FAMILIES,
        "models": MODELS,
        "flops_per_second": 3e10,  # of one core, measured
        "startup_seconds": 20,
    }
    pairs = {"cells": {SMALL: [6e5]}, "ratio": 0.4}
    main = {
        "name": "main",
        **common,
        "settings": settings(out, "main"),
        "grid": {
            "cells": {SMALL: [6e5]},
            "points": 12,
            "step": 0.05,
            "floor": 0.05,
            "repeated": 3,
        },
        "single_family": {"cells": {SMALL: [2e5, 6e5, 1.2e6], MIDDLE: [2e5, 6e5], LARGE: [6e5]}},
        "hypothesis": {**pairs, "seeds": 2},
    }
    disjoint = {
        "name": "disjoint",
        **common,
        "models": {SMALL: MODELS[SMALL]},
        "settings": settings(out, "disjoint"),
        "hypothesis": {**pairs, "seeds": 1},
        "must_determine_law": False,
    }
    return {"main": main, "disjoint": disjoint}


# ---------------------------------------------------------------- prepare


def prepare(given: argparse.Namespace) -> None:
    """Corpora and tokenizer, unless they are there; launch.sweep builds the token stores."""
    given.out.mkdir(parents=True, exist_ok=True)
    for corpus in CORPORA:
        folder = given.out / "corpora" / corpus
        if not folder.is_dir():
            write_corpus(given.corpus, folder, disjoint=corpus == "disjoint")
    if not (given.out / "tokenizer.json").is_file():
        sample = given.out / "corpora" / "for_tokenizer.jsonl"
        write_tokenizer_sample(given.out / "corpora" / "main", sample)
        # the sample has each family's share already, so it is read once and as it is
        train_on_corpus(
            sample,
            given.out / "tokenizer.json",
            vocab_size=VOCAB_SIZE,
            alpha=1.0,
            sample_megabytes=100.0,
            max_repeats=1.0,
        )
    for name, content in sweeps(given.out).items():
        make_sweep(given.out, name, content)


def write_corpus(source: Path, folder: Path, disjoint: bool) -> None:
    """The study's languages out of `source`; complete or absent."""
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for family, languages in LANGUAGES.items():
        for language in languages:
            with open(partial / f"{language}.jsonl", "w", encoding="utf-8") as file:
                for line in documents(source, language):
                    if not disjoint or family_of_document(json.loads(line)["doc_id"]) == family:
                        file.write(line)
    partial.rename(folder)


def documents(folder: Path, language: str) -> Iterator[str]:
    with open(folder / f"{language}.jsonl", encoding="utf-8") as file:
        yield from file


def family_of_document(doc_id: str) -> str:
    """The one family that keeps the document in the disjoint corpus, by a hash of its id."""
    digest = hashlib.blake2b(doc_id.encode(), digest_size=8, person=b"family").digest()
    place = int.from_bytes(digest, "big") / 2**64
    for family, share in DISJOINT_SHARES.items():
        place -= share
        if place < 0:
            return family
    return family


def write_tokenizer_sample(corpus: Path, path: Path) -> None:
    """As many characters of each family, of its languages by turns."""
    with open(path, "w", encoding="utf-8") as file:
        for languages in LANGUAGES.values():
            left = TOKENIZER_CHARACTERS
            turns = zip_longest(*(documents(corpus, language) for language in languages))
            for line in (line for turn in turns for line in turn if line):
                left -= len(json.loads(line)["text"])
                file.write(line)
                if left <= 0:
                    break


# ---------------------------------------------------------------- running


def make_sweep(out: Path, name: str, content: Mapping[str, Any]) -> None:
    """Designs the sweep into out/name unless it is there."""
    file = out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    if not (out / name / "sweep.yaml").is_file():
        call_sweep("design", str(file), "--out", str(out / name))


def call_sweep(*words: str, allowed: Sequence[int] = (0,)) -> None:
    print("$ python -m launch.sweep " + " ".join(words), flush=True)
    code = sweep.main(words)
    if code not in allowed:
        sys.exit(code)


def run_sweep(given: argparse.Namespace, name: str) -> None:
    """Runs what is left and collects; a failed run is reported and does not end the study."""
    folder = given.out / name
    call_sweep("run", str(folder), "--jobs", str(given.jobs), allowed=(0, 1))
    states = read_sweep_folder(folder).states().values()
    if any(state in ("new", "begun") for state in states):
        sys.exit(1)  # interrupted
    call_sweep("collect", str(folder), allowed=(0, 1))


def phase1(given: argparse.Namespace) -> None:
    for name in sweeps(given.out):
        run_sweep(given, name)


# ---------------------------------------------------------------- phase 2


def phase2(given: argparse.Namespace) -> None:
    """The law of phase 1, and its optima against other mixtures, at the ends of the sizes."""
    law_file = given.out / "law.yaml"
    if not law_file.is_file():
        fit_law(read_runs(given.out / "main" / TABLE_FILE)).save(law_file)
    folder = read_sweep_folder(given.out / "main")
    small = next(run for run in folder.runs if run.purpose == "grid")
    runs = compose_run(folder, small.name)
    supply = family_tokens(runs.data, runs.seq_length)
    mixtures = mixtures_to_compare(ScalingLaw.load(law_file), small, supply)
    make_sweep(
        given.out,
        "confirm",
        {
            **sweeps(given.out)["main"],
            "name": "confirm",
            "grid": {},
            "single_family": {},
            "hypothesis": {},
            "confirm": {"cells": CONFIRM_CELLS, "mixtures": mixtures, "seeds": 2},
            "must_determine_law": False,
            "first_seed": 11,  # other weights and another order than the law was fitted to
        },
    )
    run_sweep(given, "confirm")


def mixtures_to_compare(
    law: ScalingLaw, small: PlannedRun, supply: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """The optima for the small size, which the large one takes over, and the usual mixtures."""
    goal = Goal(num_parameters=small.num_parameters, tokens=small.tokens, at_least=0.02)
    return {
        "optimum": optimal_ratios(law, goal).ratios,
        "optimum-sum": optimal_ratios(law, replace(goal, objective=Objective.sum)).ratios,
        "uniform": uniform(supply),
        "proportional": proportional(supply),
        "temperature": temperature(supply, TEMPERATURE_ALPHA),
    }


def make_report(given: argparse.Namespace) -> None:
    report(given.out, given.report)


# ---------------------------------------------------------------- the command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="of python -m data.corpora")
    parser.add_argument("--out", type=Path, default=Path("runs/mixture_study"))
    parser.add_argument("--report", type=Path, default=Path("docs"), help="folder (default: docs)")
    parser.add_argument("--only", choices=STAGES, help="this stage alone")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    given = parser.parse_args()
    given.out = given.out.resolve()
    if not given.corpus.is_dir():
        parser.error(f"--corpus={given.corpus}: no such folder")
    return given


def main() -> int:
    given = parse_arguments()
    stages = {"prepare": prepare, "phase1": phase1, "phase2": phase2, "report": make_report}
    for name, stage in stages.items():
        if given.only in (None, name):
            stage(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
