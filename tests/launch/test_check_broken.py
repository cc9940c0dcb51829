"""Each launch of broken_configs.yaml is told what is wrong with it, and sound ones are let pass."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from launch.check import Machines, check
from launch.check_report import Report
from launch.findings import ERROR
from launch.schema import load
from launch.setting_names import CONF
from parallel.config import ConfigError
from pretrain.config_rules import validate
from tests.launch.broken_files import SMALL, BrokenFiles, names_in

ENTRIES: list[dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("broken_configs.yaml").read_text("utf-8")
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> BrokenFiles:
    return BrokenFiles(tmp_path_factory.mktemp("broken"))


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At W&B; nor has this machine SLURM's commands."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)


def words_of(entry: dict[str, Any], files: BrokenFiles) -> list[str]:
    """The base and the entry's own words, which win."""
    own = entry["words"]
    if entry.get("alone"):
        return own
    base = [
        f"+model={entry.get('alone_model', 'magneto_tiny')}",
        "data.store_dir={stores}",
        "data.seq_length=64",
        "wandb.mode=disabled",
        "run_dir=fresh",
    ]
    if entry.get("needs") == "small":
        base = [*SMALL, "data.store_dir={stores}", "run_dir=fresh"]
    changed = {word.partition("=")[0] for word in own}
    words = [word for word in base if word.partition("=")[0] not in changed] + own
    return [filled(word, files) for word in words]


def filled(text: str, files: BrokenFiles) -> str:
    for name in names_in(text):
        text = text.replace(f"{{{name}}}", str(files.path(name)))
    return text


def look_at(entry: dict[str, Any], files: BrokenFiles) -> Report:
    folder = entry.get("config_dir")
    return check(
        words_of(entry, files),
        Machines(processes=entry.get("processes"), device=entry.get("device")),
        config_dir=str(files.path(folder)) if folder else None,
    )


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(
            entry,
            id=entry["spirit"].replace(" ", "-"),
            marks=[] if entry.get("fast") else [pytest.mark.slow],
        )
        for entry in ENTRIES
    ],
)
def test_broken(entry: dict[str, Any], files: BrokenFiles) -> None:
    report = look_at(entry, files)
    told = "\n".join(f"{one.severity}: {one.text}" for one in report.findings)
    wanted = [(entry.get("kind", ERROR), entry["says"])]
    wanted += [(None, pieces) for pieces in entry.get("also", [])]
    for kind, pieces in wanted:
        assert any(
            kind in (None, one.severity)
            and all(filled(piece, files) in one.text for piece in pieces)
            for one in report.findings
        ), f"{kind}: {pieces} is not among\n{told}"
    if entry.get("kind") == "warning":
        assert not report.of(ERROR), told


def test_all_slips_of_a_file_are_told_and_the_rest_of_it_counts(files: BrokenFiles) -> None:
    report = check(
        ["+model=magneto_tiny", "+experiment=slips"], config_dir=str(files.path("own_conf"))
    )
    slips = {
        "data.seq_len": "seq_len:",
        "train.train_stps": "train_stps:",
        "train.micro_batch_size": "micro_batch_size:",
        "optimizer.betas": "betas:",
        "schedule.lr_warmup_steps": "lr_warmup_steps:",
    }
    lines = (files.path("own_conf") / "experiment/slips.yaml").read_text().splitlines()
    told = [one.text for one in report.of(ERROR)]
    assert len(told) == len(slips), told
    for slip, text in zip(slips, told, strict=True):
        (number,) = (i for i, line in enumerate(lines, 1) if slips[slip] in line)
        assert text.startswith(f"experiment/slips.yaml line {number}: {slip}")
    assert report.processes == 2  # of the layout that the same file chooses


def test_a_file_without_a_value_that_did_not_fit_is_not_told_to_lack_it(files: BrokenFiles) -> None:
    report = check(["+model=slips"], config_dir=str(files.path("own_conf")))
    told = [one.text for one in report.of(ERROR)]
    assert [text.split(": ")[1].split("=")[0] for text in told] == [
        "model.num_layers",
        "model.ffn_size",
    ], told


@pytest.mark.parametrize(
    "words",
    [
        ["data.mixture.alpha=-1", "data.mixture.weighting=temperature"],
        ["data.mixture.max_epochs=0"],
        ["data.mixture.language_max_epochs={de: 0}"],
        ["data.mixture.weighting=unimax"],  # without budget and max_epochs
    ],
)
def test_a_broken_mixture_is_not_looked_into(words: list[str], files: BrokenFiles) -> None:
    report = check([*SMALL, f"data.store_dir={files.path('stores')}", *words])
    told = [one for one in report.findings if one.severity in (ERROR, "warning")]
    assert {one.topic for one in told} == {"settings"}, told


def test_there_are_as_many_as_the_page_says() -> None:
    assert len(ENTRIES) >= 100
    assert f"has {len(ENTRIES)} launches" in Path(CONF.parent, "docs", "check.md").read_text()
    spirits = [entry["spirit"] for entry in ENTRIES]
    assert len(set(spirits)) == len(spirits)


# ---- sound ones


def fewest_processes(model: str, layout: str) -> int | None:
    """On which the pair is legal; None where it is not, on any number."""
    report_of = load([f"+model={model}", f"parallel={layout}", "train.global_batch_size=64"])
    sizes = report_of.parallel
    replica = (
        sizes.tensor_model_parallel_size
        * sizes.context_parallel_size
        * sizes.pipeline_model_parallel_size
    )
    experts = sizes.expert_model_parallel_size * sizes.pipeline_model_parallel_size
    processes = max(replica, experts)
    try:
        validate(report_of, processes)
    except ConfigError:
        return None
    return processes


def assert_sound(report: Report) -> None:
    assert not report.of(ERROR), report.of(ERROR)
    # whether checkpoints of 70 B parameters fit is the disk's business
    assert not [one for one in report.of("warning") if one.topic not in ("disk", "memory")]


@pytest.mark.parametrize(
    ("model", "layout"),
    [("magneto_1b", "tp8_sp"), ("xmoe_7b_64e", "tp4_pp4_ep8"), ("magneto_6_7b", "tp8_pp8_vpp2")],
)
def test_a_sound_pair(model: str, layout: str, files: BrokenFiles) -> None:
    words = [f"+model={model}", f"parallel={layout}", "train.global_batch_size=64"]
    processes = fewest_processes(model, layout)
    data = [f"data.store_dir={files.path('stores')}", "data.seq_length=64"]
    assert_sound(check([*words, *data, "train.train_steps=10"], Machines(processes=processes)))


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_every_pair_that_is_legal_is_sound(model: str, files: BrokenFiles) -> None:
    legal = 0
    for path in sorted((CONF / "parallel").glob("*.yaml")):
        processes = fewest_processes(model, path.stem)
        if processes is None:
            continue
        legal += 1
        words = [f"+model={model}", f"parallel={path.stem}", "train.global_batch_size=64"]
        data = [f"data.store_dir={files.path('stores')}", "data.seq_length=64"]
        assert_sound(check([*words, *data, "train.train_steps=10"], Machines(processes=processes)))
    assert legal


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_is_sound(name: str) -> None:
    assert_sound(check([f"+experiment={name}"]))


@pytest.mark.parametrize("site", ["generic", "gpu8_infiniband", "lab"])
def test_every_site_is_sound(site: str, files: BrokenFiles) -> None:
    data = [f"data.store_dir={files.path('stores')}", "data.seq_length=64"]
    words = ["+model=magneto_tiny", f"cluster={site}", "nodes=2", "train.global_batch_size=16"]
    assert_sound(check([*words, *data, "train.train_steps=10"]))


def test_a_resume_is_sound(files: BrokenFiles) -> None:
    words = [*SMALL, f"data.store_dir={files.path('stores')}", f"run_dir={files.path('run')}"]
    report = check(words)
    assert_sound(report)
    assert any("goes on from" in one.text and "step 20" in one.text for one in report.findings)


def test_nothing_is_written(files: BrokenFiles, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "bin")
    check([*SMALL, f"data.store_dir={files.path('stores')}", "run_dir=fresh"])
    assert not list(tmp_path.iterdir())
