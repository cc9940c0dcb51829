"""What a configuration is made small to: the structure stays, and the layout as far as it fits."""

from dataclasses import replace
from functools import cache

import pytest

from launch.schema import load
from launch.setting_names import CONF
from models.config import ModelConfig
from models.moe_config import MoEConfig, RouterType
from parallel.config import ConfigError, ParallelConfig
from pretrain.config import PretrainConfig, TrainConfig
from pretrain.config_rules import validate
from pretrain.shrink import Shrunk, processes_needed, shrink

MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
LAYOUTS = sorted(path.stem for path in (CONF / "parallel").glob("*.yaml"))


@cache
def config(*words: str) -> PretrainConfig:
    loaded = load([word if "=" in word else f"parallel={word}" for word in words])
    return replace(loaded, train=TrainConfig(global_batch_size=64, micro_batch_size=4))


@cache
def parallel_configs() -> list[ParallelConfig]:
    return [config("+model=magneto_6_7b", layout).parallel for layout in LAYOUTS]


def tried(small: Shrunk) -> dict[str, int]:
    return {axis.name.split()[0]: axis.tried for axis in small.axes if axis.tried > 1}


@pytest.mark.parametrize("name", MODELS)
def test_every_shipped_model_shrinks_under_every_layout_it_allows(name: str) -> None:
    allowed = 0
    for parallel in parallel_configs():
        whole = replace(config(f"+model={name}"), parallel=parallel)
        try:
            validate(whole, processes_needed(whole.parallel))
        except ConfigError:
            continue
        allowed += 1
        for processes in (1, 2, 3, 8):
            small = shrink(whole, processes)  # which validates it
            assert small.world_size <= processes
            assert small.config.model.num_layers <= 32
            assert small.config.model.hidden_size <= 512
    # an odd number of layers allows no pipeline
    assert allowed >= (3 if name in ("scaling_3m", "scaling_810m") else 5)


def test_what_fits_stays_and_two_replicas_join() -> None:
    small = shrink(config("+model=magneto_1b", "tp2_sp_pp2_vpp2"))
    assert tried(small) == {"tensor": 2, "pipeline": 2, "chunks": 2, "data": 2}
    assert small.world_size == 8 and small.config.parallel.sequence_parallel
    assert not [axis.remark for axis in small.axes if axis.remark]
    assert small.config.train.micro_batch_size == 2
    assert small.config.train.global_batch_size == 2 * 2 * 2 * 2  # 4 micro-batches a replica


@pytest.mark.parametrize(("size", "context", "processes"), [(8, 1, 2), (8, 1, 8), (4, 4, 16)])
def test_the_other_engine_stays_legal(size: int, context: int, processes: int) -> None:
    """ZeRO-3 refuses experts that are not sharded as the rest, whichever axis is halved first."""
    words = ["+model=xmoe_7b_64e", "parallel=tp8_sp", f"parallel.context_parallel_size={context}"]
    words += [f"parallel.{kind}_parallel_size={size}" for kind in ("tensor_model", "expert_tensor")]
    engine = ["engine=deepspeed", "deepspeed.zero_stage=3", "deepspeed.native_adam=true"]
    small = shrink(config(*words, *engine, "parallel.precision=fp32"), processes)
    parallel, deepspeed = small.config.parallel, small.config.deepspeed
    assert parallel.expert_tensor_parallel_size == parallel.tensor_model_parallel_size
    assert (deepspeed.zero_stage, deepspeed.native_adam) == (3, False)
    assert deepspeed.reduce_bucket_size < 10_000
    assert any("torch's Adam" in remark for remark in small.remarks)


def test_long_axes_are_halved_and_say_so() -> None:
    small = shrink(config("+model=magneto_6_7b", "tp8_pp4"))
    assert tried(small) == {"tensor": 2, "pipeline": 2, "data": 2}
    remarks = {axis.name: axis.remark for axis in small.axes if axis.remark}
    assert remarks == {"tensor parallel": "covered at 2", "pipeline stages": "covered at 2"}


def test_what_does_not_fit_is_named() -> None:
    small = shrink(config("+model=magneto_1b", "tp2_sp_pp2_vpp2"), 2)
    assert small.world_size == 2
    assert tried(small) == {"tensor": 2}
    remarks = {axis.name: axis.remark for axis in small.axes if axis.remark}
    assert remarks == dict.fromkeys(
        ("pipeline stages", "chunks of a stage", "data parallel"), "not covered: too few processes"
    )
    with pytest.raises(ConfigError, match=r"verify\.processes=0 must be 1 or more"):
        shrink(config("+model=magneto_1b", "tp2"), 0)


def model(**changes) -> ModelConfig:
    return ModelConfig(
        **{
            "name": "m",
            "num_layers": 24,
            "hidden_size": 2048,
            "ffn_hidden_size": 5632,
            "num_attention_heads": 32,
            "num_query_groups": 8,
        }
        | changes
    )


def shrunk_model(model: ModelConfig, *words: str) -> ModelConfig:
    whole = load(["+model=magneto_1b", *words])
    whole = replace(whole, model=model, train=TrainConfig(global_batch_size=64))
    return shrink(whole).config.model


def test_ratios_of_the_model_stay() -> None:
    small = shrunk_model(model(), "parallel=tp2")
    assert small.num_attention_heads == 4 * small.query_groups
    assert small.query_groups == 4  # several on each of two ranks, as in the launch
    assert small.ffn_hidden_size / small.hidden_size == pytest.approx(5632 / 2048, abs=0.02)
    one = shrunk_model(model(num_query_groups=2), "parallel=tp2")
    assert one.query_groups == 2  # one a rank, as in the launch
    wide = shrunk_model(model(kv_channels=128), "parallel=tp2")
    assert wide.head_width * wide.num_attention_heads > wide.hidden_size


def test_the_pattern_of_experts_stays() -> None:
    moe = MoEConfig(num_experts=64, router_topk=2, layer_freq=3, router=RouterType.linear)
    small = shrunk_model(model(moe=moe), "parallel=ep2").moe
    assert (small.num_experts, small.router_topk, small.layer_freq) == (4, 2, 3)
    layers = shrunk_model(model(moe=moe), "parallel=ep2").num_layers
    assert small.sparse_layers(layers) == [2] and layers == 3
    many = shrunk_model(model(moe=replace(moe, router_topk=8)), "parallel=ep2").moe
    assert many.num_experts > many.router_topk == 8
    paper = MoEConfig(num_experts=32, sparse_after_layer=12, stacked_sublayers=3)
    stacked = shrunk_model(model(moe=paper), "parallel=ep2").moe
    assert (stacked.sparse_after_layer, stacked.stacked_sublayers) == (1, 3)


def test_what_layouts_cannot_agree_on_is_left_out_and_said() -> None:
    moe = MoEConfig(num_experts=8, router=RouterType.sparsemixer)
    whole = replace(
        load(["+model=magneto_1b", "parallel.precision=bf16"]),
        model=model(moe=moe, hidden_dropout=0.1),
    )
    small = shrink(whole)
    assert small.config.model.hidden_dropout == 0
    assert small.config.model.moe.router is RouterType.linear
    assert [remark.split(":")[0] for remark in small.remarks] == [
        "fp32 instead of parallel.precision=bf16, where rounding hides defects",
        "without dropout",
        "model.moe.router=linear instead of sparsemixer, which draws other random numbers in "
        "every layout",
    ]
    dropping = MoEConfig(num_experts=8, expert_capacity_factor=1.25)
    small = shrink(replace(whole, model=model(moe=dropping)))
    assert small.config.model.moe.expert_capacity_factor is None
    assert "without model.moe.expert_capacity_factor" in small.remarks[-1]
