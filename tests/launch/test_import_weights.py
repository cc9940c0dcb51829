"""Weights of TorchScale and Megatron-LM become ours whole, or not at all."""

import argparse
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch import import_weights as command
from models.config import (
    Activation,
    LayerNormPlacement,
    ModelConfig,
    Normalization,
    PositionEmbedding,
)
from models.foreign_weights import Origin
from models.moe_config import MoEConfig, RouterType
from parallel.checkpoint_reader import CheckpointReader, StoredWeights
from parallel.checkpoint_writer import new_checkpoint
from parallel.config import ParallelConfig
from parallel.runtime import initialize, shutdown
from pretrain.checkpoint_list import find_checkpoint
from pretrain.config import PretrainConfig
from pretrain.generate import load_run_config
from pretrain.import_weights import (
    WeightsError,
    _check_megatron_args,
    import_weights,
    open_torchscale,
)
from tests import megatron_reference
from tests.distributed import run_on_gloo
from tests.stored_runs import live_logits, main_with, write_run
from tests.torchscale_reference import decoder, integer_histograms

VOCAB = 45  # of 48 rows here
MODEL = ModelConfig(
    name="imported",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    max_position_embeddings=32,
    make_vocab_size_divisible_by=16,
    share_embeddings_and_output_weights=False,
)
XMOE = replace(MODEL, moe=MoEConfig(num_experts=4, router=RouterType.torchscale_xmoe))
MEGATRON = replace(
    MODEL,
    layer_norm_placement=LayerNormPlacement.pre_ln,
    position_embedding_type=PositionEmbedding.rope,
    num_query_groups=2,
)
IDS = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(3)).tolist()


# ---------------------------------------------------------------- TorchScale


def write_torchscale(path: Path, model: ModelConfig) -> Tensor:
    """A state dict of TorchScale's decoder, every weight off its initial value; its logits."""
    runtime = initialize(ParallelConfig(), 1)
    torch.manual_seed(5)
    reference = decoder(model, VOCAB, subln=True, xpos_rel_pos=True)
    with torch.no_grad(), integer_histograms():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        logits = reference(torch.tensor(IDS))[0]
    state = {f"decoder.{name}": value for name, value in reference.state_dict().items()}
    torch.save({"model": state}, path)
    shutdown(runtime)
    return logits


def state_of(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["model"]


def settings(model: ModelConfig) -> PretrainConfig:
    return PretrainConfig(model=model)


@pytest.mark.parametrize("model", [MODEL, XMOE], ids=["Magneto", "X-MoE"])
def test_torchscales_decoder_gives_the_same_logits(model: ModelConfig, tmp_path: Path) -> None:
    state, out = tmp_path / "state.pt", tmp_path / "run"
    expected = run_on_gloo(1, write_torchscale, state, model)[0]
    report = run_on_gloo(1, import_weights, Origin.torchscale, state, settings(model), out)[0]
    assert report["vocabulary"] == {"ours": VOCAB, "rows": 48}
    assert report["follow_from_settings"] == [
        f"layers.{layer}.self_attn.xpos.scale" for layer in range(2)
    ]
    used = {name for names in report["weights"].values() for name in names}
    names = {name.removeprefix("decoder.") for name in state_of(state)}
    assert used | set(report["follow_from_settings"]) == names
    assert json.loads((out / "import.json").read_text()) == report
    stored = load_run_config(out).model
    assert stored == replace(model, vocab_size=VOCAB)
    logits = run_on_gloo(1, live_logits, find_checkpoint(out), stored, IDS)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    padding = StoredWeights(CheckpointReader(find_checkpoint(out))).read("output_layer.weight")
    assert padding.shape[0] == 48 and not padding[VOCAB:].any()


@pytest.fixture(scope="module")
def torchscale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchscale") / "state.pt"
    run_on_gloo(1, write_torchscale, path, MODEL)
    return path


def rename(state: dict[str, Tensor]) -> None:
    state["decoder.layers.0.ffn.third"] = state.pop("decoder.layers.0.ffn.fc1.weight")


def other_decay(state: dict[str, Tensor]) -> None:
    state["decoder.layers.1.self_attn.xpos.scale"] += 0.01


def without_embedding(state: dict[str, Tensor]) -> None:
    del state["decoder.embed_tokens.weight"]


def a_number(state: dict[str, Any]) -> None:
    state["decoder.version"] = 3.0


@pytest.mark.parametrize(
    ("change", "model", "said"),
    [
        (
            rename,
            MODEL,
            r"our model lacks \(1\): decoder\.layers\.0\.mlp\.linear_fc1\.weight \(from "
            r"layers\.0\.ffn\.fc1\.weight\)\n  theirs that nobody reads \(1\): "
            r"layers\.0\.ffn\.third",
        ),
        (other_decay, MODEL, r"layers\.1\.self_attn\.xpos\.scale is not xPos' decay"),
        (without_embedding, MODEL, r"has no embed_tokens\.weight: it is not a decoder of torchsc"),
        (a_number, MODEL, r"these are no tensors: decoder\.version"),
        (
            dict,
            replace(MODEL, num_layers=1),
            r"nobody reads \(20\): layers\.1\.\S+, .* and 12 more",
        ),
        (
            dict,
            replace(MODEL, ffn_hidden_size=64),
            r"\.linear_fc1\.weight: \[48, 32\], ours is \[6",
        ),
        (dict, replace(MODEL, num_attention_heads=2), r"xpos\.scale"),
        (dict, replace(MODEL, num_attention_heads=3, kv_channels=8), r"linear_qkv\.weight: unflat"),
        (dict, replace(MODEL, activation=Activation.swiglu), r"linear_fc1\.weight: \[48, 32\]"),
        (
            dict,
            replace(MODEL, share_embeddings_and_output_weights=True),
            r"output_projection\.weight is not embed_tokens\.weight, and model\.share_embed",
        ),
        (
            dict,
            XMOE,
            r"nothing like|our model lacks \(\d+\): decoder\.layers\.1\.mlp\.experts\.fc1",
        ),
        (
            dict,
            replace(MODEL, moe=MoEConfig(num_experts=4, shared_expert_intermediate_size=8)),
            r"our model lacks \(15\): .*\(from layers\.1\.moe_layer\.experts\.0\.fc1\.bias and 3",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    torchscale: Path,
    change: Callable[[dict[str, Any]], Any],
    model: ModelConfig,
    said: str,
    tmp_path: Path,
) -> None:
    state = state_of(torchscale)
    change(state)
    torch.save(state, tmp_path / "state.pt")
    text = run_on_gloo(1, refusal, Origin.torchscale, tmp_path / "state.pt", model, tmp_path / "o")
    with pytest.raises(WeightsError, match=said):
        raise WeightsError(text[0])
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def refusal(origin: Origin, path: Path, model: ModelConfig, out: Path) -> str:
    with pytest.raises(WeightsError) as error:
        import_weights(origin, path, settings(model), out)
    return str(error.value)


def test_a_tied_output_is_read_once(torchscale: Path, tmp_path: Path) -> None:
    state = state_of(torchscale)
    state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    torch.save(state, tmp_path / "state.pt")
    tied = replace(MODEL, share_embeddings_and_output_weights=True)
    place = Origin.torchscale, tmp_path / "state.pt", settings(tied), tmp_path / "run"
    report = run_on_gloo(1, import_weights, *place)[0]
    assert "output_projection.weight" in report["follow_from_settings"]


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_are_read_without_running_them(tmp_path: Path) -> None:
    path, trap = tmp_path / "state.pt", tmp_path / "trap"
    torch.save({"model": Trap(trap)}, path)
    with pytest.raises(ValueError, match="as weights alone: it names getattr, which") as refused:
        import_weights(Origin.torchscale, path, settings(MODEL), tmp_path / "out")
    assert "weights_only" not in str(refused.value) and not trap.exists()
    torch.save([torch.ones(1)], path)
    with pytest.raises(WeightsError, match="holds no state dict"):
        import_weights(Origin.torchscale, path, settings(MODEL), tmp_path / "out")
    for origin in Origin:
        with pytest.raises(FileNotFoundError, match="no such f"):
            import_weights(origin, tmp_path / "nothing", settings(MODEL), tmp_path / "out")


def test_files_of_other_formats_are_named_with_a_way_out(tmp_path: Path) -> None:
    old, new, trap = tmp_path / "old.pt", tmp_path / "new.pt", tmp_path / "trap"
    old.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match=r"not in the format that torch\.save has since"):
        open_torchscale(old)
    torch.save({"model": {"a": torch.ones(2)}}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not in the format") as refused:
        open_torchscale(old)
    way_out = f"torch.save(torch.load('{old}', weights_only=True), 'NEW.pt')"
    assert way_out in str(refused.value) and not trap.exists()
    torch.save(torch.load(old, weights_only=True), new)
    assert open_torchscale(new).shapes == {"a": (2,)}


# ---------------------------------------------------------------- Megatron-LM


def write_megatron(
    folder: Path,
    source: Path,
    model: ModelConfig,
    args: dict[str, Any],
    *,
    fused: bool,
    padding: float = 0.0,
) -> None:
    """What Megatron-LM would have saved of the weights in our checkpoint `source`.

    Names as in its GPTModel: `fused` with Transformer Engine's layers. RoPE in halves, unless the
    args say rotary_interleaved. With an optimizer and a padded vocabulary.
    """
    weights = StoredWeights(CheckpointReader(source))
    namespace = argparse.Namespace(**args)
    with new_checkpoint(folder, {"args": namespace, "iteration": 7}) as writer:
        for name, shape in weights.shapes().items():
            value = weights.read(name)
            if "linear_qkv" in name and not args.get("rotary_interleaved"):
                d = model.head_width
                heads = value.unflatten(0, (model.query_groups, -1, d)).clone()
                turned = torch.cat([heads[:, :-1, 0::2], heads[:, :-1, 1::2]], dim=2)
                value = torch.cat([turned, heads[:, -1:]], dim=1).flatten(0, 2)
            if ".experts.fc1_" in name:
                value = value.flatten(1, 2)
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                value = torch.cat([value[:VOCAB], padding * torch.ones(64 - VOCAB, shape[1])])
            theirs = re.sub(r"\.experts\.(fc\d)_", r".experts.experts.linear_\1.", name)
            if fused:
                theirs = theirs.replace(
                    "input_layernorm.", "self_attention.linear_qkv.layer_norm_"
                ).replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
            writer.add(theirs, tuple(value.shape), (0,) * value.dim(), value)
        moment = torch.ones(3)
        writer.add("chained_0.optimizer.state.exp_avg.x", (3,), (0,), moment)
        writer.add("optimizer.state.exp_avg.x", (3,), (0,), moment)


@pytest.mark.parametrize(
    ("model", "args", "fused"),
    [
        (MEGATRON, {"rotary_interleaved": False, "num_layers": 2, "swiglu": False}, True),
        (MEGATRON, {"rotary_interleaved": True}, False),
        (
            replace(
                MEGATRON,
                normalization=Normalization.rms_norm,
                activation=Activation.swiglu,
                add_bias_linear=False,
                moe=MoEConfig(num_experts=4, router=RouterType.aux_free, router_topk=2),
            ),
            {"position_embedding_type": "rope", "swiglu": True, "moe_router_topk": 2},
            False,
        ),
    ],
    ids=["fused norms", "interleaved", "experts"],
)
def test_megatrons_weights_find_their_places(
    model: ModelConfig, args: dict[str, Any], fused: bool, tmp_path: Path
) -> None:
    model = replace(model, vocab_size=VOCAB)
    source = run_on_gloo(1, write_run, tmp_path / "source", model)[0]
    write_megatron(tmp_path / "theirs", source, model, args, fused=fused)
    place = Origin.megatron, tmp_path / "theirs", settings(model), tmp_path / "out"
    report = run_on_gloo(1, import_weights, *place)[0]
    assert report["rotary_interleaved"] is args.get("rotary_interleaved", False)
    ours, found = (
        StoredWeights(CheckpointReader(path))
        for path in (source, find_checkpoint(tmp_path / "out"))
    )
    assert ours.shapes() == found.shapes()
    for name in ours.shapes():
        rows = (
            VOCAB if name in ("embedding.word_embeddings.weight", "output_layer.weight") else None
        )
        assert torch.equal(ours.read(name)[:rows], found.read(name)[:rows]), name


GATED = replace(
    MEGATRON,
    normalization=Normalization.rms_norm,
    activation=Activation.swiglu,
    add_bias_linear=False,
)
ALL_SPARSE = MoEConfig(num_experts=4, layer_freq=1, router_topk=2)
# model, layout on so many ranks, arguments
THEIRS: dict[str, tuple[ModelConfig, ParallelConfig, int, dict[str, Any]]] = {
    "dense": (
        MEGATRON,
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        4,
        {"num_layers": 2, "swiglu": False, "position_embedding_type": "rope"},
    ),
    "gated, tied": (
        replace(GATED, share_embeddings_and_output_weights=True),
        ParallelConfig(tensor_model_parallel_size=2),
        2,
        {"rotary_interleaved": True, "swiglu": True, "normalization": "RMSNorm"},
    ),
    "experts": (
        replace(GATED, moe=replace(ALL_SPARSE, layer_freq=2, router=RouterType.linear)),
        ParallelConfig(expert_model_parallel_size=2),
        2,
        {"moe_router_topk": 2, "moe_router_score_function": "softmax", "moe_layer_freq": [0, 1]},
    ),
    "biased experts": (
        replace(
            GATED,
            moe=replace(ALL_SPARSE, router=RouterType.aux_free, shared_expert_intermediate_size=16),
        ),
        ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
        4,
        {"moe_router_topk": 2, "moe_router_score_function": "sigmoid"},
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_megatrons_model_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model, parallel, ranks, args = THEIRS[name]
    theirs, out = tmp_path / "theirs", tmp_path / "run"
    run_on_gloo(ranks, megatron_reference.save, theirs, model, 48, parallel, args)
    expected = run_on_gloo(1, megatron_reference.logits, theirs, model, 48, IDS, args)[0]
    run_on_gloo(1, import_weights, Origin.megatron, theirs, settings(model), out)
    stored = load_run_config(out).model
    logits = run_on_gloo(1, live_logits, find_checkpoint(out), stored, IDS)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def test_settings_that_contradict_are_named(tmp_path: Path) -> None:
    source = run_on_gloo(1, write_run, tmp_path / "source", replace(MEGATRON, vocab_size=VOCAB))[0]
    args = {"normalization": "RMSNorm", "rotary_base": 10000, "position_embedding_type": "learned"}
    write_megatron(tmp_path / "theirs", source, MEGATRON, args, fused=False)
    with pytest.raises(WeightsError) as error:
        import_weights(Origin.megatron, tmp_path / "theirs", settings(MEGATRON), tmp_path / "out")
    assert str(error.value) == (
        "the checkpoint's settings are not those of this model: position_embedding_type=learned, "
        "model.position_embedding_type=rope; normalization=RMSNorm, ours LayerNorm"
    )


def test_what_megatron_lm_does_not_have_is_refused(tmp_path: Path) -> None:
    """Of a checkpoint without arguments, whose names and shapes would fit."""
    model = replace(MEGATRON, vocab_size=VOCAB, position_embedding_type=PositionEmbedding.xpos)
    source = run_on_gloo(1, write_run, tmp_path / "source", model)[0]
    write_megatron(tmp_path / "theirs", source, model, {}, fused=False)
    for settings, said in (
        (
            model,
            "model.position_embedding_type=xpos, which Megatron-LM does not have; set "
            "model.position_embedding_type=rope or none",
        ),
        (
            replace(MEGATRON, layer_norm_placement=LayerNormPlacement.sub_ln),
            "model.layer_norm_placement=sub_ln, which Megatron-LM does not have; set "
            "model.layer_norm_placement=pre_ln",
        ),
    ):
        text = refusal(Origin.megatron, tmp_path / "theirs", settings, tmp_path / "out")
        assert text == f"the checkpoint's settings are not those of this model: {said}"
    without = replace(MEGATRON, position_embedding_type=PositionEmbedding.none)
    _check_megatron_args({"position_embedding_type": "none"}, without)


def test_a_checkpoint_of_ours_is_not_imported(tmp_path: Path) -> None:
    """It has the same names, and rows in our order already."""
    source = run_on_gloo(1, write_run, tmp_path / "source", replace(MEGATRON, vocab_size=VOCAB))[0]
    text = refusal(Origin.megatron, source, MEGATRON, tmp_path / "out")
    assert "is a checkpoint of Magnetron's own" in text and f"checkpoint.load={source}" in text
    assert not (tmp_path / "out").exists()


EXPERTS = replace(MEGATRON, moe=MoEConfig(num_experts=4, router=RouterType.linear, router_topk=2))


@pytest.mark.parametrize(
    ("args", "model", "said"),
    [
        ({"moe_router_pre_softmax": True}, EXPERTS, "moe_router_pre_softmax=True, ours False"),
        (
            {"moe_router_pre_softmax": False},
            replace(EXPERTS, moe=replace(EXPERTS.moe, router_topk=1)),
            "moe_router_pre_softmax=False, ours True",
        ),
        (
            {"moe_router_score_function": "sigmoid"},
            EXPERTS,
            "moe_router_score_function=sigmoid, ours softmax",
        ),
        (
            {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True},
            replace(EXPERTS, moe=replace(EXPERTS.moe, router=RouterType.aux_free)),
            "moe_router_score_function=softmax, ours sigmoid",
        ),
        (
            {"moe_router_topk_scaling_factor": 2.5},
            EXPERTS,
            "moe_router_topk_scaling_factor=2.5, ours None",
        ),
        (
            {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
            EXPERTS,
            "moe_router_num_groups=2, ours None; moe_router_group_topk=1, ours None",
        ),
        ({"use_rope_scaling": True}, MEGATRON, "use_rope_scaling=True, ours False"),
        (
            {"rotary_seq_len_interpolation_factor": 4},
            MEGATRON,
            "rotary_seq_len_interpolation_factor=4, ours None",
        ),
        (
            {},
            replace(EXPERTS, moe=replace(EXPERTS.moe, router=RouterType.sparsemixer)),
            "model.moe.router=sparsemixer, which Megatron-LM does not have; set model.moe.router="
            "linear or aux_free",
        ),
    ],
)
def test_what_weights_do_not_show_is_compared(
    args: dict[str, Any], model: ModelConfig, said: str
) -> None:
    _check_megatron_args({"moe_router_topk": model.moe.router_topk}, MEGATRON)  # dense
    _check_megatron_args(
        {"moe_router_pre_softmax": False, "moe_router_topk_scaling_factor": 1.0}, EXPERTS
    )
    with pytest.raises(WeightsError) as error:
        _check_megatron_args(args, model)
    assert str(error.value).endswith(f"settings are not those of this model: {said}")


def test_no_part_of_a_vocabulary_is_dropped_or_made_up(tmp_path: Path) -> None:
    model = replace(MEGATRON, vocab_size=VOCAB)
    source = run_on_gloo(1, write_run, tmp_path / "source", model)[0]
    args = {"make_vocab_size_divisible_by": 16, "tensor_model_parallel_size": 2}
    theirs = tmp_path / "theirs"
    write_megatron(theirs, source, model, args, fused=False, padding=1.0)
    for rows, said in (
        (30, r"has 64 rows, and those behind model\.vocab_size=30 are no padding"),
        (
            65,
            r"has 64 rows, model\.vocab_size=65 needs 65; leave it out .* or set it to 64 or less",
        ),
    ):
        other = replace(model, vocab_size=rows)
        text = run_on_gloo(1, refusal, Origin.megatron, theirs, other, tmp_path / "out")[0]
        assert re.search(said, text)
    place = Origin.megatron, theirs, settings(model), tmp_path / "out"
    run_on_gloo(1, import_weights, *place)  # 64 is what 45 become with 16 x 2
    found = StoredWeights(CheckpointReader(find_checkpoint(tmp_path / "out")))
    assert not found.read("embedding.word_embeddings.weight")[VOCAB:].any()


# ---------------------------------------------------------------- the command


WORDS = [
    "+model=magneto_tiny",
    *("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48"),
    *("model.max_position_embeddings=32", "model.share_embeddings_and_output_weights=false"),
]


def test_the_command_imports(torchscale: Path, tmp_path: Path) -> None:
    words = ["torchscale", str(torchscale), str(tmp_path / "run"), *WORDS]
    assert run_on_gloo(1, main_with, command.main, words) == [0]
    report = json.loads((tmp_path / "run/import.json").read_text())
    assert len(report["weights"]) == 36 and report["parameters"] == 23_584
    assert load_run_config(tmp_path / "run").run_dir == str(tmp_path / "run")


def test_the_command_refuses_in_one_line(torchscale: Path, tmp_path: Path) -> None:
    def said(*words: Any) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "launch.import_weights", *map(str, words)],
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
        return ended.stderr

    assert "exists already" in said("torchscale", torchscale, tmp_path, *WORDS)
    assert "model.layers" in said("torchscale", torchscale, tmp_path / "y", "model.layers=2")
