"""Words of launch.slurm -> a batch script or an answer; SLURM itself is in tests/cluster."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data.config import DataConfig
from launch.check import check
from launch.check_presence import absent
from launch.config import ClusterConfig
from launch.findings import ERROR, NOTE
from launch.schema import load
from launch.site_settings import SITES, load_cluster
from launch.slurm import main
from launch.slurm_commands import SlurmError, ask_slurm
from launch.slurm_partitions import PartitionCheck, check_partition
from launch.slurm_script import BODY, Job
from models.config import ModelConfig
from parallel.config import ConfigError
from pretrain.config import PretrainConfig
from pretrain.config_rules import validate

ROOT = Path(__file__).resolve().parents[2]
TINY = ["+model=magneto_tiny", "cluster=lab", "nodes=2"]


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without SLURM's commands, and a folder to be in."""
    bash = shutil.which("bash")
    assert bash is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to(bash)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)


def script_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*TINY, *words]) == 0
    return capsys.readouterr().out


def refused(*words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The problems that are told; nothing may be written or printed for them."""
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["bin"]
    return [line.removeprefix("error: ") for line in told.err.splitlines()]


def option(script: str, name: str) -> str | None:
    lines = [line for line in script.splitlines() if line.startswith(f"#SBATCH --{name}")]
    assert len(lines) <= 1
    return lines[0].removeprefix(f"#SBATCH --{name}").removeprefix("=") if lines else None


def array(script: str, name: str, equals: str = "=(") -> list[str]:
    """The words of a variable of the script, as bash reads them."""
    line = next(line for line in script.splitlines() if line.startswith(name + equals))
    return shlex.split(line.removeprefix(name + equals).removesuffix(")"))


def test_a_dry_run_shows_script_and_cost_and_writes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("+model=magneto_1b", "parallel=tp8_sp", "cluster=gpu8_infiniband", "nodes=8")
    batch = ("train.global_batch_size=64", "cluster.walltime=2-12:00:00", "chain=2", "--dry-run")
    assert main([*words, *batch]) == 0
    told = capsys.readouterr()
    for fact in (
        "magneto_1b, 1,000 steps of 64 sequences",
        "8 nodes x 8 GPUs = 64 GPUs, 64 processes",
        "3,840.0 GPU-hours",
        "2 jobs, at most 7,680.0 GPU-hours",
        "add --submit",
    ):
        assert fact in told.err
    assert told.out.startswith("#!/bin/bash\n") and told.out.endswith(BODY.read_text())
    assert option(told.out, "nodes") == "8"
    assert option(told.out, "ntasks-per-node") == "1"
    assert option(told.out, "gpus-per-node") == "8"
    assert option(told.out, "time") == "2-12:00:00"
    assert option(told.out, "exclusive") == ""
    assert "export NCCL_SOCKET_IFNAME=ib\n" in told.out
    assert not list(Path.cwd().glob("runs"))


def test_what_slurm_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    script = script_of("run_dir=a run", "fault_tolerance.grace_seconds=90.4", capsys=capsys)
    assert option(script, "signal") == "B:USR1@90"
    assert option(script, "output") == f'"{Path.cwd()}/a run/logs/slurm-%j.log"'
    assert option(script, "open-mode") == "append"
    assert option(script, "dependency") == "singleton"
    assert option(script, "requeue") == "" and option(script, "no-requeue") is None
    assert option(script, "partition") is None and option(script, "gpus-per-node") is None
    # one name for a run folder, another for any other
    name, other = option(script, "job-name"), script_of("run_dir=b", capsys=capsys)
    assert name == option(script_of("run_dir=a run", capsys=capsys), "job-name")
    assert name != option(other, "job-name")
    once = script_of("cluster.max_requeues=0", capsys=capsys)
    assert option(once, "no-requeue") == "" and option(once, "requeue") is None


def test_words_arrive_as_they_were_typed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["wandb.tags=[a,'b c']", "data.mixture.weighting=temperature", 'run_dir="it\'s $HOME"']
    script = script_of(*words, capsys=capsys)
    entry, *typed = array(script, "TRAINING")
    assert entry == str(ROOT / "launch" / "pretrain.py")
    assert typed == ["+model=magneto_tiny", *words]
    assert array(script, "TORCHRUN")[:3] == [sys.executable, "-m", "torch.distributed.run"]


def test_line_breaks_stay_within_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    """sbatch reads its options up to the first line that is no comment."""
    word = "wandb.project='a\ntouch struck\n'"
    script = script_of(word, capsys=capsys)
    head, _, rest = script.partition("\n\n")
    assert all(line.startswith("#") for line in head.splitlines())
    assert option(head, "nodes") == "2"
    Path("bin", "words.sh").write_text(
        rest.partition(BODY.read_text()[:40])[0] + 'printf "%s|" "${TRAINING[@]}"'
    )
    told = subprocess.run(["/bin/bash", "bin/words.sh"], capture_output=True, text=True, check=True)
    assert told.stdout.split("|")[1:-1] == ["+model=magneto_tiny", word]
    assert not Path("struck").exists()


@pytest.mark.parametrize("folder", ["a\nb", 'a"b'])
def test_a_folder_that_slurm_cannot_be_told(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (told,) = refused(*TINY, f"run_dir='{folder}'", capsys=capsys)
    assert told.startswith("run_dir=") and "no line break and no double quote" in told


def test_a_folder_of_settings_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bin" / "it's mine, all"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /model: magneto_tiny\ntrain:\n  train_steps: 777\n"
    )
    words = ["--config-dir", "bin/it's mine, all", "+experiment=mine"]
    assert main([*words, "cluster=lab", "nodes=2"]) == 0
    told = capsys.readouterr()
    assert "magneto_tiny, 777 steps" in told.err
    assert array(told.out, "TRAINING")[1:] == words
    (problem,) = refused(*TINY, "--config-dir", "nowhere", capsys=capsys)
    assert problem.startswith("--config-dir nowhere: there is no such folder; leave it out, or ")


def commands(page: str, program: str) -> list[list[str]]:
    """The words after `program` wherever a page shows it called with settings."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if program in line and not line.startswith(" ")]
    calls = [shlex.split(line.partition(program)[2], comments=True) for line in lines]
    return [words for words in calls if words and all("=" in word for word in words)]


def test_what_the_pages_show_is_accepted() -> None:
    calls = commands("docs/slurm.md", "python -m launch.slurm")
    assert calls and all(main(words) == 0 for words in calls)
    (words,) = commands("docs/anomalies.md", "python launch/pretrain.py")
    config = load(words)
    validate(config, world_size=1)
    assert config.anomaly.spike_warmup < config.train.train_steps  # or it could find no spike
    assert config.run_dir == "runs/spikes"
    (words,) = commands("docs/slurm.md", "python launch/pretrain.py --multirun")
    asked = dict(word.split("=") for word in words if word.startswith("hydra"))
    processes = int(asked["hydra.launcher.nodes"]) * int(asked["hydra.launcher.tasks_per_node"])
    # one job of the sweep; the launcher's own plugin may not be installed
    job = [word.partition(",")[0] for word in words if not word.startswith("hydra")]
    validate(load(job), world_size=processes)


def test_what_a_site_adds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "bin" / "ours.yaml"
    site.write_text(
        "partition: gpu\naccount: llm\nqos: long\nconstraint: a100&ib\n"
        "gpus_per_node: 4\ngpu_type: a100\nprocesses_per_node: 2\ncpus_per_node: 32\n"
        "memory_per_node: 480G\nwalltime: '90'\nmax_restarts: 2\n"
        "python: /env/bin/python\ncontainer: apptainer exec --nv image.sif\n"
        "setup: [module load cuda, source /env/bin/activate]\n"
        "sbatch_arguments: [--reservation=llm]\nsrun_arguments: [--mpi=none]\n"
    )
    main(["+model=magneto_tiny", f"cluster={site}", "nodes=2"])
    script = capsys.readouterr().out
    told = {
        "partition": "gpu",
        "account": "llm",
        "qos": "long",
        "constraint": "a100&ib",
        "gpus-per-node": "a100:4",
        "cpus-per-task": "32",
        "mem": "480G",
        "time": "90",
        "reservation": "llm",
    }
    assert {name: option(script, name) for name in told} == told
    setup = script.index("set -e"), script.index("module load cuda"), script.index("set +e")
    assert list(setup) == sorted(setup)
    assert array(script, "CONTAINER") == ["apptainer", "exec", "--nv", "image.sif"]
    assert array(script, "SRUN")[-2:] == ["--cpus-per-task=32", "--mpi=none"]
    torchrun = array(script, "TORCHRUN")
    assert torchrun[0] == "/env/bin/python"
    assert {"--nproc-per-node=2", "--max-restarts=2", "--rdzv-backend=c10d"} < set(torchrun)


def test_the_script_is_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "bin" / "job.sh"
    script.write_text(script_of('run_dir="it\'s $HOME"', capsys=capsys))
    subprocess.run(["/bin/bash", "-n", script], check=True)
    assert array(script.read_text(), "RUN_DIR", "=") == [f"{Path.cwd()}/it's $HOME"]


AGENT = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:], start_new_session=True))"
WORKER = """
import pathlib, signal, sys, time
stopped = []
signal.signal(signal.SIGUSR1, lambda number, frame: stopped.append(number))
pathlib.Path("up").touch()
end = time.monotonic() + 90
while not stopped and time.monotonic() < end:
    time.sleep(0.01)
sys.exit(7 if stopped else 1)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_workers_hear_what_only_the_shell_of_their_node_was_told(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under control groups, where SLURM signals the process it started and no other."""
    on_node = BODY.read_text().partition("on_node() {")[2].partition("\n}\n")[0]
    agent = [sys.executable, "-c", AGENT, sys.executable, "-c", WORKER]
    script = f"TORCHRUN=({shlex.join(agent)})\non_node() {{{on_node}\n}}\non_node"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with subprocess.Popen(["/bin/bash", "-c", script], cwd=tmp_path) as shell:
        try:
            while not (tmp_path / "up").exists():
                assert shell.poll() is None
                time.sleep(0.01)
            shell.send_signal(number)
            assert shell.wait(60) == 7  # the worker's, through agent and shell
        finally:
            shell.kill()


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        ("", "9999999999"),  # the controller does not answer
        ("N/A", "9999999999"),
        ("NONE", "9999999999"),
        ("2030-01-02T03:04:05", "1893553445"),
    ],
)
def test_when_slurm_ends_the_job(answer: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = next(line for line in BODY.read_text().splitlines() if line.startswith("JOB_END="))
    functions = BODY.read_text().partition("\nif is_finished;")[0]
    script = f"{functions}\nsqueue() {{ echo '{answer}'; }}\n{line}\necho $JOB_END"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    command = ["/bin/bash", "-c", script]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout == f"{end}\n"


def test_a_checkpoint_set_aside_is_no_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts against cluster.max_failures: starts that left no new checkpoint."""
    newest = "step_00000016"
    others = ("08", "24.damaged-2", "32.taken_back", "40.partial")
    for name in (newest, *(f"step_000000{other}" for other in others)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    functions = BODY.read_text().partition("\nif is_finished;")[0]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("RUN_DIR", str(tmp_path))
    command = ["/bin/bash", "-c", f"{functions}\nnewest_checkpoint"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout == f"{tmp_path / 'checkpoints' / newest}\n"


def test_shellcheck_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here (apt-get install shellcheck)")
    # SC2154: variables that launch/slurm_script.py puts in front; SC2317: a function sent elsewhere
    command = ["shellcheck", "--shell=bash", "--exclude=SC2154,SC2317", str(BODY)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_all_that_does_not_fit_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(
        *("+model=magneto_tiny", "cluster=labb", "nodes=0", "chain=x", "train.train_step=5"),
        capsys=capsys,
    )
    assert [line.split(" ")[0] for line in told] == [
        "nodes=0",
        "chain=x",
        "cluster=labb:",
        "train.train_step=5:",
    ]
    assert "did you mean cluster=lab?" in told[2] and "gpu8_infiniband" in told[2]


def test_processes_and_layout(capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = refused(*TINY, "nodes=3", "parallel=tp2_pp2", capsys=capsys)
    assert "needs a multiple of 4 processes" in told
    assert "3 processes were asked for (nodes=3 x 1 on each); start 4, or choose" in told
    assert main([*TINY, "parallel=tp2"]) == 0
    assert "parallel.tensor_model_parallel_size=2 spans nodes" in capsys.readouterr().err


def test_what_an_engine_refuses_on_a_gpu_is_refused_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["+model=magneto_1b", "engine=deepspeed", "deepspeed.zero_stage=0"]
    (problem,) = refused(*words, "cluster=gpu8_infiniband", capsys=capsys)
    assert "parallel.precision=auto (bf16 on a GPU)" in problem


def test_a_site_has_to_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = refused("+model=magneto_tiny", capsys=capsys)
    assert told.startswith("no site is chosen; add cluster=NAME. There are generic, ")


def test_time_to_save_must_be_left(capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = refused(*TINY, "cluster.walltime=0:01:00", capsys=capsys)
    assert told.startswith("fault_tolerance.grace_seconds=60 must be shorter than cluster.walltime")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("walltime=5h", "must be [D-]HH:MM:SS"),
        ("walltime=0", "must be longer than nothing"),
        ("gpus_per_node=-1", "must be 0 or more"),
        ("gpus_per_node=many", "=many must be a whole number"),
        ("processes_per_node=0", "must be 1 or more"),
        ("cpus_per_node=0", "must be 1 or more"),
        ("max_failures=0", "must be 1 or more"),
        ("max_requeues=-1", "must be 0 or more"),
        ("max_restarts=-1", "must be 0 or more"),
        ("gpu_type=h100", "needs cluster.gpus_per_node"),
        ("memory_per_node=lots", "as in 480G"),
        ("partition=a b", "must be one word"),
        ("sbatch_arguments=[exclude]", "must be an option on one line"),
        ("environment.A-B=1", "is no name of an environment variable"),
        ("environment=3", "cluster.environment"),
        ("gpus=8", "did you mean cluster.gpus_per_node?"),
        ("xyz=8", "there are partition, account"),
    ],
)
def test_settings_of_a_site(setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_cluster("lab", [setting])
    (problem,) = refusal.value.problems
    assert f"cluster.{setting.partition('=')[0]}" in problem and words in problem


def test_text_stays_what_was_typed() -> None:
    """YAML would read 43200, false and 8."""
    words = ["walltime=12:00:00", "environment.NCCL_DEBUG=off", "environment.A=010"]
    cluster = load_cluster("lab", [*words, "environment.B=", "environment.C='c \"d\"'"])
    assert cluster.walltime == "12:00:00"
    told = {name: cluster.environment[name] for name in ("NCCL_DEBUG", "A", "B", "C")}
    assert told == {"NCCL_DEBUG": "off", "A": "010", "B": "", "C": 'c "d"'}
    assert load_cluster("lab", ["walltime='90'"]).walltime == "90"


def test_more_processes_than_gpus() -> None:
    with pytest.raises(ConfigError, match="each process takes a GPU"):
        ClusterConfig(gpus_per_node=4, processes_per_node=8)
    assert ClusterConfig(gpus_per_node=4).processes == 4
    assert ClusterConfig().processes == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("walltime: [", "expected the node content"),
        ("- 5", "must hold settings"),
        ("time: 5", "there is no setting cluster.time"),
    ],
)
def test_a_broken_file_of_a_site(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bin" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_cluster(str(tmp_path / "bin" / "mine.yaml"), [])


@pytest.mark.parametrize("site", sorted(path.stem for path in SITES.glob("*.yaml")))
def test_shipped_sites(site: str) -> None:
    assert load_cluster(site, []).processes >= 1


def test_without_sbatch_the_script_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "run_dir=here", "--submit"]) == 1
    script = tmp_path / "here" / "slurm" / "job.sbatch"
    assert f"sbatch is not on this machine; the script is {script}" in capsys.readouterr().err
    assert (tmp_path / "here" / "logs").is_dir()  # SLURM would write no log elsewhere
    subprocess.run(["/bin/bash", "-n", script], check=True)


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "nodes=1", "run_dir=/proc/here", "--submit"]) == 1
    told = capsys.readouterr().err
    assert "error: run_dir=/proc/here: the script cannot be written there (No such file" in told
    assert "on the default partition: 1 node, 1 process\n" in told


def test_a_run_that_has_begun_says_how_long_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "begun").mkdir()
    record = {"step": 400, "train/loss": 3.0, "throughput/step_seconds": 6.0}
    (tmp_path / "begun" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert main([*TINY, "run_dir=begun"]) == 0
    assert "to go     1:00:00 at the speed so far" in capsys.readouterr().err


def sinfo(script: str) -> None:
    """What stands in for SLURM's own, in the folder that PATH names."""
    path = Path("bin", "sinfo")
    path.write_text(f"#!{Path('bin', 'bash').resolve()}\n{script}\n")
    path.chmod(0o755)


def job_in(partition: str | None, nodes: int = 2) -> Job:
    cluster = ClusterConfig(partition=partition)
    model = ModelConfig(
        name="tiny", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1
    )
    config = PretrainConfig(model=model)
    return Job(
        config=config, cluster=cluster, nodes=nodes, words=[], folder=Path.cwd(), python="python"
    )


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "sinfo is not on this machine"),
        ("echo no way >&2; exit 1", "sinfo --noheader --format=%R|%D|%l: no way"),
        ("true", "sinfo printed nothing; are there partitions that you may see?"),
        ("exit 3", "sinfo --noheader --format=%R|%D|%l: ended with 3, without a word"),
        (
            "echo 'Welcome to n1'",
            "sinfo printed a line that is not NAME|NODES|LIMIT: 'Welcome to n1'",
        ),
        (
            "echo 'gpu|4'; echo 'cpu|8|1:00:00'",
            "sinfo printed a line that is not NAME|NODES|LIMIT: 'gpu|4'",
        ),
    ],
)
def test_why_a_partition_was_not_checked(script: str | None, why: str) -> None:
    if script is not None:
        sinfo(script)
    asked = check_partition(job_in("gpu"))
    assert asked.problems == [] and asked.notes == [f"partition gpu not checked: {why}"]


def test_a_partition_that_was_not_checked_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    note = "partition gpu not checked: sinfo is not on this machine"
    assert main([*TINY, "cluster.partition=gpu"]) == 0
    assert f"note      {note}" in capsys.readouterr().err.splitlines()
    found = check([*TINY, "cluster.partition=gpu"]).of(NOTE)
    assert [one.text for one in found if one.topic == "slurm"] == [note]


def test_what_sinfo_tells_is_held_against_the_job() -> None:
    lines = ["motd", "gpu|1|2-00:00:00", "gpu|1|2-00:00:00", "cpu|8|infinite", "dev|2|15:00"]
    sinfo(f"printf '%s\\n' {shlex.join(lines)}")
    for job in (job_in("gpu"), job_in("cpu", nodes=8), job_in(None)):
        assert check_partition(job) == PartitionCheck()  # also beside a line of something else
    (problem,) = check_partition(job_in("gpu", nodes=3)).problems
    assert problem == "nodes=3: cluster.partition=gpu has 2; use at most so"
    (problem,) = check_partition(job_in("dev")).problems
    assert "allows; use 00:15:00 or less" in problem


def test_a_sinfo_that_cannot_be_run_and_one_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("bin", "sinfo").write_bytes(b"\x7fELF")
    Path("bin", "sinfo").chmod(0o755)
    with pytest.raises(SlurmError, match="sinfo: Exec format error"):
        ask_slurm("sinfo")
    sinfo("while :; do :; done")
    monkeypatch.setattr("launch.slurm_commands.PATIENCE", 0.1)
    with pytest.raises(SlurmError, match="sinfo does not answer; is SLURM's controller down"):
        ask_slurm("sinfo")


def test_files_that_are_not_there_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no more: the nodes may see other file systems."""
    (tmp_path / "bin" / "empty").mkdir()
    cases = {
        ("corpus", "nowhere"): "no such file or folder",
        ("corpus", "bin/empty"): "the folder holds no file named",
        ("corpus", "bin/bash"): "expected a folder, or a file named",
        ("corpus", "a" * 300): "File name too long",
        ("corpus", "~nobody-of-this-name/text"): "Could not determine home directory",
        ("store_dir", "nowhere"): "no folder with a train/ folder",
        ("tokenizer", "nowhere.json"): "no such file",
        ("tokenizer", "bin"): "a folder; name the file in it",
        ("families", "brunch"): "there is no such grouping; did you mean branch?",
        ("families", "mine.yaml"): "no such file",
    }
    for (setting, value), words in cases.items():
        (text,) = absent(replace(DataConfig(), **{setting: value}))  # type: ignore[arg-type]
        assert text.startswith(f"data.{setting}={value}: ") and words in text
    (tmp_path / "bin" / "train").mkdir()
    assert absent(DataConfig(store_dir="bin")) == absent(DataConfig()) == []

    missing = ["data.corpus=nowhere", "data.tokenizer=nowhere.json"]
    assert main([*TINY, *missing]) == 0
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("warning: data")]
    known = {found.text for found in check([*TINY, *missing]).of(ERROR)}
    for word, line in zip(missing, said, strict=True):
        assert line.startswith(f"warning: {word}: no such file")
        assert line.endswith(" (as this machine sees it)")
        assert line.removeprefix("warning: ").removesuffix(" (as this machine sees it)") in known


def test_as_a_command() -> None:
    started = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launch.slurm", *TINY],
        cwd=ROOT,
        env=os.environ | {"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert started.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in started.stderr.splitlines()}
    assert "launch.slurm_script" in imported
    assert not imported & {"torch", "megatron", "wandb", "numpy"}
