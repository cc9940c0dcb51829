"""The training loop: step, measure, evaluate, save, until the last step or a signal."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

from data.ledger import Ledger
from data.loader import MicroBatchLoader, ValidationSet
from data.open_data import Data
from data.prefetch import PrefetchLoader
from parallel.engine import MegatronEngine
from parallel.runtime import Runtime
from pretrain.checkpoint import Checkpoints
from pretrain.config import PretrainConfig
from pretrain.evaluate import evaluate
from pretrain.learning_rate import learning_rate
from pretrain.progress import Progress
from pretrain.router_report import RouterReport
from pretrain.stop_signal import StopSignal
from pretrain.throughput import ThroughputMeter, peak_memory_bytes
from pretrain.tracker import Tracker
from pretrain.train_state import TrainState
from pretrain.train_step import StepMetrics, train_step

# Updates skipped in a row, because gradients were not finite, before the run gives up.
MOST_SKIPPED_UPDATES = 10


@dataclass
class Outcome:
    """How a run ended."""

    last_evaluation: dict[str, float] = field(default_factory=dict)
    stopped_by: str | None = None  # name of the signal, on the ranks that received it


@dataclass
class TrainLoop:
    """Everything a run works with; `run` is the loop itself. All ranks run it together."""

    config: PretrainConfig
    engine: MegatronEngine
    runtime: Runtime
    data: Data
    loader: MicroBatchLoader | PrefetchLoader
    validation: ValidationSet
    checkpoints: Checkpoints
    tracker: Tracker
    meter: ThroughputMeter
    progress: Progress
    ledger: Ledger | None = None  # on the one rank that writes it
    router: RouterReport | None = None  # of a model with experts
    skipped_updates: int = 0  # in a row

    def run(self, state: TrainState, stop: StopSignal) -> Outcome:
        """Train from `state` to the last step; on a signal finish the step, save, return."""
        last_step = self._last_step(state)
        outcome = Outcome()
        self._record_start(state)
        outcome.last_evaluation = self._evaluate(state)
        stopping = False
        while state.step < last_step and not stopping:
            metrics = self._step(state, stop)
            stopping = metrics.stop_requested
            last = state.step == last_step
            self._report_routing(state, last or stopping)
            if last or stopping or self.checkpoints.due(state.step):
                path = self.checkpoints.save(self.engine, state)
                self.progress.message(f"saved {path}")
            # a stopping run has a grace period to keep: it skips its evaluation
            if not stopping and (last or self._evaluation_due(state.step)):
                outcome.last_evaluation = self._evaluate(state)
        if stopping and state.step < last_step:
            outcome.stopped_by = stop.requested or "a signal on another rank"
        return outcome

    def _report_routing(self, state: TrainState, ending: bool) -> None:
        """What routers did since the last report; the table of experts and families more rarely."""
        if self.router is None:
            return
        if ending or self.router.due(state.step):
            self.tracker.log(state.step, self.router.training_metrics(state.step))
        if ending or self._evaluation_due(state.step):
            self.router.write_table(self.tracker)

    def _step(self, state: TrainState, stop: StopSignal) -> StepMetrics:
        train = self.config.train
        rate = learning_rate(
            state.step,
            peak=self.config.optimizer.lr,
            schedule=self.config.schedule,
            train_steps=train.train_steps,
        )
        sequences = train.global_batch_size
        with self.meter.step(sequences * self.data.mixture.seq_length):
            self.engine.seed_random_numbers(train.seed, state.step)
            metrics = train_step(
                self.engine,
                list(self.loader.micro_batches(state.consumed_sequences)),
                self.runtime,
                learning_rate=rate,
                languages=self.data.languages,
                stop_requested=stop.requested is not None,
            )
        self._record_step(state, sequences, metrics)
        state.advance(sequences, metrics.losses.valid_tokens())
        record = {
            "train/loss": metrics.losses.mean(),
            "train/learning_rate": rate,
            "train/grad_norm": metrics.grad_norm,
            "train/consumed_sequences": state.consumed_sequences,
            "train/consumed_tokens": state.consumed_tokens,
            "memory/peak_bytes": peak_memory_bytes(self.runtime.device),
            **self.meter.metrics(),
        }
        self._watch_updates(state.step, metrics)
        if state.step % train.log_interval == 0 or state.step == train.train_steps:
            self.tracker.log(state.step, record)
        self.progress.update(state.step, record)
        return metrics

    def _last_step(self, state: TrainState) -> int:
        """train.train_steps, or the step after which the data has no whole batch left."""
        planned, end = self.config.train.train_steps, self.data.mixture.end
        if end is None:
            return planned
        batches = max(0, end - state.consumed_sequences) // self.config.train.global_batch_size
        last = min(planned, state.step + batches)
        if last < planned:
            code = self.data.mixture.exhausted()[-1][1]
            self.progress.message(
                f"the data ends after step {last} of {planned}: {code} reaches its epoch cap and "
                f"data.mixture.when_exhausted={self.config.data.mixture.when_exhausted.value}"
            )
        return last

    def _record_start(self, state: TrainState) -> None:
        if self.ledger is not None:
            self.ledger.write(
                "start",
                step=state.step,
                consumed_sequences=state.consumed_sequences,
                global_batch_size=self.config.train.global_batch_size,
                seq_length=self.data.mixture.seq_length,
                shares=self.data.mixture.shares(state.consumed_sequences),
            )

    def _record_step(self, state: TrainState, sequences: int, metrics: StepMetrics) -> None:
        """Changes of ratios that the step went through, and updates that did not happen."""
        if self.ledger is None:
            return
        first = state.consumed_sequences
        at: dict[str, int] = {"step": state.step + 1, "consumed_sequences": first + sequences}
        for sample, shares in self.data.mixture.changes(first, first + sequences):
            self.ledger.write("ratios", **at, from_sample=sample, shares=shares)
        if not metrics.applied:
            why = "gradients are not finite"
            self.ledger.write("skip", **at, samples=[first, first + sequences], why=why)

    def _watch_updates(self, step: int, metrics: StepMetrics) -> None:
        if metrics.applied:
            self.skipped_updates = 0
            return
        self.skipped_updates += 1
        self.progress.message(f"step {step}: gradients are not finite, update skipped")
        if self.skipped_updates >= MOST_SKIPPED_UPDATES:
            raise RuntimeError(
                f"{self.skipped_updates} updates in a row had gradients that are not finite, up to "
                f"step {step} (loss {metrics.losses.mean()}); the weights are those before them. "
                f"Lower optimizer.lr={self.config.optimizer.lr} or raise schedule.lr_warmup_steps="
                f"{self.config.schedule.lr_warmup_steps}, and start from an earlier checkpoint"
            )

    def _evaluation_due(self, step: int) -> bool:
        interval = self.config.train.eval_interval
        return interval > 0 and step % interval == 0

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        router = self.router
        with router.probing(self.validation) if router else nullcontext():
            result = evaluate(self.engine, self.validation, self.data, self.runtime)
        if router is not None:
            result |= router.evaluation_metrics()
        self.tracker.log(state.step, result)
        return result
