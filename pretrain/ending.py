"""What a run leaves at its end: a table, pictures, a page, and commands that go on from there."""

import os
import shlex
import sys
from pathlib import Path

from pretrain.config import PretrainConfig
from pretrain.html_report import write_html_report
from pretrain.metrics_file import read_metrics
from pretrain.report import plot_curves, print_report
from pretrain.router_plot import plot_router
from pretrain.train_loop import Outcome


def report(outcome: Outcome, run_dir: Path, config: PretrainConfig) -> None:
    """Losses by family at start and end, a picture of the curves, and what to try next.

    The run is over: what goes wrong here is told, and changes nothing about how it ended.
    """
    if outcome.stopped_by:  # within a grace time
        print(f"stopped by {outcome.stopped_by}; the same command goes on from the checkpoint")
        return
    try:
        artefacts = draw(run_dir)
        evaluations = [r for r in read_metrics(run_dir / "metrics.jsonl") if "eval/loss" in r]
        print_report(
            evaluations[0],  # of the run's first start, however often it was resumed
            outcome.last_evaluation,
            artefacts=artefacts,
            next_steps=next_steps(run_dir, config),
        )
    except Exception as error:
        print(f"no report, the run itself is complete: {type(error).__name__}: {error}")


def draw(run_dir: Path) -> dict[str, Path]:
    """Pictures and the page of a run; where they and its records are."""
    artefacts = {
        "curves": plot_curves(run_dir / "metrics.jsonl", run_dir / "curves.png"),
        "metrics": run_dir / "metrics.jsonl",
        "record": run_dir / "run.json",
        "page": write_html_report(run_dir),
    }
    routing = plot_router(run_dir, run_dir / "router.png")
    return artefacts if routing is None else {**artefacts, "routing": routing}


def next_steps(run_dir: Path, config: PretrainConfig) -> list[str]:
    """Three commands that work from here, as this Python would be called."""
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith("..") else python
    model, steps = config.model.name, config.train.train_steps
    other = "ep2" if config.model.moe.num_experts else "tp2"
    changed = ("run_dir=", "parallel=", "parallel.", "train.train_steps=")
    words = {_name(word): word for word in sys.argv[1:] if not word.startswith(changed)}
    start = " ".join([_program("pretrain.py"), *map(shlex.quote, words.values())])
    return [
        f'{python} {_program("generate.py")} {run_dir} "The page you"',
        f"{python} -m torch.distributed.run --standalone --nproc-per-node 2 {start} "
        f"parallel={other} train.train_steps={steps} run_dir=runs/{model}-{other}",
        f"{python} {start} parallel=single train.train_steps={2 * steps} run_dir={run_dir}",
    ]


def _name(word: str) -> str:
    """What a word sets: of several that set the same the last one counts. Tables are merged."""
    name, equals, value = word.partition("=")
    return name if equals and "{" not in value else word


def _program(name: str) -> str:
    """A file of launch/, as it is called from the folder that the run was started in."""
    path = Path(__file__).resolve().parent.parent / "launch" / name
    near = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if near else path))
