"""In which line of a YAML file each of its keys stands.

Imports neither torch nor megatron-core.
"""

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]


def in_file(shown: str, path: Path, key: str) -> str:
    """Where a key of the file at `path` stands; without the line where it comes by a merge (<<)."""
    line = lines_of(path.read_text(encoding="utf-8")).get(key)
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
