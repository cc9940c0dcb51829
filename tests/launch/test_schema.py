"""What a user gets for each wrong word, and that right ones arrive as typed values."""

from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import Weighting
from launch.composition import compose_what_fits
from launch.explain import explain, nameless_choices
from launch.schema import load, validated
from launch.setting_names import shipped_models
from models.config import LayerNormPlacement
from parallel.config import ConfigError, Precision


def problems(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    for problem in caught.value.problems:
        assert "hydra.cc" not in problem and "full_key" not in problem and "HYDRA" not in problem
    return caught.value.problems


def test_load() -> None:
    config = load(
        ["+model=pre_ln_1b", "parallel=tp2_pp2", "parallel.precision=bf16", "optimizer.lr=3e-4"]
    )
    assert config.model.name == "pre_ln_1b"
    assert config.model.hidden_size == 2048  # from magneto_1b, which it builds on
    assert config.model.layer_norm_placement is LayerNormPlacement.pre_ln
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.parallel.precision is Precision.bf16
    assert config.optimizer.lr == 3e-4
    assert config.run_dir == "runs/pre_ln_1b"


def test_an_experiment_and_its_model_replaced() -> None:
    assert load(["+experiment=demo"]).model.name == "magneto_tiny"
    assert load(["+experiment=demo", "model=pre_ln_tiny"]).model.name == "pre_ln_tiny"


def test_ratios_of_families_need_no_plus() -> None:
    ratios = ["data.mixture.weighting=ratios", "data.mixture.ratios={slavic: 0.7, germanic: 0.3}"]
    mixture = load(["+model=magneto_tiny", *ratios]).data.mixture
    assert mixture.weighting is Weighting.ratios
    assert mixture.ratios == {"slavic": 0.7, "germanic": 0.3}
    normalized = [*ratios, "data.mixture.normalize=true", "data.mixture.ratios.romance=0.5"]
    more = load(["+model=magneto_tiny", *normalized])
    assert more.data.mixture.ratios["romance"] == 0.5


TINY = "+model=magneto_tiny"
CONFUSED = {
    # settings that do not exist, with and without the + that Hydra would advise
    ("parallel.tensor_parallel_size=2",): "there is no setting parallel.tensor_parallel_size; "
    "did you mean parallel.tensor_model_parallel_size",
    (TINY, "+parallel.tensor_parallel_size=2"): "there is no setting parallel.tensor_parallel_size",
    (TINY, "model.hiden_size=64"): "did you mean model.hidden_size?",
    ("train.step=5",): "train.step=5: there is no setting train.step; did you mean "
    "train.train_steps or profile.steps?",
    ("lr=1e-3",): "did you mean optimizer.lr?",
    ("seq_length=128",): "did you mean data.seq_length?",
    ("parralel.sequence_paralel=true",): "did you mean parallel.sequence_parallel?",
    ("modle=magneto_1b",): "did you mean +model",
    ("+experiment=demo", "+experiment=tiny_cpu"): "an experiment is chosen already; replace",
    (TINY, "+experiment=demo"): "replace it with model=magneto_tiny",
    (TINY, "sweep=laptop"): "python -m launch.sweep design takes files of conf/sweep",
    (TINY, "+sweep=laptop"): "python -m launch.sweep design takes files of conf/sweep",
    (TINY, "train.train_steps==5"): "one = is enough; write train.train_steps=5",
    (TINY, "data.mixture={weighting: uniform, foo: 1}"): "there is no setting data.mixture.foo; ma",
    (
        TINY,
        "data.mixture.stages=[{from_tokenz: 3}]",
    ): "in an entry of this list; did you mean from_tokens?",
    (TINY, "+foo.bar=1"): "+foo.bar=1: there is no setting foo.bar; magnetron-pretrain "
    "--cfg job prints all",
    ("hydra.foo=1",): "hydra.foo=1: there is no setting hydra.foo",
    # values that do not fit
    ("train.train_steps=abc",): "train.train_steps=abc must be a whole number",
    ("train.train_steps=1.5",): "train.train_steps=1.5 must be a whole number",
    ("train.train_steps=",): "train.train_steps= must be a whole number",
    ("train.train_steps=null",): "train.train_steps=null must be a whole number",
    ("train.train_steps={a: 1}",): "train.train_steps={a: 1} must be a whole number",
    ("data.seq_length=x",): "data.seq_length=x must be a whole number, or null",
    ("optimizer.lr=fast",): "optimizer.lr=fast must be a number",
    ("optimizer.lr=3e-4x",): "optimizer.lr=3e-4x must be a number",
    ("data.mixture.budget=300B",): "must be a number, or null; write "
    "data.mixture.budget=300000000000",
    ("train.train_steps=10,000",): "train.train_steps=10,000 is no number; write "
    "train.train_steps=10000",
    ("data.eod_token=<eos>",): "if the value is text, quote it: \"data.eod_token='<eos>'\"",
    ("parallel.sequence_parallel=maybe",): "parallel.sequence_parallel=maybe must be true or false",
    ("data.languages=en",): "data.languages=en must be a list, as in [a,b]",
    ("data.corpus=[a]",): "data.corpus=[a] must be text",
    (TINY, "data.mixture.ratios=3"): "data.mixture.ratios=3 must be a table",
    (TINY, "data.mixture.ratios.slavic=x"): "data.mixture.ratios.slavic=x must be a number",
    ("parallel.precision=bf17",): "parallel.precision=bf17 must be one of auto, fp32, bf16; "
    "did you mean bf16?",
    ("model.normalization=LayerNorm",): "did you mean layer_norm?",
    ("train=5",): "train is a group of settings: train.train_steps, ",
    ("hydra.job.chdir=x",): "hydra.job.chdir=x does not fit: Value 'x' is not a valid bool",
    (TINY, "run_dir=runs/${nope}"): "run_dir refers to ${nope}, which does not exist",
    (TINY, "model.num_layers=???"): "model.num_layers has no value",
    # groups
    ("model=magneto_1b",): "model=magneto_1b: no model is chosen yet that this could replace; "
    "write +model=magneto_1b",
    ("experiment=demo",): "write +experiment=demo",
    ("+model=magneto_1",): "+model=magneto_1: there is no conf/model/magneto_1.yaml; did you mean "
    "+model=magneto_1b",
    ("parallel=tp3",): "Choose from cp2, dp_overlap, ",
    ("+parallel=tp2",): "+parallel=tp2: a parallel is chosen already; replace it with parallel=tp2",
    ("+experiment=demo", "+model=magneto_1b"): "+model=magneto_1b: a model is chosen already; "
    "replace it with model=magneto_1b",
    # the words themselves
    ("foo",): "foo is not SETTING=VALUE as Hydra reads it: missing EQUAL",
    ("a=[1",): "a=[1 is not SETTING=VALUE as Hydra reads it",
    ("+train.train_steps=5",): "+train.train_steps=5 exists already; drop the +: "
    "train.train_steps=5",
    ("~train.train_steps",): "~train.train_steps: a setting cannot be taken away",
    ("train.train_steps=1,2",): "add --multirun for a sweep",
}


@pytest.mark.parametrize("overrides", CONFUSED, ids=" ".join)
def test_confused_words(overrides: tuple[str, ...]) -> None:
    told = problems(*overrides)
    assert len(told) == 1
    assert "\n" not in told[0]
    assert CONFUSED[overrides] in told[0]


FILES = {
    "typo": ("tensor_parallel_size: 2", "did you mean parallel.tensor_model_parallel_size"),
    "type": (
        "tensor_model_parallel_size: two",
        "parallel.tensor_model_parallel_size=two must be a whole number",
    ),
    "choice": ("precision: bf17", "parallel.precision=bf17 must be one of auto, fp32, bf16"),
    "list": ("- 1", "does not fit: Merge error"),
}


@pytest.mark.parametrize("name", FILES)
def test_confused_files(name: str, tmp_path: Path) -> None:
    content, words = FILES[name]
    (tmp_path / "parallel").mkdir()
    (tmp_path / f"parallel/{name}.yaml").write_text(content)
    (problem,) = problems(TINY, f"parallel={name}", f"hydra.searchpath=[file://{tmp_path}]")
    line = "" if name == "list" else " line 1"
    assert problem.startswith(f"parallel/{name}.yaml{line}: ")
    assert words in problem


def test_a_file_with_a_broken_defaults_list(tmp_path: Path) -> None:
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel/mine.yaml").write_text("defaults: [tp2pp2]")
    (problem,) = problems(TINY, "parallel=mine", f"hydra.searchpath=[file://{tmp_path}]")
    assert "there is no conf/parallel/tp2pp2.yaml; did you mean parallel=tp2_pp2" in problem


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel/mine.yaml").write_text("precision: [bf16\nfoo: {")
    (problem,) = problems(TINY, "parallel=mine", f"hydra.searchpath=[file://{tmp_path}]")
    assert "parallel/mine.yaml" in problem and "line 1" in problem


def test_no_model_lists_the_models() -> None:
    (problem,) = problems("train.train_steps=5")
    assert problem.startswith("no model is chosen; add +model=NAME, as in +model=magneto_1b.")
    for name in shipped_models():
        assert f"\n  {name} " in problem
    assert "1,209,094,144" in problem


def test_an_unknown_word_is_told_beside_the_missing_model() -> None:
    unknown, missing = problems("+modle=magneto_1b")
    assert "did you mean +model" in unknown
    assert missing.startswith("no model is chosen")


def test_rules_of_all_rooms_are_told_together() -> None:
    told = problems(
        TINY,
        "model.num_attention_heads=5",
        "parallel.sequence_parallel=true",
        "optimizer.lr=0",
        "data.validation_fraction=2",
        "train.train_steps=0",
        "checkpoint.keep_last=-1",
    )
    assert [line.partition("=")[0] for line in told] == [
        "model.num_attention_heads",
        "data.validation_fraction",
        "parallel.sequence_parallel",
        "optimizer.lr",
        "train.train_steps",
        "checkpoint.keep_last",
    ]


def test_explain_leaves_other_words_alone() -> None:
    assert explain(ConfigError("a", "b")).problems == ("a", "b")
    assert explain(ValueError("as it is")).problems == ("as it is",)


def test_explain_says_what_hydra_gives_no_words_for() -> None:
    """As around any error of OmegaConf that comes outside of a file and an override."""
    error = ConfigCompositionException()
    assert explain(error).problems == ("ConfigCompositionException",)
    error.__cause__ = OmegaConfBaseException("two\nlines")
    assert explain(error).problems == ("two lines",)


def test_shipped_models_are_those_hydra_composes() -> None:
    """The list reads the files itself, without Hydra: both must agree on every field."""
    for name, model in shipped_models().items():
        assert name == model.name
        assert OmegaConf.structured(model) == OmegaConf.structured(load([f"+model={name}"]).model)


def test_rules_across_rooms_are_told_together_with_those_of_the_classes() -> None:
    words = [TINY, "optimizer.lr=0", "parallel.pipeline_model_parallel_size=3", "train.seed=-1"]
    cfg = compose_what_fits(words).cfg
    assert cfg is not None
    with pytest.raises(ConfigError) as caught:
        validated(cfg, words, world_size=3)
    assert [line.partition("=")[0] for line in caught.value.problems] == [
        "optimizer.lr",
        "train.seed",
        "parallel.pipeline_model_parallel_size",
    ]


def test_sizes_of_nothing_are_told_once_and_break_nothing() -> None:
    words = [TINY, "parallel.tensor_model_parallel_size=0", "train.micro_batch_size=0"]
    cfg = compose_what_fits(words).cfg
    assert cfg is not None
    with pytest.raises(ConfigError) as caught:
        validated(cfg, words, world_size=1)
    assert caught.value.problems == (
        "parallel.tensor_model_parallel_size=0 must be 1 or more",
        "train.micro_batch_size=0 must be 1 or more",
    )


@pytest.mark.parametrize("word", ["parallel=2", "+model=true", "optimizer=[1]", "parallel=2,4"])
def test_a_group_given_what_is_no_name(word: str) -> None:
    (problem,) = nameless_choices([word, "parallel=tp2", "parallel={a:1}"]).values()
    assert problem.startswith(f"{word} names no file of conf/")
