"""In which line of a YAML file each of its keys stands.

Imports neither torch nor megatron-core.
"""

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]


def in_file(shown: str, path: Path, *keys: str) -> str:
    """Where the first of `keys` that the file at `path` has stands in it; without the line where
    it comes by a merge (<<)."""
    lines = lines_of(path.read_text(encoding="utf-8"))
    line = next((lines[key] for key in keys if key in lines), None)
    return shown if line is None else f"{shown} line {line}"


def lines_of(text: str) -> dict[str, int]:
    """Key -> line, from 1, of all tables; a.b of a table in a table, a[0].b in a list."""
    found: dict[str, int] = {}

    def look(node: Any, name: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = f"{name}.{key.value}".lstrip(".")
                found[inner] = key.start_mark.line + 1
                look(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for place, value in enumerate(node.value):
                look(value, f"{name}[{place}]")

    look(yaml.compose(text), "")
    return found
