"""Tries every layout up to 8 ranks against one process and writes docs/parity.md.

    make parity                                    all models; about an hour on two cores
    python -m tests.parity_matrix --models dense   one of them
    python -m tests.parity_matrix --write          the page from what is known so far

Layouts are tried in turn, a few at a time (`--jobs`), on gloo processes that stay alive. What came
of each is kept in runs/parity.jsonl: stopped at any moment, the same command goes on where it was.
Results count as long as the source they came from has not changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    # before torch is imported, here and in the processes started from here
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from launch.sweep_runner import end_with_parent
from pretrain.layouts import Layout, one_of_each_size, pairwise_cover
from pretrain.parity import Bounds, compare
from tests.distributed import RankFailed
from tests.parity import MODELS, exercise_of, legal_layouts_of, reference, train_exercise

REPOSITORY = Path(__file__).resolve().parents[1]
LOG = REPOSITORY / "runs" / "parity.jsonl"
PAGE = REPOSITORY / "docs" / "parity.md"
# what a training and its comparison run through
SOURCES = (
    "parallel",
    "models",
    "data/batch.py",
    *(f"pretrain/{name}.py" for name in ("parity", "layouts", "config", "loss", "train_step")),
    "tests/parity.py",
)


@dataclass(frozen=True)
class Trial:
    """What came of one layout of one model."""

    model: str
    layout: str
    world_size: int
    source: str
    deviations: dict[str, float]  # by kind of number; empty where the training failed
    beyond: list[str]  # kinds beyond their bound
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.beyond and not self.error


def main() -> int:
    options = _options()
    source = fingerprint()
    wanted = {
        model: chosen(model, options.max_ranks, every=options.every) for model in options.models
    }
    known = {(trial.model, trial.layout): trial for trial in read(LOG) if trial.source == source}
    if not options.write:
        cases = [(model, layout) for model, layouts in wanted.items() for layout in layouts]
        missing = [(model, layout) for model, layout in cases if (model, layout.name) not in known]
        print(f"{len(cases)} layouts, of which {len(cases) - len(missing)} are known")
        for trial in _try_all(missing, source, options.jobs):
            known[trial.model, trial.layout] = trial
    PAGE.write_text(page(list(known.values()), sum(len(chosen(model, 8)) for model in MODELS)))
    tried = [trial for trial in known.values() if trial.model in options.models]
    failed = sum(not trial.passed for trial in tried)
    print(f"{len(tried) - failed} of {len(tried)} layouts equal one process; see {PAGE}")
    return 1 if failed else 0


def chosen(model: str, max_ranks: int, *, every: bool = False) -> list[Layout]:
    """The layouts to try. Of a model with experts: every combination of sizes, with and without
    optimizer sharding, and every pair.

    Without experts there are some hundred layouts, and all are tried. With them, each of these
    comes with the kinds of exchange and of overlap in turn instead of with all of them, unless
    `every` one is asked for.
    """
    layouts = legal_layouts_of(exercise_of(MODELS[model]), max_ranks=max_ranks)
    if every or not MODELS[model].moe.num_experts:
        return layouts
    some = pairwise_cover(layouts)
    for sharded in (True, False):
        some += one_of_each_size(
            [one for one in layouts if one.parallel.use_distributed_optimizer is sharded]
        )
    return list({layout.name: layout for layout in some}.values())


def try_layout(model: str, layout: Layout, source: str) -> Trial:
    """Train it and compare; in a process of the executor, which keeps its own workers."""
    trial = Trial(model, layout.name, layout.world_size, source, {}, [])
    try:
        exercise = exercise_of(MODELS[model])
        result = train_exercise(exercise, layout.parallel, layout.world_size)
        differences = compare(result, reference(MODELS[model]))
    except (RankFailed, ValueError) as error:
        return Trial(**{**asdict(trial), "error": str(error)})
    return Trial(
        **{
            **asdict(trial),
            "deviations": {row.what: row.deviation for row in differences},
            "beyond": [f"{row.what}: {row.where}" for row in differences if not row.ok],
        }
    )


def _try_all(missing: Sequence[tuple[str, Layout]], source: str, jobs: int) -> Iterator[Trial]:
    LOG.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    with (
        ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=end_with_parent
        ) as executor,
        LOG.open("a") as log,
    ):
        running = [executor.submit(try_layout, *case, source) for case in missing]
        try:
            for count, future in enumerate(as_completed(running), start=1):
                trial = future.result()
                log.write(json.dumps(asdict(trial)) + "\n")
                log.flush()
                left = (time.monotonic() - began) / count * (len(missing) - count)
                verdict = "ok  " if trial.passed else "FAIL"
                print(
                    f"{count:4} of {len(missing)}, {left / 60:3.0f} min left  {verdict} "
                    f"{trial.model}: {trial.layout} {'; '.join(trial.beyond)}{trial.error}",
                    flush=True,
                )
                yield trial
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def read(log: Path) -> list[Trial]:
    if not log.exists():
        return []
    return [Trial(**json.loads(line)) for line in log.read_text().splitlines()]


def fingerprint() -> str:
    """Of `SOURCES`, and of the libraries below them."""
    digest = hashlib.blake2b(f"{_versions()}".encode(), digest_size=8)
    for source in SOURCES:
        place = REPOSITORY / source
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def page(trials: Sequence[Trial], wanted: int) -> str:
    """docs/parity.md: how it came about, the worst of all, and every layout."""
    by_model: dict[str, dict[str, Trial]] = defaultdict(dict)
    for trial in trials:
        by_model[trial.model][trial.layout] = trial
    failed = sum(not trial.passed for trial in trials)
    lines = [
        "# Layout parity",
        "",
        "Every layout trains the same model as one process: losses, auxiliary losses, every",
        "gradient by its global name, gradient norms, and the weights after two steps. What is",
        "compared, and where the bounds come from, stands in `pretrain/parity.py`;",
        "`tests/test_parity_mutants.py` shows that the comparison sees the usual bugs.",
        "",
        f"Written by `python -m tests.parity_matrix` on {datetime.now(UTC):%Y-%m-%d}, with "
        f"{_versions()}, fp32 on CPU processes over gloo. "
        f"{len(trials)} layouts tried of {wanted}, {failed} failed.",
        "",
        *_summary(by_model),
    ]
    for model in filter(by_model.__contains__, MODELS):
        lines += ["", f"## {model}", "", *_table(list(by_model[model].values()))]
    return "\n".join(lines) + "\n"


def _summary(by_model: dict[str, dict[str, Trial]]) -> list[str]:
    """Of each model the number of layouts, and the worst deviation of each kind."""
    bounds = Bounds()
    kinds = {
        "losses": bounds.losses,
        "auxiliary loss": bounds.auxiliary_losses,
        "gradients": bounds.gradients,
        "gradient norms": bounds.grad_norms,
        "weights": bounds.weights,
    }
    lines = [
        "Largest deviations over all layouts, in the units of `pretrain.parity.Bounds`. Initial",
        "weights, and copies of a shard on several ranks, are equal bit by bit.",
        "",
        "| model | layouts | failed | " + " | ".join(kinds) + " |",
        "|---|---|---|" + "---|" * len(kinds),
        "| *bound* | | | " + " | ".join(f"*{bound:.0e}*" for bound in kinds.values()) + " |",
    ]
    for model, found in by_model.items():
        worst = [_worst(found.values(), kind) for kind in kinds]
        failed = sum(not trial.passed for trial in found.values())
        lines.append(f"| {model} | {len(found)} | {failed} | " + " | ".join(worst) + " |")
    return lines


def _table(trials: Sequence[Trial]) -> list[str]:
    lines = ["| ranks | layout | losses | gradients | weights | |", "|---|---|---|---|---|---|"]
    for trial in sorted(trials, key=lambda trial: (trial.world_size, trial.layout)):
        worst = [_worst([trial], kind) for kind in ("losses", "gradients", "weights")]
        verdict = "" if trial.passed else f"**FAIL** {'; '.join(trial.beyond)}"
        if trial.error:
            verdict = f"**FAIL** {trial.error.splitlines()[0]}"
        lines.append(f"| {trial.world_size} | {trial.layout} | {' | '.join(worst)} | {verdict} |")
    return lines


def _worst(trials: Iterable[Trial], kind: str) -> str:
    """Of all numbers whose kind begins so: "auxiliary loss" means each of them."""
    found = [
        deviation
        for trial in trials
        for name, deviation in trial.deviations.items()
        if name.startswith(kind)
    ]
    return f"{max(found):.0e}" if found else "-"


def _versions() -> str:
    return (
        f"Python {platform.python_version()}, torch {version('torch')}, "
        f"megatron-core {version('megatron-core')}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--max-ranks", type=int, default=8)
    parser.add_argument("--every", action="store_true", help="of models with experts too")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--write", action="store_true", help="the page only, from what is known")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"--models: {', '.join(sorted(unknown))}; choose from {', '.join(MODELS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
