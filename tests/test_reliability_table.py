"""Every fault that docs/reliability.md lists names the tests that make it happen."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def rows() -> list[tuple[str, list[str]]]:
    """Each fault, and what stands in its last column."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    table = page.partition("## Faults")[2].partition("\n\n")[2].partition("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return [(one[0], re.findall(r"`([^`]+)`", one[-1])) for one in cells if len(one) == 4]


def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_fault_has_tests_that_are_there() -> None:
    assert len(rows()) >= 20
    for fault, tests in rows():
        assert tests, fault
        for test in tests:
            file, _, name = test.partition("::")
            assert name in functions_of(ROOT / "tests" / file), (fault, test)
