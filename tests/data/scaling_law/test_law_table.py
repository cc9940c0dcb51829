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
    assert "gamma alone" not in text
    bare = describe_law(replace(LAW, bootstrap={}))
    assert "intervals" not in bare and ".." not in bare
    assert max(map(len, text.splitlines())) <= 100


def test_gamma_alone_stands_beside_the_fitted_one() -> None:
    quality: dict[str, dict[str, float]] = {name: {"rows": 12.0} for name in GAMMA}
    quality["slavic"] |= {"gamma_alone": 0.09876, "gamma_alone_error": 0.00123}
    lines = describe_law(replace(LAW, quality=quality)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("gamma alone: the slope"))
    assert [line.split() for line in lines[start + 1 :]] == [
        ["family", "gamma", "std.", "error"],
        ["slavic", "0.09876", "0.0012"],
    ]


def test_held_out_errors_over_some_of_the_losses_say_so() -> None:
    quality = {name: {"rows": 12.0, "held_out_rows": 12.0} for name in GAMMA}
    assert "held-out errors are over" not in describe_law(replace(LAW, quality=quality))
    quality["slavic"]["held_out_rows"] = 9.0
    text = describe_law(replace(LAW, quality=quality))
    assert text.count("held-out errors are over") == 1
    assert "  slavic: held-out errors are over 9 of 12 losses, where the others" in text
