"""What the commands have in common on their command lines."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARSERS = ("ArgumentParser", "words_parser", "stream_parser", "run_command")


def programs(path: Path) -> Iterator[str | None]:
    """What the usage line of each parser in a file begins with, and its errors; None: unsaid."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in PARSERS:
            named = [word.value for word in node.keywords if word.arg == "prog"]
            said = named if name == "ArgumentParser" else node.args[:1]
            yield said[0].value if said and isinstance(said[0], ast.Constant) else None


COMMANDS = [
    path
    for room in ("data", "launch")
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.name != "command_line.py" and list(programs(path))
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_usage_line_can_be_copied(path: Path) -> None:
    module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    assert set(programs(path)) == {f"python -m {module.removesuffix('.__main__')}"}


def test_all_commands_are_looked_at() -> None:
    assert {path.stem for path in COMMANDS} >= {"checkpoint", "export", "report", "replay", "plan"}
