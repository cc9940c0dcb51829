"""The processes of one start find each other, whatever earlier ones have left in the store."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from parallel import meeting, startup
from parallel.config import ParallelConfig

WORLD = 3


class Agent:
    """torchrun's store, which lives on while processes are started again."""

    def __init__(self) -> None:
        self._server = self._client(0, is_master=True)

    @property
    def port(self) -> int:
        return self._server.port

    def _client(self, port: int, *, is_master: bool = False) -> dist.TCPStore:
        seconds = timedelta(seconds=30)
        return dist.TCPStore("127.0.0.1", port, None, is_master, seconds, wait_for_workers=False)

    def start(self, threads: ThreadPoolExecutor, rank: int, seconds: float = 20.0) -> Future:
        """A process's way to the others, in a thread; gives its part of the store, or None."""

        def announce(store: dist.Store) -> None:
            store.set(f"rank/{rank}", "here")

        store, deadline = self._client(self.port), time.monotonic() + seconds
        if rank == 0:
            return threads.submit(meeting.call, store, WORLD, deadline, announce, startup._gave_up)
        rest = store, rank, WORLD, deadline, announce, startup._gave_up
        return threads.submit(meeting.answer, *rest)


def assert_one_part(parts: list[dist.Store]) -> None:
    for number, part in enumerate(parts):
        part.set("written by", str(number))
        assert [other.get("written by") for other in parts] == [str(number).encode()] * WORLD


def test_each_start_has_a_part_of_its_own() -> None:
    agent = Agent()
    with ThreadPoolExecutor(WORLD) as threads:
        starts = []
        for _ in range(3):
            ranks = [agent.start(threads, rank) for rank in range(WORLD)]
            starts.append([future.result() for future in ranks])
            assert_one_part(starts[-1])
    for number, parts in enumerate(starts):
        parts[0].set("start", str(number))
    assert [parts[1].get("start") for parts in starts] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("before", ["all met", "rank 2 never came"])
def test_a_name_from_before_takes_in_nobody(before: str) -> None:
    agent = Agent()
    with ThreadPoolExecutor(WORLD) as threads:
        came = range(WORLD if before == "all met" else 2)
        old = [agent.start(threads, rank, seconds=1.0) for rank in came]
        assert all(future.result() is not None for future in old)
        early = [agent.start(threads, rank) for rank in (1, 2)]
        time.sleep(0.3)
        assert not any(future.done() for future in early)  # the old name is still there
        zero = agent.start(threads, 0)
        assert_one_part([zero.result(), *(future.result() for future in early)])


def test_rank_0_leaves_when_another_has_given_up() -> None:
    agent = Agent()
    with ThreadPoolExecutor(WORLD) as threads:
        zero, one = agent.start(threads, 0), agent.start(threads, 1)
        one.result().set("rendezvous/verdict", "timeout")
        assert zero.result(timeout=10).get("rank/1") == b"here"


def start(
    agent: Agent, threads: ThreadPoolExecutor, rank: int, world: int, seconds: float
) -> Future:
    """A process under torchrun, as far as its first door; gives what it says."""
    environment = {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(rank)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port)}
    place = startup.Place.from_environment(environment | {"WORLD_SIZE": str(world)})
    place = dataclasses.replace(place, hosts_store=False)

    def rendezvous() -> str:
        stages = startup.Stages(ParallelConfig(startup_timeout_seconds=seconds), place)
        try:
            with stages.rendezvous():
                return "all met"
        except startup.StartupTimeout as error:
            return str(error)

    return threads.submit(rendezvous)


def test_ranks_whose_agents_count_restarts_differently_start_together() -> None:
    """torchrun's agents do, when one saw the other hosts change before its own processes failed."""
    agent = Agent()
    with ThreadPoolExecutor(2) as threads:
        ranks = [start(agent, threads, rank, 2, seconds=10.0) for rank in range(2)]
        assert [future.result() for future in ranks] == ["all met"] * 2


@pytest.mark.parametrize("before", ["nothing", "a start"])
def test_rank_0_that_never_comes_is_named(before: str) -> None:
    """Not taken for there because of what a start before has left, when all had met."""
    agent = Agent()
    with ThreadPoolExecutor(WORLD) as threads:
        if before == "a start":
            ranks = [start(agent, threads, rank, WORLD, seconds=10.0) for rank in range(WORLD)]
            assert [future.result() for future in ranks] == ["all met"] * WORLD
        for said in [start(agent, threads, rank, WORLD, seconds=0.5) for rank in (1, 2)]:
            assert "1 of 3 ranks did not arrive" in said.result()
            assert "missing: rank 0: never reached the store" in said.result()
