"""Rules of the run and across rooms, each broken once; every offered value is tried."""

import re
from pathlib import Path

import pytest

from data.config import DataConfig
from data.packing_config import PackingConfig
from models.config import ModelConfig
from parallel.config import (
    ConfigError,
    ContextParallelComm,
    OptimizerConfig,
    ParallelConfig,
    RecomputeGranularity,
)
from pretrain.config import CheckpointConfig, PretrainConfig, ScheduleConfig, TrainConfig
from pretrain.config_rules import validate


def model(**settings: object) -> ModelConfig:
    shape: dict[str, object] = {
        "name": "tiny",
        "num_layers": 12,
        "hidden_size": 96,
        "ffn_hidden_size": 384,
        "num_attention_heads": 12,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**(shape | settings))  # type: ignore[arg-type]


def problems(world_size: int, **rooms: object) -> tuple[str, ...]:
    config = PretrainConfig(**({"model": model()} | rooms))  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size)
    return caught.value.problems


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_warmup_steps": -1}, "schedule.lr_warmup_steps=-1 must be 0 or more"),
        ({"lr_decay_steps": 0}, "schedule.lr_decay_steps=0 must be 1 or more"),
        (
            {"lr_warmup_steps": 10, "lr_decay_steps": 9},
            "schedule.lr_decay_steps=9 counts from step 0 and must not end before "
            "schedule.lr_warmup_steps=10; use 10 or more",
        ),
        ({"min_lr": -1e-5}, "schedule.min_lr=-1e-05 must be 0 or"),
    ],
)
def test_schedule_rules(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ScheduleConfig(**settings)  # type: ignore[arg-type]
    assert len(caught.value.problems) == 1
    assert words in caught.value.problems[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_steps", 0),
        ("micro_batch_size", 0),
        ("global_batch_size", 0),
        ("log_interval", 0),
        ("eval_sequences", 0),
        ("seed", -1),
        ("eval_interval", -1),
    ],
)
def test_train_rules(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.{name}={value} must be {value + 1} or more$"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", ["save_interval", "keep_last"])
def test_checkpoint_rules(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^checkpoint\.{name}=-1 must be 0 or more$"):
        CheckpointConfig(**{name: -1})


def test_run_dir() -> None:
    assert PretrainConfig(model=model()).run_dir == "runs/tiny"
    at_home = PretrainConfig(
        model=model(), run_dir="~/runs", checkpoint=CheckpointConfig(load="~/other")
    )
    assert at_home.run_dir == str(Path.home() / "runs")
    assert at_home.checkpoint.load == str(Path.home() / "other")
    with pytest.raises(ConfigError, match="run_dir= is empty"):
        PretrainConfig(model=model(), run_dir="")


def test_seq_length_is_the_models_unless_given() -> None:
    assert PretrainConfig(model=model()).seq_length == 64
    assert PretrainConfig(model=model(), data=DataConfig(seq_length=32)).seq_length == 32


def test_validate_returns_the_layout() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=3,
        sequence_parallel=True,
        recompute_granularity=RecomputeGranularity.full,
        recompute_num_layers=2,
    )
    config = PretrainConfig(
        model=model(), parallel=parallel, train=TrainConfig(global_batch_size=12)
    )
    assert validate(config, world_size=16).data_parallel_size == 2


def test_world_size() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    (problem,) = problems(6, parallel=parallel)
    assert problem.startswith(
        "parallel.tensor_model_parallel_size=2 x parallel.pipeline_model_parallel_size=2 needs a "
        "multiple of 4 processes, and 6 processes were started; start 4 or 8 with torchrun"
    )


@pytest.mark.parametrize(
    ("settings", "tensor", "broken"),
    [
        ({}, 8, "model.num_attention_heads=12"),
        ({"num_query_groups": 2}, 4, "model.num_query_groups=2"),
        ({"ffn_hidden_size": 386}, 4, "model.ffn_hidden_size=386"),
        ({}, 3, "model.make_vocab_size_divisible_by=128"),
        ({"vocab_size": 1000}, 3, "the padded vocabulary of 1024"),
        (
            {"num_query_groups": 6, "ffn_hidden_size": 386},
            4,
            "model.num_query_groups=6 and model.ffn_hidden_size=386",
        ),
    ],
)
def test_tensor_parallel_size(settings: dict[str, object], tensor: int, broken: str) -> None:
    shape = model(**settings)
    parallel = ParallelConfig(tensor_model_parallel_size=tensor)
    (problem,) = problems(tensor, model=shape, parallel=parallel)
    assert problem.startswith(f"parallel.tensor_model_parallel_size={tensor} must divide {broken};")
    for size in map(int, re.findall(r"\d+", problem.partition(";")[2])):  # what it offers works
        offered = ParallelConfig(tensor_model_parallel_size=size)
        validate(PretrainConfig(model=shape, parallel=offered), world_size=size)


def test_vocabulary_that_happens_to_divide() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=3)
    validate(
        PretrainConfig(model=model(vocab_size=3 * 128), parallel=parallel, train=TrainConfig()),
        world_size=3,
    )


def test_pipeline_parallel_size() -> None:
    (problem,) = problems(5, parallel=ParallelConfig(pipeline_model_parallel_size=5))
    assert problem == (
        "parallel.pipeline_model_parallel_size=5 must divide model.num_layers=12; "
        "1, 2, 3, 4, 6 and 12 do"
    )
    (problem,) = problems(
        2, model=model(num_layers=1), parallel=ParallelConfig(pipeline_model_parallel_size=2)
    )
    assert problem.endswith("must divide model.num_layers=1; only 1 does")


def test_interleaved_stages() -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2
    )
    (problem,) = problems(4, parallel=parallel)
    assert problem == (
        "parallel.pipeline_model_parallel_size=4 x "
        "parallel.virtual_pipeline_model_parallel_size=2 must divide model.num_layers=12; "
        "at most 2 x 6, 3 x 4, 4 x 3, 6 x 2 or 12 x 1, or divisors of these"
    )


def test_recompute_groups() -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2,
        recompute_granularity=RecomputeGranularity.full,
        recompute_num_layers=4,
    )
    (problem,) = problems(2, parallel=parallel)
    assert problem == (
        "parallel.recompute_num_layers=4 must divide the 6 layers of one pipeline stage; "
        "1, 2, 3 and 6 do"
    )


def test_sequence() -> None:
    (problem,) = problems(1, data=DataConfig(seq_length=65))
    assert problem.startswith(
        "data.seq_length=65 must not exceed model.max_position_embeddings=64; use 64 or less"
    )
    sharded = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    (problem,) = problems(4, data=DataConfig(seq_length=30), parallel=sharded)
    assert problem.startswith(
        "data.seq_length=30 must be a multiple of parallel.tensor_model_parallel_size=4"
    )
    assert problem.endswith("use 28 or 32")


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_sequence_on_context_parallel_ranks(sequence_parallel: bool) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        sequence_parallel=sequence_parallel,
    )
    (problem,) = problems(4, data=DataConfig(seq_length=30), parallel=parallel)
    unit = "2 x parallel.context_parallel_size=2"
    if sequence_parallel:
        unit += " x parallel.tensor_model_parallel_size=2 under parallel.sequence_parallel=true"
    assert problem.startswith(f"data.seq_length=30 must be a multiple of {unit}; use ")
    lengths = [int(number) for number in re.findall(r"\d+", problem.partition("; use")[2])]
    assert lengths == ([24, 32] if sequence_parallel else [28, 32])
    for length in lengths:
        data = DataConfig(seq_length=length)
        validate(PretrainConfig(model=model(), data=data, parallel=parallel), world_size=4)


@pytest.mark.parametrize(
    ("settings", "tensor", "context", "rule"),
    [
        ({}, 1, 8, "model.num_attention_heads=12 under"),
        (
            {},
            2,
            4,
            "model.num_attention_heads=12 over parallel.tensor_model_parallel_size=2 under",
        ),
        ({"num_query_groups": 2}, 1, 4, "model.num_query_groups=2 under"),
        (
            {"num_query_groups": 4},
            1,
            8,
            "model.num_attention_heads=12 and model.num_query_groups=4 under",
        ),
    ],
)
def test_heads_that_ranks_share(
    settings: dict[str, object], tensor: int, context: int, rule: str
) -> None:
    def parallel(size: int, comm: ContextParallelComm) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=tensor, context_parallel_size=size, cp_comm_type=comm
        )

    def accept(size: int, comm: ContextParallelComm) -> None:
        data = DataConfig(seq_length=2 * size)
        config = PretrainConfig(model=shape, data=data, parallel=parallel(size, comm))
        validate(config, world_size=tensor * size)

    shape = model(**settings)
    (problem,) = problems(
        tensor * context, model=shape, parallel=parallel(context, ContextParallelComm.a2a)
    )
    assert problem.startswith(f"parallel.context_parallel_size={context} must divide {rule} ")
    offered, all_gather, _ = problem.partition(", or use parallel.cp_comm_type=all_gather")
    assert all_gather
    accept(context, ContextParallelComm.all_gather)
    for size in map(int, re.findall(r"\d+", offered.partition(";")[2])):
        accept(size, ContextParallelComm.a2a)


def test_documents_are_not_told_apart_on_context_parallel_ranks() -> None:
    data = DataConfig(packing=PackingConfig(reset_attention=True))
    (problem,) = problems(2, data=data, parallel=ParallelConfig(context_parallel_size=2))
    assert problem.startswith(
        "data.packing.reset_attention=true needs parallel.context_parallel_size=1, not 2"
    )
    validate(PretrainConfig(model=model(), data=data), world_size=2)


def test_a_tensor_parallel_size_that_does_not_fit_is_told_once() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=8,
        context_parallel_size=2,
        cp_comm_type=ContextParallelComm.a2a,
    )
    (problem,) = problems(16, parallel=parallel)
    assert problem.startswith("parallel.tensor_model_parallel_size=8 must divide")


def test_global_batch_size() -> None:
    (problem,) = problems(2, train=TrainConfig(micro_batch_size=4, global_batch_size=20))
    assert problem == (
        "train.global_batch_size=20 must be a multiple of train.micro_batch_size=4 x "
        "data-parallel size 2 = 8; use 16 or 24"
    )
    (problem,) = problems(4, train=TrainConfig(global_batch_size=3))
    assert problem.endswith("= 4; use 4")


def test_global_batch_size_with_interleaved_stages() -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=3
    )
    (problem,) = problems(4, parallel=parallel, train=TrainConfig(global_batch_size=6))
    assert "x parallel.pipeline_model_parallel_size=4" in problem
    assert problem.endswith("= 4; use 4 or 8")


def test_learning_rate() -> None:
    (problem,) = problems(
        1, schedule=ScheduleConfig(lr_warmup_steps=11), train=TrainConfig(train_steps=10)
    )
    assert problem == (
        "schedule.lr_warmup_steps=11 must not exceed train.train_steps=10; use 10 or less, "
        "such as 1"
    )
    (problem,) = problems(
        1, schedule=ScheduleConfig(min_lr=0.02), optimizer=OptimizerConfig(lr=0.01)
    )
    assert problem == "schedule.min_lr=0.02 must not exceed optimizer.lr=0.01; use 0.001"


def test_problems_of_all_kinds_are_told_together() -> None:
    told = problems(
        7,
        parallel=ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=5),
        data=DataConfig(seq_length=100),
        schedule=ScheduleConfig(lr_warmup_steps=5000),
    )
    assert len(told) == 5
