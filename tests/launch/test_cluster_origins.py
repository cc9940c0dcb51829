"""Where each value of a job comes from, of all that a launch uses."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from launch.check import Machines, check
from launch.check_report import describe
from launch.cluster_origins import OF_OPTIONS
from launch.config import ClusterConfig
from launch.origins import COMMAND_LINE, DEFAULT
from launch.setting_names import settings

WORDS = ["+model=magneto_tiny", "train.global_batch_size=64", "nodes=2"]
# another value than the default's, of every setting of a site: as YAML, and as typed
OTHERS = {
    "partition": "gpu",
    "account": "llm",
    "qos": "high",
    "constraint": "a100",
    "walltime": '"2:00:00"',
    "gpus_per_node": "4",
    "gpu_type": "h100",
    "processes_per_node": "2",
    "cpus_per_node": "32",
    "memory_per_node": "480G",
    "exclusive": "true",
    "sbatch_arguments": "[--exclude=n7]",
    "setup": "[pwd]",
    "python": "/usr/bin/python3",
    "container": "apptainer",
    "srun_arguments": "[--mpi=none]",
    "max_requeues": "7",
    "max_failures": "8",
    "max_restarts": "9",
}
NAMES = [field.name for field in dataclasses.fields(ClusterConfig)]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A site's file with all of them, one a line, and a table of two entries at the end."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    lines = [f"{name}: {value}" for name, value in OTHERS.items()]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([*lines, "environment:", '  A: "1"', '  B: "2"', ""]))
    return path


def sources(words: list[str], machines: Machines | None = None) -> dict[str, str]:
    report = check([*WORDS, *words], machines)
    assert not [one for one in report.of("error") if one.topic == "slurm"], report.of("error")
    table = "\n".join(describe(report, everything=True))
    for origin in report.origins:
        row = rf"^  {re.escape(origin.setting)} .* {re.escape(origin.source)}$"
        assert re.search(row, table, re.MULTILINE), origin
    return {origin.setting: origin.source for origin in report.origins}


def typed() -> list[str]:
    return [f"cluster.{name}={value}" for name, value in OTHERS.items()]


def test_all_values_of_a_launch_are_told() -> None:
    assert {*OTHERS, "environment"} == {*NAMES}
    told = sources(["cluster=generic"])
    wanted = {*settings(), "nodes", "chain", "cluster", *(f"cluster.{name}" for name in NAMES)}
    assert {re.sub(r"(cluster\.environment)\..*", r"\1", name) for name in told} == wanted


def test_the_users_file_has_lines(site: Path) -> None:
    told = sources([f"cluster={site}"])
    lines = site.read_text().splitlines()
    for name in OTHERS:
        found = re.fullmatch(rf"{re.escape(str(site))} line (\d+)", told[f"cluster.{name}"])
        assert found, told[f"cluster.{name}"]
        assert lines[int(found[1]) - 1].startswith(f"{name}:")
    assert told["cluster.environment.A"] == f"{site} line {len(OTHERS) + 2}"


def test_a_shipped_file_and_the_defaults() -> None:
    told = sources(["cluster=gpu8_infiniband"])
    assert told["cluster.walltime"] == "conf/cluster/gpu8_infiniband.yaml line 2"
    assert told["cluster.max_requeues"] == DEFAULT
    assert (told["cluster"], told["nodes"], told["chain"]) == (COMMAND_LINE, COMMAND_LINE, DEFAULT)


def test_words_win_over_the_file(site: Path) -> None:
    words = [*typed(), "cluster.environment.B=3", "chain=2"]
    told = sources([f"cluster={site}", *words])
    for name in OTHERS:
        assert told[f"cluster.{name}"] == COMMAND_LINE, name
    assert told["cluster.environment.A"].startswith(str(site))
    assert told["cluster.environment.B"] == told["chain"] == COMMAND_LINE


def test_a_refused_word_is_no_origin(site: Path) -> None:
    report = check([*WORDS, f"cluster={site}", "cluster.max_failures=0"])
    told: dict[str, Any] = {one.setting: (one.value, one.source) for one in report.origins}
    assert told["cluster.max_failures"] == (8, f"{site} line 18")


def test_an_option_is_of_the_command_line() -> None:
    report = check(WORDS[:2], Machines(nodes=2, gpus_per_node=1))
    told = {one.setting: (one.value, one.source) for one in report.origins}
    assert told["nodes"] == (2, COMMAND_LINE)


def test_a_number_of_nodes_that_nobody_gave_or_that_follows() -> None:
    def nodes(words: list[str], machines: Machines) -> list[tuple[object, str]]:
        origins = check([*WORDS[:2], *words], machines).origins
        return [(one.value, one.source) for one in origins if one.setting == "nodes"]

    assert nodes([], Machines(processes=16)) == []
    assert nodes([], Machines(processes=16, gpus_per_node=8)) == [(2, OF_OPTIONS)]
    assert (1, COMMAND_LINE) not in nodes(["nodes=x"], Machines())


@pytest.mark.parametrize("text", ['environment: {<<: {A: "1"}, B: "2"}', "<<: {partition: gpu}"])
def test_values_that_a_site_merges_have_no_line(text: str, site: Path) -> None:
    site.write_text(f"gpus_per_node: 1\n{text}\n")
    told = {one.setting: one.source for one in check([*WORDS, "cluster=mine.yaml"]).origins}
    name = "environment.A" if "A" in text else "partition"
    assert told[f"cluster.{name}"] == str(site.name) or told[f"cluster.{name}"] == str(site)


@pytest.mark.parametrize("value", ["${nowhere}", "???"])
def test_a_site_that_refers_to_nothing(value: str, site: Path) -> None:
    site.write_text(f"gpus_per_node: 1\npartition: {value}\n")
    errors = [one.text for one in check([*WORDS, "cluster=mine.yaml"]).of("error")]
    assert [text for text in errors if f"partition={value} must be" in text], errors
