"""launch.check as a command: what it prints and returns, and the parts it is made of."""

import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import launch.check
import launch.slurm
from data.open_mixture import DEMO_TOKENIZER
from data.tokenizer import load_tokenizer
from launch.check import Machines, check, main
from launch.check_disk import _present_bytes, checkpoint_bytes, kept_at_once
from launch.check_paths import path_of
from launch.composition import compose_what_fits
from launch.findings import ERROR, NOTE, WARNING, Findings
from launch.leaner_layout import _finer, leaner
from launch.nearest_layout import nearest_layout
from launch.origins import COMMAND_LINE, DEFAULT
from launch.schema import broken_rules_across_rooms, load
from launch.setting_names import CONF
from launch.units import number_meant
from parallel.checkpoint_reader import CheckpointReader
from pretrain.config import CheckpointConfig, TrainConfig
from pretrain.config_rules import validate
from tests.launch.broken_files import FAMILIES, SMALL, BrokenFiles
from tests.pretrain.laws import a_law

ROOT = Path(__file__).resolve().parents[2]
TINY = ["+model=magneto_tiny", "wandb.mode=disabled", "data.seq_length=64"]
# CPU seconds of the whole command, user and system, however busy the machine is; it takes 1.1
MOST_SECONDS = 2.0


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.store_dir={BrokenFiles(tmp_path_factory.mktemp('sound')).path('stores')}"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_imports_no_torch_and_is_quick(stores: str) -> None:
    words = [*TINY, stores, "train.train_steps=10", "parallel=tp2", "--device", "h100-80gb"]
    code = (
        "import sys; from launch.check import main; status = main(sys.argv[1:]); "
        "print('HEAVY', *(m for m in ('torch', 'megatron', 'wandb', 'matplotlib') "
        "if m in sys.modules)); sys.exit(status)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "HEAVY"
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < MOST_SECONDS


def test_exit_status(stores: str, capsys: pytest.CaptureFixture[str]) -> None:
    sound = [*TINY, stores, "train.train_steps=10"]
    warned = [*sound, "schedule.lr_warmup_steps=10"]
    assert main(sound) == 0
    assert main([*sound, "--strict"]) == 0
    assert main(warned) == 0
    assert main([*warned, "--strict"]) == 1
    assert main([*warned, "optimizer.lr=0", "--strict"]) == 2
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.count("sound: 0 errors, 0 warnings, in ") == 2
    assert told.out.count("sound: 0 errors, 1 warning, in ") == 2
    assert "NOT SOUND: 1 error, 1 warning, in " in told.out


def test_the_example_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    """What docs/check.md shows is what the command prints; the disk, the text and the time are of
    the machine it ran on."""
    text = (ROOT / "docs" / "check.md").read_text().split("## An example")[1]
    _, command, _, shown, *_ = text.split("```")
    words = command.replace("\\\n", " ").split()
    assert words[:3] == ["python", "-m", "launch.check"]
    assert main(words[3:]) == 2
    assert independent(capsys.readouterr().out) == independent(shown)


def independent(report: str) -> list[str]:
    lines, kept = [], True
    for line in report.strip().splitlines():
        if not line.startswith(" "):
            kept = re.match(r"\w+: +(disk|data): ", line) is None
        if kept:
            lines.append(re.sub(r", \d+ warnings?, in [\d.]+ s$", "", line))
    return lines


def test_the_commands_of_the_docs() -> None:
    text = (ROOT / "docs" / "check.md").read_text()
    commands = text.split("```")[1].strip().splitlines()
    for command in commands:
        assert main(command.split()[3:]) == 0
        assert command in (launch.check.__doc__ or "")
    assert len(commands) == 2


def test_a_law_and_a_run_it_does_not_speak_of(stores: str, tmp_path: Path) -> None:
    words = [*TINY, stores, "train.train_steps=10", f"data.mixture.law={tmp_path}/law.yaml"]
    beyond = f"data.mixture.law={tmp_path}/law.yaml is used outside of its fit: "

    def told(severity: str, *families: str, **data: list[object]) -> list[str]:
        law = a_law(families, tokens=(1e9, 1e10))
        law.provenance["data"] = data
        law.save(tmp_path / "law.yaml")
        return [finding.text for finding in check(words).of(severity)]

    drawn = FAMILIES.values()
    assert any("knows nothing of" in line for line in told(ERROR, "slavic"))
    found = [line for line in told(WARNING, *drawn, seq_length=[128]) if line.startswith(beyond)]
    assert any("seq_length=64: the runs of its sweep had 128" in line for line in found)
    assert any("tokens=5120: " in line for line in found)
    assert not any("seq_length" in line for line in told(WARNING, *drawn, seq_length=[64]))


@pytest.mark.parametrize("option", ["--processes", "--nodes", "--gpus-per-node"])
def test_no_number_of_processes(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, option, "0"])
    assert "0 must be a whole number, 1 or more, as in 8" in capsys.readouterr().err


def test_how_many_processes(stores: str) -> None:
    words = [*TINY, stores, "train.train_steps=10", "parallel=tp2_pp2"]
    assert check(words).processes == 4
    assert check(words, Machines(processes=8)).processes == 8
    assert check(words, Machines(nodes=2, gpus_per_node=4)).processes == 8
    assert (
        check(
            [*words, "nodes=2", "cluster=gpu8_infiniband", "train.global_batch_size=16"]
        ).processes
        == 16
    )


def test_json_has_settings_and_where_they_come_from(
    stores: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, stores, "parallel=tp2_pp2", "train.global_batch_size=3", "--processes", "8"]
    assert main([*words, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["sound"] is False and told["processes"] == 8
    (error,) = [one for one in told["findings"] if one["severity"] == ERROR]
    assert error["topic"] == "layout"
    assert error["settings"]["train.global_batch_size"] == {"value": 3, "from": COMMAND_LINE}
    assert error["settings"]["train.micro_batch_size"] == {"value": 1, "from": DEFAULT}
    layout = told["settings"]["parallel.pipeline_model_parallel_size"]
    assert layout == {"value": 2, "from": "conf/parallel/tp2_pp2.yaml"}


def test_what_is_printed(stores: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, stores, "parallel=tp2_pp2", "train.global_batch_size=3", "--processes", "8"]
    main(words)
    told = capsys.readouterr().out
    assert told.startswith("magneto_tiny on 8 processes (--processes)\nerror:   layout: train.glob")
    assert "         (train.micro_batch_size is the default)" in told
    assert re.search(r"parallel.pipeline_model_parallel_size +2 +conf/parallel/tp2_pp2.yaml", told)
    assert "adam_eps" not in told
    main([*words, "--provenance"])
    assert re.search(
        r"optimizer.adam_eps +1e-08 +conf/optimizer/adamw.yaml", capsys.readouterr().out
    )


# ---- where values come from


def test_origins(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "experiment").mkdir(parents=True)
    (mine / "experiment" / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /model: pre_ln_tiny\n  - override /parallel: tp2\n"
        "optimizer:\n  lr: 3e-4\ntrain:\n  train_steps: 77\n"
    )
    (tmp_path / "mix.yaml").write_text("weighting: uniform\n")
    hidden = [f"hydra.searchpath=['file://{mine}']"]
    words = ["+experiment=own", "train.train_steps=5", f"data/mixture={tmp_path / 'mix.yaml'}"]
    found = compose_what_fits(words, hidden)
    assert found.problems == [] and found.refused == []
    sources = {name: origin.source for name, origin in found.origins.items()}
    assert sources["train.train_steps"] == COMMAND_LINE
    assert sources["optimizer.lr"] == str(mine / "experiment" / "own.yaml")
    assert sources["optimizer.adam_beta2"] == "conf/optimizer/adamw.yaml"
    assert sources["model.layer_norm_placement"] == "conf/model/pre_ln_tiny.yaml"
    assert sources["model.num_layers"] == "conf/model/magneto_tiny.yaml"  # which that builds on
    assert sources["parallel.tensor_model_parallel_size"] == "conf/parallel/tp2.yaml"
    assert sources["data.mixture.weighting"] == str(tmp_path / "mix.yaml")
    assert sources["data.mixture.alpha"] == DEFAULT  # the file stands for all of the mixture
    assert sources["train.seed"] == DEFAULT
    assert found.typed("optimizer.lr") and not found.typed("train.seed")


def test_words_that_do_not_fit_leave_the_others_in() -> None:
    made = compose_what_fits(
        ["model=magneto_tiny", "train.steps=5", "optimizer.lr=x", "train.seed=7", "data/mixture=no"]
    )
    assert made.refused == [
        "data/mixture=no",
        "model=magneto_tiny",
        "train.steps=5",
        "optimizer.lr=x",
    ]
    assert made.words == ["+model=magneto_tiny", "train.seed=7"]  # what the error says to write
    assert made.cfg is not None and made.cfg.train.seed == 7 and made.cfg.model.num_layers == 4
    assert len(made.problems) == 4


def test_one_wrong_value_is_one_error() -> None:
    """No value is proposed for a setting that is right, to fit one that is wrong."""
    report = check(["+model=magneto_tiny", "optimizer.lr=-1", "train.train_steps=0"])
    told = [one.text for one in report.findings if one.severity != NOTE]
    assert told == [
        "optimizer.lr=-1.0 must be a finite number above 0",
        "train.train_steps=0 must be 1 or more",
    ]
    config = load(["+model=magneto_tiny", "schedule.min_lr=0.01"])
    broken = ["schedule.min_lr=0.01 must not exceed optimizer.lr=0.001; use 0.0001"]
    assert broken_rules_across_rooms(config, 1, []) == broken
    assert broken_rules_across_rooms(config, 1, ["optimizer.lr=0.001 must be"]) == []
    assert broken_rules_across_rooms(config, 1, ["there is no optimizer.lr=0.001"]) == broken


def test_the_table_has_what_was_typed_and_no_row_without_a_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main([*TINY, "run_dir=there/run"])
    assert re.search(r"\n  run_dir +there/run +command line\n", capsys.readouterr().out)
    main(["foo", "train.seed=3"])
    table = capsys.readouterr().out.split("left at their defaults:\n")[1].split("\n\n")[0]
    assert table.split() == ["train.seed", "3", "command", "line"]


def test_what_a_word_refers_to_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRATCH", raising=False)
    words = [*TINY, "run_dir='${oc.env:SCRATCH}/x'", "optimizer.lr=0"]
    first, second = (one.text for one in check(words).of(ERROR))
    assert first.startswith("run_dir='${oc.env:SCRATCH}/x': SCRATCH is not set in the environment")
    assert second.startswith("optimizer.lr=0.0 must be")
    monkeypatch.setenv("SCRATCH", "there")
    assert len(check(words).of(ERROR)) == 1


def test_refused_words_hide_nothing_else() -> None:
    words = [*TINY, "micro_batch_size=4", "train.micro_batch_size=0", "=5"]
    told = [one.text for one in check(words).of(ERROR)]
    assert any(text.startswith("train.micro_batch_size=0 must be") for text in told)
    assert any(text.startswith("micro_batch_size=4: there is no setting") for text in told)
    assert "=5 is not SETTING=VALUE: it names no setting" in told
    findings = Findings()
    findings.errors("a", ["run.lr=1 is", "lr=2 is", "x.run.lr=3 is"])
    findings.forget_about(["run.lr"], but=[])
    assert [one.text for one in findings.all] == ["lr=2 is", "x.run.lr=3 is"]


# ---- paths


@pytest.mark.parametrize("path", ["'~nosuchuser/x'", "a" * 300])
@pytest.mark.parametrize("setting", ["run_dir", "data.store_dir", "data.corpus", "checkpoint.load"])
def test_paths_that_cannot_be_looked_at(setting: str, path: str) -> None:
    if setting == "checkpoint.load" and "~" in path:
        return  # which a run does not expand
    errors = [one.text for one in check([*TINY, f"{setting}={path}"]).of(ERROR)]
    assert len(errors) == 1 and errors[0].startswith(f"{setting}={path.strip(chr(39))}: ")


def test_a_folder_that_may_not_be_entered() -> None:
    findings = Findings()
    with path_of("run_dir", "/a/b/c", findings):
        raise PermissionError(13, "Permission denied", "/a/b")
    (error,) = findings.all
    assert error.text == "run_dir=/a/b/c: Permission denied: /a/b; choose another path"


def test_files_that_vanish_take_no_room(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert _present_bytes(tmp_path) == 5
    assert _present_bytes(tmp_path / "nowhere") == 0


def test_a_file_system_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.check_disk.free_bytes", lambda path: 0)
    (error,) = check([*TINY, "run_dir=there"]).of(ERROR)
    assert error.text.startswith("run_dir=there: its file system has no room at all")


# ---- text that is not tokenized


def test_names_that_a_corpus_may_or_may_not_have(tmp_path: Path) -> None:
    line = json.dumps({"text": "Ein Satz.", "language": "de", "doc_id": "1"})
    (tmp_path / "text.jsonl").write_text(line + "\n")
    words = [*TINY, f"data.corpus={tmp_path}", f"data.cache_dir={tmp_path}/cache"]

    def told(*more: str) -> list[str]:
        report = check([*words, *more])
        assert not report.of(ERROR)
        return [one.text for one in report.of(WARNING)]

    assert told() == []  # a note says that it is not tokenized
    (looked,) = told("data.languages=[de]")
    assert looked.startswith(f"data.corpus={tmp_path}: 1 file of 0.0 MB; tokenized when the run")
    unknown, _ = told("data.languages=[grmn]")
    assert unknown.startswith("data.languages: language 'grmn' is not in") and "'de'" in unknown
    stage = "data.mixture.stages=[{from_tokens: 9, weighting: uniform, drop_languages: [frnch]}]"
    dropped, capped, _ = told(stage, "data.mixture.language_max_epochs={rssian: 2}")
    assert dropped.startswith("data.mixture.stages[0].drop_languages: language 'frnch'")
    assert capped.startswith("data.mixture.language_max_epochs: language 'rssian'")
    ratios = ["data.mixture.weighting=ratios", "data.mixture.ratios={slavik: 1.0}"]
    family, _ = told(*ratios)
    assert family.startswith(
        "data.mixture.ratios names slavik, which data.families=branch makes of"
    )
    assert family.endswith("; did you mean slavic?")
    assert any("names slavik" in text for text in told(*ratios, "data.families=five_families"))
    (error,) = check([*words, "data.families=brnch"]).of(ERROR)
    assert error.text.startswith("data.families=brnch: there is no such grouping")


def test_settings_for_the_text_that_ships() -> None:
    def told(*more: str) -> list[str]:
        cache = "data.cache_dir=nowhere"
        return [one.text for one in check([*TINY, cache, *more]).findings if one.topic == "data"]

    sound = told("data.languages=[de,ru]", "data.mixture.drop_languages=[ru]")
    assert len(sound) == 2 and sound[1].startswith("the text that ships is tokenized when")
    assert "zh-Hant; did you mean en?" in told("data.languages=[eng]")[1]
    assert (
        "is in one of its groups" in told("data.languages=[fi]", "data.families=five_families")[1]
    )
    assert (
        "leaves no language" in told("data.languages=[de]", "data.mixture.drop_languages=[de]")[1]
    )
    assert not any(
        "data.mixture.gamma lacks" in text for text in told("data.mixture.weighting=scaling_law")
    )  # that it is missing is told
    (left_out,) = [text for text in told("data.families=five_families") if "leaves out" in text]
    assert "fi" in left_out


@pytest.mark.parametrize(
    ("model", "words", "much"),
    [
        ("magneto_tiny", [], False),
        ("magneto_tiny", ["nodes=2"], True),
        ("magneto_125m", [], True),
        ("magneto_125m", ["data.corpus=mine"], False),
    ],
)
def test_much_ado_on_the_text_that_ships(
    model: str, words: list[str], much: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = "train.global_batch_size=16"
    typed = [f"+model={model}", batch, "cluster=gpu8_infiniband", *words]
    text = f"data.corpus and data.store_dir are empty: {model}, of "
    found = [one.severity for one in check(typed).findings if one.text.startswith(text)]
    assert found == [WARNING] * much
    assert launch.slurm.main(typed) == 0
    assert (f"\nwarning: {text}" in capsys.readouterr().err) == much


# ---- machines


@pytest.mark.parametrize(
    ("words", "machines", "says"),
    [
        ([], Machines(64, 3, 8), "--processes 64: --nodes 3 x --gpus-per-node 8 is 24 processes"),
        (["cluster=lab", "nodes=4"], Machines(16), "nodes=4 x the cluster's 1 a node is 4"),
        (["nodes=4"], Machines(12, 3), "--nodes 3 and nodes=4 say different things"),
        (["cluster=gpu8_infiniband"], Machines(None, None, 4), "--gpus-per-node 4 and the clu"),
        ([], Machines(10, None, 4), "--processes 10 must be a multiple of --gpus-per-node 4; use"),
        ([], Machines(9, 2), "--processes 9 must be a multiple of --nodes 2; use 10"),
    ],
)
def test_machines_that_contradict(words: list[str], machines: Machines, says: str) -> None:
    errors = [one.text for one in check([*TINY, *words], machines).of(ERROR)]
    assert any(says in text for text in errors), errors


def test_machines_that_agree(stores: str) -> None:
    words = [*TINY, stores, "train.train_steps=10", "train.global_batch_size=48"]
    for machines in (
        Machines(24, 3, 8),
        Machines(24, None, 8),
        Machines(24, 3),
        Machines(4, None, 8),
    ):
        assert not check(words, machines).of(ERROR)


@pytest.mark.parametrize(
    ("tensor", "machines", "says"),
    [
        (4, Machines(8, None, 2), "spans nodes of 2 processes, at the speed of the network; use 2"),
        (4, Machines(4, None, 1), "nodes of 1 process, at the speed of the network; use 1, and"),
        (4, Machines(None, 2, 6), "does not divide the 6 processes of a node"),
        (4, Machines(None, 2, 4), None),
        (4, Machines(8), None),
    ],
)
def test_tensor_ranks_on_several_nodes(tensor: int, machines: Machines, says: str | None) -> None:
    words = [*TINY, f"parallel.tensor_model_parallel_size={tensor}"]
    told = [one.text for one in check(words, machines).of(WARNING) if one.topic == "layout"]
    assert (says is None and told == []) or (says is not None and says in told[0])


def test_the_grace_time_is_of_nodes_that_are_known(stores: str) -> None:
    words = ["+model=magneto_70b", stores, "data.seq_length=64"]

    def told(machines: Machines) -> list[str]:
        findings = check(words, machines).of(WARNING)
        return [one.text for one in findings if "grace_seconds" in one.text]

    assert told(Machines(8)) == []
    assert "GB/s for 1 node; use" in told(Machines(8, 1))[0]
    assert "GB/s for 2 nodes; use" in told(Machines(8, 2))[0]


# ---- memory


def test_a_device_is_never_ignored() -> None:
    def told(*words: str, device: str) -> list[str]:
        found = check([*TINY, *words], Machines(device=device)).findings
        return [f"{one.severity}: {one.text}" for one in found if one.topic == "memory"]

    wrong = told("optimizer.lr=0", device="zzz")
    assert wrong[0].startswith("error: --device zzz: 'zzz' is no device memory")
    (why,) = told("optimizer.lr=0", device="80GiB")
    assert why.startswith(f"{NOTE}: memory is not predicted, because there are errors")
    (why,) = told("data.tokenizer='~nosuchuser/x'", device="80GiB")
    assert "because the vocabulary is not known" in why


@pytest.mark.parametrize(
    ("model", "words", "processes", "device", "says"),
    [
        (
            "magneto_13b",
            ["parallel.use_distributed_optimizer=false", "parallel=tp8_sp"],
            64,
            "20GiB",
            "with parallel.use_distributed_optimizer=true it would be",
        ),
        ("xmoe_7b_64e", [], 64, "h100-80gb", "parallel.expert_model_parallel_size="),
        ("magneto_13b", [], 64, "10GiB", "parallel.pipeline_model_parallel_size="),
        ("magneto_13b", [], 64, "2GiB", "none of the layouts tried is small enough on 64"),
    ],
)
def test_what_would_fit(
    model: str, words: list[str], processes: int, device: str, says: str
) -> None:
    small = ["data.seq_length=1024", "train.global_batch_size=64", "wandb.mode=disabled"]
    report = check([f"+model={model}", *small, *words], Machines(processes, device=device))
    (told,) = [one.text for one in report.of(WARNING) if one.topic == "memory"]
    assert says in told
    if "none of" in says:
        return
    proposed = told.rpartition(": with ")[2].partition(" it would be")[0].split()
    again = check(
        [f"+model={model}", *small, *words, *proposed], Machines(processes, device=device)
    )
    assert not again.of(ERROR)


def test_the_cheapest_change_comes_first() -> None:
    config = load(["+model=xmoe_7b_64e", "parallel.use_distributed_optimizer=false"])
    first = next(iter(leaner(config, 64)))
    assert first.parallel == replace(config.parallel, use_distributed_optimizer=True)
    sizes = _finer(config, 64)
    assert sizes[:3] == [(1, 1, 1), (1, 1, 2), (1, 1, 4)]
    assert (8, 2, 4) in sizes and max(tensor for tensor, _, _ in sizes) == 8


# ---- numbers


@pytest.mark.parametrize(
    ("setting", "text", "kind", "meant"),
    [
        ("data.mixture.budget", "300B", float, "write data.mixture.budget=300000000000"),
        ("data.mixture.budget", "1.5T", float, "write data.mixture.budget=1500000000000"),
        ("optimizer.weight_decay", "10%", float, "write optimizer.weight_decay=0.1"),
        ("train.train_steps", "1e4", int, "write train.train_steps=10000"),
        ("train.train_steps", "5k steps", int, None),
        ("train.train_steps", "5ksteps", int, "write train.train_steps=5000"),
        ("train.train_steps", "1,000", int, "write train.train_steps=1000"),
        ("train.train_steps", "1.5", int, None),
        (
            "train.train_steps",
            "0.5",
            int,
            "it counts steps: 0.5 of train.train_steps=10000 would be 5000",
        ),
        (
            "train.global_batch_size",
            "0.5",
            int,
            "it counts sequences and is no share of them",
        ),
        ("model.num_layers", "2h", int, "it counts whole things, not time"),
        (
            "checkpoint.save_interval",
            "2h",
            int,
            "it counts steps, not time",
        ),
        ("a.b_seconds", "1.5h", float, "it is in seconds: a.b_seconds=5400"),
        ("a.b_seconds", "01:00:30", float, "it is in seconds: a.b_seconds=3630"),
        ("a.b_seconds", "2d", float, "it is in seconds: a.b_seconds=172800"),
        ("a.b_seconds", "soon", float, None),
        ("wandb.project", "300B", str, None),
        ("train.train_steps", "1e999", int, None),
        ("train.train_steps", "-1e999", int, None),
        ("train.train_steps", "1e999h", int, None),
        ("a.b_seconds", "1e999h", float, None),
    ],
)
def test_numbers_that_were_meant(setting: str, text: str, kind: type, meant: str | None) -> None:
    told = number_meant(setting, text, (kind,))
    assert told is None if meant is None else told and told.split(", as in ")[0] == meant


# ---- layouts


@pytest.mark.parametrize(
    ("model", "words", "processes", "found"),
    [
        (
            "magneto_1b",
            ["parallel.tensor_model_parallel_size=3"],
            8,
            ["parallel.tensor_model_parallel_size=4"],
        ),
        (
            "magneto_1b",
            ["parallel.pipeline_model_parallel_size=5", "train.global_batch_size=16"],
            8,
            ["parallel.pipeline_model_parallel_size=4"],
        ),
        ("magneto_tiny", ["train.global_batch_size=10"], 8, ["train.global_batch_size=8"]),
        (
            "xmoe_tiny",
            ["parallel.tensor_model_parallel_size=2"],
            2,
            ["parallel.sequence_parallel=true"],
        ),
    ],
)
def test_the_nearest_layout(model: str, words: list[str], processes: int, found: list[str]) -> None:
    config = load([f"+model={model}", *words])
    assert nearest_layout(config, processes) == found
    better = load([f"+model={model}", *words, *found])
    assert validate(better, processes).world_size == processes


def test_no_layout_is_near() -> None:
    config = load(["+model=magneto_tiny", "data.packing.reset_attention=true"])
    parallel = replace(config.parallel, overlap_grad_reduce=False)
    # what no size can mend
    broken = replace(config, parallel=parallel, schedule=replace(config.schedule, min_lr=1.0))
    assert nearest_layout(broken, 8) == []


# ---- checkpoints and the disk


@pytest.mark.parametrize(
    ("steps", "checkpoint", "count"),
    [
        (1000, CheckpointConfig(save_interval=0), 1),
        (1000, CheckpointConfig(save_interval=500), 2),
        (10_000, CheckpointConfig(save_interval=500), 4),
        (10_000, CheckpointConfig(save_interval=500, keep_last=0), 20),
        (10_100, CheckpointConfig(save_interval=500, keep_last=0), 21),
        (10_000, CheckpointConfig(save_interval=500, keep_every=2500), 8),
        (10_000, CheckpointConfig(save_interval=500, keep_best=2), 6),
        (2000, CheckpointConfig(save_interval=500, keep_last=30), 4),
    ],
)
def test_how_many_checkpoints_lie_there_at_once(
    steps: int, checkpoint: CheckpointConfig, count: int
) -> None:
    config = load(["+model=magneto_tiny"])
    config = replace(config, checkpoint=checkpoint, train=TrainConfig(train_steps=steps))
    assert kept_at_once(config) == count


def test_what_a_rollback_goes_back_to_lies_there_as_well() -> None:
    config = load(["+model=magneto_tiny", "anomaly.on_spike=rollback"])
    config.train.train_steps, config.checkpoint.save_interval = 10_000, 500
    assert kept_at_once(config) == 5


def test_the_size_of_a_checkpoint_is_that_on_the_disk(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    files = BrokenFiles(tmp_path_factory.mktemp("sizes"))
    run = files.path("run")
    step = run / "checkpoints" / "step_00000020"
    # in files of this size headers count as well
    on_disk = sum(tensor.bytes for tensor in CheckpointReader(step).tensors.values())
    config = load([*SMALL, "parallel.precision=fp32"])
    predicted = checkpoint_bytes(config, load_tokenizer(DEMO_TOKENIZER).vocab_size)
    assert predicted == pytest.approx(on_disk, rel=0.01)


def test_whoever_reads_may_stop_reading() -> None:
    command = f"{sys.executable} -m launch.check +experiment=demo | true"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=CONF.parent)
    assert ended.stderr == ""
