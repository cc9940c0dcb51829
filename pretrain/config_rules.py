"""The rules that cross rooms: what no dataclass of settings can check alone.

Imports neither torch nor megatron-core.
"""

import math
from importlib.util import find_spec

from models.parameter_count import padded_vocab_size
from parallel.config import (
    FIRST_STEP_ALLOWANCE,
    ConfigError,
    ContextParallelComm,
    RecomputeGranularity,
)
from parallel.deepspeed_config import (
    EngineKind,
    Launch,
    counting_for_nothing,
    not_installed,
    problems_of,
)
from parallel.rank_layout import RankLayout
from pretrain.config import PretrainConfig


def validate(config: PretrainConfig, world_size: int) -> RankLayout:
    """Checks what one room cannot check alone, and the layout against the number of processes.

    The answer depends on the arguments only, so all ranks come to the same one before the first
    collective. Returns the layout. Raises ConfigError with every broken rule.
    """
    layout = None
    problems: list[str] = []
    try:
        layout = RankLayout.of(config.parallel, world_size)
    except ConfigError as error:
        problems += error.problems
    problems += _tensor_parallel(config) + _pipeline_parallel(config)
    problems += _context_parallel(config) + _sequence(config)
    problems += _experts(config, layout.ranks_per_stage if layout else None)
    if layout is not None:
        problems += _batch(config, layout.data_parallel_size)
    problems += _learning_rate(config) + _profile(config, world_size) + _tensorboard(config)
    problems += _hang_timeout(config) + _best_checkpoints(config) + _rollback(config)
    problems += _law(config) + _countable(config)
    problems += _engine(config)
    if layout is None or problems:
        raise ConfigError(*problems)
    return layout


def _engine(config: PretrainConfig) -> list[str]:
    if config.engine is EngineKind.megatron:
        return counting_for_nothing(config.deepspeed)
    launch = Launch(config.parallel, config.deepspeed, config.model.moe.num_experts)
    return not_installed() + problems_of(launch)


def _tensor_parallel(config: PretrainConfig) -> list[str]:
    model, size = config.model, config.parallel.tensor_model_parallel_size
    # with the tokenizer's vocabulary still unknown, whatever it is has to fit after padding
    multiple = model.make_vocab_size_divisible_by
    padded = padded_vocab_size(model.vocab_size or multiple, multiple)
    split = {
        f"model.num_attention_heads={model.num_attention_heads}": model.num_attention_heads,
        f"model.num_query_groups={model.query_groups}": model.query_groups,
        f"model.ffn_hidden_size={model.ffn_hidden_size}": model.ffn_hidden_size,
        f"model.make_vocab_size_divisible_by={multiple}"
        if model.vocab_size is None
        else f"the padded vocabulary of {padded}": padded,
    }
    if model.num_query_groups is None:  # as many as heads, and not typed by anyone
        del split[f"model.num_query_groups={model.query_groups}"]
    broken = [name for name, width in split.items() if width % size]
    if not broken:
        return []
    return [
        f"parallel.tensor_model_parallel_size={size} must divide {_and(broken)}; "
        f"{_which_do(_divisors(math.gcd(*split.values())))}"
    ]


def _experts(config: PretrainConfig, ranks_per_stage: int | None) -> list[str]:
    model, parallel, moe = config.model, config.parallel, config.model.moe
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    typed = {
        f"parallel.expert_model_parallel_size={ep}": ep,
        f"parallel.expert_tensor_parallel_size={etp}": etp,
    }
    if moe.num_experts == 0:
        split = [name for name, size in typed.items() if size > 1]
        if not split:
            return []
        return [
            f"{_and(split)} shares out experts, and {model.name} has none; use 1, or a model with "
            "experts such as +model=xmoe_tiny"
        ]
    problems = []
    if moe.num_experts % ep:
        shared_out = math.gcd(moe.num_experts, ranks_per_stage or 0)  # gcd with 0: the other
        problems.append(
            f"parallel.expert_model_parallel_size={ep} must divide model.moe.num_experts="
            f"{moe.num_experts}; {_which_do(_divisors(shared_out))}"
        )
    widths = {
        f"the width of an expert, {model.expert_ffn_hidden_size}": model.expert_ffn_hidden_size,
        f"model.hidden_size={model.hidden_size}": model.hidden_size,
    }
    broken = [name for name, width in widths.items() if width % etp]
    if broken:
        problems.append(
            f"parallel.expert_tensor_parallel_size={etp} must divide {_and(broken)}; "
            f"{_which_do(_divisors(math.gcd(*widths.values())))}"
        )
    if etp > 1 and moe.sparse_after_layer:
        problems.append(
            f"parallel.expert_tensor_parallel_size={etp} must be 1 with model.moe."
            f"sparse_after_layer={moe.sparse_after_layer}: the norms inside its experts are not "
            "split; use parallel.expert_model_parallel_size"
        )
    tp, shared = parallel.tensor_model_parallel_size, moe.shared_expert_intermediate_size
    if shared % tp:
        problems.append(
            f"parallel.tensor_model_parallel_size={tp} must divide "
            f"model.moe.shared_expert_intermediate_size={shared}; "
            f"{_which_do(_divisors(shared))}"
        )
    if tp > 1 and not parallel.sequence_parallel:
        problems.append(
            f"parallel.tensor_model_parallel_size={tp} needs parallel.sequence_parallel=true in a "
            "model with experts: every tensor-parallel rank would send the same tokens to them"
        )
    return problems


def _pipeline_parallel(config: PretrainConfig) -> list[str]:
    parallel, layers = config.parallel, config.model.num_layers
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    if layers % (pipeline * virtual):
        if virtual == 1:
            return [
                f"parallel.pipeline_model_parallel_size={pipeline} must divide "
                f"model.num_layers={layers}; {_which_do(_divisors(layers))}"
            ]
        pairs = [f"{p} x {layers // p}" for p in _divisors(layers)[1:]]
        return [
            f"parallel.pipeline_model_parallel_size={pipeline} x "
            f"parallel.virtual_pipeline_model_parallel_size={virtual} must divide "
            f"model.num_layers={layers}; at most {_and(pairs, 'or')}, or divisors of these"
        ]
    local = layers // (pipeline * virtual)
    group = parallel.recompute_num_layers
    if parallel.recompute_granularity is RecomputeGranularity.full and local % group:
        return [
            f"parallel.recompute_num_layers={group} must divide the {local} layers of one "
            f"pipeline stage; {_which_do(_divisors(local))}"
        ]
    return []


def _context_parallel(config: PretrainConfig) -> list[str]:
    model, parallel = config.model, config.parallel
    size, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if size == 1:
        return []
    problems = []
    if config.data.packing.reset_attention:
        problems.append(
            f"data.packing.reset_attention=true needs parallel.context_parallel_size=1, not {size}:"
            " a document that lies on several ranks cannot be told from its neighbours yet; use "
            "that, or data.packing.reset_attention=false"
        )
    shared = math.gcd(model.num_attention_heads, model.query_groups)
    if parallel.cp_comm_type is not ContextParallelComm.a2a or shared % tensor:
        return problems  # if the tensor size does not fit, it has been told
    heads = {f"model.num_attention_heads={model.num_attention_heads}": model.num_attention_heads}
    if model.num_query_groups is not None:
        heads[f"model.num_query_groups={model.query_groups}"] = model.query_groups
    broken = [name for name, count in heads.items() if count // tensor % size]
    if broken:
        problems.append(
            f"parallel.context_parallel_size={size} must divide {_and(broken)}"
            + (f" over parallel.tensor_model_parallel_size={tensor}" if tensor > 1 else "")
            + " under parallel.cp_comm_type=a2a, which shares out the heads; "
            f"{_which_do(_divisors(shared // tensor))}, or use parallel.cp_comm_type=all_gather"
        )
    return problems


def _sequence(config: PretrainConfig) -> list[str]:
    length, longest = config.seq_length, config.model.max_position_embeddings
    typed = f"data.seq_length={length}"
    problems = []
    if length > longest:
        problems.append(
            f"{typed} must not exceed model.max_position_embeddings={longest}; use {longest} or "
            "less, or a model made for longer sequences"
        )
    unit, factors = 1, []
    if config.parallel.context_parallel_size > 1:
        unit *= 2 * config.parallel.context_parallel_size  # each rank holds two chunks
        factors.append(f"2 x parallel.context_parallel_size={unit // 2}")
    if config.parallel.sequence_parallel:
        unit *= config.parallel.tensor_model_parallel_size
        factors.append(
            f"parallel.tensor_model_parallel_size={config.parallel.tensor_model_parallel_size} "
            "under parallel.sequence_parallel=true"
        )
    if length % unit:
        fits = _neighbours(length, unit)
        if length >= unit and (length // unit + 1) * unit > longest:
            fits = f"{length // unit * unit}"
        problems.append(f"{typed} must be a multiple of {' x '.join(factors)}; use {fits}")
    return problems


def _countable(config: PretrainConfig) -> list[str]:
    train = config.train
    sequences = train.train_steps * train.global_batch_size
    if sequences * config.seq_length < 1 << 63:
        return []
    name = max(("train_steps", "global_batch_size"), key=lambda one: getattr(train, one))
    most = ((1 << 63) - 1) * getattr(train, name) // (sequences * config.seq_length)
    return [
        f"train.{name}={getattr(train, name)} is too large: train.train_steps x "
        "train.global_batch_size x the sequence length must stay below 2^63 tokens; use "
        f"{most} or less"
    ]


def _batch(config: PretrainConfig, data_parallel_size: int) -> list[str]:
    train, parallel = config.train, config.parallel
    unit = train.micro_batch_size * data_parallel_size
    product = (
        f"train.micro_batch_size={train.micro_batch_size} x data-parallel size {data_parallel_size}"
    )
    if parallel.virtual_pipeline_model_parallel_size > 1:
        # megatron-core's interleaved schedule moves groups of as many micro-batches as stages
        unit *= parallel.pipeline_model_parallel_size
        product += (
            f" x parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} "
            "(interleaved stages take micro-batches in groups of that many)"
        )
    if train.global_batch_size % unit == 0:
        return []
    return [
        f"train.global_batch_size={train.global_batch_size} must be a multiple of {product} = "
        f"{unit}; use {_neighbours(train.global_batch_size, unit)}"
    ]


def _learning_rate(config: PretrainConfig) -> list[str]:
    schedule, steps, lr = config.schedule, config.train.train_steps, config.optimizer.lr
    problems = []
    if schedule.lr_warmup_steps > steps:
        problems.append(
            f"schedule.lr_warmup_steps={schedule.lr_warmup_steps} must not exceed "
            f"train.train_steps={steps}; use {steps} or less, such as {steps // 10}"
        )
    if schedule.min_lr > lr:
        problems.append(
            f"schedule.min_lr={schedule.min_lr} must not exceed optimizer.lr={lr}; use {lr / 10:g}"
        )
    return problems


def _law(config: PretrainConfig) -> list[str]:
    law = config.data.mixture.law
    if not law:
        return []
    from data.mixture_law import open_law  # imports numpy, which runs without a law need later

    try:
        open_law(law)
    except ValueError as error:
        return [str(error)]
    return []


def _best_checkpoints(config: PretrainConfig) -> list[str]:
    best, save = config.checkpoint.keep_best, config.checkpoint.save_interval
    evaluate = config.train.eval_interval
    if best == 0 or save == 0 or (evaluate and save % evaluate == 0):
        return []
    use = f"train.eval_interval={save}, or a divisor of that"
    if evaluate:
        use = f"checkpoint.save_interval={_neighbours(save, evaluate)}"
    return [
        f"checkpoint.keep_best={best} compares what is evaluated in the step it is saved: "
        f"checkpoint.save_interval={save} must be a multiple of train.eval_interval={evaluate}; "
        f"use {use}"
    ]


def _rollback(config: PretrainConfig) -> list[str]:
    anomaly = config.anomaly
    if config.checkpoint.save_interval > 0 or not anomaly.rolls_back:
        return []
    asked = {"on_nonfinite": anomaly.on_nonfinite.value, "on_spike": anomaly.on_spike.value}
    return [
        f"anomaly.{name}=rollback goes back to the multiples of checkpoint.save_interval, and "
        "checkpoint.save_interval=0 saves none; save every so many steps, or use "
        f"anomaly.{name}=skip"
        for name, value in asked.items()
        if value == "rollback"
    ]


def _hang_timeout(config: PretrainConfig) -> list[str]:
    hang = config.fault_tolerance.hang_timeout_seconds
    collective = config.parallel.collective_timeout_seconds
    if FIRST_STEP_ALLOWANCE * hang < collective:
        return []
    return [
        f"fault_tolerance.hang_timeout_seconds={hang:g}, times {FIRST_STEP_ALLOWANCE:g} in the "
        f"first step, must be below parallel.collective_timeout_seconds={collective:g}, or the "
        "collective gives up before anyone has said which rank is behind; use "
        f"{collective / (FIRST_STEP_ALLOWANCE + 1):g}, or a longer timeout there"
    ]


def _profile(config: PretrainConfig, world_size: int) -> list[str]:
    beyond = [rank for rank in config.profile.ranks if rank >= world_size]
    if not beyond:
        return []
    return [
        f"profile.ranks={config.profile.ranks} names rank {beyond[0]}, but the run has ranks 0 to "
        f"{world_size - 1}; use some of these"
    ]


def _tensorboard(config: PretrainConfig) -> list[str]:
    if not config.tensorboard.enabled or find_spec("tensorboard") is not None:
        return []
    return [
        "tensorboard.enabled=true needs the package tensorboard, which is not installed; install "
        "magnetron[tensorboard], or use tensorboard.enabled=false (metrics.jsonl has all numbers)"
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _neighbours(number: int, unit: int) -> str:
    """The multiples of `unit` on both sides of `number`."""
    below, above = number // unit * unit, (number // unit + 1) * unit
    return f"{below} or {above}" if below else f"{above}"


def _which_do(numbers: list[int]) -> str:
    return "only 1 does" if numbers == [1] else f"{_and([str(n) for n in numbers])} do"


def _and(words: list[str], conjunction: str = "and") -> str:
    return f" {conjunction} ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
