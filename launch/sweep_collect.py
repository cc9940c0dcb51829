"""The table of a sweep, out of the folders of its finished runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.config import DataConfig
from data.open_mixture import open_mixture
from data.packed_sequences import PackedSequences, RowReader, Tail
from data.scaling_law.design import PlannedRun
from data.scaling_law.runs_table import RunsTable, make_table
from launch.sweep_folder import DONE, FAILED, SweepFolder, compose_run
from pretrain.config import PretrainConfig
from pretrain.metrics_file import METRICS_FILE, read_metrics


def collect(folder: SweepFolder) -> tuple[RunsTable, list[str]]:
    """The table of the finished runs, and a line for each run that is not in it.

    A family's ratio is what was drawn, its loss that of the evaluation after the last step. A
    failed run has rows with the planned ratios and without losses. Raises ValueError where there
    is nothing to collect, or a family without validation tokens.
    """
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    eval_tokens: dict[str, Mapping[str, int]] = {}
    for name, state in folder.states().items():
        run = folder.by_name[name]
        if state == DONE:
            if run.model not in eval_tokens:
                eval_tokens[run.model] = evaluation_tokens(compose_run(folder, name))
                check_evaluation(folder.config.families, eval_tokens[run.model])
            try:
                rows += finished_rows(folder, run, eval_tokens[run.model])
            except ValueError as error:
                left_out.append(f"{name}: {error}")
        elif state == FAILED:
            left_out.append(f"{name}: {folder.last_attempts()[name]['reason']}")
            rows += [_row(run, family, run.ratios[family]) for family in folder.config.families]
        else:
            left_out.append(f"{name}: {state}")
    if not rows:
        raise ValueError(f"{folder.path}: none of its {len(folder.runs)} runs is finished yet")
    return make_table(rows), left_out


def finished_rows(
    folder: SweepFolder, run: PlannedRun, eval_tokens: Mapping[str, int]
) -> list[dict[str, Any]]:
    """A row for each family. Raises ValueError where the run's metrics lack something."""
    path = folder.run_dir(run.name) / METRICS_FILE
    last: dict[str, Any] = {}
    for record in read_metrics(path) if path.is_file() else ():
        if record["step"] == run.train_steps:
            last |= record
    rows = []
    drawn = {f: last.get(f"data/family/{f}/tokens", math.nan) for f in folder.config.families}
    if math.isnan(all_drawn := sum(drawn.values())) or "eval/loss" not in last:
        raise ValueError(
            f"{path} has no evaluation or no tokens by family at step {run.train_steps}; remove "
            f"{path.parent} and run the sweep again"
        )
    for family in folder.config.families:
        if f"eval/family/{family}/loss" not in last:
            raise ValueError(
                f"{path} has no loss of {family} at step {run.train_steps}, whose validation text "
                f"the run did not have; remove {path.parent} and run the sweep again"
            )
        row = _row(run, family, drawn[family] / all_drawn)
        row["loss"] = last[f"eval/family/{family}/loss"]
        row["epochs"] = last[f"data/family/{family}/epochs"]
        row["eval_tokens"] = eval_tokens[family]
        rows.append(row)
    return rows


def _row(run: PlannedRun, family: str, ratio: float) -> dict[str, Any]:
    values = {
        name: getattr(run, name)
        for name in ("model", "num_parameters", "tokens", "seed", "purpose")
    }
    empty = {"loss": math.nan, "eval_tokens": 0, "epochs": 0.0}
    return {"run": run.name, **values, "family": family, "ratio": ratio, **empty}


def evaluation_tokens(config: PretrainConfig) -> dict[str, int]:
    """Validation tokens of each family that an evaluation of the run goes through."""
    opened = open_mixture(config.data, config.seq_length)
    tokens = dict.fromkeys(opened.mixture.families, 0)
    for store in opened.validation_stores:
        packed = PackedSequences(
            store, config.seq_length, Tail.pad, opened.mixture.packing, opened.mixture.plan_folder
        )
        numbers = np.arange(min(config.train.eval_sequences, len(packed)))
        rows = RowReader([packed]).read(np.zeros_like(numbers), numbers)
        valid = rows.valid if rows.label_mask is None else rows.label_mask
        tokens[opened.mixture.family_of[store.language]] += int(valid.sum())
    return tokens


def check_evaluation(families: Sequence[str], tokens: Mapping[str, int]) -> None:
    """Raises ValueError naming the families without a token to measure their loss on."""
    without = [family for family in families if not tokens.get(family)]
    if without:
        raise ValueError(
            f"{', '.join(without)}: there is no validation text, so no loss to fit the law to; "
            "raise data.validation_fraction (stores made by data.tokenize: its "
            "--validation-fraction) in settings and run the sweep anew, or leave the family out "
            "of families and data.languages"
        )


def family_tokens(config: DataConfig, seq_length: int) -> dict[str, int]:
    """Training tokens that each family has."""
    opened = open_mixture(config, seq_length)
    sizes = dict.fromkeys(opened.mixture.families, 0)
    for packed in opened.mixture.sequences:
        sizes[opened.mixture.family_of[packed.store.language]] += len(packed) * seq_length
    return sizes
