"""Names from Megatron-LM, DeepSpeed, torchtitan and Hugging Face lead to the settings meant."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.aliases import ADVICE, ALIASES, REFUSED_VALUES
from launch.check import check, main
from launch.foreign_flags import with_words
from launch.schema import load
from launch.setting_names import settings
from parallel.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TINY = "+model=magneto_tiny"


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load([TINY, *words])
    (problem,) = caught.value.problems
    return problem


def test_what_is_meant_exists() -> None:
    assert set(ALIASES.values()) <= set(settings())
    assert not set(ALIASES) & set(settings())
    assert not set(ADVICE) & set(settings())
    assert set(REFUSED_VALUES) <= set(settings())


@pytest.mark.parametrize(
    ("word", "meant"),
    {
        "model.d_model=64": "model.hidden_size",
        "hidden_dim=64": "model.hidden_size",
        "n_layers=2": "model.num_layers",
        "num_layers=2": "model.num_layers",
        "n_heads=2": "model.num_attention_heads",
        "train.seq_len=64": "data.seq_length",
        "parallel.tp=2": "parallel.tensor_model_parallel_size",
        "parallel.pp=2": "parallel.pipeline_model_parallel_size",
        "parallel.cp=2": "parallel.context_parallel_size",
        "ep=2": "parallel.expert_model_parallel_size",
        "optimizer.learning_rate=1e-3": "optimizer.lr",
        "optimizer.grad_clip=1": "optimizer.clip_grad",
        "clip_grad=1": "optimizer.clip_grad",
        "gradient_clipping=1": "optimizer.clip_grad",
        "train.max_grad_norm=1": "optimizer.clip_grad",
        "train.max_steps=5": "train.train_steps",
        "train_iters=5": "train.train_steps",
        "lr_warmup_iters=5": "schedule.lr_warmup_steps",
        "warmup_steps=5": "schedule.lr_warmup_steps",
        "data.num_workers=2": "data.prefetch",
        "output_dir=x": "run_dir",
        "save=x": "run_dir",
        "load=x": "checkpoint.load",
        "train.save_interval=5": "checkpoint.save_interval",
        "cpu_offload=true": "deepspeed.offload_optimizer",
        "+zero_optimization.stage=1": "deepspeed.zero_stage",
        "parallel.zero-stage=1": "deepspeed.zero_stage",
    }.items(),
)
def test_a_name_of_others(word: str, meant: str) -> None:
    assert f"{word}: there is no setting " in refused(word)
    assert f"; did you mean {meant}?" in refused(word)


@pytest.mark.parametrize(
    ("word", "advice"),
    {
        "train.gradient_accumulation_steps=4": "train.global_batch_size / (train.micro_batch_size "
        "x data-parallel size)",
        "parallel.dp=4": "processes / (tensor x context x pipeline)",
        "parallel.activation_checkpointing=true": "parallel.recompute_granularity=full",
        "wandb.enabled=true": "wandb.mode=online",
        "wandb.enabled=false": "wandb.mode=disabled",
        "optimizer.betas=[0.9,0.95]": "optimizer.adam_beta1=0.9 optimizer.adam_beta2=0.95",
        "optimizer.betas=x": "optimizer.adam_beta1 and optimizer.adam_beta2",
        "bf16=true": "write parallel.precision=bf16",
        "bf16=false": "write parallel.precision=fp32",
        "fp16=true": "fp16 is not supported; write parallel.precision=bf16",
        "wandb.name=x": "it is the last folder of run_dir",
        "optimizer.type=adam": "it is AdamW always; leave it out",
        "use_deepspeed=true": "write engine=deepspeed",
        "deepspeed=true": "write engine=deepspeed",
        "zero_optimization.offload_optimizer.device=cpu": "write deepspeed.offload_optimizer=true",
        "nodes=2": "torchrun's --nnodes says how many",
        "gpus=8": "torchrun's --nproc-per-node says how many",
        "nproc_per_node=8": "torchrun's --nproc-per-node says how many",
        "precision=fp8": "parallel.precision, one of auto, fp32, bf16",
        "train.train_tokens=300B": "tokens / (train.global_batch_size x data.seq_length)",
    }.items(),
)
def test_what_has_no_setting_of_its_own(word: str, advice: str) -> None:
    assert advice in refused(word)


def test_a_precision_that_is_not_supported_has_no_neighbour() -> None:
    told = refused("parallel.precision=fp8")
    assert told.endswith("must be one of auto, fp32, bf16; fp8 is not supported, use bf16")
    assert "did you mean bf16" in refused("parallel.precision=bf17")


def test_off_is_not_nearly_offline() -> None:
    assert refused("wandb.mode=off").endswith("; did you mean disabled?")


def test_tokens_are_counted_in_steps() -> None:
    words = [TINY, "train.train_tokens=1.3M", "data.seq_length=64", "train.global_batch_size=16"]
    (error,) = check(words).of("error")
    assert "with 16 sequences of 64 tokens, 1.3M are train.train_steps=1270" in error.text


def test_a_value_that_is_no_number_of_tokens() -> None:
    (error,) = check([TINY, "train.train_tokens=many"]).of("error")
    assert error.text.endswith("(train.global_batch_size x data.seq_length)")


def test_flags_become_words() -> None:
    typed = "--tensor-model-parallel-size 2 --bf16 a=1 --no-async-save --lr=1e-3 --seed -1 --nodes"
    words, problems = with_words(typed.split(), ["--nodes"])
    assert words == [
        "parallel.tensor_model_parallel_size=2",
        "parallel.precision=bf16",
        "a=1",
        "checkpoint.async_save=false",
        "optimizer.lr=1e-3",
        "--nodes",
    ]
    assert problems[0] == (
        "--tensor-model-parallel-size 2: settings are words here; write "
        "parallel.tensor_model_parallel_size=2"
    )
    assert problems[4] == "--seed -1: settings are words here; write data.seed=-1 or train.seed=-1"


@pytest.mark.parametrize(
    ("flags", "says"),
    {
        "--recompute-activations": "write parallel.recompute_granularity=selective",
        "--proceses 4": "there is no such option; did you mean --processes 4?",
        "--model magneto_1b": "write +model=magneto_1b",
        "--optimizer.lr 1e-3": "write optimizer.lr=1e-3",
        "--train.seed 5": "write train.seed=5",
        "--training.steps 5": "write train.train_steps=5",
        "--tensor-parallel 2": "write parallel.tensor_model_parallel_size=2",
        "--lr": "write optimizer.lr=VALUE",
        "--swiglu": "write model.activation=swiglu",
        "--disable-bias-linear": "write model.add_bias_linear=false",
        "--lr-warmup-fraction 0.01": "which counts steps; write there that share",
        "--normalization RMSNorm": "write model.normalization=rms_norm",
        "--train-iters 10k": "settings are words here; write train.train_steps=10000",
        "--deepspeed": "write engine=deepspeed",
        "--eval-iters 10": "no such option; of settings magnetron-pretrain --cfg job prints all",
        "--submit": "no such option; of settings magnetron-pretrain --cfg job prints all",
        "--cfg job": "it is an option of the launcher, launch/pretrain.py; leave it out here",
        "--gradient-accumulation-steps 4": "data-parallel size",
    }.items(),
)
def test_flags_hide_nothing(flags: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([TINY, "optimizer.lr=fast", *flags.split(), "--processes", "1"]) == 2
    told = capsys.readouterr().out
    assert f"settings: {flags}: " in told and says in told
    assert "optimizer.lr=fast must be a number" in told


def test_a_flag_keeps_its_place() -> None:
    said = with_words(["--lr", "1e-3", "optimizer.lr=2e-3"], [])[0]
    assert said == ["optimizer.lr=1e-3", "optimizer.lr=2e-3"]


def test_a_flag_is_taken_as_it_should_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    main([TINY, "--tensor-model-parallel-size", "2", "data.corpus=/nowhere"])
    told = capsys.readouterr().out
    assert "magneto_tiny on 2 processes" in told and "data.corpus=/nowhere" in told


def test_flags_at_the_launcher() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "launch.pretrain", TINY, "--train-iters", "5", "--cfg", "job"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: --train-iters 5: settings are words here; write train.train_steps=5\n"
    )
