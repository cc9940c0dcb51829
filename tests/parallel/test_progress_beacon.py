"""Where a rank is, and who holds the others up."""

import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from parallel.progress_beacon import Position, ProgressBeacon, behind
from tests.distributed import run_on_gloo


def test_stages() -> None:
    beacon = ProgressBeacon()
    assert not beacon.position().in_training
    assert beacon.position().describe() == "step 0, between stages"
    with beacon.stage("data", 5):
        assert beacon.position().describe() == "step 5, data"
    with beacon.stage("evaluation"):
        with beacon.stage("forward_backward"):
            assert beacon.position().stage == "forward_backward"
        assert beacon.position().describe() == "step 5, evaluation"
        assert beacon.position().first_step
    with beacon.stage("optimizer"):
        pass
    end = beacon.position()
    assert (end.stage, end.moves, end.first_step, end.in_training) == ("", 8, False, True)
    assert beacon.step == 5
    beacon.reset()
    assert beacon.position().moves == 0


def test_an_error_leaves_the_stage_and_does_not_count_as_an_update() -> None:
    beacon = ProgressBeacon()
    with pytest.raises(ValueError, match="no"), beacon.stage("optimizer", 1):
        raise ValueError("no")
    assert beacon.position().stage == ""
    assert beacon.position().first_step


def test_quiet_is_the_time_since_it_got_on() -> None:
    beacon = ProgressBeacon()
    time.sleep(0.05)
    assert beacon.position().quiet >= 0.05
    beacon.tick()
    assert beacon.position().quiet < 0.05


def places_around_a_collective() -> list[Position]:
    beacon = ProgressBeacon()
    groups = [dist.new_group([rank], group_desc="ALONE") for rank in range(dist.get_world_size())]
    half = groups[dist.get_rank()]
    untouched = vars(dist.ProcessGroup)["allreduce"], vars(dist.Work)["wait"]
    beacon.watch_collectives()
    seen: list[Position] = []
    try:
        dist.all_reduce(torch.ones(1))
        seen.append(beacon.position())
        dist.all_reduce(torch.ones(1), group=half)
        dist.all_reduce(torch.ones(1), group=half)
        seen.append(beacon.position())
        if dist.get_rank() == 0:
            time.sleep(0.5)
            dist.barrier()
        else:
            thread = threading.Thread(target=dist.barrier)
            thread.start()
            time.sleep(0.2)
            seen.append(beacon.position())
            thread.join()
        seen.append(beacon.position())
    finally:
        beacon.leave_collectives()
    assert untouched == (vars(dist.ProcessGroup)["allreduce"], vars(dist.Work)["wait"])
    dist.all_reduce(torch.ones(1))
    assert beacon.position().collective == ""
    return seen


def test_collectives_are_followed() -> None:
    first, second = run_on_gloo(2, places_around_a_collective)
    assert first[0].describe().endswith("last collective all_reduce 1 of default_pg (2 ranks)")
    assert first[1].describe().endswith("last collective all_reduce 2 of ALONE (1 ranks)")
    assert second[2].waiting
    assert second[2].describe().endswith("waiting in barrier 2 of default_pg (2 ranks)")
    assert 0.1 <= second[2].quiet <= 0.4
    assert not second[3].waiting
    assert second[3].quiet < 0.1


IN_STEP = Position(step=7, moves=40, stage="forward_backward", collective="all_reduce", number=9)
WAITING = replace(IN_STEP, waiting=True)


@pytest.mark.parametrize(
    ("positions", "guilty"),
    [
        # one computes, or sleeps, while the others wait for it
        ([WAITING, WAITING, IN_STEP, WAITING], [2]),
        # one waits for its data while the others are in the step
        ([replace(IN_STEP, stage="data", moves=39), WAITING, WAITING, WAITING], [0]),
        # one is a step behind: it waits for something the others have done with
        ([WAITING, WAITING, replace(WAITING, step=6, moves=33), WAITING], [2]),
        # all wait, but one left a collective of the same group out
        ([WAITING, replace(WAITING, number=8), WAITING, WAITING], [1]),
        # different groups cannot be compared
        ([replace(WAITING, group="a", number=3), replace(WAITING, group="b")], [0, 1]),
        # all in one place: the network, or each other
        ([WAITING, WAITING], [0, 1]),
    ],
)
def test_who_is_behind(positions: list[Position], guilty: list[int]) -> None:
    assert behind(dict(enumerate(positions))) == guilty
