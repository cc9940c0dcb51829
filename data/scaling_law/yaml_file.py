"""YAML that people read: numbers of one thing on one line. Written whole or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]


def write_yaml(path: str | Path, content: dict[str, Any], comment: str) -> None:
    """Write `content` under `comment`; `path` holds its old content or all of the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(f"# {line}\n" for line in comment.splitlines())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 shuts out the rest of the group
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_yaml(path: str | Path) -> Any:
    """What the file holds. Raises yaml.YAMLError for what is not YAML."""
    # libyaml's loader is several times as fast where PyYAML was built with it
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=loader)


class _Dumper(yaml.SafeDumper):
    """Lists of numbers on one line, mappings of numbers too; everything else in blocks."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        flat = all(isinstance(item, (int, float, str)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        values = list(mapping.values())
        flat = bool(values) and all(type(item) in (int, float) for item in values)
        return super().represent_mapping(tag, mapping, flow_style=flat)

    def ignore_aliases(self, data: Any) -> bool:
        return True
