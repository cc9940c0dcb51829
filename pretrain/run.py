"""A pretraining run from beginning to end. Start reading here.

Settings arrive checked (`launch.pretrain`); every rank calls `run` and every rank does the same
things in the same order, because most of them are collective.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from omegaconf import OmegaConf

from data.ledger import Ledger
from data.loader import MicroBatchLoader, ValidationSet
from data.mixture_law import differences, open_law_of
from data.open_data import Data, open_data, prepare
from data.prefetch import PrefetchLoader
from models.build import build_model
from models.parameter_count import flops_per_token, parameter_count
from parallel import failure_watch
from parallel.accelerators import check_apex, find_accelerators
from parallel.config import ConfigError
from parallel.deepspeed_config import EngineKind, without_effect
from parallel.engine import Engine, MegatronEngine
from parallel.failure_watch import FailureWatch
from parallel.fast_paths import in_use
from parallel.precision import parameter_dtype
from parallel.progress_beacon import beacon
from parallel.runtime import Runtime, initialize, shutdown
from pretrain.anomaly_watch import open_anomaly_watch
from pretrain.checkpoint import Checkpoints, Notify
from pretrain.checkpoint_list import newest_settings
from pretrain.config import PretrainConfig
from pretrain.earlier_record import set_aside
from pretrain.ending import report
from pretrain.events import Events
from pretrain.instruments import Instruments
from pretrain.memory import predict_memory_of_run
from pretrain.predicted_losses import PredictedLosses, keep_law, write_prediction
from pretrain.progress import Progress
from pretrain.provenance import RUN_RECORD, atomic_write_text, write_run_record
from pretrain.router_report import open_router_report
from pretrain.run_identity import asdict_plain, changed_settings, identity, vocabulary_of
from pretrain.run_lock import RunFolderBusyError, RunLock
from pretrain.run_status import RunStatus
from pretrain.stop_signal import StopSignal, stop_signal
from pretrain.throughput import ThroughputMeter, peak_flops_of_run, pipeline_bubble
from pretrain.tracker import Tracker, make_tracker
from pretrain.train_loop import Outcome, TrainLoop
from pretrain.train_state import TrainState
from pretrain.walltime import WallTime, end_of_time
from pretrain.wandb_tracker import WANDB_RUN_ID_FILE


def run(config: PretrainConfig, stop: StopSignal | None = None) -> Outcome:
    """Train `config.model` on `config.data` until `train.train_steps`, a signal, or until the time
    is up.

    Writes the run's record, metrics, checkpoints and curves into `config.run_dir`, which is held
    for this run alone meanwhile.

    Args:
        stop: entered already, for signals that come while this module is imported.
    """
    with ExitStack() as outermost:
        if stop is None:
            stop = outermost.enter_context(stop_signal())
        check_apex()
        check_engine(config)
        runtime = initialize(config.parallel, config.train.seed)
        with watch_for_failures(config, runtime) as watch:
            # left after the failure watch, so that a failure is recorded with its cause
            status = outermost.enter_context(run_folder(config, runtime))
            watch.last_words = status.failed
            outcome = train(config, runtime, stop, status)
        shutdown(runtime)
        return outcome


def check_engine(config: PretrainConfig) -> None:
    """Raises ConfigError for what the engine does not do on this device, before there is any
    process group."""
    if config.engine is EngineKind.deepspeed:
        from parallel.deepspeed_engine import check, library

        check(config.parallel, config.deepspeed, config.model.moe.num_experts)
        library()  # its import takes seconds, in which a rank gives no sign of life


def make_engine(config: PretrainConfig, data: Data, runtime: Runtime) -> Engine:
    """This rank's model chunks, in the engine that `engine` names. All ranks must call it."""
    chunks = build_model(
        config.model,
        config.parallel,
        runtime,
        vocab_size=vocab_size(config, data),
        seed=config.train.seed,
    )
    if config.engine is EngineKind.megatron:
        return MegatronEngine(chunks, config.parallel, config.optimizer, runtime)
    from parallel.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(chunks, config.parallel, config.optimizer, config.deepspeed, runtime)


def watch_for_failures(config: PretrainConfig, runtime: Runtime) -> FailureWatch:
    """What ends all ranks when one fails, dies or hangs; the rank that finds it records it."""
    settings, run_dir = config.fault_tolerance, Path(config.run_dir)
    events = Events(run_dir, enabled=True)

    def record(kind: str, text: str) -> None:
        if beacon.position().in_training:  # a start that is refused leaves no trace
            events.write(f"rank_{kind}", beacon.step, text)

    return FailureWatch(
        runtime,
        heartbeat_interval_seconds=settings.heartbeat_interval_seconds,
        heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds,
        hang_timeout_seconds=settings.hang_timeout_seconds,
        stacks=run_dir / "stacks",
        report=record,
    )


def train(config: PretrainConfig, runtime: Runtime, stop: StopSignal, status: RunStatus) -> Outcome:
    """What all ranks do together between start-up and shutdown."""
    run_dir = Path(config.run_dir)

    data = prepare_data(config, runtime)
    predictions = open_predictions(config, data)
    engine = make_engine(config, data, runtime)

    events = Events(run_dir, enabled=runtime.rank == 0)
    checkpoints = open_checkpoints(config, data, runtime, events, status)
    state = checkpoints.resume(engine)  # a refused resume leaves no trace
    changed = settings_changed(config, runtime, state)
    anew = begin_anew(config, runtime, state)
    record_run(config, data, runtime, run_dir, resumed_step=state.step)
    status.starting(state.step, config.train.train_steps, runtime.world_size)
    status.when_folder_goes(
        lambda text: write_again(config, data, runtime, events, text, state.step)
    )
    if state.step:
        ranks = "1 rank" if runtime.world_size == 1 else f"{runtime.world_size} ranks"
        events.write("resume", state.step, f"resumed on {ranks}")
    tracker = open_tracker(config, runtime, state)
    progress = Progress(
        config.train.train_steps,
        start_step=state.step,
        enabled=runtime.rank == 0,
        log_interval=config.train.log_interval,
    )
    checkpoints.notify = notice(events, progress.message)
    if changed:
        checkpoints.notify("settings_changed", state.step, changed)
    if anew:
        checkpoints.notify("started_anew", 0, f"WARNING: {anew}")
    walltime = wall_time(config, runtime)
    checkpoints.patience = lambda: walltime.patience
    loop = TrainLoop(
        config=config,
        engine=engine,
        runtime=runtime,
        data=data,
        loader=train_loader(config, data, runtime),
        validation=validation_set(config, data, runtime),
        checkpoints=checkpoints,
        anomalies=open_anomaly_watch(config, engine, runtime, data, checkpoints, progress, events),
        tracker=tracker,
        meter=throughput_meter(config, data, runtime),
        progress=progress,
        instruments=Instruments(
            config, engine, data.mixture, runtime, tracker, progress, events, state
        ),
        ledger=Ledger(run_dir) if runtime.rank == 0 else None,
        router=open_router_report(config, engine, data, runtime, resumed_step=state.step or None),
        status=status,
        walltime=walltime,
        events=events,
        predictions=predictions if runtime.rank == 0 else None,
    )
    introduce(loop, state)
    outcome = run_and_close(loop, state, stop)
    if runtime.rank == 0:
        report(outcome, run_dir, config)
    return outcome


def introduce(loop: TrainLoop, state: TrainState) -> None:
    """What the run's first lines say of it."""
    config, data, runtime = loop.config, loop.data, loop.runtime
    loop.progress.message(runtime.describe())
    accelerators = accelerator_lines(config, runtime, loop.engine)
    profile = profile_lines(config, state)
    for line in [*accelerators, *memory_lines(config, data, runtime), *profile]:
        loop.progress.message(line)
    if loop.predictions is not None:
        loop.progress.message(predict_end(loop.predictions, config, state))


def run_and_close(loop: TrainLoop, state: TrainState, stop: StopSignal) -> Outcome:
    """The loop, and the end of all that works beside it, however the loop ends."""
    finished = False
    try:
        outcome = loop.run(state, stop)
        loop.status.ended(outcome.stopped_by)
        finished = True
        return outcome
    except Exception as error:
        # at once: closing what is open takes seconds, and the other ranks wait meanwhile
        if (watch := failure_watch.current()) is not None:
            watch.announce(error)
        raise
    finally:
        if isinstance(loop.loader, PrefetchLoader):
            loop.loader.close()
        loop.checkpoints.close()
        loop.progress.close()
        if loop.router is not None:
            loop.router.close()
        loop.instruments.close()
        loop.events.close()
        if loop.ledger is not None:
            loop.ledger.close()
        loop.tracker.close(failed=not finished)


@contextmanager
def run_folder(config: PretrainConfig, runtime: Runtime) -> Iterator[RunStatus]:
    """Hold the run folder, and report the run's status there. All ranks must enter it.

    Raises RunFolderBusyError on all ranks where another run holds the folder, ConfigError on all
    where it cannot be made or written.
    """
    run_dir = Path(config.run_dir)
    with ExitStack() as held:
        status = RunStatus()
        refusal: list[Exception | None] = [None]
        if runtime.rank == 0:
            lock = RunLock(run_dir, config.fault_tolerance.ends_alone_after(runtime.world_size))
            try:
                held.enter_context(lock)
            except (RunFolderBusyError, ConfigError) as error:
                refusal = [error]
                if (watch := failure_watch.current()) is not None:
                    watch.announce(error)  # before the others learn of it, and raise it as well
            status = RunStatus(run_dir, lock)
        torch.distributed.broadcast_object_list(refusal, src=0)
        if refusal[0] is not None:
            raise refusal[0]
        yield held.enter_context(status)


def open_checkpoints(
    config: PretrainConfig, data: Data, runtime: Runtime, events: Events, status: RunStatus
) -> Checkpoints:
    checkpoints = Checkpoints(
        Path(config.run_dir) / "checkpoints",
        config.checkpoint,
        identity(config, vocab_size(config, data), data.mixture.fingerprint()),
        notify=notice(events, print if runtime.rank == 0 else None),
        rolls_back=config.anomaly.rolls_back,
    )
    checkpoints.may_publish = status.may_publish
    return checkpoints


def open_tracker(config: PretrainConfig, runtime: Runtime, state: TrainState) -> Tracker:
    """All ranks must call it."""
    run_dir = Path(config.run_dir)
    keep_wandb_run_id(run_dir, state, runtime)
    tracker = make_tracker(
        config.wandb,
        run_dir,
        runtime.rank,
        asdict_plain(config),
        resumed_step=state.step or None,
        tensorboard=config.tensorboard,
    )
    keep_wandb_run_id(run_dir, state, runtime)
    return tracker


def keep_wandb_run_id(run_dir: Path, state: TrainState, runtime: Runtime) -> None:
    """Before the tracker starts: the checkpoint's W&B run goes on where the folder has lost its id.
    After it: the next checkpoint knows the folder's. All ranks must call it.

    `checkpoint.load` starts a new run there, as it starts counting anew.
    """
    file = run_dir / WANDB_RUN_ID_FILE
    if runtime.rank == 0 and state.wandb_run_id and not file.is_file():
        atomic_write_text(file, state.wandb_run_id + "\n")
    elif runtime.rank == 0 and file.is_file():
        state.wandb_run_id = file.read_text(encoding="utf-8").strip()
    everyones = [state.wandb_run_id]
    torch.distributed.broadcast_object_list(everyones, src=0)
    state.wandb_run_id = everyones[0]


def wall_time(config: PretrainConfig, runtime: Runtime) -> WallTime:
    """When the run must have stopped, by the clock of rank 0."""
    if runtime.rank != 0:
        return WallTime()
    settings = config.fault_tolerance
    return WallTime(end_of_time(settings.walltime, os.environ), settings.grace_seconds)


def notice(events: Events, say: Callable[[str], None] | None) -> Notify:
    """What checkpoints have to tell, to a person and, but for what is as it should be, to the
    run's events; a disk that is full is one of these things."""

    def tell(kind: str, step: int, text: str) -> None:
        if say is not None:
            say(text)
        if kind != "saved":
            try:
                events.write(kind, step, text)
            except OSError as error:
                if say is not None:
                    say(f"could not write {events.path}: {error}")

    return tell


def prepare_data(config: PretrainConfig, runtime: Runtime) -> Data:
    """Build the token stores on one rank per host while the others wait, then open them on all."""
    failure = None
    if runtime.local_rank == 0:
        try:
            prepare(config.data)
            if config.data.packing.needs_plan:
                open_data(config.data, config.seq_length).build_packing_plans()
        except Exception as error:
            failure = error
            if (watch := failure_watch.current()) is not None:
                watch.announce(error)  # before the others learn of it, and raise for that reason
    wait_for_preparation(runtime)
    failed = torch.tensor(float(failure is not None), device=runtime.device)
    torch.distributed.all_reduce(failed)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError("preparing the data failed on another rank; its message says why")
    return open_data(config.data, config.seq_length)


def wait_for_preparation(runtime: Runtime) -> None:
    """Until all ranks are here, however long: a collective would give up after half an hour."""
    if runtime.store.add("data_prepared/count", 1) == runtime.world_size:
        runtime.store.set("data_prepared/all", "")
    seconds = 0.01
    while not runtime.store.check(["data_prepared/all"]):
        time.sleep(seconds)
        seconds = min(2 * seconds, 1.0)


def train_loader(
    config: PretrainConfig, data: Data, runtime: Runtime
) -> MicroBatchLoader | PrefetchLoader:
    """This rank's training batches, read ahead by a thread unless data.prefetch is 0."""
    loader = data.train_loader(
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        data_parallel_rank=runtime.data_parallel_rank,
        data_parallel_size=runtime.data_parallel_size,
    )
    if not config.data.prefetch:
        return loader
    return PrefetchLoader(loader, depth=config.data.prefetch, device=runtime.device)


def validation_set(config: PretrainConfig, data: Data, runtime: Runtime) -> ValidationSet:
    return data.validation_set(
        sequences_per_language=config.train.eval_sequences,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=runtime.data_parallel_rank,
        data_parallel_size=runtime.data_parallel_size,
        micro_batch_multiple=runtime.pipeline_parallel_size,
    )


def vocab_size(config: PretrainConfig, data: Data) -> int:
    return vocabulary_of(config.model, data.tokenizer.vocab_size, data.tokenizer.path)


def record_run(
    config: PretrainConfig, data: Data, runtime: Runtime, run_dir: Path, resumed_step: int
) -> None:
    """The first thing a run writes: what it is made of."""
    if runtime.rank != 0:
        return
    layout = {
        "world_size": runtime.world_size,
        "tensor_parallel_size": runtime.tensor_parallel_size,
        "pipeline_parallel_size": runtime.pipeline_parallel_size,
        "data_parallel_size": runtime.data_parallel_size,
        "backend": runtime.backend,
    }
    record = write_run_record(
        run_dir,
        OmegaConf.to_yaml(OmegaConf.structured(config)),
        data.mixture.fingerprint(),
        extra={"layout": layout, "resumed_step": resumed_step},
    )
    if config.data.mixture.law:
        keep_law(config.data.mixture.law, record)


def open_predictions(config: PretrainConfig, data: Data) -> PredictedLosses | None:
    """What data.mixture.law says of this model and data; the same on every rank."""
    if not config.data.mixture.law:
        return None
    law = open_law_of(data.mixture, config.data.mixture.law)
    count = parameter_count(config.model, vocab_size(config, data))
    unlike = differences(law, data.mixture, sparse=bool(config.model.moe.num_experts))
    return PredictedLosses(law, data.mixture, count.non_embedding, unlike)


def settings_changed(config: PretrainConfig, runtime: Runtime, state: TrainState) -> str:
    """What a resume goes on with otherwise than the start before it; "" where nothing. To be
    called before this start writes its own settings."""
    run_dir = Path(config.run_dir)
    before = newest_settings(run_dir) if runtime.rank == 0 and state.step else None
    changed = changed_settings(config, before) if before is not None else []
    if not changed:
        return ""
    assert before is not None
    return f"settings changed since {before.name}, from step {state.step} on: {', '.join(changed)}"


def begin_anew(config: PretrainConfig, runtime: Runtime, state: TrainState) -> str:
    """Before a start from step 0 writes anything: what it has put out of its way, in words."""
    if runtime.rank != 0 or state.step:
        return ""
    run_dir = Path(config.run_dir)
    before = newest_settings(run_dir)
    return set_aside(run_dir, changed_settings(config, before) if before is not None else None)


def write_again(
    config: PretrainConfig, data: Data, runtime: Runtime, events: Events, text: str, step: int
) -> None:
    """The folder of a run was made anew under it: what a start writes there, and the event."""
    record = Path(config.run_dir) / RUN_RECORD
    if not record.exists():  # else this is tried again
        record_run(config, data, runtime, Path(config.run_dir), resumed_step=step)
    elif config.data.mixture.law:
        keep_law(config.data.mixture.law, record)
    events.write("run_folder_gone", beacon.step, text)


def predict_end(predictions: PredictedLosses, config: PretrainConfig, state: TrainState) -> str:
    """Where the run should end, for its record and for whoever starts it."""
    end = predictions.end_point(state, config.train.train_steps, config.train.global_batch_size)
    if config.checkpoint.load:
        end.warnings.append(
            f"checkpoint.load={config.checkpoint.load}: tokens its weights have seen do not count"
        )
    write_prediction(Path(config.run_dir), end)
    return "\n".join(end.lines(config.data.mixture.law))


def throughput_meter(config: PretrainConfig, data: Data, runtime: Runtime) -> ThroughputMeter:
    """Utilisation is reported by rank 0; the others wait while it measures a CPU's peak."""
    dtype = parameter_dtype(config.parallel.precision, runtime.device)
    peak = None
    if runtime.rank == 0:
        peak, _ = peak_flops_of_run(
            runtime.device,
            "bf16" if dtype is torch.bfloat16 else "fp32",
            world_size=runtime.world_size,
            ranks_per_host=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
    torch.distributed.barrier()
    seq_length, train = data.mixture.seq_length, config.train
    return ThroughputMeter(
        flops_per_token(config.model, seq_length, vocab_size=vocab_size(config, data)),
        peak,
        pipeline_bubble=pipeline_bubble(
            runtime.pipeline_parallel_size,
            config.parallel.virtual_pipeline_model_parallel_size,
            train.global_batch_size // (train.micro_batch_size * runtime.data_parallel_size),
        ),
    )


def accelerator_lines(config: PretrainConfig, runtime: Runtime, engine: Engine) -> list[str]:
    """Which fast paths are on, what optional packages are here, and which settings the engine does
    not look at. On a CPU only DeepSpeed, where it is the engine, would do anything."""
    deepspeed = config.engine is EngineKind.deepspeed
    on_cpu = runtime.device.type == "cpu"
    model = engine.chunks[0].module.config
    compiled = model.compile_elementwise
    if on_cpu and not deepspeed and not compiled:
        return [
            "optional accelerators (apex, Transformer Engine, ...): none applies on a CPU; "
            f"activations and norms are not compiled ({model.why_not_compiled})"
        ]
    packages = [
        accelerator.describe()
        for accelerator in find_accelerators()
        if not on_cpu or (deepspeed and accelerator.name == "deepspeed")
    ]
    adam = getattr(engine, "optimizer", None) if deepspeed else None
    used = in_use(runtime.device, compiled=compiled, deepspeed_adam=adam)
    found = "; ".join(f"{work}: {who}" for work, who in used.items())
    if not compiled:
        found += f" (not compiled: {model.why_not_compiled})"
    ignored = without_effect(config.parallel, config.deepspeed) if deepspeed else []
    return [f"fast paths: {found}", *packages, *(f"warning: {line}" for line in ignored)]


def profile_lines(config: PretrainConfig, state: TrainState) -> list[str]:
    """A warning where no step of the profiler's window will be taken."""
    profile, last = config.profile, config.train.train_steps
    if not profile.start_step or state.step >= last:
        return []
    end = profile.start_step + profile.steps - 1
    if profile.start_step <= last and end > state.step:
        return []
    return [
        f"warning: profile.start_step={profile.start_step} profile.steps={profile.steps}: nothing "
        f"is traced, this start takes the steps {state.step + 1} to {last}"
    ]


def memory_lines(config: PretrainConfig, data: Data, runtime: Runtime) -> list[str]:
    """What `memory/peak_bytes` of a GPU should come to."""
    predicted = predict_memory_of_run(
        config,
        runtime.world_size,
        vocab_size=vocab_size(config, data),
        device=runtime.device.type,
    )
    return [predicted.peak.describe()]
