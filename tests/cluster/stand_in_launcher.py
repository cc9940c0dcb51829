"""Stands in for Hydra's submitit launcher: PYTHON_SCRIPT SWEEP RUN... as one array of jobs.

Leaves what submitit does for each job, and then waits for results that never come, as submitit does
for a job that was killed.
"""

import subprocess
import sys
import time
from pathlib import Path

JOB = """\
run=$(echo {runs} | cut -d ' ' -f $((SLURM_ARRAY_TASK_ID + 1)))
here={jobs}/${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
mkdir -p $here
exec {python} {script} --config-dir {sweep}/conf +run=$run 2>$here/0_log.err
"""


def main() -> None:
    script, sweep, *runs = sys.argv[1:]
    jobs = Path(sweep, "multirun", ".submitit")
    text = JOB.format(
        runs=" ".join(runs), jobs=jobs, python=sys.executable, script=script, sweep=sweep
    )
    command = ["sbatch", "--parsable", f"--array=0-{len(runs) - 1}", "--output=/dev/null"]
    array = subprocess.check_output([*command, f"--wrap={text}"], text=True).strip()
    for index in range(len(runs)):
        job = f"{array}_{index}"
        (jobs / job).mkdir(parents=True, exist_ok=True)
        (jobs / job / f"{job}_submitted.pkl").touch()
    time.sleep(600)


if __name__ == "__main__":
    main()
