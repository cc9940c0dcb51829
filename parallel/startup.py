"""The stages of start-up: doors that all ranks go through together, kept in a shared store.

A rank announces itself at the door of a stage and goes through once all ranks stand there, so a
rank that never comes is named by every rank that did, instead of leaving them in a collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel import meeting
from parallel.config import ParallelConfig
from parallel.rank_layout import describe_ranks

STAGES = ("rendezvous", "process group", "model-parallel groups", "first collective")

_LOOK_AT = {
    "rendezvous": (
        "were the missing processes started at all, did they end earlier (their own log), and can"
        " their hosts reach {address}? WORLD_SIZE={world_size} is how many are expected"
    ),
    "process group": (
        "the logs of the missing ranks; the step before is choosing the device (driver,"
        " CUDA_VISIBLE_DEVICES, LOCAL_RANK)"
    ),
    "model-parallel groups": (
        "the logs of the missing ranks; the step before connects every rank with every other"
        " (firewall between hosts, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME)"
    ),
    "first collective": (
        "the logs of the missing ranks, then the network between the hosts (NCCL_DEBUG=INFO,"
        " NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
    ),
}

_GO = b"go"
# Seconds a failing rank stays for the others to read why; whoever hosts the store takes it along.
FAREWELL_SECONDS = 5.0


class StartupError(RuntimeError):
    """Start-up failed on this or on another rank; the message names the stage and the cause."""


class StartupTimeout(StartupError):
    """Some ranks did not reach a start-up stage in time; the message names them."""


@dataclass(frozen=True)
class Place:
    """This process according to its environment."""

    rank: int
    world_size: int
    local_rank: int
    master_host: str
    master_port: int  # 0: alone, any free port
    hosts_store: bool
    prefix: str  # of this job's keys in a store that others may use as well

    @property
    def address(self) -> str:
        return f"{self.master_host}:{self.master_port}"

    @classmethod
    def from_environment(cls, environment: dict[str, str]) -> Place:
        if "RANK" not in environment:
            return cls(0, 1, 0, "127.0.0.1", 0, True, "start/alone")
        needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if not environment.get(name)]
        if missing:
            raise StartupError(
                f"RANK={environment['RANK']} is set, but {', '.join(missing)} not: set all of"
                f" RANK, {', '.join(needed)}, let torchrun do it, or unset RANK to run alone."
            )
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        if not 0 <= rank < world_size:
            raise StartupError(
                f"RANK={rank} with WORLD_SIZE={world_size}: ranks run from 0 to WORLD_SIZE - 1."
            )
        local_rank = int(environment.get("LOCAL_RANK", rank % max(1, torch.cuda.device_count())))
        agent_hosts = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        run = environment.get("TORCHELASTIC_RUN_ID", "none")
        return cls(
            rank,
            world_size,
            local_rank,
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            hosts_store=rank == 0 and not agent_hosts,
            prefix=f"start/{run}/{world_size}",
        )

    @classmethod
    def from_process_group(cls) -> Place:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        local_rank = int(os.environ.get("LOCAL_RANK", rank % max(1, torch.cuda.device_count())))
        return cls(rank, world_size, local_rank, "existing process group", 0, False, "start/again")


class Stages:
    """Announce, wait for all, go through: one door after the other, kept in a shared store.

    Keys of one start (`parallel.meeting`): `rank/<r>` = "<host>\\n<last stage>", and for each stage
    `<stage>/count` and `<stage>/verdict`. The verdict is written once (compare_set): "go" by the
    last rank to arrive, or the error by whoever first runs out of time or fails; every waiting
    rank wakes on that one key, so all of them reach the same conclusion.
    """

    def __init__(self, config: ParallelConfig, place: Place) -> None:
        self.timeout = config.startup_timeout_seconds
        self.place = place
        self.host = platform.node()
        self.seconds: dict[str, float] = {}
        self.store: dist.Store

    @contextlib.contextmanager
    def rendezvous(self) -> Iterator[None]:
        started = time.monotonic()
        # a round of looks may be on its way when the time is over
        last_resort = self._last_resort("rendezvous", self.timeout + 2 * FAREWELL_SECONDS)
        with last_resort, self._losing_the_store("rendezvous"):
            self.store = self._open_store(started + self.timeout)
        with self.stage("rendezvous", started):
            yield

    @contextlib.contextmanager
    def stage(self, name: str, started: float | None = None) -> Iterator[None]:
        """Wait at the door of `name`, then run the body, which must end within the timeout too."""
        started = time.monotonic() if started is None else started
        with self._last_resort(name, self.timeout + 2 * FAREWELL_SECONDS):
            self._wait_for_all(name, started + self.timeout)
        with self._last_resort(name, self.timeout):
            try:
                yield
            except Exception as error:
                raise self._tell_others(name, error) from error
        self.seconds[name] = time.monotonic() - started

    def _open_store(self, deadline: float) -> dist.Store:
        if self.place.master_host == "existing process group":
            base = dist.distributed_c10d._get_default_store()
        else:
            base = self._connect(deadline)
        store, place = dist.PrefixStore(self.place.prefix, base), self.place
        rest = place.world_size, deadline, self._announce, _gave_up
        if place.rank == 0:
            return meeting.call(store, *rest)
        return meeting.answer(store, place.rank, *rest)

    def _announce(self, store: dist.Store, stage: str = "rendezvous") -> None:
        store.set(f"rank/{self.place.rank}", f"{self.host}\n{stage}")

    @contextlib.contextmanager
    def _losing_the_store(self, name: str) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            host = "torchrun's agent on the first node" if _agent_hosts() else "rank 0"
            raise StartupError(
                f'start-up stage "{name}": rank {self.place.rank} on {self.host} lost the store at'
                f" {self.place.address}, which {host} hosts ({_first_line(error)}): that process"
                " has ended or its host is gone. Look at its log."
            ) from None

    def _connect(self, deadline: float) -> dist.TCPStore:
        place = self.place
        try:
            if not place.hosts_store:
                # TCPStore logs a page of C++ frames for each failed connect: knock first
                _wait_until_reachable(place.master_host, place.master_port, deadline)
            return dist.TCPStore(
                place.master_host,
                place.master_port,
                is_master=place.hosts_store,
                wait_for_workers=False,
                multi_tenant=True,  # several starts of one process may share the port
                timeout=timedelta(seconds=max(1.0, deadline - time.monotonic())),
            )
        except (OSError, dist.DistError) as error:
            if place.hosts_store:
                raise StartupError(
                    f'start-up stage "rendezvous": rank 0 cannot host the store at'
                    f" MASTER_ADDR:MASTER_PORT={place.address}: {_first_line(error)}. Is the port"
                    " taken by another job, and does MASTER_ADDR name this host"
                    f" ({self.host})?"
                ) from None
            host = "torchrun's agent on the first node" if _agent_hosts() else "rank 0"
            raise StartupTimeout(
                f'start-up stage "rendezvous": rank {place.rank} on {self.host} could not reach'
                f" the store at MASTER_ADDR:MASTER_PORT={place.address} within"
                f" parallel.startup_timeout_seconds={self.timeout:g} ({_first_line(error)})."
                f" {host} hosts it: has that process started, does MASTER_ADDR name its host, and"
                " does a firewall between the hosts let the port through?"
            ) from None

    def _wait_for_all(self, name: str, deadline: float) -> None:
        with self._losing_the_store(name):
            self._announce(self.store, name)
            if self.store.add(f"{name}/count", 1) == self.place.world_size:
                verdict = self.store.compare_set(f"{name}/verdict", "", _GO.decode())
            else:
                remaining = max(0.001, deadline - time.monotonic())
                if wait(self.store, f"{name}/verdict", remaining):
                    verdict = self.store.get(f"{name}/verdict")
                else:
                    verdict = self._decide(name)
            if verdict != _GO:
                self._stay_until_read(name)
        if verdict != _GO:
            kind, _, text = verdict.decode().partition("\n")
            raise (StartupTimeout if kind == "timeout" else StartupError)(
                f"{text}\n  (this is rank {self.place.rank} on {self.host})"
            )

    def _decide(self, name: str) -> bytes:
        """The verdict after a timeout. The first rank here lists the missing; the rest read it."""
        if self.store.add(f"{name}/timeouts", 1) == 1:
            text = self._timeout_text(name)
            return self.store.compare_set(f"{name}/verdict", "", f"timeout\n{text}")
        wait(self.store, f"{name}/verdict", FAREWELL_SECONDS)
        return self.store.get(f"{name}/verdict")

    def _stay_until_read(self, name: str) -> None:
        """Hold this rank, and the store it may host, until all who arrived have the verdict."""
        arrived = self.store.add(f"{name}/count", 0)
        if self.store.add(f"{name}/read", 1) >= arrived:
            self.store.set(f"{name}/all_read", "")
        else:
            wait(self.store, f"{name}/all_read", FAREWELL_SECONDS)
        if self.place.hosts_store:
            time.sleep(0.2)  # the last answers are still on their way

    def _tell_others(self, name: str, error: Exception) -> StartupError:
        """Put this rank's error on the next door, where the others are waiting or will be."""
        text = (
            f'start-up stage "{name}": rank {self.place.rank} on {self.host} failed:'
            f" {type(error).__name__}: {_first_line(error)}"
        )
        if name != STAGES[-1]:
            following = STAGES[STAGES.index(name) + 1]
            with contextlib.suppress(dist.DistError):
                self.store.compare_set(f"{following}/verdict", "", f"failed\n{text}")
                if self.place.hosts_store:
                    time.sleep(1.0)  # let the others read it before the store goes
        return StartupError(text)

    def _timeout_text(self, name: str) -> str:
        place = self.place
        position = STAGES.index(name)
        missing: dict[str, list[int]] = {}
        for rank in range(place.world_size):
            where = f"never reached the store at {place.address}"
            if self.store.check([f"rank/{rank}"]):
                host, last = self.store.get(f"rank/{rank}").decode().split("\n")
                if STAGES.index(last) >= position:
                    continue
                where = f'host {host}, last seen in stage "{last}"'
            missing.setdefault(where, []).append(rank)
        count = sum(map(len, missing.values()))
        lines = [
            f'start-up stage "{name}": {count} of {place.world_size} ranks did not arrive within'
            f" parallel.startup_timeout_seconds={self.timeout:g}.",
            *(f"  missing: {describe_ranks(ranks)}: {where}" for where, ranks in missing.items()),
            f"  look at: {self._look_at(name)}",
        ]
        return "\n".join(lines)

    @contextlib.contextmanager
    def _last_resort(self, name: str, seconds: float) -> Iterator[None]:
        """End the process with a message if the body, stuck in C++, takes longer than `seconds`."""
        timer = threading.Timer(seconds, self._exit_stuck, (name,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _exit_stuck(self, name: str) -> None:
        place = self.place
        print(
            f'StartupTimeout: start-up stage "{name}": rank {place.rank} on {self.host} entered it'
            f" and is stuck there after parallel.startup_timeout_seconds={self.timeout:g};"
            f" another rank may have died inside it.\n  look at: {self._look_at(name)}\n",
            end="",  # one write, which other ranks' lines do not part
            file=sys.__stderr__,
            flush=True,
        )
        faulthandler.dump_traceback(file=2, all_threads=True)  # file descriptor of stderr
        os._exit(1)

    def _look_at(self, name: str) -> str:
        return _LOOK_AT[name].format(address=self.place.address, world_size=self.place.world_size)


def _gave_up(store: dist.Store) -> bool:
    """Whether ranks that met there have; a start before this one may have gone through."""
    verdict = "rendezvous/verdict"
    return store.check([verdict]) and store.get(verdict) != _GO


def wait(store: dist.Store, key: str, seconds: float) -> bool:
    """Whether `key` was there in time."""
    try:
        store.wait([key], timedelta(seconds=seconds))
    except RuntimeError as error:
        # TCPStore raises DistStoreError, a kind of RuntimeError; FileStore a plain one
        if isinstance(error, dist.DistNetworkError) or "timeout" not in str(error).lower():
            raise
        return False
    return True


def _wait_until_reachable(host: str, port: int, deadline: float) -> None:
    """Return once something accepts connections at host:port; else raise the last OSError."""
    pause = 0.01
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            socket.create_connection((host, port), timeout=left).close()
            return
        except OSError:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _agent_hosts() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
