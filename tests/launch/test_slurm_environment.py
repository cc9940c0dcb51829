import pytest

from launch.slurm_environment import ranks_of_step, tasks_on_node

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_ranks_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.slurm_environment.first_address", lambda nodes: f"first of {nodes}")
    assert ranks_of_step(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "first of n[1-2]",
        "MASTER_PORT": "30711",
    }


def test_elsewhere_nothing_is_set() -> None:
    assert ranks_of_step({}) == {}
    assert ranks_of_step(STEP | {"RANK": "3"}) == {}  # torchrun's child
    # the shell of a batch script: part of a job of 8 tasks, but of no step
    batch = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert ranks_of_step(batch) == {}
    assert ranks_of_step(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}


def test_tasks_on_node() -> None:
    assert [tasks_on_node("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]
    assert tasks_on_node("8", 0) == 8
    with pytest.raises(ValueError, match=r"SLURM_STEP_TASKS_PER_NODE=2\(x3\),1 ends 1 nodes"):
        tasks_on_node("2(x3),1", 4)
