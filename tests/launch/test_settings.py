"""docs/settings.md is what the settings' dataclasses say, and leaves nothing out."""

from pathlib import Path

from launch import settings
from launch.setting_names import settings as names

DOC = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def test_documentation_is_the_dataclasses() -> None:
    """Else: python -m launch.settings > docs/settings.md"""
    assert DOC.read_text() == settings.markdown()


def test_every_setting_is_there_and_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in settings.markdown().splitlines() if line[:3] == "| `"]
    assert {row[0].strip("| `") for row in rows} >= set(names())
    assert [row[0] for row in rows if len(row) != 4 or not row[3].strip("| ")] == []
