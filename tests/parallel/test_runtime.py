"""Start-up: the groups of a healthy start, and who is named when ranks stay away, fail or hang."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from parallel import runtime as runtime_module
from parallel import startup
from parallel.config import ConfigError, ParallelConfig
from parallel.rank_layout import RankLayout, describe_ranks
from parallel.runtime import initialize, shutdown
from parallel.startup import StartupError, StartupTimeout
from tests.distributed import run_on_gloo
from tests.ports import free_port

StartRanks = Callable[..., list[dict]]
START_RANKS = Path(__file__).with_name("start_ranks.py")


@pytest.fixture(scope="module")
def start_ranks() -> Iterator[StartRanks]:
    """Call with roles: what became of one real process for each; see start_ranks.py."""
    with subprocess.Popen(
        [sys.executable, str(START_RANKS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def start(*roles: str, timeout: float = 2.0, port: int | None = None) -> list[dict]:
            job = {"roles": roles, "timeout": timeout, "port": port or free_port()}
            print(json.dumps(job), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield start
        server.kill()


def torchrun(*roles: str, timeout: float, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(len(roles)), "--max-restarts", str(restarts)]
    command += [str(START_RANKS), str(timeout), *roles]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def number_of_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


# ---- healthy starts ----


def where_am_i(config: ParallelConfig) -> dict[str, object]:
    runtime = initialize(config, seed=7)
    group_ranks = {
        axis: torch.distributed.get_process_group_ranks(getattr(runtime.groups, axis))
        for axis in ("tp", "pp", "dp", "cp")
    }
    facts = {
        "coordinates": (
            runtime.tensor_parallel_rank,
            runtime.context_parallel_rank,
            runtime.data_parallel_rank,
            runtime.pipeline_parallel_rank,
        ),
        "sizes": (
            runtime.tensor_parallel_size,
            runtime.context_parallel_size,
            runtime.data_parallel_size,
            runtime.pipeline_parallel_size,
        ),
        "first": runtime.is_first_pipeline_stage,
        "last": runtime.is_last_pipeline_stage,
        "groups": group_ranks,
        "device": str(runtime.device),
        "stages": tuple(runtime.startup_seconds),
        "line": runtime.describe(),
        "draw": torch.rand(()).item(),
    }
    shutdown(runtime)
    shutdown(runtime)
    facts["left"] = torch.distributed.is_initialized()
    return facts


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [(1, {}), (2, {"tensor": 2}), (4, {"pipeline": 2}), (8, {"tensor": 2, "pipeline": 2})],
)
def test_coordinates_and_groups_agree_with_the_arithmetic(
    world_size: int, sizes: dict[str, int]
) -> None:
    config = ParallelConfig(**{f"{axis}_model_parallel_size": size for axis, size in sizes.items()})
    layout = RankLayout.of(config, world_size)
    for rank, facts in enumerate(run_on_gloo(world_size, where_am_i, config)):
        assert facts["coordinates"] == tuple(layout.coordinates(rank))
        assert facts["sizes"] == tuple(layout.sizes)
        for axis, ranks in facts["groups"].items():
            assert ranks == layout.group_of(rank, axis), axis
        stage = layout.coordinates(rank).pp
        assert facts["first"] == (stage == 0)
        assert facts["last"] == (stage == layout.pipeline_model_parallel_size - 1)
        assert facts["stages"] == startup.STAGES
        assert facts["line"].startswith(f"rank {rank} of {world_size} on ")
        assert facts["left"]  # the group was there before, so shutdown leaves it


def test_seeds_differ_between_pipeline_stages_only() -> None:
    config = ParallelConfig(pipeline_model_parallel_size=2)
    draws = [facts["draw"] for facts in run_on_gloo(4, where_am_i, config)]
    assert draws[0] == draws[1] != draws[2] == draws[3]


def test_without_torchrun_a_process_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for _ in range(2):  # a second start in one process works like the first
        runtime = initialize(ParallelConfig(), seed=1)
        assert (runtime.rank, runtime.world_size, runtime.backend) == (0, 1, "gloo")
        assert runtime.device == torch.device("cpu")
        with pytest.raises(StartupError, match="called twice; call shutdown"):
            initialize(ParallelConfig(), seed=1)
        shutdown(runtime)
        shutdown(runtime)
        assert not torch.distributed.is_initialized()


def test_shutdown_takes_every_thread_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    before = number_of_threads()
    runtime = initialize(ParallelConfig(), seed=1)
    assert number_of_threads() > before
    shutdown(runtime)
    del runtime
    assert number_of_threads() == before


def test_plain_environment_variables_start_several_ranks(start_ranks: StartRanks) -> None:
    reports = start_ranks("well", "late:0.5", timeout=20)
    for rank, report in enumerate(reports):
        assert report["code"] == 0, report["text"]
        assert f"rank {rank} of 2 on " in report["text"]


@pytest.mark.slow
def test_torchrun_starts_again_after_a_failed_attempt() -> None:
    # both attempts share the agent's store: leftovers of the first must not disturb the second
    result = torchrun("well", "fail_once:process group", timeout=30, restarts=1)
    assert result.returncode == 0, result.stderr
    assert "rank 1 on" in result.stderr
    assert "failed: ArithmeticError: made to fail" in result.stderr
    assert result.stdout.count("of 2 on") == 2


# ---- ranks that stay away ----


def test_a_rank_that_never_arrives_is_named(start_ranks: StartRanks) -> None:
    present, _ = start_ranks("well", "absent")
    assert present["code"] == 1
    assert 2.0 <= present["seconds"] < 15.0
    assert 'StartupTimeout: start-up stage "rendezvous": 1 of 2 ranks' in present["text"]
    assert "parallel.startup_timeout_seconds=2." in present["text"]
    assert "missing: rank 1: never reached the store at 127.0.0.1:" in present["text"]
    assert "look at: were the missing processes started at all" in present["text"]


def test_ranks_missing_at_a_later_stage_are_named_with_their_host(
    start_ranks: StartRanks,
) -> None:
    away = ("leave:process group", "hang:process group")
    *present, gone, stuck = start_ranks("well", "well", *away)
    for rank, report in enumerate(present):
        assert report["code"] == 1
        assert report["seconds"] < 15.0
        text = report["text"]
        assert 'StartupTimeout: start-up stage "model-parallel groups": 2 of 4 ranks' in text
        missing = f"missing: ranks 2-3: host {socket.gethostname()}, last seen in stage"
        assert f'{missing} "process group"' in text
        assert f"(this is rank {rank} on {socket.gethostname()})" in text
    assert gone["code"] == 0
    # it cannot raise, being asleep inside the stage; it must not live on either
    assert stuck["code"] == 1
    assert "is stuck there after parallel.startup_timeout_seconds=2" in stuck["text"]
    assert "in misbehave" in stuck["text"]


@pytest.mark.slow
def test_under_torchrun_a_missing_rank_is_named_and_the_job_ends() -> None:
    started = time.monotonic()
    result = torchrun("well", "well", "late:500", timeout=30.0)  # two must have come by then
    assert result.returncode != 0
    assert time.monotonic() - started < 200.0  # long before rank 2 would have come
    assert 'StartupTimeout: start-up stage "rendezvous": 1 of 3 ranks' in result.stderr
    assert "missing: rank 2: never reached the store at" in result.stderr


def test_a_store_that_is_never_reachable_is_named(start_ranks: StartRanks) -> None:
    port = free_port()
    _, report = start_ranks("absent", "well", port=port)
    assert report["code"] == 1
    assert report["seconds"] < 15.0
    assert 'StartupTimeout: start-up stage "rendezvous": rank 1' in report["text"]
    assert f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port} within" in report["text"]
    assert "parallel.startup_timeout_seconds=2 " in report["text"]


def test_something_else_on_the_port_is_no_store(start_ranks: StartRanks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        host, guest = start_ranks("well", "well", timeout=1.0, port=port)
    assert host["code"] == 1
    assert (
        f"rank 0 cannot host the store at MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}"
        in (host["text"])
    )
    assert "Is the port taken by another job" in host["text"]
    assert guest["code"] == 1  # its connection is accepted and never answered
    assert 'stage "rendezvous"' in guest["text"]
    assert guest["seconds"] < 15.0


def arrive(config: ParallelConfig, late_rank: int) -> tuple[str, str]:
    if torch.distributed.get_rank() == late_rank:
        time.sleep(1.5)
    try:
        initialize(config, seed=1)
    except StartupError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_a_rank_that_comes_too_late_hears_the_verdict_of_the_others() -> None:
    config = ParallelConfig(startup_timeout_seconds=0.5)
    results = run_on_gloo(3, arrive, config, 1)
    for rank, (kind, text) in enumerate(results):
        assert kind == StartupTimeout.__name__
        assert "1 of 3 ranks did not arrive" in text
        assert "missing: rank 1: never reached the store" in text
        assert f"this is rank {rank} on" in text


# ---- ranks that fail or hang inside a stage ----


def test_a_failing_rank_is_named_by_all_at_once(start_ranks: StartRanks) -> None:
    reports = start_ranks("well", "fail:process group", "well", timeout=30)
    for report in reports:
        assert report["code"] == 1
        assert report["seconds"] < 15.0  # nobody waits for the timeout
        assert re.search(
            'StartupError: start-up stage "process group": rank 1 on .* failed:'
            " ArithmeticError: made to fail",
            report["text"],
        )


def test_a_store_that_goes_away_is_named(start_ranks: StartRanks) -> None:
    _, report = start_ranks("leave:rendezvous", "well")
    assert report["code"] == 1
    assert re.search(
        'StartupError: start-up stage ".*": rank 1 on .* lost the store at 127.0.0.1',
        report["text"],
    )
    assert "which rank 0 hosts" in report["text"]


def test_a_rank_stuck_in_a_collective_ends_with_its_stack(start_ranks: StartRanks) -> None:
    for report in start_ranks("well", "skip:first collective"):
        assert report["code"] == 1
        assert report["seconds"] < 15.0
        assert 'StartupTimeout: start-up stage "first collective": rank' in report["text"]
        assert "_first_collective" in report["text"] or "then_misbehave" in report["text"]


# ---- settings and environments that cannot work ----


def refused(config: ParallelConfig) -> str:
    try:
        initialize(config, seed=1)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_a_world_that_does_not_divide_is_refused_on_every_rank() -> None:
    for text in run_on_gloo(3, refused, ParallelConfig(tensor_model_parallel_size=2)):
        assert "parallel.tensor_model_parallel_size=2" in text


def test_an_incomplete_environment_is_refused() -> None:
    with pytest.raises(StartupError, match="RANK=0 is set, but WORLD_SIZE, MASTER_PORT not"):
        startup.Place.from_environment({"RANK": "0", "MASTER_ADDR": "node1"})


def test_a_rank_outside_the_world_is_refused() -> None:
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    with pytest.raises(StartupError, match="RANK=2 with WORLD_SIZE=2"):
        startup.Place.from_environment({"RANK": "2", **environment})


def test_jobs_do_not_share_keys() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "1"}
    places = [
        startup.Place.from_environment({**environment, "TORCHELASTIC_RUN_ID": run})
        for run in ("a", "b")
    ]
    assert len({place.prefix for place in places}) == 2


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(StartupError, match="LOCAL_RANK=2, but this host shows 2 CUDA device"):
        runtime_module._choose_device(local_rank=2, cuda_devices=2)


def sum_in_a_wrong_world() -> str:
    place = startup.Place.from_process_group()
    try:
        wrong = dataclasses.replace(place, world_size=5)
        runtime_module._first_collective(wrong, torch.device("cpu"))
    except StartupError as error:
        return str(error)
    return "accepted"


def test_a_collective_with_a_wrong_answer_is_noticed() -> None:
    for text in run_on_gloo(2, sum_in_a_wrong_world):
        assert "the sum of 1 over 5 ranks came out as 2" in text


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([1, 2, 3, 7], "ranks 1-3, 7"), ([0, 2], "ranks 0, 2")],
)
def test_ranks_are_written_as_ranges(ranks: list[int], text: str) -> None:
    assert describe_ranks(ranks) == text
