"""Stands in for launch/pretrain.py where a sweep's runner is tested: 20 ms a step instead of
seconds of imports, the same files and exit codes as far as the runner and collect look at them.

In the sweep's folder it appends to `started` how it was started; a file `fail` there makes the run
named in it fail; a file `hold` keeps runs from taking their last step. Each process, of several
under torchrun, appends to `processes`; those above the first do nothing else.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import yaml  # type: ignore[import-untyped]

stopped = False


def stop(number: int, frame: FrameType | None) -> None:
    global stopped
    stopped = True


def main() -> int:
    signal.signal(signal.SIGTERM, stop)
    conf, word = Path(sys.argv[2]), sys.argv[3]
    run = yaml.safe_load((conf / "run" / f"{word.partition('=')[2]}.yaml").read_text())
    folder, steps = Path(run["run_dir"]), run["train"]["train_steps"]
    sweep = conf.parent
    with open(sweep / "processes", "a") as file:
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        file.write(f"{rank}/{size} {os.environ.get('CUDA_VISIBLE_DEVICES') or '-'}\n")
    if rank != "0":
        return 0
    with open(sweep / "started", "a") as file:
        file.write(f"{folder.name} {os.environ['OMP_NUM_THREADS']}\n")
    if (sweep / "fail").is_file() and (sweep / "fail").read_text() == folder.name:
        print("error: as asked", file=sys.stderr)
        return 2
    checkpoint = folder / "checkpoints" / "step"
    step = int(checkpoint.read_text()) if checkpoint.is_file() else 0
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    while step < steps and not stopped:
        time.sleep(0.02)
        if step == steps - 1 and (sweep / "hold").is_file():
            continue
        step += 1
        checkpoint.write_text(str(step))
    state = "finished" if step == steps else "stopped"
    if state == "finished":
        ratios = run["data"]["mixture"]["ratios"]
        metrics = {"step": step, "eval/loss": 2.0}
        for family, ratio in ratios.items():
            metrics |= {
                f"eval/family/{family}/loss": 2.0 + ratio,
                f"data/family/{family}/tokens": 1000 * ratio,
                f"data/family/{family}/epochs": ratio,
            }
        (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    status = {"state": state, "step": step, "reason": "", "heartbeat": time.time()}
    (folder / "status.json").write_text(json.dumps(status))
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return 0 if state == "finished" or torchrun else os.EX_TEMPFAIL


if __name__ == "__main__":
    sys.exit(main())
