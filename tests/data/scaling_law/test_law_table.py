"""data.scaling_law.law_table: what is printed of a fitted law."""

from dataclasses import replace

from data.scaling_law.law_table import describe_law
from tests.data.scaling_law.test_mixture_table import GAMMA, LAW


def test_lines_that_differ_in_numbers_are_told_once() -> None:
    provenance = {
        "left_out": [
            *(f"run{i}, indic: loss=nan: the run failed or diverged" for i in range(7)),
            "best: its purpose is one of confirm",
        ],
        "warnings": [
            "run1, indic: 4.2 passes over its text",
            "run2, slavic: 1.7e+01 passes over its text",
            "slavic: alpha=3 stopped at the end of its range",
        ],
    }
    lines = describe_law(replace(LAW, provenance=provenance)).splitlines()
    assert lines[:5] == [
        "Left out",
        "  run0, indic: loss=nan: the run failed or diverged",
        "    the same: run1, indic; run2, indic; run3, indic; run4, indic and 2 more",
        "  best: its purpose is one of confirm",
        "",
    ]
    assert lines[-4:] == [
        "Doubts",
        "  run1, indic: 4.2 passes over its text",
        "    the same: run2, slavic",
        "  slavic: alpha=3 stopped at the end of its range",
    ]


def test_quality_and_parameters() -> None:
    quality = {name: {"rows": 12.0, "r2": 0.98765, "held_out_rms": 0.0123} for name in GAMMA}
    del quality["indic"]["held_out_rms"]
    text = describe_law(replace(LAW, quality=quality, fixed={"beta": 0.3}))
    lines = [line.split() for line in text.splitlines()]
    assert ["family", "losses", "R2", "held-out", "rms"] in lines
    assert ["germanic", "12", "0.9877", "0.0123"] in lines
    assert ["indic", "12", "0.9877", "-"] in lines
    assert "below them 90 % intervals; set, not fitted: beta=0.3" in text
    row = next(line for line in lines if line[:1] == ["slavic"] and len(line) == 7)
    assert row[-2:] == ["0.3", "0.1"]
    bare = describe_law(replace(LAW, bootstrap={}))
    assert "intervals" not in bare and ".." not in bare
    assert max(map(len, text.splitlines())) <= 100
