"""A bad word about the cluster costs that word, and not the cluster."""

from pathlib import Path

import pytest

from launch.check import check
from launch.site_settings import cluster_that_fits
from launch.slurm import main
from parallel.config import ConfigError
from pretrain.walltime import walltime_seconds

WORDS = ["+model=magneto_tiny", "cluster=gpu8_infiniband", "nodes=2", "train.global_batch_size=16"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("cluster.walltime=24h", "cluster.walltime=24h must be [D-]HH:MM:SS, such as 23:30:00, or "
         "minutes, such as 90; write 24:00:00"),
        ("cluster.gpu_per_node=8", "cluster.gpu_per_node=8: there is no setting "
         "cluster.gpu_per_node; did you mean cluster.gpus_per_node"),
        ("cluster.gpus_per_node=many", "cluster.gpus_per_node=many must be a whole number"),
        ("cluster.exclusive=maybe", "cluster.exclusive=maybe must be true or false"),
        ("cluster.cpus_per_node=x", "cluster.cpus_per_node=x must be a whole number, or null"),
        ("cluster.walltime=90:00", "write 90:00:00, or 1:30:00 where minutes and seconds"),
        ("cluster.sbatch_arguments=[--nodes=9]", "'--nodes=9' is written by nodes=N; give it"),
        ("cluster.sbatch_arguments=[-t 9]", "'-t 9' is written by cluster.walltime; give it there"),
        ("cluster.partition", "cluster.partition is not SETTING=VALUE"),
    ],
)  # fmt: skip
def test_the_cluster_stays(word: str, says: str) -> None:
    report = check([*WORDS, word])
    assert report.processes == 16
    (error,) = report.of("error")
    assert says in error.text


def test_all_bad_words_are_told() -> None:
    words = ["gpu_per_node=8", "walltime=1d", "max_failures=0", "account=us"]
    cluster, problems = cluster_that_fits("gpu8_infiniband", words)
    assert cluster is not None and cluster.account == "us" and cluster.walltime == "1-00:00:00"
    assert [line.partition("=")[0] for line in problems] == [
        "cluster.gpu_per_node",
        "cluster.walltime",
        "cluster.max_failures",
    ]


def test_words_that_fit_only_together() -> None:
    words = ["processes_per_node=16", "gpus_per_node=16", "walltime=5x"]
    cluster, (problem,) = cluster_that_fits("gpu8_infiniband", words)
    assert cluster is not None and cluster.processes == 16
    assert problem.startswith("cluster.walltime=5x ")


def test_a_site_that_is_not_there_is_no_cluster() -> None:
    with pytest.raises(ConfigError, match="there is no"):
        cluster_that_fits("gpu9", [])


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("24h", "24:00:00"),
        ("90min", "1:30:00"),
        ("2d", "48:00:00"),
        ("1.5 hours", "1:30:00"),
        ("12h30m", "12:30:00"),
        ("45s", "0:00:45"),
        ("12:30", "12:30:00, or 0:12:30 where minutes and seconds were meant, as SLURM reads it"),
    ],
)
def test_a_time_with_a_unit(text: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"; write {meant}$"):
        walltime_seconds(text)


@pytest.mark.parametrize("text", ["soon", "h", "", "5x", "0h"])
def test_a_time_that_nobody_knows(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as 90$"):
        walltime_seconds(text)


def test_minutes_that_may_be_hours(capsys: pytest.CaptureFixture[str]) -> None:
    told = [one.text for one in check([*WORDS, "cluster.walltime=48"]).of("warning")]
    says = "cluster.walltime=48 is 48 minutes; if hours were meant: cluster.walltime=48:00:00"
    assert says in told
    assert not any(
        "minutes" in one.text for one in check([*WORDS, "cluster.walltime=90"]).of("warning")
    )
    assert main([*WORDS, "cluster.walltime=48"]) == 0
    assert f"warning: {says}" in capsys.readouterr().err


def test_all_of_a_sites_file_is_told(tmp_path: Path) -> None:
    site = tmp_path / "mine.yaml"
    site.write_text("partion: gpu\ngpus_per_node: eight\nmemory_per_node: 64GB\naccount: us\n")
    with pytest.raises(ConfigError) as caught:
        cluster_that_fits(str(site), [])
    told = "\n".join(caught.value.problems)
    for says in ("mine.yaml: there is no setting cluster.partion", "mine.yaml: gpus_per_node=eight"
                 " must be a whole number", "cluster.memory_per_node=64GB"):  # fmt: skip
        assert says in told
