"""The training loop: step, measure, evaluate, save, until the last step or a signal."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from data.ledger import Ledger
from data.loader import MicroBatchLoader, ValidationSet
from data.open_data import Data
from data.prefetch import PrefetchLoader
from parallel.engine import Engine
from parallel.progress_beacon import beacon
from parallel.runtime import Runtime
from pretrain.anomaly import (
    Action,
    AnomalyError,
    first_sample,
    samples_to_leave_out,
    whole_steps,
)
from pretrain.anomaly_watch import AnomalyWatch
from pretrain.checkpoint import Checkpoints
from pretrain.config import PretrainConfig
from pretrain.evaluate import evaluate
from pretrain.events import Events
from pretrain.instruments import Instruments
from pretrain.learning_rate import learning_rate
from pretrain.metrics_file import METRICS_FILE, read_metrics
from pretrain.predicted_losses import PredictedLosses
from pretrain.progress import Progress
from pretrain.router_report import RouterReport
from pretrain.run_status import RunStatus
from pretrain.stop_signal import StopSignal
from pretrain.throughput import ThroughputMeter, memory_metrics
from pretrain.tracker import Tracker
from pretrain.train_state import TrainState
from pretrain.train_step import StepMetrics, train_step
from pretrain.walltime import WALLTIME, WallTime

# Updates skipped in a row, because of anomalies, before the run gives up.
MOST_SKIPPED_UPDATES = 10


@dataclass
class Outcome:
    """How a run ended."""

    last_evaluation: dict[str, float] = field(default_factory=dict)
    # before the last step: a signal's name or "walltime", the same on all ranks
    stopped_by: str | None = None


@dataclass
class TrainLoop:
    """Everything a run works with; `run` is the loop itself. All ranks run it together."""

    config: PretrainConfig
    engine: Engine
    runtime: Runtime
    data: Data
    loader: MicroBatchLoader | PrefetchLoader
    validation: ValidationSet
    checkpoints: Checkpoints
    anomalies: AnomalyWatch
    tracker: Tracker
    meter: ThroughputMeter
    progress: Progress
    instruments: Instruments
    ledger: Ledger | None = None  # on the one rank that writes it
    router: RouterReport | None = None  # of a model with experts
    status: RunStatus = field(default_factory=RunStatus)  # silent but on rank 0
    walltime: WallTime = field(default_factory=WallTime)  # with an end on rank 0 only
    events: Events = field(default_factory=lambda: Events("", enabled=False))
    predictions: PredictedLosses | None = None  # on rank 0, of a run with data.mixture.law

    def run(self, state: TrainState, stop: StopSignal) -> Outcome:
        """Train from `state` to the last step; on a signal, or when the time is up, finish the
        step, save, return."""
        self.anomalies.take_up(state)
        last_step = self._last_step(state)
        outcome = Outcome(stopped_by=self._stopped_by(stop))
        if outcome.stopped_by:  # while starting: there is nothing new to save
            return outcome
        self._record_start(state)
        outcome.last_evaluation = self._first_evaluation(state, last_step)
        stopping = False
        while state.step < last_step and not stopping:
            self.status.running(state.step)
            metrics = self._step(state, stop)
            stopping = metrics.stop_requested
            if metrics.verdict.action is Action.rollback:
                self._roll_back(state)
                last_step = self._last_step(state)
                continue
            last = state.step == last_step
            self._report_routing(state, last or stopping)
            self.checkpoints.check(state.step)
            if last or stopping or self.checkpoints.due(state.step):
                self._save(state, ending=last or stopping)
            # a stopping run has a grace period to keep: it skips its evaluation
            if not stopping and (last or self._evaluation_due(state.step)):
                outcome.last_evaluation = self._evaluate(state)
        if stopping:  # also after the last step, whose evaluation the next start makes
            outcome.stopped_by = self._stopped_by(stop) or WALLTIME
            self.events.write("stop", state.step, f"stopped by {outcome.stopped_by}")
        self.instruments.finish()
        return outcome

    def _stopped_by(self, stop: StopSignal) -> str | None:
        """The signal that the first of the ranks that received one received. All ranks call it."""
        names: list[str | None] = [None] * self.runtime.world_size
        dist.all_gather_object(names, stop.requested)
        return next((name for name in names if name), None)

    def _save(self, state: TrainState, ending: bool) -> None:
        """The last save of a run is there when this returns; others may be written meanwhile."""
        self.status.saving(state.step)
        save = self.checkpoints.save_last if ending else self.checkpoints.save
        with (
            self.instruments.pause("checkpoint") as duration,
            beacon.stage("checkpoint", state.step),
        ):
            save(self.engine, state)
        self.tracker.log(state.step, duration)

    def _must_stop(self, state: TrainState, stop: StopSignal) -> bool:
        """Whether this rank wants the next step to be the last one."""
        due = state.step + 1
        saving = self.checkpoints.due(due) or self.checkpoints.saving
        evaluating = self._evaluation_due(due)
        self.walltime.took("save", self.checkpoints.seconds)
        return bool(stop.requested) or self.walltime.is_up(saving=saving, evaluating=evaluating)

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
        self._leave_out(state)
        stop_requested = self._must_stop(state, stop)
        tokens = sequences * self.data.mixture.seq_length
        with (
            self.instruments.step(state.step + 1),
            self.meter.step(tokens),
            self.walltime.measuring("step"),
        ):
            self.engine.seed_random_numbers(train.seed, state.step)
            with (
                beacon.stage("data", state.step + 1),
                self.meter.waiting_for_data(),
                self.instruments.data(),
            ):
                micro_batches = list(self.loader.micro_batches(state.consumed_sequences))
            metrics = train_step(
                self.engine,
                micro_batches,
                self.runtime,
                learning_rate=rate,
                languages=self.data.languages,
                stop_requested=stop_requested,
                judge=self.anomalies.judge(state),
            )
        self._record_step(state, sequences, metrics)
        state.advance(sequences, metrics.losses.valid_tokens())
        self.anomalies.after_step(state, sequences, metrics, rate)
        record = {
            "train/loss": metrics.losses.mean(),
            "train/learning_rate": rate,
            "train/grad_norm": metrics.grad_norm,
            "train/consumed_sequences": state.consumed_sequences,
            "train/consumed_tokens": state.consumed_tokens,
            **memory_metrics(self.runtime.device),
            **self.meter.metrics(),
            **self.anomalies.metrics(state, metrics.verdict),
        }
        if state.step % train.log_interval == 0 or state.step == train.train_steps:
            self.tracker.log(state.step, record)
        self.progress.update(state.step, record)
        self.instruments.after_step(state, metrics.losses)
        self._watch_updates(state, metrics)
        return metrics

    def _last_step(self, state: TrainState) -> int:
        """train.train_steps, or the step after which the data has no whole batch left."""
        planned, end = self.config.train.train_steps, self.data.mixture.end
        if end is None:
            return planned
        sequences, left_out = self.config.train.global_batch_size, state.anomaly.left_out_samples
        batches = whole_steps(state.consumed_sequences, end, sequences, left_out)
        last = min(planned, state.step + batches)
        if last < planned:
            code = self.data.mixture.exhausted()[-1][1]
            self.progress.message(
                f"the data ends after step {last} of {planned}: {code} reaches its epoch cap and "
                f"data.mixture.when_exhausted={self.config.data.mixture.when_exhausted.value}"
            )
        return last

    def _leave_out(self, state: TrainState) -> None:
        """Go past samples that a rollback left out, if the next step would reach into them."""
        sequences, left_out = self.config.train.global_batch_size, state.anomaly.left_out_samples
        first = first_sample(state.consumed_sequences, sequences, left_out)
        if first != state.consumed_sequences:
            state.consumed_sequences = first
            self._record_start(state)

    def _roll_back(self, state: TrainState) -> None:
        """Back to the newest regular save, to go on without the data of the step just taken."""
        sequences, from_step = self.config.train.global_batch_size, state.step
        saved = self.checkpoints.roll_back(self.engine)
        left_out = samples_to_leave_out(
            state.consumed_sequences - sequences,
            sequences,
            steps=self.config.anomaly.rollback_steps,
            saved_at=saved.consumed_sequences,
        )
        state.go_back(saved, list(left_out))
        self.anomalies.remember_rollback(state)
        self._record_start(state)
        if self.ledger is not None:
            self.ledger.write(
                "rollback",
                step=state.step,
                consumed_sequences=state.consumed_sequences,
                from_step=from_step,
                left_out=list(left_out),
            )
        self.tracker.go_back(state.step)
        self.instruments.go_back(state)
        if self.router is not None:
            self.router.go_back(state.step)
        self.anomalies.rolled_back(state, from_step, left_out)

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
            why = metrics.verdict.why
            self.ledger.write("skip", **at, samples=[first, first + sequences], why=why)

    def _watch_updates(self, state: TrainState, metrics: StepMetrics) -> None:
        """Raises AnomalyError where the settings say so, RuntimeError where nothing helps."""
        verdict, skipped = metrics.verdict, state.anomaly.skipped_in_a_row
        numbers = f"loss {metrics.losses.mean():.6g}, gradient norm {metrics.grad_norm:.6g}"
        if verdict.action is Action.stop:
            raise AnomalyError(
                f"step {state.step} was not taken: {verdict.why} ({numbers}). What is known of its "
                f"documents is in {self.config.run_dir}/anomalies. To go on from the newest "
                f"checkpoint, set {verdict.setting}=skip or rollback, or lower optimizer.lr="
                f"{self.config.optimizer.lr}. Where the weights are broken, "
                f"{self._where_from(state)}"
            )
        if skipped >= MOST_SKIPPED_UPDATES:
            raise RuntimeError(
                f"{skipped} updates in a row were skipped, up to step {state.step}: {verdict.why} "
                f"({numbers}); the weights are those before them. "
                f"Lower optimizer.lr={self.config.optimizer.lr} or raise schedule.lr_warmup_steps="
                f"{self.config.schedule.lr_warmup_steps}, and {self._where_from(state)}"
            )

    def _where_from(self, state: TrainState) -> str:
        """What to start from now that updates are not made: the last one that was made may have
        broken the weights, and saves after it hold them. All ranks must call it."""
        last_update = state.step - state.anomaly.skipped_in_a_row
        before = f"from before the last update that was made, that of step {last_update}"
        found = self.checkpoints.newest_before(last_update)
        if found is None:
            return f"start anew in another run_dir: there is no checkpoint {before}"
        return f"start from {found}, the newest {before}: move the checkpoints after it away"

    def _evaluation_due(self, step: int) -> bool:
        interval = self.config.train.eval_interval
        return interval > 0 and step % interval == 0

    def _first_evaluation(self, state: TrainState, last_step: int) -> dict[str, float]:
        """The evaluation that belongs to the step the run starts at, unless it was made before the
        run was interrupted; {} where none belongs to it."""
        if state.step > 0 and state.step != last_step and not self._evaluation_due(state.step):
            return {}
        made: list[dict[str, float]] = [{}]
        if self.runtime.rank == 0:
            made[0] = recorded_evaluation(self.config.run_dir, state.step)
        dist.broadcast_object_list(made, src=0)
        return made[0] or self._evaluate(state)

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        # some routers draw in evaluation, too, and a run that is resumed here must draw the same
        self.engine.seed_random_numbers(self.config.train.seed, state.step)
        router = self.router
        with (
            self.walltime.measuring("evaluation"),
            self.instruments.pause("evaluation") as duration,
            beacon.stage("evaluation", state.step),
            router.probing(self.validation) if router else nullcontext(),
        ):
            result = evaluate(self.engine, self.validation, self.data, self.runtime)
        self.checkpoints.record_evaluation(state.step, result["eval/loss"])
        if router is not None:
            result |= router.evaluation_metrics()
        if self.predictions is not None:
            result |= self.predictions.metrics(state, result)
        result |= {"train/consumed_tokens": state.consumed_tokens, **duration}
        self.tracker.log(state.step, result)
        return result


def recorded_evaluation(run_dir: str | Path, step: int) -> dict[str, float]:
    """The evaluation at `step` that stands in a run's metrics; {} if none does."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return {}
    found = [r for r in read_metrics(path) if r["step"] == step and "eval/loss" in r]
    return {k: v for k, v in found[-1].items() if k not in ("step", "time")} if found else {}
