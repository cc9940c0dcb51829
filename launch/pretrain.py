"""The entry of a training: settings in, checked before anything heavy is imported, then `run`.

    torchrun --nproc-per-node 8 launch/pretrain.py +model=magneto_1b parallel=tp8_sp

`python -m launch.pretrain` and the command `magnetron-pretrain` are the same. Settings that do not
fit are answered once on each node, without a traceback, and all ranks leave with exit code 2.
A run that was stopped before its last step, by a signal or because its time was up, leaves with
exit code 75 (EX_TEMPFAIL: try again), under torchrun with 0.
"""

import gc
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NoReturn, cast

# before launch/, where `import pretrain` would find this very file
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.interrupted import say_interrupted

if __name__ == "__main__":
    say_interrupted()  # also amid the imports below, which take a second

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launch.explain import nameless_choices
from launch.file_keys import explained
from launch.foreign_flags import HYDRAS_OPTIONS, with_words
from launch.mixture_file import short_name, with_mixture_files
from launch.repeated_words import repeated
from launch.schema import register, validated
from launch.setting_names import CONF
from launch.slurm_environment import adopt_slurm_ranks
from launch.whole_lines import write_whole_lines
from parallel.config import ConfigError
from pretrain.stop_signal import stop_signal

# Set in jobs that submitit runs for a sweep. Their errors are handed, as exceptions, to the process
# that waits for them and says them; a job that just exits would leave it waiting.
SWEEP_JOB = "SUBMITIT_EXECUTOR"
ROOMS = ("parallel", "models", "data", "pretrain", "launch")
LONGEST_FOLDER = 200  # letters; file systems take 255 bytes


def launch(cfg: DictConfig) -> None:
    """Called by Hydra with the settings put together; with --multirun, once for each job."""
    hydra_config = HydraConfig.get()
    adopt_slurm_ranks()  # where srun started the ranks, as for the jobs of a sweep
    try:
        typed = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
        processes = int(os.environ.get("WORLD_SIZE") or 1)
        config = validated(cfg, cast(list[str], typed), world_size=processes)
    except ConfigError as error:
        refuse(error)
    warn_of_repeated_words(cast(list[str], typed))
    if hydra_config.mode == RunMode.MULTIRUN:  # or jobs would go on from each other's checkpoints
        mixtures = [name for word in cast(list[str], typed) if (name := short_name(word))]
        words = [hydra_config.job.override_dirname, *mixtures]
        # no words but +run=NAME: a run of launch/sweep.py, whose file names a folder of its own
        config.run_dir = str(Path(config.run_dir, folder_of_job(",".join(filter(None, words)))))

    try:
        with stop_signal() as stop:  # before the imports of the next lines, which take seconds
            with imports_that_stay():
                from pretrain.run import run

            outcome = run(config, stop)
    except Exception as error:
        if SWEEP_JOB in os.environ:
            traceback.print_exc()  # Hydra hands the error on; the job's own log would not have it
            raise
        if not raised_by_us(error):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"error on rank {rank}: {error}\n", end="", file=sys.stderr)  # one write
        sys.exit(2)
    # torchrun takes any other status than 0 for a failure; status.json says "stopped"
    if outcome.stopped_by and not {"TORCHELASTIC_RUN_ID", SWEEP_JOB} & os.environ.keys():
        sys.exit(os.EX_TEMPFAIL)


@contextmanager
def imports_that_stay() -> Iterator[None]:
    """Keep Python from looking for garbage among what the body imports. Half a million objects,
    looked through again and again, take a sixth of the CPU time of a start, and later on a quarter
    of a second whenever all are looked through."""
    if "pretrain.run" in sys.modules:  # a further job of a sweep: what the last one left is garbage
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def folder_of_job(overrides: str) -> str:
    """A job's own folder in a sweep, named by its overrides as far as a file name may be long."""
    name = re.sub(r"[^\w.+-]+", "_", overrides)
    if len(name) <= LONGEST_FOLDER:
        return name
    return f"{name[: LONGEST_FOLDER - 9]}-{sha256(overrides.encode()).hexdigest()[:8]}"


def main() -> None:
    write_whole_lines()
    say_interrupted()  # for the command magnetron-pretrain
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on instead of wording them itself
    try:
        sys.argv[1:], problems = with_words(sys.argv[1:], HYDRAS_OPTIONS, job=False)
        problems += nameless_choices(sys.argv[1:]).values()
        if problems:
            raise ConfigError(*problems)
        sys.argv[1:] = with_mixture_files(sys.argv[1:])
        with explained(sys.argv[1:]):
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="pretrain")(launch)()
    except ConfigError as error:
        refuse(error)


def warn_of_repeated_words(words: Sequence[str]) -> None:
    """Once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        for text in repeated(words):
            print(f"warning: {text}", file=sys.stderr)


def refuse(error: ConfigError) -> NoReturn:
    """Ends this rank; every rank finds the same errors, and the first of each node says them."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if first or SWEEP_JOB in os.environ:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
    if SWEEP_JOB in os.environ:
        raise error
    if not first and "TORCHELASTIC_RUN_ID" in os.environ:
        # whoever leaves first makes torchrun end the others, and that must be the one that speaks
        time.sleep(20)
    sys.exit(2)


def raised_by_us(error: Exception) -> bool:
    """Whether a `raise` of one of our rooms ended the run: then its message says all there is."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = any(CONF.parent / room in Path(last.filename).parents for room in ROOMS)
    return ours and (last.line or "").startswith("raise ")


if __name__ == "__main__":
    main()
