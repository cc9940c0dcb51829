"""Trackers: which there are, W&B through the real library, offline, and TensorBoard."""

import json
import math
import os
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from parallel.config import ConfigError
from pretrain.config import PretrainConfig, TensorboardConfig, WandbConfig, WandbMode
from pretrain.config_rules import validate
from pretrain.metrics_file import MetricsFile
from pretrain.tracker import NullTracker, _Trackers, make_tracker, resolve_wandb_mode
from tests.disks import small_disk
from tests.parity import MODEL
from tests.pretrain.test_metrics_file import steps
from tests.pretrain.wandb_server import HANG, wandb_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert resolve_wandb_mode(WandbMode.auto) == "offline"
    assert resolve_wandb_mode(WandbMode.online) == "online"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password 0123456789\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert resolve_wandb_mode(WandbMode.auto) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert resolve_wandb_mode(WandbMode.auto) == "offline"  # a key, but for another server
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    assert resolve_wandb_mode(WandbMode.auto) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_wandb_mode(WandbMode.auto) == "disabled"
    assert resolve_wandb_mode(WandbMode.offline) == "offline"


def test_only_rank_0_tracks(tmp_path: Path):
    tracker = make_tracker(WandbConfig(), tmp_path, rank=1, resolved_config={})
    assert isinstance(tracker, NullTracker)
    tracker.log(1, {"train/loss": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_disabled_leaves_wandb_alone(tmp_path: Path):
    config = WandbConfig(mode=WandbMode.disabled)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pretrain.config import *; from pretrain.tracker import *\n"
        "t = make_tracker(WandbConfig(mode=WandbMode.disabled), sys.argv[2], 0, {})\n"
        "t.log(1, {'train/loss': 1.0}); t.close()\n"
        "assert not {'wandb', 'torch', 'megatron'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path)], check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert config.project == "magnetron"


# A process of its own for every W&B run, as in life: the library keeps global state.
RUN = """
    import os, subprocess, sys, signal
    sys.path.insert(0, {root!r})
    from pretrain.config import WandbConfig, WandbMode
    from pretrain.tracker import make_tracker
    from pretrain.wandb_tracker import WandbTracker

    first, last, resumed_step = {first}, {last}, {resumed_step}
    resolved = {{
        "train": {{"lr": 0.5, "train_tokens": 7}},
        "data": {{"tokenizer": "t.json", "hub_token": "secret-in-config"}},
        "note": "the key is " + os.environ["WANDB_API_KEY"],
    }}
    config = WandbConfig(mode=WandbMode({mode!r}), project="proj", group="g", tags=["t1"])
    if {timeout} is None:
        tracker = make_tracker(config, {run_dir!r}, 0, resolved, resumed_step)
    else:
        tracker = WandbTracker(config, {run_dir!r}, resolved, {mode!r}, init_timeout={timeout})
    for step in range(first, last + 1):
        tracker.log(step, {{"train/loss": 10.0 / (step + 1)}})
        {each_step}
    tracker.log(last, {{"eval/loss": 3.5, "eval/family/Slavic/loss": 3.25}})
    tracker.close()
    tracker.close()
"""
KEY = "0123456789abcdef0123456789abcdef01234567"


def run_wandb(
    run_dir: Path,
    first: int,
    last: int,
    *,
    resumed_step: int | None = None,
    mode: str = "offline",
    timeout: float | None = None,
    each_step: str = "pass",
    server: str = "http://127.0.0.1:9",  # where nobody listens
    arguments: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(RUN).format(
        root=str(ROOT),
        run_dir=str(run_dir),
        first=first,
        last=last,
        resumed_step=resumed_step,
        mode=mode,
        timeout=timeout,
        each_step=each_step,
    )
    script = run_dir.parent / "a_run.py"
    script.write_text(code)  # a file: of `python -c`, W&B would record no command line
    environment = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=90,
        check=True,
    )


def records(run_folder: Path) -> list[dict[str, Any]]:
    """Read a .wandb file back with W&B's own reader."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json"]
    out = subprocess.run(
        [*command, str(run_folder)], capture_output=True, text=True, check=True, timeout=60
    )
    return [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]


def of_type(name: str, all_records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record[name] for record in all_records if record["type"] == name]


def all_bytes(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_offline_run_reads_back_and_resumes_as_the_same_run(tmp_path: Path):
    run_dir = tmp_path / "tiny"
    done = run_wandb(run_dir, 0, 4, arguments=("x.api_key=secret-on-command-line",))
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1 and "recording offline" in done.stdout

    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert [p for p in (run_dir / "wandb").iterdir() if p.is_dir() and not p.is_symlink()] == [
        folder
    ]
    run_id = (run_dir / "wandb_run_id").read_text().strip()
    found = records(folder)
    (run,) = of_type("run", found)
    assert run["run_id"] == run_id and folder.name.endswith(run_id)
    assert (run["project"], run["display_name"]) == ("proj", "tiny")
    assert (run["run_group"], run["tags"]) == ("g", ["t1"])
    config = run["config"]["update"]
    config.pop("_wandb")
    assert config == {
        "train": {"lr": 0.5, "train_tokens": 7},
        "data": {"tokenizer": "t.json"},
        "note": "the key is <hidden>",
    }
    axes = {axis.get("glob_name") or axis["name"]: axis for axis in of_type("metric", found)}
    assert axes["*"]["step_metric"] == "step" == axes["eval/loss"]["step_metric"]
    assert axes["step"]["options"]["hidden"]
    assert axes["eval/loss"]["summary"].keys() >= {"last", "min"}
    rows = [row["item"] for row in of_type("history", found)]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[1]["train/loss"] == 5.0
    assert (rows[4]["train/loss"], rows[4]["eval/loss"]) == (2.0, 3.5)
    assert of_type("exit", found)[0]["exit_code"] == 0

    run_wandb(run_dir, 3, 6, resumed_step=2)
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(f.name.endswith(run_id) for f in folders)
    (second,) = set(folders) - {folder}
    resumed = records(second)
    assert of_type("run", resumed)[0]["run_id"] == run_id
    # it took 3 and 4 again, which W&B has
    assert [row["item"]["step"] for row in of_type("history", resumed)] == [5, 6]
    assert steps(run_dir) == [0, 1, 2, 3, 4, 5, 6, 6]

    everything = all_bytes(run_dir)
    assert b"tiny" in everything
    for secret in (KEY, "secret-in-config", "secret-on-command-line"):
        assert secret.encode() not in everything


def test_online_without_a_server_falls_back_to_offline(tmp_path: Path):
    done = run_wandb(tmp_path / "run", 0, 2, mode="online", timeout=2.0)
    assert done.stderr.count("WARNING: wandb.mode=online failed") == 1
    assert KEY not in done.stderr
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert len(of_type("history", records(folder))) == 3


@pytest.mark.parametrize("refuse", [401, pytest.param(HANG, marks=pytest.mark.slow)])
def test_a_wrong_key_or_a_server_that_hangs_is_told_once(tmp_path: Path, refuse: int) -> None:
    with wandb_server(refuse) as server:
        done = run_wandb(tmp_path / "run", 0, 2, mode="online", timeout=5.0, server=server.address)
    assert done.stderr.count("WARNING") == 1, done.stderr
    assert "WARNING: wandb.mode=online failed" in done.stderr and KEY not in done.stderr
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    rows = [row["item"] for row in of_type("history", records(folder))]
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_losing_wandb_in_mid_run_is_told_once_and_the_run_goes_on(tmp_path: Path):
    kill = textwrap.dedent("""
        import pathlib, time
        me = os.getpid()
        if step == 2:
            for child in pathlib.Path(f"/proc/{me}/task/{me}/children").read_text().split():
                if b"wandb-core" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)
            time.sleep(0.5)
    """)
    done = run_wandb(tmp_path, 0, 6, each_step=f"exec({kill!r})")
    assert done.stderr.count("WARNING: Weights & Biases failed") == 1
    assert "Traceback" not in done.stderr
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6, 6]


def test_a_machine_without_wandb_trains(tmp_path: Path):
    hide = "sys.modules['wandb'] = None"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); {hide}\n"
        "from pretrain.config import *; from pretrain.tracker import *\n"
        "t = make_tracker(WandbConfig(), sys.argv[1], 0, {}); t.log(1, {'a': 1.0}); t.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("WARNING: Weights & Biases could not start") == 1
    assert steps(tmp_path) == [1]


def scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """name -> step -> value, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = WandbConfig(mode=WandbMode.disabled), tmp_path
    on = TensorboardConfig(enabled=True)
    tracker = make_tracker(*config, 0, {}, tensorboard=on)
    for step in range(6):
        tracker.log(step, {"train/loss": 10.0 - step})
    tracker.log(5, {"eval/loss": math.nan, "eval/seconds": 1.5})
    tracker.close()  # and then killed; the checkpoint was of step 3
    resumed = make_tracker(*config, 0, {}, resumed_step=3, tensorboard=on)
    for step in (4, 5, 6):
        resumed.log(step, {"train/loss": 100.0 + step})
    resumed.go_back(4)
    resumed.log(5, {"train/loss": 1000.0})
    resumed.close()
    found = scalars(tmp_path)
    assert found["train/loss"] == {0: 10, 1: 9, 2: 8, 3: 7, 4: 104, 5: 1000}
    assert "eval/loss" not in found and not found["eval/seconds"]  # of a step taken again
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]
    make_tracker(*config, 1, {}, tensorboard=on).log(9, {"train/loss": 0.0})
    assert 9 not in scalars(tmp_path)["train/loss"]


def test_tensorboard_without_its_package_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = PretrainConfig(model=MODEL, tensorboard=TensorboardConfig(enabled=True))
    monkeypatch.setattr("pretrain.config_rules.find_spec", lambda name: None)
    message = r"^tensorboard\.enabled=true needs the package tensorboard, which is not installed"
    with pytest.raises(ConfigError, match=message):
        validate(config, world_size=8)
    config.tensorboard.enabled = False
    validate(config, world_size=8)


@pytest.mark.slow
def test_a_killed_run_goes_on_behind_what_wandb_has(tmp_path: Path) -> None:
    """SIGKILL at step 5, checkpoint at 2: steps 3 to 5 are taken again, and recorded once. Later
    starts and `wandb sync`: the server gets one run, and every step in order."""
    run_dir = tmp_path / "run"
    die = "step == 5 and os.kill(os.getpid(), 9)"
    with pytest.raises(subprocess.CalledProcessError) as killed:
        run_wandb(run_dir, 0, 9, each_step=f"exec({die!r})")
    assert killed.value.returncode == -9
    run_wandb(run_dir, 3, 8, resumed_step=2)
    names = sorted(path.name for path in (run_dir / "wandb").iterdir() if path.is_dir())
    assert [name.partition("-2")[0] for name in names] == [
        "latest-run",
        "offline-empty",  # nothing had been written yet
        "offline-run",
    ]
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    rows = [row["item"] for row in of_type("history", records(folder))]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["train/loss"] for row in rows] == [10.0 / (step + 1) for step in range(9)]
    assert rows[2]["_timestamp"] < rows[3]["_timestamp"] - 0.2, "step 2 is of the first start"

    with wandb_server() as server:
        settings: Any = {"mode": "online", "server": server.address}
        done = run_wandb(run_dir, 8, 10, resumed_step=7, **settings)  # has to wait for the others
        assert done.stderr.count("WARNING") == 1 and "that are not uploaded" in done.stderr
        assert server.history == []
        folders = sorted((run_dir / "wandb").glob("offline-run-*"))
        assert len(folders) == 2
        subprocess.run(
            [Path(sys.executable).parent / "wandb", "sync", *folders],
            env={**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.address},
            capture_output=True,
            check=True,
            timeout=90,
        )
        done = run_wandb(run_dir, 10, 12, resumed_step=9, **settings)
        assert "WARNING" not in done.stderr and server.address in done.stdout
        at_server = [row["_step"] for row in server.history]
        assert at_server == list(range(13))
        assert server.runs == {(run_dir / "wandb_run_id").read_text().strip()}


def run_wandb_over_a_full_disk(disk: Path) -> subprocess.CompletedProcess[str]:
    """401 steps, with no room from the sixth on."""
    full = textwrap.dedent("""
        if step == 5:
            import pathlib
            import pretrain.wandb_tracker
            from tests.disks import fill
            fill(pathlib.Path(sys.argv[1]))
            pretrain.wandb_tracker.WANDB_WRITING_SECONDS = 1.0
    """)
    return run_wandb(disk / "run", 0, 400, each_step=f"exec({full!r})", arguments=(str(disk),))


def test_wandb_over_a_full_disk_is_told(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        done = run_wandb_over_a_full_disk(disk)
        (folder,) = (disk / "run" / "wandb").glob("offline-run-*")
    assert done.stderr.count(f"Weights & Biases: {folder} ") == 1, done.stderr
    assert "and the run got to step 400" in done.stderr
    assert "start the same command again" in done.stderr


@pytest.mark.slow
def test_what_wandb_lost_to_a_full_disk_is_made_up_by_the_same_command(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        run_dir = disk / "run"
        run_wandb_over_a_full_disk(disk)
        (disk / "filler").unlink()
        metrics = MetricsFile(run_dir, resumed_step=400)  # as if its lines had waited for room
        for step in range(steps(run_dir)[-1] + 1, 401):
            metrics.log(step, {"train/loss": 10.0 / (step + 1)})
        metrics.close()
        again = run_wandb(run_dir, 401, 400, resumed_step=400)
        assert again.stderr == ""
        rows = [
            row["item"]["_step"]
            for folder in sorted((run_dir / "wandb").glob("offline-run-*"))
            for row in of_type("history", records(folder))
        ]
        assert rows == list(range(401))


def test_tensorboard_over_a_full_disk_is_told_once(tmp_path: Path) -> None:
    """In a process of its own, as in life: pytest catches what threads print."""
    pytest.importorskip("tensorboard")
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from pretrain.tracker import TensorboardTracker
        from tests.disks import fill
        for when in ("start", "way", "end"):
            disk = Path(sys.argv[1], when)
            if when == "start":
                fill(disk)
            tracker = TensorboardTracker(disk)
            fill(disk)
            for step in range(1 if when == "end" else 60):
                tracker.log(step, {f"train/{name}": 1.0 for name in range(99)})
                if when == "way":
                    time.sleep(0.005)
            tracker.close()
            tracker.close()
            print(f"{when} is over", file=sys.stderr)
    """)
    with ExitStack() as disks:
        for when in ("start", "way", "end"):
            disks.enter_context(small_disk(tmp_path / when, "256k"))
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    told = [line for line in done.stderr.splitlines() if line]
    warning = "WARNING: TensorBoard's files cannot be written ([Errno 28] No space left on device)"
    assert [line[: len(warning)] for line in told] == [
        warning,
        "start is over",
        warning,
        "way is over",
        warning,
        "end is over",
    ]


def test_all_trackers_are_closed(tmp_path: Path) -> None:
    closed = []

    class Failing(NullTracker):
        def close(self, failed: bool = False) -> None:
            closed.append(failed)
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        _Trackers([Failing(), Failing()]).close(failed=True)
    assert closed == [True, True]
