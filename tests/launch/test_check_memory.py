"""What launch.check says of a launch's memory and computing, and of what would fit."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from data.open_mixture import DEMO_TOKENIZER
from data.tokenizer import load_tokenizer
from launch.check import Machines, check
from launch.check_disk import checkpoint_bytes
from launch.check_flops import check_flops
from launch.check_host_memory import USABLE, host_room
from launch.check_machines import Planned
from launch.check_memory import check_memory
from launch.config import ClusterConfig
from launch.findings import NOTE, WARNING, Findings
from launch.leaner_layout import leaner
from launch.schema import load
from models.memory import readable
from parallel.config import RecomputeGranularity
from parallel.deepspeed_config import EngineKind, not_installed
from pretrain.config import PretrainConfig
from pretrain.config_rules import validate
from pretrain.memory import predict_memory_of_run

VOCABULARY = load_tokenizer(DEMO_TOKENIZER).vocab_size
OFFLOADED = [
    "engine=deepspeed",
    "deepspeed.zero_stage=3",
    "deepspeed.offload_optimizer=true",
    "deepspeed.offload_parameters=true",
]
ON_8_GPUS = Planned(8, "", nodes=1, per_node=8)
with_deepspeed = pytest.mark.skipif(bool(not_installed()), reason="deepspeed is not installed")


def told(
    severity: str,
    config: PretrainConfig,
    planned: Planned,
    *,
    device: str | None = None,
    cluster: ClusterConfig | None = None,
) -> list[str]:
    """What check_memory finds of this severity."""
    findings = Findings()
    check_memory(config, planned, VOCABULARY, device, cluster, findings)
    return [one.text for one in findings.of(severity)]


def gpus(memory: str | None) -> ClusterConfig:
    return ClusterConfig(gpus_per_node=8, memory_per_node=memory)


def offloading(config: PretrainConfig, **settings: bool) -> PretrainConfig:
    return replace(config, deepspeed=replace(config.deepspeed, **settings))


def test_what_is_said_of_a_launch() -> None:
    """The rest of these tests look at the parts of it."""
    words = ["+model=magneto_1b", *OFFLOADED, "cluster=gpu8_infiniband"]
    findings = check([*words, "cluster.memory_per_node=16G"], Machines(device="4GiB")).findings
    found = [(one.severity, one.text) for one in findings if one.topic in ("memory", "compute")]
    for severity, text in [
        (NOTE, "a step of 16,384 tokens is "),
        (NOTE, "a GPU of pipeline stage 0 needs "),
        (NOTE, "the 8 processes of a node keep "),
        (WARNING, "cluster.memory_per_node=16G leaves 14.4 GiB, and the 8 processes of a node"),
        (WARNING, "--device 4GiB leaves 3.7 GiB: "),
    ]:
        assert any(one == severity and text in line for one, line in found), found
    assert len(found) == 5


# ---- computing


def flops(config: PretrainConfig, processes: int) -> str:
    findings = Findings()
    check_flops(config, processes, VOCABULARY, findings)
    (note,) = findings.of(NOTE)
    return note.text


def test_flops_of_a_step() -> None:
    """For each weight of a linear layer, of 4 layers of width 128, and of the output layer 6 a
    token; for attention 12 L h s."""
    config = load(["+model=magneto_tiny", "data.seq_length=64", "train.global_batch_size=8"])
    rows = -(-VOCABULARY // 128) * 128
    weights = 4 * (4 * 128 * 128 + 2 * 128 * 512) + rows * 128
    attention = 12 * 4 * 128 * 64
    a_token = 6 * weights + attention
    step = a_token * 512
    plain = f"a step of 512 tokens is {step:.3g} model FLOPs, {a_token:.3g} a token"
    assert flops(config, 1) == plain
    shared = f"{plain} and {step / 4:.3g} a step on each of 4 processes"
    assert flops(config, 4) == shared
    selective = RecomputeGranularity.selective
    recomputed = replace(config.parallel, recompute_granularity=selective)
    again = step + 512 * attention // 3
    assert flops(replace(config, parallel=recomputed), 4) == shared + (
        f"; parallel.recompute_granularity=selective makes them {again:.3g}, "
        f"{again / step - 1:.1%} more"
    )
    findings = Findings()
    check_flops(None, 1, VOCABULARY, findings)
    check_flops(config, 1, None, findings)
    assert findings.all == []


# ---- stages


def test_every_stage_is_shown() -> None:
    config = load(["+model=magneto_1b", "parallel.pipeline_model_parallel_size=4"])
    stages = predict_memory_of_run(config, 4, vocab_size=VOCABULARY).stages
    shown = ", ".join(f"{stage.stage}: {readable(stage.total)}" for stage in stages)
    assert len(set(shown.split(", "))) == 4
    assert f"at their peaks, by pipeline stage: {shown}" in told(NOTE, config, Planned(4, ""))
    config = replace(config, parallel=replace(config.parallel, pipeline_model_parallel_size=1))
    assert not any("by pipeline stage" in one for one in told(NOTE, config, Planned(4, "")))


def test_stages_that_take_the_same_are_shown_together() -> None:
    config = load(
        [
            "+model=magneto_70b",
            "parallel=tp8_sp",
            "parallel.pipeline_model_parallel_size=8",
            "train.global_batch_size=1",
        ]
    )
    (line,) = [one for one in told(NOTE, config, Planned(64, "")) if "by pipeline stage" in one]
    assert re.search(r"stage: 0: [\d.]+ GiB, 1 to 6: [\d.]+ GiB, 7: [\d.]+ GiB$", line)


# ---- the memory of hosts


def test_what_is_offloaded_must_fit_the_host() -> None:
    """And every way out that is told is one."""
    config = load(["+model=magneto_13b", *OFFLOADED, "train.global_batch_size=64"])
    offloaded = 8 * predict_memory_of_run(config, 8, vocab_size=VOCABULARY).peak.host
    copies = checkpoint_bytes(config, VOCABULARY)
    keep = (
        f"the 8 processes of a node keep {readable(offloaded + copies)} "
        f"({readable(offloaded)} of what is offloaded, {readable(copies)} to write checkpoints "
        "from) in its memory"
    )
    assert keep in told(NOTE, config, ON_8_GPUS)
    (problem,) = told(WARNING, config, ON_8_GPUS, cluster=gpus("64G"))
    limit = "cluster.memory_per_node=64G leaves 57.6 GiB, and "
    assert problem.startswith(f"{limit}{keep}: use cluster.memory_per_node=")
    memory, nodes = (way.partition("=")[2] for way in problem.split(": use ")[1].split(", or "))
    assert told(WARNING, config, ON_8_GPUS, cluster=gpus(memory)) == []
    more = Planned(8 * int(nodes), "", nodes=int(nodes), per_node=8)
    assert told(WARNING, config, more, cluster=gpus("64G")) == []
    assert told(WARNING, config, ON_8_GPUS, cluster=gpus("0")) == []
    needed = (offloaded + copies) / USABLE / 2**20
    assert told(WARNING, config, ON_8_GPUS, cluster=gpus(str(int(needed) + 1))) == []
    assert len(told(WARNING, config, ON_8_GPUS, cluster=gpus(str(int(needed))))) == 1


def test_less_is_offloaded_where_the_device_holds_it() -> None:
    config, cluster = load(["+model=magneto_13b", *OFFLOADED]), gpus("250G")
    none = "deepspeed.offload_optimizer=false deepspeed.offload_parameters=false"
    for device, told_so in {None: True, "h100-80gb": True, "40GiB": False}.items():
        (problem,) = told(WARNING, config, ON_8_GPUS, device=device, cluster=cluster)
        assert problem.endswith(f", or {none}") == told_so
    less = offloading(config, offload_optimizer=False, offload_parameters=False)
    assert told(WARNING, less, ON_8_GPUS, device="h100-80gb", cluster=cluster) == []


def test_on_a_cpu_the_training_is_in_the_hosts_memory() -> None:
    config = load(["+model=magneto_tiny", "data.seq_length=64", "train.global_batch_size=2"])
    peak = predict_memory_of_run(config, 2, vocab_size=VOCABULARY, device="cpu").peak.total
    copies = checkpoint_bytes(config, VOCABULARY)
    planned = Planned(2, "", nodes=1, per_node=2)
    limit = int((2 * peak + copies / 2) / USABLE / 2**10)
    cluster = ClusterConfig(processes_per_node=2, memory_per_node=f"{limit}K")
    first, second = told(NOTE, config, planned, cluster=cluster)
    assert first.startswith(f"a process of pipeline stage 0 needs {readable(peak)} at its peak")
    assert second == (
        f"the 2 processes of a node keep {readable(2 * peak + copies)} ({readable(2 * peak)} of "
        f"the training, {readable(copies)} to write checkpoints from) in its memory"
    )
    (problem,) = told(WARNING, config, planned, cluster=cluster)
    assert ", or checkpoint.async_save=false" in problem
    in_place = replace(config, checkpoint=replace(config.checkpoint, async_save=False))
    assert told(WARNING, in_place, planned, cluster=cluster) == []


def test_of_a_host_nobody_knows_only_what_is_offloaded_is_told() -> None:
    config = load(["+model=magneto_1b", *OFFLOADED])
    each = [one for one in told(NOTE, config, Planned(8, "")) if "host's memory" in one]
    assert len(each) == 1 and each[0].startswith("each process keeps ")
    config = offloading(config, offload_optimizer=False, offload_parameters=False)
    assert not any("host's memory" in one for one in told(NOTE, config, Planned(8, "")))


@pytest.mark.parametrize(
    ("memory", "room"),
    [(None, None), ("0", None), ("0G", None), ("1T", 2**40), ("64G", 2**36), ("100", 100 * 2**20)],
)
def test_what_a_process_may_offload(memory: str | None, room: int | None) -> None:
    config = load(["+model=magneto_tiny"])
    expected = None
    if room is not None:
        expected = (USABLE * room - checkpoint_bytes(config, VOCABULARY)) / 8
    found = host_room(config, ON_8_GPUS, VOCABULARY, gpus(memory))
    assert found == (None if expected is None else pytest.approx(expected))


# ---- what would fit


def proposed(words: Sequence[str], processes: int, device: str) -> list[str]:
    """The words that are told to help, which do."""
    planned = Planned(processes, "")
    (problem,) = told(WARNING, load(list(words)), planned, device=device)
    more = problem.partition(": with ")[2].partition(" it would be")[0].split()
    assert more, problem
    changed = {word.partition("=")[0] for word in more}
    rest = [word for word in words if word.partition("=")[0] not in changed]
    again = load([*rest, *more])
    validate(again, processes)
    assert told(WARNING, again, planned, device=device) == []
    return more


def test_nothing_is_proposed_for_what_is_refused_on_a_gpu() -> None:
    config = load(["+model=xmoe_1b_16e", "engine=deepspeed"])  # its routers are in fp32, see there
    assert told(WARNING, config, Planned(8, ""), device="a10-24gb") == []
    (note,) = told(NOTE, config, Planned(8, ""), device="a10-24gb")
    assert note.startswith("memory is not predicted, because there are errors")


def test_there_is_no_micro_batch_below_one() -> None:
    words = ["+model=xmoe_1b_16e", "parallel=ep8", "parallel.recompute_granularity=full"]
    (warning,) = told(WARNING, load(words), Planned(8, ""), device="a10-24gb")
    assert warning.endswith("set model.moe.expert_capacity_factor=1.25")


@with_deepspeed
def test_the_other_engine_where_nothing_else_fits() -> None:
    more = proposed(["+model=magneto_2_7b"], 1, "24GiB")
    assert more[0] == "engine=deepspeed"
    assert "deepspeed.offload_optimizer=true" in more
    assert "deepspeed.offload_parameters=true" not in more


@with_deepspeed
@pytest.mark.parametrize(
    ("model", "memory"),
    [("xmoe_7b_64e", None), ("magneto_2_7b", "80G")],
    ids=["which refuses experts in bf16", "whose host has no room"],
)
def test_the_other_engine_is_no_way_out(model: str, memory: str | None) -> None:
    alone = Planned(1, "", nodes=1, per_node=1)
    config = load([f"+model={model}"])
    problem = told(WARNING, config, alone, device="40GiB", cluster=gpus(memory))[-1]
    assert "40GiB leaves 36.8 GiB: none of the layouts tried is small enough on 1 pro" in problem


@with_deepspeed
def test_what_belongs_to_the_engine_that_is_left_stays_behind() -> None:
    words = ["+model=magneto_2_7b", "parallel=tp2_pp2", "parallel.overlap_grad_reduce=true"]
    more = proposed(words, 4, "7GiB")
    assert more[0] == "engine=deepspeed"
    assert "parallel.pipeline_model_parallel_size=1" in more
    assert "parallel.overlap_grad_reduce=false" in more


@with_deepspeed
def test_offload_comes_last() -> None:
    words = ["+model=magneto_70b", "engine=deepspeed", "train.global_batch_size=512"]
    more = proposed(words, 512, "h100-80gb")
    assert more == ["parallel.recompute_granularity=full", "deepspeed.zero_stage=3"]
    config = load(words)
    seen = [
        (one.deepspeed.offload_optimizer, one.deepspeed.offload_parameters)
        for one in leaner(config, 512)
    ]
    assert list(dict.fromkeys(seen)) == [(False, False), (True, False), (True, True)]
    assert seen == sorted(seen)
    asked = offloading(config, offload_optimizer=True)
    assert all(one.deepspeed.offload_optimizer for one in leaner(asked, 512))
    assert {one.engine for one in leaner(config, 512)} == {EngineKind.deepspeed}
