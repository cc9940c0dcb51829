"""The matrix of layouts: which are tried, what is kept, and the page made of it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests import parity_matrix
from tests.parity import MODELS
from tests.parity_matrix import Trial, chosen, fingerprint, page, read

RIGHT = Trial("dense", "tp2 zero:on", 2, "s", {"losses": 2e-8, "gradients": 1.5e-6}, [])
WRONG = Trial("dense", "dp2 zero:on", 2, "s", {"losses": 1e-8, "gradients": 0.1}, ["gradients: w"])
ENDED = Trial("xmoe", "ep2 zero:on", 2, "s", {}, [], "failed on rank 1\nTraceback")


def test_the_page_has_the_worst_of_each_model_and_every_layout() -> None:
    lines = page([RIGHT, WRONG, ENDED], wanted=9).splitlines()
    assert "3 layouts tried of 9, 2 failed." in lines[7]
    assert "| dense | 2 | 1 | 2e-08 | - | 1e-01 | - | - |" in lines
    assert "| 2 | tp2 zero:on | 2e-08 | 2e-06 | - |  |" in lines
    assert "| 2 | dp2 zero:on | 1e-08 | 1e-01 | - | **FAIL** gradients: w |" in lines
    assert "| 2 | ep2 zero:on | - | - | - | **FAIL** failed on rank 1 |" in lines


def test_all_layouts_without_experts_and_all_sizes_with_them() -> None:
    dense = chosen("dense", 8)
    assert len(dense) == len({layout.name for layout in dense}) > 200
    sizes = ("tp", "sp", "pp", "vpp", "cp", "ep", "etp", "dp")
    some, every = chosen("xmoe", 4), chosen("xmoe", 4, every=True)
    assert len(some) < len(every) / 3
    assert {tuple(layout.values[axis] for axis in sizes) for layout in some} == {
        tuple(layout.values[axis] for axis in sizes) for layout in every
    }


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity_matrix, "LOG", tmp_path / "parity.jsonl")
    monkeypatch.setattr(parity_matrix, "PAGE", tmp_path / "parity.md")
    monkeypatch.setattr("sys.argv", ["", "--models", "dense", "--max-ranks", "1"])
    old = Trial("dense", "single zero:on", 1, "older source", {}, ["losses"])
    done = Trial("dense", "single zero:off", 1, fingerprint(), {"losses": 0.0}, [])
    (tmp_path / "parity.jsonl").write_text(
        "".join(json.dumps(asdict(trial)) + "\n" for trial in (old, done))
    )
    assert parity_matrix.main() == 0
    assert "3 layouts, of which 1 are known" in capsys.readouterr().out
    assert parity_matrix.main() == 0
    assert "3 layouts, of which 3 are known" in capsys.readouterr().out
    assert [trial.layout for trial in read(tmp_path / "parity.jsonl")][2:] == [
        "single zero:on",
        "single zero:overlap",
    ]
    assert "| dense | 3 | 0 |" in (tmp_path / "parity.md").read_text()


def test_unknown_models_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["", "--models", "sparse"])
    with pytest.raises(SystemExit):
        parity_matrix.main()
    assert f"--models: sparse; choose from {', '.join(MODELS)}" in capsys.readouterr().err
