"""Every setting, its default and its line of meaning.

    python -m launch.settings > docs/settings.md

The meanings are the comments that stand with the fields of the settings' dataclasses. Imports
neither torch nor megatron-core.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from enum import Enum
from types import NoneType
from typing import Any

from pretrain.config import PretrainConfig

_HEAD = """\
# Every setting

Made by `python -m launch.settings > docs/settings.md` from the dataclasses that hold the settings;
edit those. Names are as on a command line. [configuration.md](configuration.md) says how they are
composed; `python -m launch.check ... --provenance` where the values of a launch come from.
"""


def markdown() -> str:
    """docs/settings.md."""
    lines = [_HEAD]
    for section, cls in _sections(PretrainConfig, ""):
        rows = list(_rows(section, cls))
        if not rows:
            continue
        lines += [f"## {section or 'The rest'}", ""]
        if said := _first_paragraph(cls):
            lines += [said, ""]
        lines += ["| setting | takes | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def meanings(cls: type) -> dict[str, str]:
    """Field -> the comment behind it, or else the lines of comment right above it."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    return {name: said for base in bases for name, said in _meanings(base).items()}


def _meanings(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        target = _target(node)
        if target:
            assert node.end_lineno is not None and node.end_col_offset is not None
            # ast counts columns in bytes
            behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            words = [behind.strip().removeprefix("#").strip()]
            if not words[0]:
                words = _block_above(lines, node.lineno - 1)
            found[target] = " ".join(words).strip().replace("None:", "null:")
    return found


def _target(node: ast.stmt) -> str:
    """The name that `name: type = value` or, in an Enum, `name = value` gives."""
    named: ast.expr | None = node.target if isinstance(node, ast.AnnAssign) else None
    if isinstance(node, ast.Assign):
        named = node.targets[0]
    return named.id if isinstance(named, ast.Name) else ""


def _block_above(lines: list[str], index: int) -> list[str]:
    block: list[str] = []
    while index > 0 and (line := lines[index - 1].strip()).startswith("#"):
        block.insert(0, line.removeprefix("#").strip())
        index -= 1
    return block


def _sections(cls: type, prefix: str) -> Iterator[tuple[str, type]]:
    yield prefix, cls
    for name, annotation in typing.get_type_hints(cls).items():
        if of_list := [a for a in typing.get_args(annotation) if dataclasses.is_dataclass(a)]:
            yield f"{prefix}.{name}[]", typing.cast(type, of_list[0])
        if dataclasses.is_dataclass(annotation):
            yield from _sections(typing.cast(type, annotation), f"{prefix}.{name}".strip("."))


def _rows(section: str, cls: Any) -> Iterator[str]:
    hints, said = typing.get_type_hints(cls), meanings(cls)
    for one in dataclasses.fields(cls):
        annotation = hints[one.name]
        if dataclasses.is_dataclass(annotation):
            continue
        name = f"{section}.{one.name}".strip(".")
        meaning = said[one.name] or _first_paragraph(_plain(annotation))
        cells = (f"`{name}`", _takes(annotation), f"`{_default(one)}`", meaning)
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _plain(annotation: Any) -> Any:
    """int of int | None."""
    options = [option for option in typing.get_args(annotation) if option is not NoneType]
    return options[0] if NoneType in typing.get_args(annotation) else annotation


def _takes(annotation: Any) -> str:
    kind = _plain(annotation)
    if isinstance(kind, type) and issubclass(kind, Enum):
        said = _meanings(kind)
        return "<br>".join(f"`{m}`{f': {said[m]}' * bool(said[m])}" for m in kind.__members__)
    words = {int: "whole number", float: "number", bool: "true, false", str: "text"}
    words |= {list: "list", dict: "table"}
    optional = ", null" if kind is not annotation else ""
    return words[typing.get_origin(kind) or kind] + optional


def _default(one: Any) -> str:
    if one.default is not dataclasses.MISSING:
        value = one.default
    elif one.default_factory is not dataclasses.MISSING:
        value = one.default_factory()
    else:
        return "(must be given)"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool | NoneType):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def _first_paragraph(cls: type) -> str:
    text = cls.__dict__.get("__doc__") or ""
    if text.startswith(f"{cls.__name__}("):  # the dataclass decorator's
        return ""
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())


if __name__ == "__main__":
    print(markdown(), end="")
