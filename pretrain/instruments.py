"""What a run watches of itself besides its loss: mixture, norms, time by stage, slow ranks.

The training loop calls this one object; each instrument has its own interval and its own file.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from data.language_mixture import LanguageMixture
from parallel.engine import Engine
from parallel.gradient_norms import NormsByBlock
from parallel.runtime import Runtime
from parallel.stage_clock import StageClock
from pretrain.config import PretrainConfig
from pretrain.events import Events
from pretrain.loss import LanguageLosses
from pretrain.mixture_report import MixtureReport
from pretrain.profiler import StepProfiler
from pretrain.progress import Progress
from pretrain.stragglers import StragglerReport
from pretrain.tracker import Tracker
from pretrain.train_state import TrainState


class Instruments:
    """All ranks must make it and call its methods in the same order: most of them are collective
    at the steps where something is due, which depend on the step and the settings alone.

    A step at which nothing is due costs additions of a few numbers for each language.

    Args:
        state: where the run starts or goes on.
    """

    def __init__(
        self,
        config: PretrainConfig,
        engine: Engine,
        mixture: LanguageMixture,
        runtime: Runtime,
        tracker: Tracker,
        progress: Progress,
        events: Events,
        state: TrainState,
    ) -> None:
        run_dir = Path(config.run_dir)
        self._train = config.train
        self._tracker, self._progress, self._events = tracker, progress, events
        self._clock = StageClock(engine, runtime.device)
        self._norms = NormsByBlock(engine, config.model.num_layers)
        self._mixture = MixtureReport(mixture, state)
        self._profiler = StepProfiler(config.profile, runtime, run_dir)
        self._stragglers = StragglerReport(
            config.profile, runtime, run_dir, state.step or None, self._point_out
        )

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of this number, counted from 1."""
        self._show(self._profiler.before(number))
        with contextlib.ExitStack() as instruments:
            if self._norms_due(number):
                instruments.enter_context(self._norms.measuring())
            if self._timed(number):
                annotate = self._profiler.tracing
                instruments.enter_context(self._clock.measure(annotate=annotate))
            yield

    def data(self) -> contextlib.AbstractContextManager[None]:
        """Around what fetches the batch, inside `step`."""
        return self._clock.stage("data")

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[dict[str, float]]:
        """Around a "checkpoint" or an "evaluation"; what it gives holds afterwards how long that
        took, as a metric."""
        metric = {"checkpoint": "checkpoint/stall_seconds", "evaluation": "eval/seconds"}[name]
        metrics: dict[str, float] = {}
        start = time.perf_counter()
        with self._profiler.pause(name):
            yield metrics
        metrics[metric] = time.perf_counter() - start

    def after_step(self, state: TrainState, losses: LanguageLosses) -> None:
        """Log what is due; `state` has the step counted in already, `losses` are the step's.

        What is not due yet goes into `state`, and so into the next checkpoint.
        """
        self._mixture.add(losses)
        step, metrics = state.step, dict[str, float]()
        if self._train.mixture_interval and step % self._train.mixture_interval == 0:
            metrics |= self._mixture.metrics(state.consumed_sequences)
        state.unreported = self._mixture.unreported()
        if self._norms_due(step):
            metrics |= self._norms.metrics()
        if self._timed(step):
            table = self._clock.table()
            if self._profiler.covers(step):
                self._profiler.add(table)
            if self._stragglers.due(step):
                metrics |= self._stragglers.report(step, table)
        if metrics:
            self._tracker.log(step, metrics)

    def go_back(self, state: TrainState) -> None:
        """The run goes back to `state` and takes the steps after it again."""
        self._mixture.go_on(state)
        self._stragglers.go_back(state.step)

    def finish(self) -> None:
        """After the last step and what follows it; all ranks must call it."""
        self._show(self._profiler.finish())

    def close(self) -> None:
        """Close files; also after an error, where the ranks need not agree."""
        self._stragglers.close()

    def _norms_due(self, step: int) -> bool:
        interval = self._train.gradient_norm_interval
        return interval > 0 and step % interval == 0

    def _timed(self, step: int) -> bool:
        return self._stragglers.due(step) or self._profiler.covers(step)

    def _show(self, table: str | None) -> None:
        if table is not None:
            self._progress.message(f"{table}\ntraces: {self._profiler.folder}")

    def _point_out(self, step: int, text: str, rank: int, host: str) -> None:
        self._progress.message(f"step {step}: {text}")
        self._events.write("straggler", step, text, rank=rank, host=host)
