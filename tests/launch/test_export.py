"""An exported model computes what the checkpoint computes, whatever the variant and the layout."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from data.open_mixture import DEMO_TOKENIZER
from data.tokenizer import load_tokenizer
from launch import export as command
from launch import generate
from models.config import (
    Activation,
    LayerNormPlacement,
    ModelConfig,
    Normalization,
    PositionEmbedding,
)
from models.hugging_face.mapping import Architecture, architecture_of
from models.moe_config import MoEConfig, RouterType, ScoreFunction, SecondExpertPolicy
from parallel.checkpoint_manifest import write_manifest
from parallel.config import ParallelConfig
from pretrain import export, export_check
from pretrain.checkpoint_list import DamagedCheckpointError
from pretrain.convert_checkpoint import to_checkpoint
from pretrain.export_check import ExportError
from tests.distributed import run_on_gloo
from tests.stored_runs import VOCAB, live_logits, main_with, save_again, write_run

MODEL = ModelConfig(
    name="exported",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    max_position_embeddings=32,
    make_vocab_size_divisible_by=32,
    vocab_size=VOCAB,
)
PRE_LN = replace(
    MODEL,
    layer_norm_placement=LayerNormPlacement.pre_ln,
    position_embedding_type=PositionEmbedding.rope,
)
LLAMA = replace(
    PRE_LN,
    normalization=Normalization.rms_norm,
    activation=Activation.swiglu,
    add_bias_linear=False,
    num_query_groups=2,
)
GATED = {"activation": Activation.swiglu, "normalization": Normalization.rms_norm}


def sparse(model: ModelConfig = MODEL, **settings: Any) -> ModelConfig:
    return replace(model, moe=MoEConfig(**{"num_experts": 4, **settings}))


def placed(placement: LayerNormPlacement, **changes: Any) -> ModelConfig:
    return replace(MODEL, layer_norm_placement=placement, **changes)


VARIANTS = {
    "magneto": MODEL,
    "magneto rms swiglu gqa wide heads": replace(
        MODEL,
        num_query_groups=2,
        kv_channels=10,
        add_bias_linear=False,
        share_embeddings_and_output_weights=False,
        **GATED,
    ),
    "post-LN": placed(LayerNormPlacement.post_ln, position_embedding_type=PositionEmbedding.none),
    "deepnorm": placed(LayerNormPlacement.deepnorm),
    "deepnorm on pre-LN": placed(LayerNormPlacement.deepnorm_pre_ln, **GATED),
    "pre-LN xpos": placed(LayerNormPlacement.pre_ln),
    "gpt_neox": PRE_LN,
    "llama": LLAMA,
    "llama with biases, untied": replace(
        LLAMA, add_bias_linear=True, share_embeddings_and_output_weights=False, kv_channels=10
    ),
    "xmoe": sparse(router_topk=2, router_dim=4, shared_expert_intermediate_size=24),
    "xmoe swiglu": sparse(
        replace(MODEL, **GATED), router_score_function=ScoreFunction.sigmoid, layer_freq=1
    ),
    "xmoe behind": sparse(PRE_LN, sparse_after_layer=1, stacked_sublayers=2),
    "linear": sparse(router=RouterType.linear, router_topk=2),
    "switch": sparse(router=RouterType.linear, ffn_hidden_size=24),
    "aux_free": sparse(router=RouterType.aux_free, router_topk=2),
    "sparsemixer": sparse(router=RouterType.sparsemixer, router_topk=2),
    "torchscale top-1": sparse(router=RouterType.torchscale),
    "torchscale xmoe, second at random": sparse(router=RouterType.torchscale_xmoe, router_topk=2),
    "torchscale, sampled, normalized late": sparse(
        router=RouterType.torchscale,
        router_topk=2,
        second_expert_policy=SecondExpertPolicy.sampling,
        normalize_gate_prob_before_dropping=False,
        eval_capacity_token_fraction=0.0,
    ),
}
IDS = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(3)).tolist()
BOUND = 1e-5  # of logits up to 5, in fp32


def write_both(folder: Path, model: ModelConfig, settings: dict[str, Any]) -> torch.Tensor:
    """`folder`/run and its export `folder`/out, unchecked; what the run's model computes."""
    checkpoint = write_run(folder / "run", model)
    export.export(checkpoint, folder / "out", check=False, **settings)
    return live_logits(checkpoint, model, IDS)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant as `exports`/NAME/run and `exports`/NAME/out, and expected.pt."""
    folder = tmp_path_factory.mktemp("exports")
    expected = {
        name: run_on_gloo(1, write_both, folder / name, model, {})[0]
        for name, model in VARIANTS.items()
    }
    in_parts = {"dtype": torch.bfloat16, "max_bytes": 10_000}
    run_on_gloo(1, write_both, folder / "bf16", VARIANTS["xmoe"], in_parts)
    torch.save(expected, folder / "expected.pt")
    (folder / "ids.json").write_text(json.dumps(IDS))
    return folder


@pytest.fixture(scope="module")
def answers(exports: Path) -> dict[str, Any]:
    """What transformers computes with them."""
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install magnetron[export]")
    script = Path(__file__).with_name("read_exports.py")
    ended = subprocess.run(
        [sys.executable, "-P", str(script), str(exports), str(exports / "answers.pt")],
        env=os.environ | {"HF_HOME": str(exports / "cache")},
        cwd=exports,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return torch.load(exports / "answers.pt", weights_only=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_logits_are_those_of_the_checkpoint(
    name: str, exports: Path, answers: dict[str, Any]
) -> None:
    expected = torch.load(exports / "expected.pt", weights_only=True)[name]
    assert expected.std() > 0.1
    torch.testing.assert_close(answers[name], expected, rtol=0, atol=BOUND)


def test_cached_keys_and_left_padding_change_nothing(answers: dict[str, Any]) -> None:
    more, whole = answers["of xmoe"], answers["xmoe"]
    torch.testing.assert_close(more["pieces"], whole, rtol=0, atol=BOUND)
    torch.testing.assert_close(more["padded"], whole, rtol=0, atol=BOUND)
    torch.testing.assert_close(more["last"], whole[:, -1:], rtol=0, atol=BOUND)
    assert more["generated"][:, 10].tolist() == whole[:, 6].argmax(-1).tolist()


def test_the_loss_is_that_of_the_shifted_labels(answers: dict[str, Any]) -> None:
    logits = answers["xmoe"][:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(IDS)[:, 1:].flatten())
    assert answers["of xmoe"]["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_trainer_is_told_that_the_loss_is_a_mean(answers: dict[str, Any]) -> None:
    assert answers["of xmoe"]["loss is a mean"]


def test_what_depends_on_its_neighbours_is_generated_without_a_cache(
    exports: Path, answers: dict[str, Any]
) -> None:
    text = {
        name: json.loads((exports / name / "out/generation_config.json").read_text())
        for name in ("torchscale top-1", "xmoe", "llama", "gpt_neox")
    }
    assert [each["use_cache"] for each in text.values()] == [False, True, True, True]
    found = answers["continued"]
    assert found["generated"].tolist() == found["by hand"].tolist()


def test_bf16_in_several_files_keeps_routers_fp32(exports: Path, answers: dict[str, Any]) -> None:
    out = exports / "bf16/out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and all((out / name).is_file() for name in files)
    types = answers["types"]
    routers = {name for name in types if ".router." in name}
    assert routers and {types[name] for name in routers} == {"torch.float32"}
    assert {types[name] for name in types if name not in routers} == {"torch.bfloat16"}


def test_existing_architectures_are_taken_where_they_fit() -> None:
    found = {name: architecture_of(model).value for name, model in VARIANTS.items()}
    assert found.pop("gpt_neox") == "gpt_neox"
    assert found.pop("llama") == found.pop("llama with biases, untied") == "llama"
    assert set(found.values()) == {"magneto"}
    assert architecture_of(replace(PRE_LN, num_query_groups=2)) is Architecture.magneto
    assert architecture_of(replace(PRE_LN, add_bias_linear=False)) is Architecture.magneto


def test_any_layout_is_read(exports: Path, tmp_path: Path) -> None:
    """The same weights, saved by four ranks, give the same files."""
    name = "xmoe swiglu"
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
    )
    one = exports / name
    checkpoint = one / "run/checkpoints/step_00000003"
    run_on_gloo(4, save_again, checkpoint, tmp_path / "run", VARIANTS[name], parallel)
    shutil.copy(one / "run/config.yaml", tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "out", check=False)
    for file in ("model.safetensors", "config.json"):
        assert (one / "out" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


# ---------------------------------------------------------------- the command, with its check


def run_command(run: Path, out: Path, model: ModelConfig, words: list[str]) -> int:
    write_run(run, model)
    return main_with(command.main, [str(run), str(out), *words])


@pytest.mark.usefixtures("answers")  # skips where transformers is not installed
def test_the_command_checks_what_it_writes(tmp_path: Path) -> None:
    """transformers loads the folder in a process that knows nothing of us."""
    run, out = tmp_path / "run", tmp_path / "out"
    model = sparse(replace(MODEL, vocab_size=8192), router_topk=2)
    assert run_on_gloo(1, run_command, run, out, model, ["--dtype", "bf16"]) == [0]
    report = json.loads((out / export.REPORT_FILE).read_text())
    check = report["check"]
    assert check["tokens"] == 64 and check["max_abs_difference"] < 1e-5 < check["largest_logit"]
    assert check["greedy_tokens"] == 8 and check["tokenizer_equal"] is True
    assert check["loaded_as"] == "MagnetoForCausalLM"
    assert set(report["files"]) | {"README.md", export.REPORT_FILE} == {
        p.name for p in out.iterdir()
    }
    card = (out / "README.md").read_text()
    assert "64 tokens" in card and "step_00000003" in card and "trust_remote_code" in card
    assert (out / "tokenizer.json").read_bytes() == DEMO_TOKENIZER.read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0


def test_an_answer_that_differs_is_refused(tmp_path: Path) -> None:
    answers: dict[str, dict[str, Any]] = {
        "is not the checkpoint's: logits of 64 tokens differ by 0.01, more than": {"logits": 0.01},
        "differ by nan": {"logits": float("nan")},
        "continues with token 7 where the checkpoint's has": {"greedy": [7]},
        "the exported tokenizer gives [1, 2]... for 'Die 3 Häuser": {"text_ids": [1, 2]},
        "needs files of this program: ": {
            "imported": [str(export_check.ROOT / "models/config.py")]
        },
    }
    said = run_on_gloo(1, refusals, tmp_path, list(answers.values()))[0]
    no_models = "the checkpoint's own logits are no model's: the largest of 64 tokens is "
    for expected, text in zip([*answers, no_models], said, strict=True):
        assert expected in text


def refusals(folder: Path, answers: list[dict[str, Any]]) -> list[str]:
    """What is said to the answer that the right folder would give, with changes to it."""
    checkpoint = write_run(folder / "run", MODEL)
    request = export_check.make_request(MODEL)
    live = export_check.Live(checkpoint, MODEL, None)
    expected, tokenizer = live.logits(request["ids"]), load_tokenizer(DEMO_TOKENIZER)
    right = {"greedy": [], "text_ids": None, "imported": [], "class": "", "versions": {}}
    said = []
    for changes in answers:
        logits = expected + changes.get("logits", 0.0)
        with pytest.raises(ExportError) as error:
            export_check.compare(live, request, right | changes | {"logits": logits}, tokenizer)
        said.append(str(error.value))
    with torch.no_grad():  # a bit that flipped in an exponent
        live.chunk.embedding.word_embeddings.weight.mul_(2.0**100)
    wild = live.logits(request["ids"])
    with pytest.raises(ExportError) as error:
        export_check.compare(live, request, right | {"logits": wild}, tokenizer)
    said.append(str(error.value))
    live.close()
    return said


@pytest.mark.slow  # transformers is imported once more
def test_a_folder_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the exported folder cannot be loaded: "):
        export_check.read_back(tmp_path, export_check.make_request(MODEL))


# ---------------------------------------------------------------- refusals


def refusal(*words: Any) -> str:
    """What the command says to standard error, leaving with status 2."""
    ended = subprocess.run(
        [sys.executable, "-m", "launch.export", *map(str, words)],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    return ended.stderr


def test_what_cannot_be_exported_is_said_at_once(exports: Path, tmp_path: Path) -> None:
    magneto = exports / "magneto"
    out = tmp_path / "out"
    assert "no such folder" in refusal(tmp_path / "nothing", out)
    assert "holds no complete checkpoint" in refusal(tmp_path, out)
    assert f"it holds runs: {magneto / 'run'}; name one" in refusal(magneto, out)
    assert "holds no checkpoint of step 9; there are 3" in refusal(
        magneto / "run", out, "--step", 9
    )
    assert "exists already" in refusal(magneto / "run", magneto / "out")
    assert "--max-file-gb=0.0 must be above 0" in refusal(magneto, out, "--max-file-gb", 0)


def test_the_check_needs_transformers(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(exports / "magneto/run"), str(exports / "new")]
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'magnetron\[export\]', or leave"):
        command._refuse_early(command.parse(words))
    command._refuse_early(command.parse([*words, "--no-check"]))


def test_other_errors_name_their_cause(exports: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exports / "xmoe/run", run)
    checkpoint, out = run / "checkpoints/step_00000003", tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer=nowhere\.json"):
        export.export(run, out, tokenizer="nowhere.json")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("num_layers: 2", "num_layers: 3"))
    with pytest.raises(ExportError, match="disagree about the model: num_layers=3 and 2"):
        export.export(run, out)
    (run / "config.yaml").write_text(config.replace("num_layers: 2", "layers: 2"))
    with pytest.raises(ValueError, match="is not a configuration of this version: Key 'layers'"):
        export.export(run, out)
    (run / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml beside it"):
        export.export(run, out)
    (run / "config.yaml").write_text(config)
    (checkpoint / ".metadata").unlink()  # half deleted
    with pytest.raises(ValueError, match=r"is damaged: \.metadata is missing"):
        export.export(run, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_weights_of_another_model_are_refused(exports: Path, tmp_path: Path) -> None:
    source = export.open_source(exports / "magneto/run")
    architecture = Architecture.magneto
    for layers, said in ((3, r"not stored: decoder\.layers\.2\."), (1, "of no use to its model")):
        other = replace(source, model=replace(source.model, num_layers=layers))
        with pytest.raises(ExportError, match=f"holds the weights of another model .*{said}"):
            export.write_weights(other, architecture, tmp_path, None, 10**9)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    run_on_gloo(1, write_run, tmp_path / "run", MODEL)
    checkpoint = tmp_path / "run/checkpoints/step_00000003"
    plain = torch.load(checkpoint / "common.pt", weights_only=True)
    plain["identity"]["data"] = {"tokenizer": "f" * 64}
    torch.save(plain, checkpoint / "common.pt")
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match="is not the tokenizer this model was trained with"):
        export.export(tmp_path / "run", tmp_path / "out")
    del plain["identity"]["data"]  # as in imported weights
    torch.save(plain, checkpoint / "common.pt")
    write_manifest(checkpoint)
    demo = str(DEMO_TOKENIZER)
    generating = [str(tmp_path / "run"), "Die", "--tokenizer"]
    for words, said in (([], "does not say with which tokenizer"), ([demo], "8192 ids, the model")):
        with pytest.raises(ValueError, match=said):
            export.export(tmp_path / "run", tmp_path / "out", tokenizer="".join(words))
        error = run_on_gloo(1, generate_error, [*generating, *(words or [""])])[0]
        assert error.startswith("error: ") and said in error


def test_text_is_generated_from_all_that_names_a_checkpoint(tmp_path: Path) -> None:
    """A run, its checkpoints, one of them, and copies in other types: the same first token."""
    run, copy = tmp_path / "run", tmp_path / "bf16"
    run_on_gloo(1, write_run, run, replace(MODEL, vocab_size=8192))
    checkpoint = run / "checkpoints/step_00000003"
    to_checkpoint(checkpoint, copy, dtype=torch.bfloat16, weights_only=True)
    words = ["Die", "--max-new-tokens", "1", "--temperature", "0"]
    said = {
        run_on_gloo(1, generated, [str(path), *words])[0]
        for path in (run, run / "checkpoints", checkpoint, copy)
    }
    assert len(said) == 1 and said.pop().startswith("Die")
    error = run_on_gloo(1, generate_error, [str(tmp_path), "Die"])[0]
    assert error == (
        f"error: {tmp_path} holds no complete checkpoint; it holds runs: {run}; name one of them\n"
    )


def flip_a_bit(path: Path) -> None:
    """The lowest one of a number: nothing but the checksum tells."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_another_tokenizer(path: Path) -> None:
    plain = torch.load(path, weights_only=True)
    plain["identity"]["data"]["tokenizer"] = "f" * 64
    torch.save(plain, path)


@pytest.mark.parametrize(
    ("file", "damage"), [("__0_0.distcp", flip_a_bit), ("common.pt", write_another_tokenizer)]
)
def test_a_damaged_checkpoint_gives_no_text_and_no_export(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    run_on_gloo(1, write_run, tmp_path / "run", MODEL)
    checkpoint = tmp_path / "run/checkpoints/step_00000003"
    damage(checkpoint / file)
    said = f"{checkpoint} is damaged: {file} has "
    with pytest.raises(DamagedCheckpointError, match=said):
        export.export(checkpoint, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()
    words = [str(checkpoint), "Die", "--max-new-tokens", "1", "--tensor-model-parallel-size", "2"]
    for error in run_on_gloo(2, generate_error, words):  # each may be the only one that met it
        assert said in error and "put the file back from a copy, or name another" in error


def test_text_without_a_manifest_comes_with_a_warning(tmp_path: Path) -> None:
    run_on_gloo(1, write_run, tmp_path / "run", replace(MODEL, vocab_size=8192))
    (tmp_path / "run/checkpoints/step_00000003/manifest.json").unlink()
    words = [str(tmp_path / "run"), "Die", "--max-new-tokens", "1"]
    for said in run_on_gloo(1, generated_with_warnings, words):
        assert said.count("warning: ") == 1 and "has no manifest.json: nothing tells" in said


def generated_with_warnings(words: list[str]) -> str:
    said = io.StringIO()
    with redirect_stderr(said):
        generated(words)
    return said.getvalue()


def generated(words: list[str]) -> str:
    said = io.StringIO()
    with redirect_stdout(said):
        assert main_with(generate.main, words) == 0
    return said.getvalue()


def generate_error(words: list[str]) -> str:
    said = io.StringIO()
    with redirect_stderr(said):
        assert main_with(generate.main, words) == 2
    return said.getvalue()


# ---------------------------------------------------------------- memory

MEASURE = """
import resource, sys
from pathlib import Path
from pretrain.export import architecture_of, open_source, write_weights
source = open_source(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_weights(source, architecture_of(source.model), Path(sys.argv[2]), None, 10**9)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_weight(tmp_path: Path) -> None:
    """155 MB of weights, the largest of 4.2 MB, are written within four of the latter."""
    model = replace(
        MODEL, num_layers=12, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=8
    )
    run_on_gloo(1, write_run, tmp_path / "run", model)
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "run"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, ended.stdout.split())
    assert (tmp_path / "model.safetensors").stat().st_size > 150e6
    assert (after - before) * 1024 < 4 * 4.2e6 + 8e6  # and what reading files needs
