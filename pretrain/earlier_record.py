"""What a start from step 0 does in a folder where steps are recorded and no checkpoint is: that of
a run which died before its first save, or whose checkpoints somebody removed.

Nothing of the record is lost, and the numbers of two runs never mix. Imports no torch.
"""

from collections.abc import Sequence
from pathlib import Path

from pretrain.metrics_file import METRICS_FILE, read_metrics
from pretrain.wandb_tracker import WANDB_RUN_ID_FILE

# Files that go by step, from the first one; a start from step 0 begins each of them anew.
BY_STEP = (METRICS_FILE, "router.jsonl", "stragglers.jsonl")
# Settings that change no number of a run.
_BESIDE_THE_NUMBERS = (
    *("wandb.", "tensorboard.", "profile.", "fault_tolerance."),
    *("checkpoint.save_interval ", "checkpoint.keep_", "checkpoint.async_save "),
    *("checkpoint.verify_integrity ", "checkpoint.resume "),
)


def set_aside(run_dir: Path, changed: Sequence[str] | None) -> str:
    """Keep what an earlier run recorded in the folder under other names, metrics.1.jsonl and so on;
    what was done, for a person, or "" where there was nothing.

    A start with the settings of the one before takes the same steps, so its W&B run goes on behind
    what W&B has. With others a new one begins: the old id is kept in wandb_run_id.1.

    Args:
        changed: settings that differ from those of the start before (`changed_settings`); None
            where these are not known.
    """
    said = []
    number = 1
    while (
        any(run_dir.glob(f"*.{number}.jsonl"))
        or (run_dir / f"{WANDB_RUN_ID_FILE}.{number}").exists()
    ):
        number += 1
    # the id first: killed in between, the next start does the rest
    other = changed is None or [c for c in changed if not c.startswith(_BESIDE_THE_NUMBERS)]
    wandb_id = run_dir / WANDB_RUN_ID_FILE
    if other and wandb_id.is_file():
        wandb_id.rename(run_dir / f"{WANDB_RUN_ID_FILE}.{number}")
        why = f"settings are others: {', '.join(other)}" if isinstance(other, list) else ""
        said.append(
            f"a new W&B run begins ({why or 'the settings of the earlier start are not known'}); "
            f"the id of the old one is in {WANDB_RUN_ID_FILE}.{number}"
        )
    metrics = run_dir / METRICS_FILE
    last = max((r["step"] for r in read_metrics(metrics)), default=0) if metrics.is_file() else 0
    kept = []
    for name in BY_STEP:
        file = run_dir / name
        if file.is_file() and file.stat().st_size:
            kept.append(file.with_suffix(f".{number}.jsonl").name)
            file.rename(run_dir / kept[-1])
    if kept:
        said.insert(0, f"the old record is kept: {', '.join(kept)}")
    if not said:
        return ""
    return (
        f"run_dir={run_dir} has recorded steps up to {last} and holds no checkpoint: the run died "
        "before its first save, or its checkpoints were removed. It starts anew from step 0; "
        + "; ".join(said)
    )
