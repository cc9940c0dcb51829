"""Reading pickles of a checkpoint without running them; imports neither torch nor megatron-core.

A pickle names functions and has the reader call them: loading one from somebody else runs what they
wrote. Here a name is looked up in a table of inert stand-ins and nowhere else. Nothing that a file
names is ever imported or called.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO


class UnsafePickleError(ValueError):
    """A pickle names what no checkpoint has in it."""


class Record:
    """Stands for an object of a class that is not imported: `name`, `args`, and its `state`."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        made = object.__new__(cls)
        made.args, made.state, made.items = args, {}, []
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any
        self.items: list[Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Record:
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __repr__(self) -> str:
        return f"<{self.name}>"


def record_class(name: str) -> type[Record]:
    """An inert class that stands for the one called `name` in a pickle."""
    return type(name.rpartition(".")[2], (Record,), {"name": name})


# what plain values are made of beside the built-in types, which need no name
PLAIN: dict[str, Any] = {"collections.OrderedDict": OrderedDict}


def load(file: BinaryIO, where: str, allowed: Mapping[str, Any], *, tolerant: bool = False) -> Any:
    """The object pickled in `file`.

    Args:
        where: the file's name, for errors.
        allowed: full name in the pickle -> what stands for it here. `PLAIN` is always allowed.
        tolerant: give a `Record` for every other name, instead of an error.

    Raises:
        UnsafePickleError: it names something else; nothing was executed.
        ValueError: not a pickle, or cut off.
    """
    try:
        return _Unpickler(file, where, {**PLAIN, **allowed}, tolerant).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # damaged pickles raise almost anything
        raise ValueError(f"{where} is damaged: {type(error).__name__}: {error}") from error


def load_saved(file: Path | BinaryIO, where: str = "", *, tolerant: bool = False) -> Any:
    """The plain values in a file written by `torch.save`; tensors in it are `Record`s.

    where: the file's name, for errors; of a path it need not be given. Raises as `load`, and
    ValueError where torch.load might read something else in the file than what is read here.
    """
    where = where or str(file)
    try:
        with zipfile.ZipFile(file) as archive:
            content = _only_pickle(archive, where)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    return load(io.BytesIO(content), where, SAVED, tolerant=tolerant)


def _only_pickle(archive: zipfile.ZipFile, where: str) -> bytes:
    """Python looks for a zip archive at the end of a file and takes what is before it for no part
    of it; torch looks at the first bytes, has readers for other content, and ignores case."""
    assert archive.fp is not None
    archive.fp.seek(0)
    entries = archive.infolist()
    pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
    starts = archive.fp.read(len(ZIP_START)) == ZIP_START
    if (
        not starts
        or entries[:1] != [entry for entry in entries if entry.header_offset == 0]
        or [entry.filename.rpartition("/")[2] for entry in pickles] != ["data.pkl"]
        or archive.comment
    ):
        raise ValueError(f"{where} is damaged: no file of torch.save's")
    return archive.read(pickles[0])  # also compares the stored CRC-32


ZIP_START = b"PK\x03\x04"


# bytes of one element of torch's types, by their names
DTYPE_BYTES = {
    **{"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1},
    **{"float8_e4m3fn": 1, "float8_e5m2": 1},
}
_STORAGES = (
    *("Double", "Float", "BFloat16", "Half", "Long", "Int", "Short", "Char", "Byte", "Bool"),
    *("Untyped",),
)


# what torch.save pickles: plain values and tensors
SAVED: dict[str, Any] = {
    **{
        name: record_class(name)
        for name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
    },
    **{f"torch.{kind}Storage": record_class(kind) for kind in _STORAGES},
    **{f"torch.{name}": name for name in DTYPE_BYTES},
}


def torchs_reason(error: Exception) -> str:
    """Why torch.load(weights_only=True) did not read a file, in a line."""
    text = without_advice(error)
    return text.splitlines()[0] if text else type(error).__name__


def without_advice(error: BaseException) -> str:
    """What an error says; of torch.load's, which go on with how to load such a file all the same,
    only what is wrong with it."""
    text = str(error)
    if "weights_only" not in text:
        return text
    if named := re.search(r"\bGLOBAL ([\w.]+)", text):
        return f"it names {named[1]}, which weights do not need; nothing of it was executed"
    return "what is pickled in it are not weights alone; nothing of it was executed"


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, file: BinaryIO, where: str, allowed: Mapping[str, Any], tolerant: bool
    ) -> None:
        super().__init__(file)
        self._where, self._allowed, self._tolerant = where, allowed, tolerant

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._allowed:
            return self._allowed[full]
        if self._tolerant:
            return record_class(full)
        raise UnsafePickleError(
            f"{self._where} names {full}, which no checkpoint of ours has in it; nothing of it was "
            "executed. Do not load this file with anything else."
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid  # torch.save's references to storages
